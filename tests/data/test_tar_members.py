"""A tar is read in full or refused with the place of its damage: never a shorter list without a word."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from typing import Any

import pytest

from muybridge.data.tar_members import BLOCK, TarError, TarListing, list_members

FILES = {"a.mp4": b"A" * 700, "a.txt": b"a cat", "deep/b.mp4": b"B" * 512, "deep/b.txt": b"a dog"}


def make_tar(files: dict[str, bytes] = FILES, *, format: int = tarfile.USTAR_FORMAT, **fields: Any) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def listing(data: bytes, size: int | None = None) -> TarListing:
    return list_members(lambda offset, count: data[offset : offset + count], len(data) if size is None else size)


def found(data: bytes) -> dict[str, bytes]:
    return {member.name: data[member.offset : member.offset + member.size] for member in listing(data).members}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_all_formats_are_found(format: int) -> None:
    long = {f"{'folder/' * 20}{'n' * 90}.mp4": b"long", "ü/走る猫.txt": "猫".encode()}
    if format == tarfile.USTAR_FORMAT:
        long.pop("ü/走る猫.txt")  # such a name is no ASCII, which this format leaves open
    data = make_tar({**FILES, **long}, format=format)
    assert found(data) == {**FILES, **long}
    assert listing(data).warnings == []
    assert listing(data).has_end


def test_sizes_beyond_eight_gigabytes_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 9 * 2**30
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("big.mp4")
        info.size = size
        header = info.tobuf(format=format)
        total = len(header) + size + 1024

        def read(offset: int, count: int, header: bytes = header, total: int = total) -> bytes:
            return header[offset : offset + count].ljust(min(count, total - offset), b"\0")

        [member] = list_members(read, total).members
        assert (member.size, member.offset) == (size, len(header))


def test_every_cut_is_noticed() -> None:
    data = make_tar()
    whole = [(member.name, member.offset) for member in listing(data).members]
    end = max(member.offset + member.size for member in listing(data).members)
    kinds = set()
    for cut in range(0, len(data), BLOCK):
        try:
            seen = listing(data[:cut])
        except TarError:
            kinds.add("error")
            continue
        if seen.has_end:  # only padding is gone
            assert cut >= end + 2 * BLOCK
            assert [(member.name, member.offset) for member in seen.members] == whole
        else:
            assert "it may be cut" in seen.warnings[0]
            kinds.add("warning")
    assert kinds == {"error", "warning"}


def test_cuts_within_a_block_are_noticed_too() -> None:
    data = make_tar()
    end = max(member.offset + member.size for member in listing(data).members)
    for cut in range(1, end, 37):
        if cut % BLOCK:
            with pytest.raises(TarError, match=r"cut in the|not a tar"):
                listing(data[:cut])


def test_a_cut_says_what_is_missing() -> None:
    with pytest.raises(TarError, match=r"cut in the middle of a\.mp4: 600 of its 700 bytes are missing \(byte 0\)"):
        listing(make_tar()[: BLOCK + 100])
    with pytest.raises(TarError, match=r"cut in the padding after a\.mp4 \(byte 1300\)"):
        listing(make_tar()[:1300])
    with pytest.raises(TarError, match=r"cut in the middle of a header: 100 of 512 bytes are left \(byte 1536\)"):
        listing(make_tar()[:1636])


def test_every_flipped_bit_of_a_header_is_noticed() -> None:
    data = make_tar({"a.mp4": b"A" * 700, "b.mp4": b"B"})
    place = 3 * BLOCK  # the second header
    for bit in range(BLOCK * 8):
        broken = bytearray(data)
        broken[place + bit // 8] ^= 1 << bit % 8
        try:
            names = list(found(bytes(broken)).items())
        except TarError as caught:
            error = str(caught)
        else:  # blanks around the checksum's digits
            assert names == [("a.mp4", b"A" * 700), ("b.mp4", b"B")]
            assert 148 <= bit // 8 < 156
            continue
        assert f"(byte {place})" in error


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"empty: 0 bytes \(byte 0\)"),
        (b"<html>404</html>", r"not a tar, .* starts with b'<html>404"),
        (b"<html>404</html>" * 100, r"not a tar, .* starts with b'<html>404"),
        (gzip.compress(make_tar()), r"compressed with gzip, .* run: gunzip --keep some\.tar \(byte 0\)"),
        (bz2.compress(make_tar()), "compressed with bzip2, .* run: bunzip2 --keep"),
        (lzma.compress(make_tar()), "compressed with xz, .* run: unxz --keep"),
        (make_tar() + make_tar(), r"something follows the end-of-archive blocks: joined tars, or damage \(byte 4608\)"),
    ],
)
def test_other_files_are_refused_with_what_they_are(data: bytes, reason: str) -> None:
    with pytest.raises(TarError, match=reason):
        list_members(lambda offset, count: data[offset : offset + count], len(data), name="some.tar")


def test_a_hole_of_zeros_is_not_the_end() -> None:
    data = bytearray(make_tar())
    data[3 * BLOCK : 4 * BLOCK] = bytes(BLOCK)  # the second header
    with pytest.raises(TarError, match=r"something follows .* \(byte 1536\)"):
        listing(bytes(data))


def test_missing_end_blocks_are_a_warning() -> None:
    data = make_tar()
    end = 4608
    assert found(data[:end]) == FILES
    assert listing(data[:end]).warnings == [f"no end-of-archive blocks: it may be cut (byte {end})"]
    assert listing(data[: end + BLOCK]).warnings == [f"only one end-of-archive block: it may be cut (byte {end})"]
    assert listing(data[: end + 2 * BLOCK]).warnings == []


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a character device"),
        (tarfile.BLKTYPE, "a block device"),
        (tarfile.FIFOTYPE, "a pipe"),
    ],
)
def test_links_and_devices_are_refused_and_the_rest_is_read(kind: bytes, what: str) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        odd = tarfile.TarInfo("odd.mp4")
        odd.type, odd.linkname = kind, "/etc/passwd"
        tar.addfile(odd)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        plain = tarfile.TarInfo("b.mp4")
        plain.size = 3
        tar.addfile(plain, io.BytesIO(b"abc"))
    assert found(file.getvalue()) == {"b.mp4": b"abc"}
    assert listing(file.getvalue()).refused == [(0, "odd.mp4", f"not a regular file: {what}")]


def test_sparse_files_are_refused_in_both_forms() -> None:
    pax = make_tar({"holes.mp4": b"xyz"}, format=tarfile.PAX_FORMAT, pax_headers={"GNU.sparse.major": "1"})
    assert listing(pax).refused == [(0, "holes.mp4", "not a regular file: a sparse file")]
    assert listing(pax).members == []
    # GNU's old form: the header says that a block of the map follows, which is not part of the size.
    header = bytearray(make_tar({"holes.mp4": b"xyz"})[:BLOCK])
    header[156:157], header[482] = b"S", 1
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    old = bytes(header) + bytes(BLOCK) + b"xyz".ljust(BLOCK, b"\0") + make_tar({"b.mp4": b"B"})
    assert listing(old).refused == [(0, "holes.mp4", "not a regular file: a sparse file")]
    assert found(old) == {"b.mp4": b"B"}


def test_names_that_lead_elsewhere_are_only_names() -> None:
    names = ["../../etc/x.mp4", "/abs/y.mp4", "./z.mp4"]
    assert list(found(make_tar(dict.fromkeys(names, b"x")))) == names


def test_names_that_are_no_text_are_refused() -> None:
    data = make_tar({b"caf\xe9.mp4".decode("latin-1"): b"x", "b\n.mp4": b"y"}, format=tarfile.USTAR_FORMAT)
    latin = data.replace("café".encode(), "café".encode("latin-1"))
    assert listing(data).members[0].name == "café.mp4"
    header = bytearray(data[:BLOCK])
    header[:100] = b"caf\xe9.mp4".ljust(100, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    latin = bytes(header) + data[BLOCK:]
    reasons = [reason for _, _, reason in listing(latin).refused]
    assert reasons == ["the name is not UTF-8", "the name has control characters"]


def test_a_pax_size_may_not_contradict_the_header() -> None:
    data = make_tar({"a.mp4": b"A" * 600, "b.mp4": b"B"}, format=tarfile.PAX_FORMAT, pax_headers={"size": "9999"})
    # tarfile writes the record as asked and keeps the header's own size
    assert b"size=9999" in data
    with pytest.raises(TarError, match="two sizes for one member: 600 in its header, 9999 in PAX records"):
        listing(data)


@pytest.mark.parametrize("record", [b"99 path=x\n", b"x path=x\n", b"11 path=xy", b"9 pathxy\n"])
def test_damaged_pax_records_are_an_error(record: bytes) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    data = info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(BLOCK, b"\0") + make_tar()
    with pytest.raises(TarError, match=r"damaged PAX records \(byte 0\)"):
        listing(data)


def test_a_long_name_without_its_member_is_a_cut() -> None:
    data = make_tar({"n" * 150 + ".mp4": b"x"}, format=tarfile.GNU_FORMAT)
    for end in (data[: 2 * BLOCK], data[: 2 * BLOCK] + bytes(2 * BLOCK)):
        with pytest.raises(TarError, match="cut between a long name or PAX header and its member"):
            listing(end)
    with pytest.raises(TarError, match="cut in the middle of a long name"):
        listing(data[:BLOCK])
