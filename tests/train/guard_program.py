"""Runs the engine at every ZeRO stage with steps that are called off or not finite, checks what it relies on in DeepSpeed, and
writes what it found as JSON, for test_guarded_steps.py and test_deepspeed_contract.py to judge.

Torch and DeepSpeed are imported once; the ranks of each world are forks of this process.
"""

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor, nn

from muybridge.data.batch import VideoBatch
from muybridge.train.ema import EMA, EMAConfig
from muybridge.train.engine import Engine, EngineConfig, Precision, initialise_distributed
from muybridge.train.guards import GuardConfig, SpikePolicy, StepGuard
from muybridge.train.model_hash import differing_ranks, model_fingerprint
from muybridge.train.optimizer import OptimizerConfig, build_optimizer

WORLDS = (1, 2)
GLOBAL_BATCH, MICRO_BATCH = 8, 2
LR, CLIPPING, WEIGHT_DECAY = 1e-2, 0.01, 0.3
EPS = 1e-4  # Adam's division by the root of a gradient near 0 would blow rounding up
# What happens to the steps of `run_guarded_steps`; of those that are not finite, the loss is so on the last rank only.
PLAN = ("called off", "applied", "applied", "nan", "applied", "called off", "called off", "inf", "applied")
APPLIED = [step for step, what in enumerate(PLAN) if what == "applied"]
# And to those of `run_step_guard`, the first of which are needed to know what is usual.
SPIKE, WRONG_LOSS, WRONG_GRADIENT, GUARDED_STEPS = 55, 57, 59, 61


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


