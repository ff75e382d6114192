"""The members of a tar, from headers that are checked in full: a damaged archive is an error with its place, never a shorter list.

Python's tarfile takes a damaged header for the end of the archive, and would lose the rest without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

BLOCK = 512  # bytes
_MAX_EXTENSION_BYTES = 1 << 20  # of a long name or a PAX header
_MAX_PADDING_BYTES = 1 << 20  # after the end; GNU tar's largest usual record
_USUAL_PADDING_BYTES = 20 * 1024  # of the usual record of 10 KiB at most one, and the two blocks of the end
_OCTAL_LIMIT = 8**11  # sizes from here on do not fit into the eleven digits of a header
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip --keep"),
    b"BZh": ("bzip2", "bunzip2 --keep"),
    b"\xfd7zXZ": ("xz", "unxz --keep"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
_LINKS_AND_DEVICES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a pipe",
    b"S": "a sparse file",
    b"D": "a directory dump",
    b"M": "a part of a file in another volume",
    b"V": "a volume label",
}


class TarError(Exception):
    """The archive is damaged or no tar: the text says what is wrong and at which byte."""

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(f"{reason} (byte {offset})")
        self.offset = offset


@dataclass(frozen=True)
class Member:
    """A regular file in a tar. The name is a label and never a path: it may be absolute or lead upwards."""

    name: str
    offset: int  # of the file's bytes
    size: int  # bytes
    header_offset: int = -1  # of the first header that belongs to it


@dataclass
class TarListing:
    """What a tar holds."""

    members: list[Member] = field(default_factory=list)
    refused: list[tuple[int, str, str]] = field(default_factory=list)  # header's offset, name and reason
    warnings: list[str] = field(default_factory=list)
    has_end: bool = True  # whether it ends as tars do, so that nothing at its end can be missing
    end: int = 0  # the byte behind the last member, where all that is missing would begin


@dataclass
class _Overrides:
    # What extension headers say about the next member.
    start: int = -1
    name: bytes | None = None
    size: int | None = None
    is_sparse: bool = False


def list_members(read: Callable[[int, int], bytes], size: int, *, name: str = "the file") -> TarListing:
    """Walks over all headers of a tar of `size` bytes; `read(offset, size)` gives its bytes. Raises TarError.

    Directories are passed over; links, devices and sparse files are listed as refused. `name` goes into the remedy of an error.
    """
    _refuse_other_files(read(0, BLOCK), size, name)
    listing = TarListing()
    overrides = _Overrides()
    offset = 0
    while True:
        header = read(offset, BLOCK)
        if not header:
            _check_pending(overrides, offset)
            listing.end, listing.has_end = offset, False
            listing.warnings.append(f"no end-of-archive blocks: it may be cut (byte {offset})")
            return listing
        if len(header) < BLOCK:
            raise TarError(f"cut in the middle of a header: {len(header)} of {BLOCK} bytes are left", offset)
        if not any(header):
            _check_pending(overrides, offset)
            _check_end(read, offset, size, listing)
            return listing
        _check_header(header, offset)
        kind = header[156:157]
        header_size = _number(header[124:136], "size", offset)
        data = offset + BLOCK
        if kind in (b"x", b"g", b"L", b"K"):
            content = _extension(read, data, header_size, size, offset)
            if kind != b"g" and overrides.start < 0:
                overrides.start = offset
            _apply_extension(kind, content, overrides, offset)
            offset = data + _padded(header_size)
            continue
        start = overrides.start if overrides.start >= 0 else offset
        raw_name = _header_name(header) if overrides.name is None else overrides.name
        member_size = _member_size(header_size, overrides, offset)
        is_folder = kind == b"5" or raw_name.endswith(b"/")
        if is_folder or kind in (b"1", b"2", b"3", b"4", b"6"):
            member_size = 0  # these have no bytes, whatever the field says: as all tar programs have it
        if kind == b"S":
            data = _after_sparse_map(read, header, data)
        if data + member_size > size:
            missing = data + member_size - size
            raise TarError(
                f"cut in the middle of {_shown(raw_name)}: {missing} of its {member_size} bytes are missing", offset
            )
        _take(listing, raw_name, kind, Member("", data, member_size, start), overrides.is_sparse, is_folder)
        offset = data + _padded(member_size)
        if offset > size:
            raise TarError(f"cut in the padding after {_shown(raw_name)}", size)
        overrides = _Overrides()


def _refuse_other_files(start: bytes, size: int, name: str) -> None:
    if size == 0:
        raise TarError("empty: 0 bytes", 0)
    for magic, (kind, command) in _COMPRESSED.items():
        if start.startswith(magic):
            raise TarError(
                f"compressed with {kind}, so nothing in it can be read by its place; run: {command} {name}", 0
            )
    if len(start) < BLOCK or (any(start) and not _has_valid_checksum(start)):
        raise TarError(f"not a tar, or its first header is damaged: it starts with {start[:16]!r}", 0)


def _check_header(header: bytes, offset: int) -> None:
    if not _has_valid_checksum(header):
        raise TarError("damaged header: its checksum does not fit", offset)
    # POSIX, GNU and the old format, which has nothing there.
    if header[257:265] not in (b"ustar\x0000", b"ustar  \x00") and any(header[257:263]):
        raise TarError(f"unknown tar format {header[257:265]!r}", offset)


def _has_valid_checksum(header: bytes) -> bool:
    try:
        claimed = int(header[148:156].strip(b" \x00"), 8)
    except ValueError:
        return False
    rest = header[:148] + b" " * 8 + header[156:]
    # Some old programs summed signed characters.
    return claimed == sum(rest) or claimed == sum(byte - 256 if byte > 127 else byte for byte in rest)


def _number(digits: bytes, what: str, offset: int) -> int:
    if digits[0] == 0x80:  # GNU's binary form for large numbers
        return int.from_bytes(digits[1:], "big")
    text = digits.strip(b" \x00")
    if not text:
        return 0
    if not all(byte in b"01234567" for byte in text):
        raise TarError(f"the {what} in the header is {digits!r}, which is no octal number", offset)
    return int(text, 8)


def _header_name(header: bytes) -> bytes:
    name = header[:100].split(b"\x00")[0]
    prefix = header[345:500].split(b"\x00")[0] if header[257:263] == b"ustar\x00" else b""
    return prefix + b"/" + name if prefix else name


def _member_size(header_size: int, overrides: _Overrides, offset: int) -> int:
    # Only the header is protected by a checksum. A PAX size may say what does not fit there, and nothing else.
    if overrides.size is None or overrides.size == header_size:
        return header_size
    if overrides.size < _OCTAL_LIMIT:
        raise TarError(
            f"two sizes for one member: {header_size} in its header, {overrides.size} in PAX records", offset
        )
    return overrides.size


def _extension(read: Callable[[int, int], bytes], data: int, length: int, size: int, offset: int) -> bytes:
    if length > _MAX_EXTENSION_BYTES:
        raise TarError(f"a name or PAX header of {length} bytes is larger than {_MAX_EXTENSION_BYTES}", offset)
    if data + _padded(length) > size:
        raise TarError("cut in the middle of a long name or PAX header", offset)
    return read(data, length)


def _apply_extension(kind: bytes, content: bytes, overrides: _Overrides, offset: int) -> None:
    if kind == b"L":
        overrides.name = content.split(b"\x00")[0]
    elif kind in (b"x", b"g"):
        records = _pax_records(content, offset)
        if any(keyword.startswith(b"GNU.sparse.") for keyword in records):
            overrides.is_sparse = True
        if kind == b"g":  # for all that follow: dates and comments are common (git archive), these two make no sense
            if b"path" in records or b"size" in records:
                raise TarError("a global PAX header gives all members one name or size", offset)
            return
        if b"path" in records:
            overrides.name = records[b"path"]
        if b"size" in records:
            if not records[b"size"].isdigit():
                raise TarError(f"the size in PAX records is {records[b'size'][:32]!r}", offset)
            overrides.size = int(records[b"size"])


def _pax_records(content: bytes, offset: int) -> dict[bytes, bytes]:
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(content):
        digits, space, _ = content[position : position + 8].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        record = content[position : position + length]
        keyword, equals, value = record[len(digits) + 1 :].partition(b"=")
        if len(record) != length or not record.endswith(b"\n") or not equals:
            raise TarError("damaged PAX records", offset)
        records[keyword] = value[:-1]
        position += length
    return records


def _check_pending(overrides: _Overrides, offset: int) -> None:
    if overrides.start >= 0:
        raise TarError("cut between a long name or PAX header and its member", offset)


def _check_end(read: Callable[[int, int], bytes], offset: int, size: int, listing: TarListing) -> None:
    after = read(offset + BLOCK, _MAX_PADDING_BYTES)
    if any(after) or size > offset + BLOCK + _MAX_PADDING_BYTES:
        # Tars joined end to end: every common reader would lose the second one silently.
        raise TarError("something follows the end-of-archive blocks: joined tars, or damage", offset)
    listing.end = offset
    if len(after) < BLOCK:
        listing.has_end = False
        listing.warnings.append(f"only one end-of-archive block: it may be cut (byte {offset})")
    elif len(after) > _USUAL_PADDING_BYTES:
        # So a download looks that broke off in a file whose room was taken before.
        listing.has_end = False
        listing.warnings.append(f"{size - offset} bytes of zeros at its end: the rest may be lost (byte {offset})")


def _take(listing: TarListing, raw_name: bytes, kind: bytes, member: Member, is_sparse: bool, is_folder: bool) -> None:
    if is_sparse or kind in _LINKS_AND_DEVICES:
        what = "a sparse file" if is_sparse else _LINKS_AND_DEVICES[kind]
        listing.refused.append((member.header_offset, _shown(raw_name), f"not a regular file: {what}"))
        return
    if is_folder:
        return
    if kind not in (b"0", b"\x00", b"7"):
        listing.refused.append((member.header_offset, _shown(raw_name), f"not a regular file: of type {kind!r}"))
        return
    try:
        name = raw_name.decode("utf-8")
    except UnicodeDecodeError:
        listing.refused.append((member.header_offset, _shown(raw_name), "the name is not UTF-8"))
        return
    if not name.isprintable():
        listing.refused.append((member.header_offset, _shown(raw_name), "the name has control characters"))
        return
    listing.members.append(Member(name, member.offset, member.size, member.header_offset))


def _after_sparse_map(read: Callable[[int, int], bytes], header: bytes, data: int) -> int:
    # GNU's old form keeps the rest of the map of holes in blocks of its own, each of which says whether another follows.
    is_continued = header[482]
    while is_continued:
        block = read(data, BLOCK)
        if len(block) < BLOCK:
            raise TarError("cut in the map of a sparse file", data)
        is_continued = block[504]
        data += BLOCK
    return data


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _shown(name: bytes) -> str:
    text = name.decode("utf-8", errors="replace")
    return "".join(c if c.isprintable() else "?" for c in text)[:200]
