"""Trains a small network through every ZeRO stage under torchrun and writes what happened as JSON, for test_engine.py to judge.

One start of torch and DeepSpeed costs seconds, so everything that needs a given number of processes happens in one program.
"""

import json
import resource
import signal
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from muybridge.tests.train.checkpoint_parts import save_at_once
from muybridge.train.checkpoint import CheckpointConfig, Checkpointer
from muybridge.train.checkpoint_folder import choose_checkpoint
from muybridge.train.ema import EMA, EMAConfig, average_name
from muybridge.train.engine import Engine, initialise_distributed
from muybridge.train.engine_config import EngineConfig, Precision
from muybridge.train.exit_codes import exit_process
from muybridge.train.fragments import load_checkpoint, read_weights
from muybridge.train.optimizer import OptimizerConfig, build_optimizer

STEPS, SAVED_AT = 6, 3
GLOBAL_BATCH, MICRO_BATCH = 12, 2
LR, CLIPPING, DECAYS, WEIGHT_DECAY, TEXT_LR_SCALE = 1e-2, 0.1, [0.8, 0.3], 0.3, 0.25
EPS = 1e-4  # Adam's division by the root of a gradient near 0 would blow rounding up


class Net(nn.Module):
    """Odd sizes, so that parameters straddle ranks; one of a single element, of which the second rank holds nothing but padding
    under ZeRO-3; and one above 1e5 elements, which ZeRO-3 does not keep gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(7, 14508)
        self.text_encoder = nn.Linear(7, 36)
        self.norm = nn.LayerNorm(36)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 36))
        self.head = nn.Linear(36, 3)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:  # [B, 7] -> [B, 3]
        x = x.to(self.head.weight.dtype)
        wide = torch.tanh(self.wide(x)).view(len(x), 36, 403).mean(2) * 20
        return self.gain * self.head(self.norm(wide + torch.tanh(self.text_encoder(x))) + self.scale_shift_table)


def build_net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The global batch of a step."""
    x = torch.randn(GLOBAL_BATCH, 7, generator=torch.Generator().manual_seed(step))
    return x, x[:, :3].sin()


def build_engine(zero: int, precision: Precision) -> tuple[Engine, EMA]:
    net = build_net()
    optimizer = OptimizerConfig(lr=LR, eps=EPS, weight_decay=WEIGHT_DECAY, text_encoder_lr_scale=TEXT_LR_SCALE)
    engine = Engine(
        net,
        build_optimizer(net, optimizer),
        config=EngineConfig(zero=zero, precision=precision),
        micro_batch=MICRO_BATCH,
        gradient_clipping=CLIPPING,
    )
    return engine, EMA(engine, EMAConfig(DECAYS))


def run(engine: Engine, ema: EMA, steps: range, *, poisoned: int | None = None) -> dict[str, list[Any]]:
    """Losses, gradient norms and whether each step was applied; the loss of the first sample of step `poisoned` is NaN."""
    world, rank = dist.get_world_size(), dist.get_rank()
    found: dict[str, list[Any]] = {"losses": [], "norms": [], "applied": []}
    for step in steps:
        x, y = batch(step)
        total = torch.zeros(())
        accumulation = GLOBAL_BATCH // MICRO_BATCH // world
        for micro_step in range(accumulation):
            first = (micro_step * world + rank) * MICRO_BATCH
            here = slice(first, first + MICRO_BATCH)
            loss = (engine(x[here]).float() - y[here]).square().mean()
            total += loss.detach() / accumulation / world
            loss = loss * float("nan") if step == poisoned and first == 0 else loss
            engine.backward(loss / accumulation, is_last=micro_step + 1 == accumulation)
        result = engine.step(LR)
        if result.applied:
            ema.update(step + 1)
        dist.all_reduce(total)
        found["losses"].append(total.item())
        found["norms"].append(float(result.grad_norm))
        found["applied"].append(bool(result.applied))
    return found


def run_reference(path: Path) -> dict[str, list[float]]:
    """The same training in plain torch, written out: AdamW's groups by hand, one batch, no engine."""
    net = build_net()
    matrices = [net.wide.weight, net.head.weight]
    vectors = [net.wide.bias, net.norm.weight, net.norm.bias, net.scale_shift_table, net.head.bias, net.gain]
    text = {"lr": LR * TEXT_LR_SCALE}
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0.0},
            {"params": [net.text_encoder.weight], "weight_decay": WEIGHT_DECAY, **text},
            {"params": [net.text_encoder.bias], "weight_decay": 0.0, **text},
        ],
        lr=LR,
        eps=EPS,
    )
    averages = {decay: {name: p.detach().clone() for name, p in net.named_parameters()} for decay in DECAYS}
    found: dict[str, list[float]] = {"losses": [], "norms": []}
    for step in range(STEPS):
        x, y = batch(step)
        loss = (net(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), CLIPPING)
        optimizer.step()
        # The average's ramp: (1 + t) / (10 + t) after t steps, up to the decay.
        for decay, average in averages.items():
            kept = min(decay, (2 + step) / (11 + step))
            for name, parameter in net.named_parameters():
                average[name] = kept * average[name] + (1 - kept) * parameter.detach()
        found["losses"].append(loss.item())
        found["norms"].append(norm.item())
    weights = {f"master/{name}": parameter.detach() for name, parameter in net.named_parameters()}
    for decay, average in averages.items():
        weights |= {f"{average_name(decay)}/{name}": value for name, value in average.items()}
    save_file(weights, path)
    return found


