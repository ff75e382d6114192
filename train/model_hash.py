"""Whether all processes still hold the same weights: nothing else tells of a memory fault in one of them."""

import socket
from collections import Counter

import torch
from torch import Tensor

from .engine import Engine
from .ranks import from_all_ranks

# Words of a tensor that are multiplied and summed at once: as int64, with the factors, 64 MiB.
_CHUNK = 1 << 22
# Odd factors (2^64 / golden ratio, and another one of PCG64), so that a change of a single word always changes the sum modulo 2^64.
_STEP, _NEXT = 0x9E3779B97F4A7C15 - (1 << 64), 0x5851F42D4C957F2D
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def model_fingerprint(engine: Engine) -> int | None:
    """A signed 64-bit number of the weights that the forward uses, of their order, and of the buffers.

    The same bits give the same number on every kind of device; one changed weight always gives another. None at ZeRO 3, where
    every process holds weights of its own. Reads the weights once, and waits for the device.
    """
    if engine.config.zero == 3:
        return None
    tensors = [*engine.module.parameters(), *engine.module.buffers()]
    longest = min(_CHUNK, max(tensor.numel() for tensor in tensors))
    factors = (torch.arange(longest, device=tensors[0].device) * _STEP) | 1
    total: Tensor | None = None
    for tensor in tensors:
        words = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
        for chunk in words.split(_CHUNK):
            part = (chunk.long() * factors[: len(chunk)]).sum()  # modulo 2^64, as integers overflow
            total = part if total is None else total * _NEXT + part
    assert total is not None, "the model has no weights"
    return int(total)


def differing_ranks(fingerprints: list[int]) -> list[int]:
    """The ranks whose fingerprint is not that of more than half of all; all of them where no such majority exists."""
    value, count = Counter(fingerprints).most_common(1)[0]
    if count * 2 <= len(fingerprints):
        return list(range(len(fingerprints)))
    return [rank for rank, fingerprint in enumerate(fingerprints) if fingerprint != value]


class RanksDiffer(RuntimeError):
    """Processes hold different weights, which no step can have made."""


def check_same_weights(engine: Engine, step: int) -> None:
    """Raise RanksDiffer, on all ranks, where some hold other weights than most. Collective."""
    fingerprint = model_fingerprint(engine)
    if fingerprint is None:
        return
    found = from_all_ranks((fingerprint, socket.gethostname()))
    if len({fingerprint for fingerprint, _ in found}) == 1:
        return
    differing = differing_ranks([fingerprint for fingerprint, _ in found])
    names = ", ".join(f"rank {rank} ({found[rank][1]})" for rank in differing)
    raise RanksDiffer(
        f"after step {step} the weights of {names} are not those of the other processes: memory or a processor there may be "
        "broken, and checkpoints since the last check (guards.hash_every_steps) may hold wrong weights"
    )
