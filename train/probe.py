"""What a machine must do right before it trains: multiply, add up with the others, and keep files that the others can read.

A card that computes wrongly or a folder that is not shared would spoil a run hours later; here it costs a fraction of a second.
"""

import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from .life import tell_bad_node
from .ranks import from_all_ranks, from_rank_0, on_rank_0

_CPU_SIZE, _GPU_SIZE, _DEPTH = 128, 4096, 256
# Entries of a product that keep all its sums exact, in whatever order and precision they are added up.
_LARGEST = {torch.float32: 255, torch.bfloat16: 1}
_MOST_SHOWN = 8
_FILE_BYTES = 1 << 16


class ProbeError(RuntimeError):
    """A machine does not do what training needs of it; the next attempt may be on another one."""


def probe(device: torch.device, run_dir: Path) -> None:
    """Try each rank's device, the sums of all of them, and `run_dir`. Collective.

    Raises ProbeError, on all ranks with the same words, naming each rank with a fault, its host, and what was found.
    """
    own_fault = wrong_products(device)
    if own_fault:  # of all faults this is the one that the machine has alone
        tell_bad_node(own_fault)
    found = from_all_ranks([f for f in (own_fault, wrong_sum(device)) if f])
    found = [here + there for here, there in zip(found, _storage_faults(run_dir), strict=True)]
    hosts = from_all_ranks(f"{socket.gethostname()}, {_device_name(device)}")
    faults = [
        f"rank {rank} ({host}): {'; '.join(texts)}"
        for rank, (host, texts) in enumerate(zip(hosts, found, strict=True))
        if texts
    ]
    if faults:
        more = f"; and {len(faults) - _MOST_SHOWN} more ranks" if len(faults) > _MOST_SHOWN else ""
        raise ProbeError(f"a machine failed its test: {'; '.join(faults[:_MOST_SHOWN])}{more}")


def refuse_different_settings(settings: dict[str, str]) -> None:
    """Raises ValueError, on all ranks, where some have other settings than rank 0, naming them. Collective."""
    expected = from_rank_0(settings)
    names = [name for name in {**expected, **settings} if expected.get(name) != settings.get(name)]
    own = [f"{name} is {settings.get(name)}, there {expected.get(name)}" for name in names[:_MOST_SHOWN]]
    everyone = from_all_ranks((socket.gethostname(), own))
    faults = [f"rank {rank} ({host}): {'; '.join(texts)}" for rank, (host, texts) in enumerate(everyone) if texts]
    if faults:
        raise ValueError(f"ranks have other settings than rank 0: {'; '.join(faults[:_MOST_SHOWN])}")


def wrong_products(device: torch.device) -> str:
    """What is wrong with products of matrices of whole numbers; "" for nothing."""
    size = _GPU_SIZE if device.type == "cuda" else _CPU_SIZE
    try:
        places = torch.arange(size * _DEPTH, device=device).view(size, _DEPTH)
        x = places[:, 0] % 5 + 1
        for dtype, largest in _LARGEST.items():
            a = places * 7919 % (2 * largest + 1) - largest
            b = places.T * 104729 % (2 * largest + 1) - largest
            product = _multiply(a.to(dtype), b.to(dtype))
            # (A B) x = A (B x), in whole numbers: no other product has to be trusted, and no entry of x hides one of A B.
            wrong = _times(product.long(), x) != _times(a, _times(b, x))
            if count := int(wrong.sum()):
                row = int(wrong.nonzero()[0])
                return f"{count} of {size} rows of a product in {dtype} are wrong, the first of them row {row}"
    except RuntimeError as error:
        return f"a product failed: {error}"
    return ""


def _multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


def _times(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return (matrix * vector).sum(1)


def wrong_sum(device: torch.device, *, count: int = 1000, group: dist.ProcessGroup | None = None) -> str:
    """What is wrong with a sum of `count` whole numbers over all ranks (of the group), different on each; "" for nothing."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    places = torch.arange(count, device=device)
    # A place counts every rank with a weight of its own, so that one that is missing or counted twice shows.
    sums = (places % 7 + 1) * (rank + 1)
    dist.all_reduce(sums, group=group)
    expected = (places % 7 + 1) * (world * (world + 1) // 2)
    wrong = int((sums != expected).sum())
    return f"{wrong} of {len(sums)} sums over all ranks are wrong" if wrong else ""


def _storage_faults(run_dir: Path) -> list[list[str]]:
    """Of each rank, what is wrong with files in the run directory: each writes one, and reads that of the rank behind it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    try:
        folder = on_rank_0(lambda: _make_folder(run_dir))
    except OSError as error:
        return [[f"cannot make a folder in {run_dir}: {error}"], *([] for _ in range(world - 1))]
    content = {number: number.to_bytes(4, "little") * (_FILE_BYTES // 4) for number in (rank, (rank + 1) % world)}
    faults = []
    try:
        _write(folder / str(rank), content[rank])
    except OSError as error:
        faults.append(f"cannot write in {run_dir}: {error}{_hint(error)}")
    written = [not texts for texts in from_all_ranks(faults)]
    for number, expected in content.items():
        if written[number]:
            try:
                if (folder / str(number)).read_bytes() != expected:
                    faults.append(f"what rank {number} wrote in {run_dir} is not what can be read there")
            except OSError as error:
                faults.append(f"cannot read in {run_dir} what rank {number} wrote: {error}{_hint(error)}")
    found = from_all_ranks(faults)
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _make_folder(run_dir: Path) -> Path:
    for left in run_dir.glob(".probe-*-*"):  # of a start that was killed; nobody else is at work here
        shutil.rmtree(left, ignore_errors=True)
    folder = run_dir / f".probe-{os.getpid()}-{os.urandom(4).hex()}"
    folder.mkdir(parents=True)
    return folder


def _hint(error: OSError) -> str:
    return " (it must be on a file system that all machines share)" if isinstance(error, FileNotFoundError) else ""


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _device_name(device: torch.device) -> str:
    with suppress(RuntimeError):  # of a device that does not work
        if device.type == "cuda":
            return f"{device}, {torch.cuda.get_device_name(device)}"
    return str(device)
