"""Trains a small network with Muon at every ZeRO stage in several worlds, and writes checkpoints, and what else it found as JSON,
for test_muon_sharded.py to judge.

Torch and DeepSpeed are imported once; the ranks of each world are forks of this process.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from muybridge.tests.train.checkpoint_parts import save_at_once
from muybridge.tests.train.forked_world import run_world
from muybridge.train.ema import EMA, EMAConfig
from muybridge.train.engine import Engine
from muybridge.train.engine_config import EngineConfig, Precision
from muybridge.train.fragments import FragmentReader, load_checkpoint
from muybridge.train.muon import is_block_matrix
from muybridge.train.optimizer import OptimizerConfig, OptimizerKind, build_optimizer

# Checkpoints are taken up by the worlds after them.
WORLDS = (1, 3, 2)
STEPS, SAVED_AT = 5, 2
CALLED_OFF, POISONED = 1, 3
GLOBAL_BATCH = 24  # divided by every world, and enough for gradients of full rank
DIVISOR = 32  # a power of two, which leaves gradients exact
LR, WEIGHT_DECAY, MOMENTUM = 0.02, 0.3, 0.9
CLIPPING = 0.5  # an eighth of the norm, or 0, with which all stages round alike
CASES = {f"fp32-{zero}": (zero, Precision.fp32, 0.0) for zero in range(4)}
CASES |= {f"bf16-{zero}": (zero, Precision.bf16, 0.0) for zero in (1, 3)}
CASES |= {f"clipped-{zero}": (zero, Precision.fp32, CLIPPING) for zero in (2, 3)}
# Whose checkpoints of other worlds each stage takes up, beside its own.
FOREIGN = {0: 3, 1: 0, 2: 1, 3: 2}


class Block(nn.Module):
    """Matrices of three shapes, which three ranks cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mix, self.down = nn.Linear(10, 23), nn.Linear(23, 23), nn.Linear(23, 10, bias=False)


