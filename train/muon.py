"""Muon for the matrices of the transformer's blocks, AdamW for all other parameters, on whatever shards ZeRO makes of them.

With G the clipped gradient of a matrix [m, n], mu `optimizer.momentum` and NS five steps of a quintic Newton-Schulz iteration
(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; weight decay and the scale of the update: Liu et al. 2025,
arXiv:2502.16982, which bring the root mean square of an update to that of AdamW's, so that one learning rate serves both):

    M <- mu M + (1 - mu) G
    W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(m, n)) NS((1 - mu) G + mu M)

which is what `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` computes, to the bit on the CPU. The iteration runs
in bf16, as there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .ranks import from_all_ranks

if TYPE_CHECKING:
    from .flat_shards import FlatShard, Fragment

# a, b, c of s -> a s + b s^3 + c s^5, which takes any singular value in (0, 1] to about 0.7 ... 1.2 within these steps.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
# Added nowhere: what the norm of a matrix is at least, so that one of zeros stays so.
_SMALLEST_NORM = 1e-7
# Root mean square of AdamW's updates, as measured by Liu et al.
_UPDATE_RMS = 0.2
_BYTES = 2  # of an element on its way: the iteration would round it to bf16 anyway

# The one state that a matrix has, 4 bytes a parameter where AdamW has 8.
MOMENTUM = "momentum_buffer"


@dataclass(frozen=True)
class MuonCosts:
    """What the matrices cost one process in one step."""

    # Of the Newton-Schulz iteration, on the process that has most to do.
    flops: int
    # That a process sends, and receives, in one direction; 0 for one process.
    exchanged_bytes: int


@dataclass(frozen=True)
class _Round:
    """One matrix for each rank at most: memory for more than that is never needed, and all ranks are at work."""

    # Of this rank's matrix; None where there are fewer matrices than ranks.
    shape: torch.Size | None
    # What this shard holds of the matrices, in the order of the ranks that orthogonalise them, and the scale of their updates.
    pieces: "list[tuple[Fragment, float]]"
    # Elements that go to each rank's matrix from here, and that come from each rank for this one's.
    sent: list[int]
    received: list[int]


class Muon(torch.optim.AdamW):
    """AdamW whose groups with `orthogonal` have matrices that are updated by Muon instead.

    A matrix is put together from its pieces, orthogonalised once, by one rank, and its pieces go back to where the weights are. So
    the result does not depend on the number of ranks or on the stage: given the same gradients, weights are the same bit for bit.
    A step costs 4 bytes a parameter of communication over all ranks together (see `muon_costs`), which nothing hides.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        """As AdamW; groups with `orthogonal` also have a `momentum`. `bind` must follow before the first step."""
        super().__init__(groups, **settings)
        # By the identity of a shard's state, which is all that a step is told of its shard.
        self._rounds: dict[int, list[_Round]] = {}

    def bind(self, shards: "list[FlatShard]", shapes: Mapping[str, torch.Size], *, is_sharded: bool) -> None:
        """Learn where the matrices lie, and tell their shards which states they have. Collective where the weights are sharded."""
        here = [{part.name: (part.start, part.numel) for part in shard.fragments} for shard in shards]
        everyone, rank = (from_all_ranks(here), dist.get_rank()) if is_sharded else ([here], 0)
        for index, shard in enumerate(shards):
            parts = [ranks[index] for ranks in everyone]  # of each rank, by name
            names = [name for name in shapes if any(name in held for held in parts)]
            if all(is_block_matrix(name, shapes[name]) for name in names):
                shard.state_names = (MOMENTUM,)
                fragments = {part.name: part for part in shard.fragments}
                self._rounds[id(shard.optimizer_state)] = [
                    _build_round(owned, fragments, parts, shapes, rank)
                    for owned in matrices_by_round({name: shapes[name] for name in names}, len(everyone))
                ]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every shard that has a gradient. Collective: DeepSpeed asks for the same shards in the same order on all ranks."""
        assert closure is None, "DeepSpeed passes none"
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            for parameter in group["params"] if group["orthogonal"] else ():
                if parameter.grad is not None:
                    self._update(parameter.view(-1), parameter.grad.reshape(-1), self.state[parameter], group)

    def _update(self, weights: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if MOMENTUM not in state:
            state["step"], state[MOMENTUM] = torch.zeros(()), torch.zeros_like(weights)
        state["step"] = state["step"].cpu() + 1  # a checkpoint puts it on the GPU
        momentum = state[MOMENTUM].view(-1)
        momentum.lerp_(gradient, 1 - group["momentum"])
        lr = group["lr"]
        for exchange in self._rounds[id(state)]:
            sent = torch.empty(sum(exchange.sent), dtype=torch.bfloat16, device=weights.device)
            parts = sent.split([piece.numel for piece, _ in exchange.pieces])
            places = [slice(piece.offset, piece.offset + piece.numel) for piece, _ in exchange.pieces]
            for place, part in zip(places, parts, strict=True):
                part.copy_(gradient[place].lerp(momentum[place], group["momentum"]))
            _orthogonalise(sent, exchange)
            for place, part, (_, scale) in zip(places, parts, exchange.pieces, strict=True):
                weights[place].mul_(1 - lr * group["weight_decay"]).add_(part, alpha=-lr * scale)


def is_block_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether Muon updates a parameter: matrices of the transformer's blocks, and a LoRA's factors on them.

    Embeddings, head, norms, biases, tables and convolutions are AdamW's, and so is a text encoder that is trained along.
    """
    return len(shape) == 2 and "blocks" in name.split(".")


