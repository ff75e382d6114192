"""`muybridge bench step`: training steps of a configured diffusion model on random latents, ours or diffusers' own, in one process.

Both have the same weights, data, engine and optimizer, so that they differ in the transformer alone.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..train.config import TrainConfig

WARM_UP = 3  # steps before those that are timed
# A fresh head is 0, and so would be the gradients of all that lies before it.
HEAD_STD = 0.02


class Peer(Enum):
    """diffusers' WanTransformer3DModel as its users can set it up."""

    default = "default"  # eager, with the attention that torch chooses
    compiled = "compiled"  # each block compiled
    cudnn = "cudnn"  # the same with cuDNN's attention


class StepOptimizer(Enum):
    """What updates the weights."""

    configured = "configured"  # that of the settings
    torch_fused = "torch_fused"  # torch's AdamW, one launch for many tensors
    torch_foreach = "torch_foreach"  # torch's AdamW, a launch for each operation


def main(argv: list[str]) -> int:
    """Time steps, print the figures; an end for want of memory is a figure, too."""
    parser = argparse.ArgumentParser(prog="muybridge bench step", description=__doc__)
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed, after 3 others (%(default)s)")
    parser.add_argument(
        "--diffusers",
        choices=[peer.name for peer in Peer],
        help="diffusers' transformer instead of ours, with its own checkpointing where activations.policy=block",
    )
    parser.add_argument(
        "--optimizer",
        choices=[kind.name for kind in StepOptimizer],
        default=StepOptimizer.configured.name,
        help="another optimizer than that of the settings (%(default)s)",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument(
        "overrides", nargs="*", help="settings of `muybridge train`, as +experiment=wan_1_3b_480p data.frames=17"
    )
    options = parser.parse_args(argv)
    from ..train.config import load_train_config
    from ..train.exit_codes import ExitCode, exit_process

    config = load_train_config([*options.overrides, "dry_run=true"])
    peer = None if options.diffusers is None else Peer[options.diffusers]
    result = time_steps(config, steps=options.steps, peer=peer, optimizer=StepOptimizer[options.optimizer])
    table = Table(title="muybridge bench step")
    table.add_column("what")
    table.add_column("figure", justify="right")
    for name, value in result.items():
        table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"muybridge: wrote {options.json}")
    # A process group is up, and gloo can abort an ordinary exit.
    exit_process(ExitCode.done if result["ok"] else ExitCode.out_of_memory, alone=not result["ok"])


def time_steps(
    config: "TrainConfig",
    *,
    steps: int,
    peer: Peer | None = None,
    optimizer: StepOptimizer = StepOptimizer.configured,
) -> dict[str, Any]:
    """Median times, FLOP/s, memory and the loss of each step; `ok` is false where the device's memory was not enough.

    Raises ValueError for settings of which not all weights are trained, or that diffusers' transformer does not have.
    """
    import torch

    from ..models.flops import count_parameters, count_tokens, training_flops
    from ..train.engine import initialise_distributed
    from ..train.gpus import recognised_gpu

    if config.lora.is_on or config.model.image_dim is not None:
        raise ValueError("bench step times the training of all weights: lora.rank must be 0 and model.image_dim null")
    device = initialise_distributed(config.deepspeed)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    shape, batch = config.latent_shape(), config.micro_batch
    tokens = batch * count_tokens(config.model, shape[1:])
    result = {
        "ok": True,
        "device": name,
        "transformer": "ours" if peer is None else f"diffusers, {peer.name}",
        "parameters": count_parameters(config.model),
        "clip": f"{config.data.frames}x{config.data.height}x{config.data.width}",
        "micro_batch": batch,
        "tokens_per_step": tokens,
        "activations": config.activations.policy.name,
        "optimizer": optimizer.name,
        "zero": config.deepspeed.zero,
        "precision": config.deepspeed.precision.value,
        "torch": torch.__version__,
    }
    try:
        figures = _run(config, device, WARM_UP + steps, peer, optimizer)
    except torch.OutOfMemoryError as error:
        return {**result, "ok": False, "summary": "out of memory", "said": str(error).split(". ")[0], **_memory(device)}
    flops = batch * training_flops(config.model, shape[1:], config.text.max_tokens)
    gpu = recognised_gpu(name) if on_gpu else None
    seconds = figures["seconds_per_step"]
    return {
        **result,
        **figures,
        "tokens_per_second": tokens / seconds,
        "model_tflop_per_step": flops / 1e12,
        "tflops_per_second": flops / seconds / 1e12,
        "mfu": flops / seconds / gpu.bf16_flops if gpu else None,
        **_memory(device),
        "predicted_activations_gib": _predicted_activations(config) / 2**30 if peer is None else None,
    }