def build(zero: int, precision: Precision) -> tuple[Engine, EMA, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = Net()
    optimizer = build_optimizer(net, OptimizerConfig(eps=EPS, weight_decay=WEIGHT_DECAY))
    config = EngineConfig(zero=zero, precision=precision)
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


def run_guarded_steps(zero: int, precision: Precision) -> dict[str, Any]:
    """The steps of PLAN, and beside them a run that has never seen those which were left out."""
    engine, ema, _ = build(zero, precision)
    found: dict[str, Any] = {"applied": [], "asked": [], "norms": [], "unchanged": []}
    for step, what in enumerate(PLAN):
        before = held(engine, ema)
        asked: list[float] = []

        def accept(norm: float, is_called_off: bool = what == "called off", asked: list[float] = asked) -> bool:
            asked.append(norm)
            return not is_called_off

        factor = {"nan": float("nan"), "inf": float("inf")}.get(what, 1.0)
        norm, applied = train_step(engine, step, accept, factor)
        found["unchanged"].append(are_equal(before, held(engine, ema)))
        if applied:
            ema.update(step + 1)
        found["applied"].append(applied)
        found["asked"].append(asked)
        found["norms"].append(norm if torch.tensor(norm).isfinite() else None)
    found["optimizer_steps"] = engine.optimizer_step_count()
    end = held(engine, ema)
    engine.destroy()
    engine, ema, _ = build(zero, precision)
    for step in APPLIED:
        train_step(engine, step)
        ema.update(step + 1)
    found["equals_a_run_without"] = are_equal(end, held(engine, ema))
    engine.destroy()
    return found


def reference_gradients() -> tuple[float, dict[str, Tensor]]:
    """The gradient norm of step 0 and the clipped gradients, by plain torch on the whole batch."""
    torch.manual_seed(0)
    net = Net()
    sample_losses(net, inputs(0, list(range(GLOBAL_BATCH)))).mean().backward()
    trained = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    norm = nn.utils.clip_grad_norm_(trained.values(), CLIPPING)
    return norm.item(), {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}


def check_contract(zero: int, precision: Precision) -> dict[str, bool]:
    """What engine.py relies on, each by name."""
    norm, gradients = reference_gradients()
    tolerance = 1e-4 if precision is Precision.fp32 else 0.03
    engine, ema, optimizer = build(zero, precision)
    inner, kept = engine._engine.optimizer, ("weight_decay", "lr_scale", "betas", "eps")
    expected = [
        {name: group[name] for name in kept}
        for group in build_optimizer(Net(), OptimizerConfig(eps=EPS, weight_decay=WEIGHT_DECAY)).param_groups
    ]
    found = {
        "the shared-memory op can be turned off": "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__,
        "supported optimizers are a list": isinstance(ZERO_SUPPORTED_OPTIMIZERS, list),
        "groups keep their hyper-parameters": [{name: group[name] for name in kept} for group in inner.param_groups]
        == expected,
        "the optimizer's own step is called": getattr(inner, "optimizer", inner) is optimizer,
        "each group is a shard": len(engine.shards) == (len(inner.param_groups) if zero else len(gradients)),
    }
    found |= check_layout(engine)

    events: list[str | float] = []  # norms that were asked about, and steps of the optimizer, in their order
    if zero > 0:
        own_step = engine._optimizer_step

        def counted_step(closure: Callable[[], float] | None = None) -> Any:
            events.append("step")
            return own_step(closure)

        engine._optimizer_step = counted_step

    def accept(norm: float) -> bool:
        events.append(norm)
        return True

    before = held(engine, ema)
    # The last rank's part of the gradient is not finite.
    train_step(engine, 0, None, float("nan"))
    found["of a gradient that is not finite no optimizer hears"] = not events and are_equal(before, held(engine, ema))
    reported, _ = train_step(engine, 0, accept)
    found["the norm is known before the first shard is stepped"] = events[:1] == [reported]
    found["the norm is of the mean over ranks, before clipping"] = abs(reported / norm - 1) < tolerance
    found["one step a shard"] = zero == 0 or events[1:] == ["step"] * len(engine.shards)
    moments = [
        (shard.optimizer_state["exp_avg"].view(-1), shard.optimizer_state["exp_avg_sq"].view(-1))
        for shard in engine.shards
    ]
    # The first moment after one step is 0.1 of the gradient that the optimizer was given.
    errors = [
        (
            first[part.offset : part.offset + part.numel] / 0.1
            - gradients[part.name].view(-1)[part.start : part.start + part.numel]
        ).norm()
        for shard, (first, _) in zip(engine.shards, moments, strict=True)
        for part in shard.fragments
    ]
    found["the optimizer gets the clipped gradient of its fragments"] = all(
        error.item() < tolerance * CLIPPING for error in errors
    )
    found["states lie as the masters do"] = all(
        first.numel() == second.numel() == shard.master.numel()
        for shard, (first, second) in zip(engine.shards, moments, strict=True)
    )
    found["groups keep their hyper-parameters through a step"] = [
        {name: group[name] for name in kept} for group in inner.param_groups
    ] == expected
    found |= {f"after a step, {name}": holds for name, holds in check_layout(engine).items()}

    for shard in engine.shards:
        for part in shard.fragments:
            shard.master[part.offset : part.offset + part.numel] += 1
    engine.refresh_weights()
    found |= {f"after a refresh, {name}": holds for name, holds in check_layout(engine).items()}
    if zero == 3:
        names = {engine._names.get(parameter) for parameter in inner.persistent_parameters}
        found["small parameters stay gathered, large ones do not"] = "gain" in names and "wide.weight" not in names
    engine.destroy()
    return found


def check_layout(engine: Engine) -> dict[str, bool]:
    """Whether the shards' fragments are what they say."""
    fragments = [part for shard in engine.shards for part in shard.fragments]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [(part.name, part.start, part.numel) for part in fragments])
    if engine.config.zero == 0:
        everyone = everyone[:1]  # all ranks hold all
    covered: dict[str, int] = {}
    is_gapless = True
    for name, start, numel in sorted(part for parts in everyone for part in parts):
        is_gapless = is_gapless and covered.get(name, 0) == start
        covered[name] = start + numel
    with whole(engine) as parameters:
        is_true = all(
            torch.equal(
                shard.master[part.offset : part.offset + part.numel].to(parameters[part.name].dtype),
                parameters[part.name].detach().view(-1)[part.start : part.start + part.numel],
            )
            for shard in engine.shards
            for part in shard.fragments
        )
    is_complete = covered == {name: shape.numel() for name, shape in engine.parameter_shapes.items()}
    return {
        "fragments cover every trained parameter once": is_gapless and is_complete,
        "no frozen parameter is in a shard": not any(name.startswith("frozen") for name in covered),
        "weights of the forward are those of the fragments": is_true,
    }