def update_scale(shape: Sequence[int]) -> float:
    """What the orthogonalised update of a matrix is multiplied with, beside the learning rate."""
    return _UPDATE_RMS * math.sqrt(max(shape))


def orthogonalised(matrix: Tensor) -> Tensor:
    """bf16 [m, n] -> [m, n] with the same singular vectors and singular values near 1."""
    a, b, c = _COEFFICIENTS
    wide = matrix.T if len(matrix) > matrix.shape[1] else matrix  # [short, long]
    wide = wide / wide.norm().clamp(min=_SMALLEST_NORM)
    for _ in range(_STEPS):
        gram = wide @ wide.T  # [short, short]
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if len(matrix) > matrix.shape[1] else wide


def newton_schulz_flops(shape: Sequence[int]) -> int:
    """Of one matrix: per step two products [s, l] x [l, s] and one of [s, s] x [s, s], s its shorter side."""
    short, long = min(shape), max(shape)
    return _STEPS * (4 * short**2 * long + 2 * short**3)


def matrices_by_round(shapes: Mapping[str, Sequence[int]], world: int) -> list[list[str]]:
    """Names of the matrices, round by round; in each, the first is rank 0's. Those of a round cost about the same."""
    names = sorted(shapes, key=lambda name: -newton_schulz_flops(shapes[name]))  # stable, so the same on all ranks
    return [names[start : start + world] for start in range(0, len(names), world)]


def muon_costs(shapes: Mapping[str, Sequence[int]], world: int) -> MuonCosts:
    """Costs of a step for the matrices among these parameters, over `world` processes that have equal parts of them."""
    matrices = {name: shape for name, shape in shapes.items() if is_block_matrix(name, shape)}
    rounds = matrices_by_round(matrices, world)
    numel = sum(math.prod(shape) for shape in matrices.values())
    return MuonCosts(
        # In a round, all wait for the first.
        flops=sum(newton_schulz_flops(matrices[names[0]]) for names in rounds),
        # There and back, but for the piece that a rank has of its own matrix.
        exchanged_bytes=2 * _BYTES * numel * (world - 1) // world**2,
    )


def _build_round(
    owned: list[str],
    fragments: "dict[str, Fragment]",
    parts: list[dict[str, tuple[int, int]]],
    shapes: Mapping[str, torch.Size],
    rank: int,
) -> _Round:
    """The round in which rank r orthogonalises `owned[r]`; `parts` has the range of each parameter on each rank."""
    for name in owned:
        ranges = [held[name] for held in parts if name in held]
        ends = [start + numel for start, numel in ranges]
        # So what comes from the ranks, in their order, is the matrix.
        assert [start for start, _ in ranges] == [0, *ends[:-1]], f"{name} must lie in the order of the ranks"
        assert ends[-1] == shapes[name].numel(), f"{name} must be there as a whole"
    mine = owned[rank] if rank < len(owned) else None
    missing = len(parts) - len(owned)
    return _Round(
        shape=shapes[mine] if mine is not None else None,
        pieces=[(fragments[name], update_scale(shapes[name])) for name in owned if name in fragments],
        sent=[fragments[name].numel if name in fragments else 0 for name in owned] + [0] * missing,
        received=[held[mine][1] if mine in held else 0 for held in parts] if mine is not None else [0] * len(parts),
    )


def _orthogonalise(sent: Tensor, exchange: _Round) -> None:
    """Replace pieces of matrices by those of the orthogonalised ones. Collective, where there is more than one rank."""
    if len(exchange.sent) == 1:
        assert exchange.shape is not None, "one rank has all matrices"
        sent.copy_(orthogonalised(sent.view(exchange.shape)).reshape(-1))
        return
    received = sent.new_empty(sum(exchange.received))
    dist.all_to_all_single(received, sent, exchange.received, exchange.sent)
    if exchange.shape is not None:
        received = orthogonalised(received.view(exchange.shape)).reshape(-1)
    dist.all_to_all_single(sent, received, exchange.sent, exchange.received)