def _predicted_activations(config: "TrainConfig") -> int:
    """Bytes that activations need at the worst moment of a step, by the formula that plans go by."""
    from ..train.activation_bytes import activation_bytes
    from ..train.costs_memory import activation_shape

    [bucket] = config.buckets(1)
    return activation_bytes(config.model, activation_shape(config, bucket), config.activations).peak


def _run(
    config: "TrainConfig", device: "torch.device", steps: int, peer: Peer | None, optimizer: StepOptimizer
) -> dict[str, Any]:
    """Set up as the trainer does, and step."""
    import torch

    from ..kernels.dispatch import configure
    from ..models.diffusion.objective import rectified_flow_loss
    from ..train.ema import EMA
    from ..train.engine import Engine

    configure(config.kernels)
    batch, shape = config.micro_batch, config.latent_shape()
    random = torch.Generator(device).manual_seed(config.seed)
    latents = torch.randn(batch, *shape, generator=random, device=device)
    text = torch.randn(batch, config.text.max_tokens, config.model.text_dim, generator=random, device=device)
    condition = _condition(config, random)
    model = build_model(config, device, peer)
    engine = Engine(
        model,
        _build_optimizer(model, config, optimizer),
        config=config.deepspeed,
        micro_batch=batch,
        gradient_clipping=config.optimizer.gradient_clipping,
    )
    ema = EMA(engine, config.ema)
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def step(number: int) -> tuple[float, float, float, "Tensor"]:
        """Seconds until the backward was asked for, of the update, and in all; and the mean loss."""
        random = torch.Generator(device).manual_seed(config.seed + 1 + number)
        noise = torch.randn(latents.shape, generator=random, device=device)
        noise_levels = torch.rand(batch, generator=random, device=device)
        wait()
        began = time.perf_counter()
        loss = rectified_flow_loss(engine, latents, text, noise, noise_levels, condition).mean()
        engine.backward(loss, is_last=True)
        asked = time.perf_counter()
        wait()  # the update begins with a look at the gradient, which waits, too
        computed = time.perf_counter()
        engine.step(config.optimizer.lr)
        ema.update(number + 1)
        wait()
        ended = time.perf_counter()
        return asked - began, ended - computed, ended - began, loss.detach()

    found = []
    for number in track(range(steps), description="steps", console=Console(stderr=True)):
        found.append(step(number))
        if number + 1 == WARM_UP:
            at_rest = _memory(device, at_rest=True)
            if device.type == "cuda":  # what compiling needs is no part of a step
                torch.cuda.reset_peak_memory_stats()
    timed = found[WARM_UP:]
    return {
        "seconds_per_step": statistics.median(all_ for _, _, all_, _ in timed),
        "seconds_of_each_step": [round(all_, 4) for _, _, all_, _ in timed],
        "seconds_of_update": statistics.median(update for _, update, _, _ in timed),
        "host_seconds_of_forward_and_backward": statistics.median(host for host, _, _, _ in timed),
        "losses": [loss.item() for _, _, _, loss in found],
        **at_rest,
        "launches_per_step": _count_launches(lambda: step(steps)) if device.type == "cuda" else None,
    }


