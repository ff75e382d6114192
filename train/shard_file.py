"""The file with a rank's part of a checkpoint, and how files get to the disk. Without torch: the writer process imports this.

A shard is a safetensors file of flat fp32 tensors. It is written in blocks, each of which is checked and counted into the CRC-32
while it is in the processor's cache: nothing is read twice.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from zlib_ng.zlib_ng import crc32

ELEMENT_BYTES = 4
BLOCK_BYTES = 2**20
_WRITE_BACK_BYTES = 8 * 2**20
_ALIGNMENT = 64
_LENGTH_BYTES = 8  # of the header's length in front of it

Digest = dict[str, int]  # of a file: its "bytes" and "crc32"


def shard_header(numels: Mapping[str, int]) -> bytes:
    """What comes before the elements of fp32 tensors, given by name and length, in the order in which they follow."""
    entries, end = {}, 0
    for name, numel in numels.items():
        start, end = end, end + ELEMENT_BYTES * numel
        entries[name] = {"dtype": "F32", "shape": [numel], "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Spaces behind the text are allowed, and elements then lie where vector instructions like them.
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def write_part(shard: Path, header: bytes, blocks: Iterable[memoryview], texts: Mapping[str, str]) -> dict[str, Digest]:
    """Write a shard of a header and its elements, then texts, by file name, next to it; all is on the disk at the end.

    Returns the digests of all by file name. Raises OSError where the disk fails or an element is not finite.
    """
    digests = {shard.name: _write_blocks(shard, header, blocks)}
    return digests | {name: write_text(shard.parent / name, text) for name, text in texts.items()}


def blocks_of(data: memoryview) -> Iterator[memoryview]:
    """Bytes in blocks of BLOCK_BYTES, without a copy."""
    for start in range(0, len(data), BLOCK_BYTES):
        yield data[start : start + BLOCK_BYTES]


def write_text(path: Path, text: str) -> Digest:
    """Write a small file that is on the disk when this returns."""
    content = text.encode()
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "crc32": crc32(content)}


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk: those of new files, or a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of(path: Path) -> Digest:
    """Size and CRC-32 of a file as it is now."""
    checksum, size = 0, 0
    with open(path, "rb", buffering=0) as file:
        block = memoryview(bytearray(BLOCK_BYTES))
        while count := file.readinto(block):
            checksum, size = crc32(block[:count], checksum), size + count
    return {"bytes": size, "crc32": checksum}


def _write_blocks(path: Path, header: bytes, blocks: Iterable[memoryview]) -> Digest:
    checksum, size, started = crc32(header), len(header), 0
    # Of pieces larger than the buffer the file makes one write each, without a copy.
    with open(path, "xb", buffering=BLOCK_BYTES // 2) as file:
        file.write(header)
        for block in blocks:
            values = np.frombuffer(block, dtype=np.float32)
            if not _are_finite(values):
                bad = size - len(header) + ELEMENT_BYTES * int(np.isfinite(values).argmin())
                raise OSError(f"{_tensor_at(header, bad)} holds NaN or infinite values; the checkpoint is refused")
            checksum = crc32(block, checksum)
            file.write(block)
            size += len(block)
            if size - started >= _WRITE_BACK_BYTES:
                # "Not needed again" has the kernel bring these bytes to the disk meanwhile, instead of all at once in the end, and
                # keeps them from pushing clips out of its cache.
                file.flush()
                os.posix_fadvise(file.fileno(), started, size - started, os.POSIX_FADV_DONTNEED)
                started = size
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "crc32": checksum}


def _are_finite(values: np.ndarray) -> bool:
    # A finite sum has finite terms only, and costs less than a look at each; large ones can overflow.
    with np.errstate(over="ignore", invalid="ignore"):
        return math.isfinite(float(np.add.reduce(values))) or bool(np.isfinite(values).all())


def _tensor_at(header: bytes, position: int) -> str:
    for name, entry in json.loads(header[_LENGTH_BYTES:]).items():
        if entry["data_offsets"][0] <= position < entry["data_offsets"][1]:
            return str(name)
    raise AssertionError(f"no tensor holds byte {position}")
