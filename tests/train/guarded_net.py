"""A small network in an engine, and all that a step of it may change; for guard_program.py and deepspeed_facts.py."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from muybridge.train.ema import EMA, EMAConfig
from muybridge.train.engine import Engine
from muybridge.train.engine_config import EngineConfig, Precision
from muybridge.train.optimizer import OptimizerConfig, build_optimizer

GLOBAL_BATCH, MICRO_BATCH = 8, 2
LR, CLIPPING, WEIGHT_DECAY = 1e-2, 0.01, 0.3
EPS = 1e-4  # Adam's division by the root of a gradient near 0 would blow rounding up


class Net(nn.Module):
    """Odd sizes, so that parameters straddle ranks; one parameter of a single element, of which the second rank holds nothing but
    padding under ZeRO-3; one above 1e5 elements, which ZeRO-3 does not keep gathered; and frozen ones."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(7, 9).requires_grad_(False)
        self.wide = nn.Linear(9, 12_000)
        self.head = nn.Linear(40, 3)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:  # [B, 7] -> [B, 3]
        hidden = torch.tanh(self.wide(self.frozen(x.to(self.head.weight.dtype))))
        return self.gain * self.head(hidden.view(len(x), 40, 300).mean(2) * 10)


def build(zero: int, precision: Precision, *, on_host: bool = False) -> tuple[Engine, EMA, torch.optim.Optimizer]:
    """With the optimizer's states `on_host` where asked."""
    torch.manual_seed(0)
    net = Net()
    optimizer = build_optimizer(net, OptimizerConfig(eps=EPS, weight_decay=WEIGHT_DECAY), on_host=on_host)
    config = EngineConfig(zero=zero, precision=precision, offload_optimizer=on_host)
    engine = Engine(net, optimizer, config=config, micro_batch=MICRO_BATCH, gradient_clipping=CLIPPING)
    return engine, EMA(engine, EMAConfig([0.8])), optimizer


def inputs(step: int, places: list[int]) -> Tensor:
    """The samples at these places of a step's global batch, [B, 7]."""
    return torch.randn(GLOBAL_BATCH, 7, generator=torch.Generator().manual_seed(step))[places]


def sample_losses(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:  # [B, 7] -> [B]
    return (model(x).float() - x[:, :3].sin()).square().mean(1)


def local_places() -> list[list[int]]:
    """The places of this rank's micro-batches."""
    world, rank = dist.get_world_size(), dist.get_rank()
    starts = range(rank * MICRO_BATCH, GLOBAL_BATCH, world * MICRO_BATCH)
    return [list(range(start, start + MICRO_BATCH)) for start in starts]


def train_step(
    engine: Engine, step: int, accept: Callable[[float], bool] | None = None, factor: float = 1.0
) -> tuple[float, bool]:
    """Gradient norm, and whether the step was applied; the losses of the last rank's last micro-batch are multiplied."""
    micro_batches = local_places()
    for number, places in enumerate(micro_batches, start=1):
        is_last = number == len(micro_batches)
        loss = sample_losses(engine, inputs(step, places)).mean() / len(micro_batches)
        engine.backward(
            loss * factor if is_last and dist.get_rank() == dist.get_world_size() - 1 else loss, is_last=is_last
        )
    result = engine.step(LR, accept)
    return float(result.grad_norm), bool(result.applied)


@contextmanager
def whole(engine: Engine) -> Iterator[dict[str, nn.Parameter]]:
    """All trainable parameters as the forward uses them."""
    parameters = {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    if engine.config.zero < 3:
        yield parameters
        return
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        yield parameters


def held(engine: Engine, ema: EMA) -> list[Tensor]:
    """Everything of a rank that a step may change: masters, states, averages and weights, without the shards' padding."""
    flat = [shard.master for shard in engine.shards]
    flat += [average for averages in ema.averages.values() for average in averages]
    tensors = [
        tensor.view(-1)[fragment.offset : fragment.offset + fragment.numel]
        for shard, tensor in zip(engine.shards * 2, flat, strict=True)
        for fragment in shard.fragments
    ]
    for shard in engine.shards:
        for name, value in shard.optimizer_state.items():
            pieces = [slice(part.offset, part.offset + part.numel) for part in shard.fragments]
            tensors += [value] if name == "step" else [value.view(-1)[piece] for piece in pieces]
    with whole(engine) as parameters:
        return [tensor.detach().clone() for tensor in (*tensors, *parameters.values())]


def are_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))