def check_fingerprints(zero: int, precision: Precision) -> dict[str, Any]:
    """Fingerprints of all ranks: at first, after a step, and with one bit of one weight flipped on the last rank."""
    engine, _, _ = build(zero, precision)

    def gather() -> list[int | None]:
        everyone: list[int | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, model_fingerprint(engine))
        return everyone

    found: dict[str, Any] = {"first": gather()}
    train_step(engine, 0)
    found["stepped"] = gather()
    if zero < 3 and dist.get_rank() == dist.get_world_size() - 1:
        weight = engine.module.get_parameter("wide.weight").detach().view(-1)
        weight.view(torch.int16 if precision is Precision.bf16 else torch.int32)[1234] ^= 1
    found["flipped"] = gather()
    if zero < 3:
        found["differing"] = differing_ranks([value or 0 for value in found["flipped"]])
    engine.destroy()
    return found


def run_step_guard() -> dict[str, Any]:
    """Steps that a StepGuard judges; one has a spike, one a loss that is not finite though its gradient is, one neither finite."""
    engine, ema, _ = build(2, Precision.bf16)
    guard = StepGuard(GuardConfig(spike_policy=SpikePolicy.skip))
    is_last_rank = dist.get_rank() == dist.get_world_size() - 1
    found: dict[str, Any] = {"applied": [], "texts": {}}
    for step in range(GUARDED_STEPS):
        guard.begin_step(step, "5x8x8")
        micro_batches = local_places()
        for number, places in enumerate(micro_batches, start=1):
            losses = sample_losses(engine, inputs(step, places))
            is_last = number == len(micro_batches)
            shown = losses
            if is_last_rank and is_last:
                losses = losses * {SPIKE: 1000.0, WRONG_GRADIENT: float("nan")}.get(step, 1.0)
                shown = losses * float("inf") if step == WRONG_LOSS else losses
            guard.add(shown, torch.linspace(0.1, 0.9, GLOBAL_BATCH)[places], video_batch(step, places))
            engine.backward(losses.mean() / len(micro_batches), is_last=is_last)
        result = engine.step(1e-4, guard.accept)
        verdict = guard.end_step(applied=bool(result.applied))
        if result.applied:
            ema.update(step + 1)
        found["applied"].append(bool(result.applied))
        if verdict.text:
            found["texts"][step] = verdict.text
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (guard.state(), found))
    found["ranks_agree"] = all(other == everyone[0] for other in everyone)
    found["counts"], found["state_bytes"] = guard.counts, len(json.dumps(guard.state()))
    engine.destroy()
    return found


def video_batch(step: int, places: list[int]) -> VideoBatch:
    numbers = torch.tensor(places)
    return VideoBatch(
        step=step,
        step_samples=GLOBAL_BATCH,
        slots=numbers,
        datasets=torch.zeros(len(places), dtype=torch.int64),
        rows=100 + numbers,
        weights=torch.ones(len(places)),
        keys=[f"clip-{place}" for place in places],
        captions=[""] * len(places),
    )


def run_rank(rank: int, world: int, port: int, root: Path) -> None:
    """One process of a world, from its start to its report."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    initialise_distributed(EngineConfig(zero=0, precision=Precision.fp32))
    cases = {f"fp32-{zero}": (zero, Precision.fp32) for zero in range(4)}
    cases |= {f"bf16-{zero}": (zero, Precision.bf16) for zero in (1, 2, 3)}
    found: dict[str, Any] = {
        name: {
            "steps": run_guarded_steps(*case),
            "contract": check_contract(*case),
            "fingerprints": check_fingerprints(*case),
        }
        for name, case in cases.items()
    }
    found["guard"] = run_step_guard()
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, found)
    if rank == 0:
        (root / f"w{world}.json").write_text(json.dumps(everyone))
    dist.barrier()
    os._exit(0)  # gloo's worker threads can abort a process that finalises Python after its work is done


def main(root: Path) -> None:
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    for world in WORLDS:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks = [fork.Process(target=run_rank, args=(rank, world, port, root)) for rank in range(world)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            sys.exit(f"a world of {world} ended with {[process.exitcode for process in ranks]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