@torch.no_grad()
def predict(model: Any) -> Tensor:
    """What the network says to a fixed input, asked as a validation does."""
    model.eval()
    answer = model(batch(99)[0][:MICRO_BATCH]).clone()
    model.train()
    return answer


def held(engine: Engine, ema: EMA) -> list[Tensor]:
    """Everything of a rank that a step reads: what the masters, the optimizer and the average hold, and what the model says."""
    kept = [*chain.from_iterable(ema.averages.values()), *(shard.master for shard in engine.shards)]
    kept += [value for shard in engine.shards for value in shard.optimizer_state.values()]
    return [*(tensor.clone() for tensor in kept), predict(engine)]


def run_case(name: str, zero: int, precision: Precision, root: Path, world: int) -> dict[str, Any]:
    """Train, save in the middle and at the end, then resume: from its own checkpoint and from those of other worlds."""
    folder = root / f"{name}-w{world}"
    engine, ema = build_engine(zero, precision)
    found: dict[str, Any] = run(engine, ema, range(SAVED_AT))
    # Training goes on while this is written: what comes back must be the state before that.
    background = Checkpointer(folder / "middle", CheckpointConfig(), engine, ema)
    background.begin(SAVED_AT, {"extra": "kept"}, "", {})
    for key, values in run(engine, ema, range(SAVED_AT, STEPS)).items():
        found[key] += values
    saved = background.commit()
    assert not saved.failure, saved.failure
    background.close()
    end = save_at_once(folder / "end", step=STEPS, engine=engine, ema=ema)

    before = held(engine, ema)
    plain = Net().to(torch.bfloat16 if precision is Precision.bf16 else torch.float32)
    plain.load_state_dict(read_weights(end, "ema"))
    with ema.swapped_in():
        found["swap_error"] = (predict(engine) - predict(plain)).abs().max().item()
        found["swap_change"] = (predict(engine) - before[-1]).abs().max().item()
    found["swap_back_is_exact"] = all(torch.equal(a, b) for a, b in zip(before, held(engine, ema), strict=True))
    engine.destroy()

    engine, ema = build_engine(zero, precision)
    # Groups must keep their own hyper-parameters through a load.
    groups = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in engine._engine.optimizer.param_groups]
    middle = choose_checkpoint(folder / "middle", "must")
    assert middle is not None
    facts = load_checkpoint(middle, engine=engine, ema=ema)
    assert facts["step"] == SAVED_AT
    assert facts["extra"] == "kept"
    found["resumed"] = run(engine, ema, range(SAVED_AT, SAVED_AT + 1))["losses"]
    with ema.swapped_in():  # a validation must leave no trace in the steps after it
        predict(engine)
    found["resumed"] += run(engine, ema, range(SAVED_AT + 1, STEPS))["losses"]
    save_at_once(folder / "again", step=STEPS, engine=engine, ema=ema)
    loaded = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in engine._engine.optimizer.param_groups]
    found["groups_are_kept"] = loaded == groups and len(groups) == 4
    found["elastic"] = {}
    if precision is Precision.fp32:
        for source in sorted(root.glob("fp32-*-w*/middle")):
            # Own stage in another world, and the next stage from any: enough, since a file does not know who wrote it.
            other_zero, other_world = int(source.parent.name[5]), int(source.parent.name[-1])
            if other_world != world and other_zero in (zero, (zero + 1) % 4):
                load_checkpoint(source / f"step-{SAVED_AT:08d}", engine=engine, ema=ema)
                found["elastic"][source.parent.name] = run(engine, ema, range(SAVED_AT, STEPS))["losses"]
    engine.destroy()
    return found


def run_faults(zero: int, root: Path) -> dict[str, Any]:
    """A step with a NaN, and saves that fail on one rank only."""
    world, rank = dist.get_world_size(), dist.get_rank()
    engine, ema = build_engine(zero, Precision.fp32)
    found = run(engine, ema, range(STEPS), poisoned=2)
    folder = root / f"faults-{zero}-w{world}"
    last = world - 1

    def failure() -> str:
        try:
            save_at_once(folder, step=1, engine=engine, ema=ema)
        except OSError as error:
            return str(error)
        return ""

    reports: dict[str, str] = {}
    if zero > 0 or world == 1:
        # As a full disk answers: the write fails, and the process lives on.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == last:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        reports["full disk"] = failure()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        average = ema.averages[average_name(DECAYS[1])][0]
        kept = average[0].item()
        if rank == last:
            average[0] = float("nan")
        reports["NaN"] = failure()
        average[0] = kept
    left = sorted(path.name for path in folder.iterdir()) if reports and rank == 0 else []
    reports["mended"] = failure()
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, reports)
    engine.destroy()
    return {**found, "reports": everyone, "left": left}


def main(root: Path) -> None:
    initialise_distributed(EngineConfig(zero=0, precision=Precision.fp32))
    torch.set_num_threads(1)
    world = dist.get_world_size()
    cases = {f"fp32-{zero}": (zero, Precision.fp32) for zero in range(4)}
    cases |= {f"bf16-{zero}": (zero, Precision.bf16) for zero in (1, 2, 3)}
    found: dict[str, Any] = {name: run_case(name, *case, root, world) for name, case in cases.items()}
    found |= {f"faults-{zero}": run_faults(zero, root) for zero in range(4)}
    if world == 1:
        found["reference"] = run_reference(root / "reference.safetensors")
    if dist.get_rank() == 0:
        (root / f"w{world}.json").write_text(json.dumps(found))
    exit_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