class Net(nn.Module):
    """Five trained matrices in blocks, which two ranks orthogonalise in three rounds, and parameters that are AdamW's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Linear(4, 10), nn.Linear(10, 3)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.blocks[1].mix.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # [B, 23] each -> [B]
        """Of inputs and weights of the output that are -1, 0 or 1, so gradients are exact, and the same in any world."""
        answers = [layer(x[:, : layer.in_features]) for layer in self.linears()]
        return torch.stack([(answer * y[:, : answer.shape[1]]).sum(1) for answer in answers]).float().sum(0)

    def linears(self) -> Iterator[nn.Linear]:
        return (module for module in self.modules() if isinstance(module, nn.Linear))


def build_net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The global batch of a step."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randint(-1, 2, (2, GLOBAL_BATCH, 23), generator=generator).float()
    return x, y


def build(zero: int, precision: Precision, clipping: float) -> tuple[Engine, EMA]:
    net = build_net()
    config = OptimizerConfig(kind=OptimizerKind.muon, lr=LR, weight_decay=WEIGHT_DECAY, momentum=MOMENTUM)
    engine = Engine(
        net,
        build_optimizer(net, config),
        config=EngineConfig(zero=zero, precision=precision),
        micro_batch=1,
        gradient_clipping=clipping,
    )
    return engine, EMA(engine, EMAConfig([0.8]))


def run(engine: Engine, ema: EMA, steps: range) -> list[float | None]:
    """The norms of the steps that were applied; one is called off, and of one the gradient is NaN on the last rank."""
    world, rank = dist.get_world_size(), dist.get_rank()
    norms: list[float | None] = []
    for step in steps:
        here = slice(rank * GLOBAL_BATCH // world, (rank + 1) * GLOBAL_BATCH // world)
        x, y = (part[here].to(next(engine.module.parameters()).dtype) for part in batch(step))
        loss = engine(x, y).sum() * (world / DIVISOR)
        poison = float("nan") if step == POISONED and rank == world - 1 else 1.0
        engine.backward(loss * poison, is_last=True)
        result = engine.step(LR / (1 + step), lambda _, step=step: step != CALLED_OFF)  # type: ignore[misc]
        norms.append(float(result.grad_norm) if result.applied else None)
        if result.applied:
            ema.update(step + 1)
    return norms


def run_case(name: str, root: Path, world: int) -> dict[str, Any]:
    """Train, save in the middle and at the end, and go on from the middle once more, also from those of another stage and world."""
    folder = root / f"{name}-w{world}"
    engine, ema = build(*CASES[name])
    norms = run(engine, ema, range(SAVED_AT))
    middle = save_at_once(folder / "middle", step=SAVED_AT, engine=engine, ema=ema)
    norms += run(engine, ema, range(SAVED_AT, STEPS))
    found: dict[str, Any] = {"norms": norms, "optimizer_steps": engine.optimizer_step_count(), "resumed": {}}
    end = save_at_once(folder / "end", step=STEPS, engine=engine, ema=ema)
    engine.destroy()
    if name.startswith("clipped"):
        return found
    zero, precision, _ = CASES[name]
    foreign = root.glob(f"{precision.value}-{FOREIGN[zero]}-w*/middle/step-*") if precision is Precision.fp32 else []
    engine, ema = build(*CASES[name])
    for source in [middle, *sorted(path for path in foreign if path.parts[-3][-1] != str(world))]:
        load_checkpoint(source, engine=engine, ema=ema)
        run(engine, ema, range(SAVED_AT, STEPS))
        found["resumed"][source.parts[-3]] = holds(engine, ema, end)
    engine.destroy()
    return found


def holds(engine: Engine, ema: EMA, checkpoint: Path) -> bool:
    """Whether what this rank has is what a checkpoint has, bit for bit."""
    (averages,) = ema.averages.values()
    equal = []
    with FragmentReader(checkpoint) as reader:
        for shard, average in zip(engine.shards, averages, strict=True):
            kinds = {"master": shard.master, "ema-0.8": average}
            kinds |= {kind: shard.optimizer_state[kind].view(-1) for kind in shard.state_names}
            for part in shard.fragments:
                here = slice(part.offset, part.offset + part.numel)
                equal += [
                    torch.equal(flat[here], reader.read(kind, part.name, part.start, part.numel))
                    for kind, flat in kinds.items()
                ]
    return all(equal)


def run_reference(path: Path, clipping: float) -> None:
    """The same training in plain torch: its Muon, its AdamW, its clipping, and the whole batch at once."""
    net = build_net()
    trained = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    matrices = [parameter for name, parameter in trained.items() if is_block_matrix(name, parameter.shape)]
    vectors = [parameter for parameter in trained.values() if parameter.ndim == 1]
    optimizers = [
        torch.optim.Muon(matrices, weight_decay=WEIGHT_DECAY, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([net.embedding.weight, net.head.weight], weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(vectors, weight_decay=0.0),
    ]
    for step in range(STEPS):
        net.zero_grad()
        (net(*batch(step)).sum() / DIVISOR).backward()
        if clipping > 0:
            nn.utils.clip_grad_norm_(trained.values(), clipping)
        for optimizer in optimizers if step not in (CALLED_OFF, POISONED) else ():
            optimizer.param_groups[0]["lr"] = LR / (1 + step)
            optimizer.step()
    found = {f"master/{name}": parameter.detach() for name, parameter in trained.items()}
    names = {parameter: name for name, parameter in trained.items()}
    for parameter, state in (item for optimizer in optimizers for item in optimizer.state.items()):
        found |= {f"{kind}/{names[parameter]}": value for kind, value in state.items() if kind != "step"}
    save_file(found, path)


def find(root: Path, world: int) -> dict[str, Any]:
    """What one rank has to tell."""
    return {name: run_case(name, root, world) for name in CASES}


def main(root: Path) -> None:
    for world in WORLDS:
        run_world(partial(find, root, world), world=world, out=root / f"w{world}.json")
    run_reference(root / "fp32.safetensors", 0.0)
    run_reference(root / "clipped.safetensors", CLIPPING)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
