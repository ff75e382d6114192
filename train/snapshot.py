"""A rank's part of a checkpoint: which tensors it is made of, and a copy of them in memory that the writer process shares."""

import contextlib
import mmap
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.frame_ring import available_memory
from .ema import EMA
from .engine import Engine
from .shard_file import BLOCK_BYTES, ELEMENT_BYTES, shard_header

_SHARE_OF_MEMORY = 0.8  # of what is free; the rest is for what training allocates later
_GIB = 2**30


@dataclass(frozen=True)
class Part:
    """What one rank writes, as it is now: it changes with the next step."""

    # By KIND/NAME, flat fp32 views of the state, without the padding between parameters.
    pieces: dict[str, Tensor]
    # By the name of a parameter: the first element of it that is here, and how many are.
    addresses: dict[str, tuple[int, int]]

    @staticmethod
    def of(engine: Engine, ema: EMA) -> "Part":
        """What this rank holds."""
        pieces: dict[str, Tensor] = {}
        addresses: dict[str, tuple[int, int]] = {}
        averages = ema.averages
        for index, shard in enumerate(engine.shards):
            kinds = {"master": shard.master} | {name: tensors[index] for name, tensors in averages.items()}
            kinds |= {kind: shard.optimizer_state[kind] for kind in shard.state_names if kind in shard.optimizer_state}
            for fragment in shard.fragments:
                addresses[fragment.name] = (fragment.start, fragment.numel)
                for kind, flat in kinds.items():
                    here = slice(fragment.offset, fragment.offset + fragment.numel)
                    pieces[f"{kind}/{fragment.name}"] = flat.detach().view(-1)[here]
        return Part(pieces, addresses)

    @staticmethod
    def expected_bytes(engine: Engine, ema: EMA) -> int:
        """Bytes of what this rank will hold once the optimizer has its states, which it makes in its first step."""
        numels = {
            f"{kind}/{fragment.name}": fragment.numel
            for shard in engine.shards
            for kind in ("master", *ema.averages, *shard.state_names)
            for fragment in shard.fragments
        }
        return len(shard_header(numels)) + ELEMENT_BYTES * sum(numels.values())

    def header(self) -> bytes:
        """The header of its file."""
        return shard_header({name: piece.numel() for name, piece in self.pieces.items()})

    def data_bytes(self) -> int:
        """Bytes of its elements."""
        return ELEMENT_BYTES * sum(piece.numel() for piece in self.pieces.values())

    def blocks(self) -> Iterator[memoryview]:
        """Its elements in blocks, of which only one at a time is in memory a second time, if any is."""
        step = BLOCK_BYTES // ELEMENT_BYTES
        for piece in self.pieces.values():
            for start in range(0, piece.numel(), step):
                yield piece[start : start + step].to("cpu", torch.float32).numpy().data.cast("B")


class SharedImage:
    """Memory for the bytes of one file, kept from save to save, so that its pages are taken from the machine only once."""

    def __init__(self) -> None:
        # A nameless file in memory, as /dev/shm has 64 MB in most containers and keeps what a killed process leaves behind.
        self.file = os.memfd_create("muybridge-checkpoint")
        self._memory: Tensor | None = None
        self._is_locked = False
        self._preparation: threading.Thread | None = None

    def prepare(self, nbytes: int) -> None:
        """Take memory for `nbytes` in a thread: to clear its pages costs the first snapshot several times what a copy does."""

        def take() -> None:
            with contextlib.suppress(OSError):  # the first snapshot will meet it, too
                memory = self._mapped(nbytes)
                memory.numpy()[:: mmap.PAGESIZE] = 0  # a look at each page puts it into the table of this process
                self._memory = memory

        self._preparation = threading.Thread(target=take, daemon=True)
        self._preparation.start()

    def fault(self, nbytes: int) -> str:
        """What speaks against taking memory for `nbytes` on each process of this machine, or an empty string."""
        self._wait_until_prepared()
        held = 512 * os.fstat(self.file).st_blocks
        wanted = max(0, nbytes - held) * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        free = available_memory()
        if wanted <= _SHARE_OF_MEMORY * free:
            return ""
        return (
            f"the copies of this machine's processes take {wanted / _GIB:.1f} GiB of memory, more than {_SHARE_OF_MEMORY:.0%} of "
            f"the {free / _GIB:.1f} GiB that are free"
        )

    def take(self, part: Part, header: bytes) -> int:
        """Copy a part to where its file's bytes are; returns their number. Raises OSError where the memory cannot be had."""
        nbytes = len(header) + part.data_bytes()
        memory = self._reserved(nbytes)
        memory[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        elements = memory[len(header) : nbytes].view(torch.float32)
        start = 0
        for piece in part.pieces.values():
            elements[start : start + piece.numel()].copy_(piece, non_blocking=True)
            start += piece.numel()
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return nbytes

    def close(self) -> None:
        """Give the memory back."""
        self._wait_until_prepared()
        self._release()
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def _reserved(self, nbytes: int) -> Tensor:
        self._wait_until_prepared()
        if self._memory is None or len(self._memory) < nbytes:
            self._release()
            self._memory = self._mapped(nbytes)
        if torch.cuda.is_available() and not self._is_locked:
            # Page-locked, a GPU copies to it at full speed; where the limits forbid that, it copies anyway.
            status = torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), len(self._memory), 0)
            self._is_locked = int(status) == 0
            if not self._is_locked:
                _take_up_cuda_error()
        return self._memory

    def _mapped(self, nbytes: int) -> Tensor:
        # Now and not page by page in the copy, where a lack of memory would be a SIGBUS.
        os.posix_fallocate(self.file, 0, nbytes)
        return torch.frombuffer(mmap.mmap(self.file, nbytes), dtype=torch.uint8)

    def _wait_until_prepared(self) -> None:
        if self._preparation is not None:
            self._preparation.join()
            self._preparation = None

    def _release(self) -> None:
        if self._is_locked and self._memory is not None:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
            self._is_locked = False
        self._memory = None


def _take_up_cuda_error() -> None:
    # CUDA keeps the error of a call for whoever asks next, and torch asks after each kernel: this one hears it for the rest.
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")