def build_model(config: "TrainConfig", device: "torch.device", peer: Peer | None) -> "nn.Module":
    """Our model as the trainer wires it, or diffusers' with the same weights behind the same call."""
    import torch
    from torch import nn

    from ..models.dit import DiT
    from ..models.text_to_video import TextToVideoModel
    from ..train.mesh import build_mesh
    from ..train.parallelize import parallelize

    torch.manual_seed(config.seed)
    with device:
        dit = DiT(config.model)
        nn.init.normal_(dit.proj_out.weight, std=HEAD_STD)
    if peer is not None:
        return _diffusers_model(dit, config, device, peer)
    model = TextToVideoModel(dit, None)
    parallelize(model, build_mesh(config.parallel, timeout_seconds=config.deepspeed.timeout_seconds), config)
    return model


def _diffusers_model(dit: "nn.Module", config: "TrainConfig", device: "torch.device", peer: Peer) -> "nn.Module":
    from torch import nn

    from ..models.token_layout import AttentionPattern
    from ..train.activations import ActivationPolicy

    try:
        import diffusers
    except ImportError as error:
        raise ValueError("--diffusers needs diffusers: pip install diffusers") from error

    policy = config.activations.policy
    if policy not in (ActivationPolicy.none, ActivationPolicy.block):
        raise ValueError(f"activations.policy={policy.name} must be none or block with --diffusers: it has no other")
    if config.model.self_attention.pattern is not AttentionPattern.full:
        raise ValueError("model.self_attention.pattern must be full with --diffusers: it has no other")
    with device:
        transformer = diffusers.WanTransformer3DModel.from_config(config.model.to_diffusers())
    transformer.load_state_dict(dit.state_dict())
    transformer.train()
    if policy is ActivationPolicy.block:
        transformer.enable_gradient_checkpointing()
    if peer is Peer.cudnn:
        transformer.set_attention_backend("_native_cudnn")
    if peer is not Peer.default:
        transformer.compile_repeated_blocks()

    class Velocity(nn.Module):
        """The call of our model."""

        def __init__(self) -> None:
            super().__init__()
            self.transformer = transformer

        def forward(self, latents: "Tensor", timestep: "Tensor", text: "Tensor") -> "Tensor":
            dtype = next(self.transformer.parameters()).dtype
            return self.transformer(latents.to(dtype), timestep, text.to(dtype), return_dict=False)[0]

    return Velocity()


def _condition(config: "TrainConfig", random: "torch.Generator") -> Any:
    """What the model is told beside the text, of random numbers."""
    import torch

    from ..models.diffusion.conditioning import TEXT_ALONE, ConditioningForm, ImageChannels

    if config.conditioning.form is not ConditioningForm.channels:
        return TEXT_ALONE
    channels, *sizes = config.latent_shape()
    beside = config.input_channels() - channels
    return ImageChannels(
        torch.randn(config.micro_batch, beside, *sizes, generator=random, device=random.device)  # the mask, too
    )


def _build_optimizer(model: "nn.Module", config: "TrainConfig", kind: StepOptimizer) -> "torch.optim.Optimizer":
    import torch

    from ..train.optimizer import build_optimizer

    built = build_optimizer(model, config.optimizer)
    if kind is StepOptimizer.configured:
        return built
    is_fused = kind is StepOptimizer.torch_fused
    groups = [{name: group[name] for name in ("params", "weight_decay", "lr_scale")} for group in built.param_groups]
    return torch.optim.AdamW(
        groups,
        lr=config.optimizer.lr,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps,
        fused=is_fused,
        foreach=not is_fused,
    )


def _memory(device: "torch.device", *, at_rest: bool = False) -> dict[str, float | None]:
    """Memory of the GPU in GiB: between two steps, or at most so far."""
    import torch

    if device.type != "cuda":
        return {"memory_between_steps_gib": None} if at_rest else {"peak_memory_gib": None, "peak_reserved_gib": None}
    if at_rest:
        return {"memory_between_steps_gib": torch.cuda.memory_allocated() / 2**30}
    return {
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }


def _count_launches(step: Callable[[], Any]) -> int:
    """What one more step puts on the GPU: kernels, copies and fills."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
    return sum(event.device_type is torch.autograd.DeviceType.CUDA for event in profiler.events() or [])
