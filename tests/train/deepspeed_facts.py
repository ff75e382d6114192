"""Looks, one thing at a time, whether DeepSpeed still does what the engine relies on; guard_program.py runs it."""

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor, nn

from muybridge.tests.train.guarded_net import (
    CLIPPING,
    EPS,
    GLOBAL_BATCH,
    WEIGHT_DECAY,
    Net,
    are_equal,
    build,
    held,
    inputs,
    sample_losses,
    train_step,
    whole,
)
from muybridge.train.engine import Engine
from muybridge.train.engine_config import Precision
from muybridge.train.optimizer import OptimizerConfig, build_optimizer


def reference_gradients() -> tuple[float, dict[str, Tensor]]:
    """The gradient norm of step 0 and the clipped gradients, by plain torch on the whole batch."""
    torch.manual_seed(0)
    net = Net()
    sample_losses(net, inputs(0, list(range(GLOBAL_BATCH)))).mean().backward()
    trained = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    norm = nn.utils.clip_grad_norm_(trained.values(), CLIPPING)
    return norm.item(), {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}


def check_contract(zero: int, precision: Precision, *, on_host: bool = False) -> dict[str, bool]:
    """What engine.py relies on, each by name."""
    norm, gradients = reference_gradients()
    tolerance = 1e-4 if precision is Precision.fp32 else 0.03
    engine, ema, optimizer = build(zero, precision, on_host=on_host)
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

    train_step(engine, 1)  # leaves small parameters gathered at stage 3, which a refresh must reach
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
