"""Whether a run's weights and optimizer fit this machine, asked before anything is allocated."""

import os
import resource
from dataclasses import dataclass

import psutil
import torch

from ..models.dit import DiT
from ..models.flops import parameter_count
from ..models.lora import add_lora
from ..models.text import ByteTextEncoder, TextEncoderKind
from ..models.text_small import build_encoder
from ..models.vae import VideoVAE
from .config import TaskKind, TrainConfig
from .engine_config import Precision
from .muon import is_block_matrix
from .optimizer import OptimizerKind

GIB = 2**30
# Parts that deepspeed.offload_optimizer moves to the memory of the host.
OFFLOADED = ("optimizer", "EMA")


class OutOfMemoryError(RuntimeError):
    """The run does not fit; the message says what it needs, what there is and what to change."""


@dataclass(frozen=True)
class ParameterCounts:
    """How many parameters a model has, and how many of them are trained."""

    all: int
    trainable: int
    # Of the trained ones, matrices that Muon updates; 0 with AdamW.
    muon: int = 0


def parameter_counts(config: TrainConfig) -> ParameterCounts:
    """Parameters of the configured model, counted without allocating them."""
    is_muon = config.optimizer.kind is OptimizerKind.muon
    has_frozen_text = config.text.kind is TextEncoderKind.umt5
    if config.task is TaskKind.text_to_video and has_frozen_text and not config.lora.is_on:
        count = parameter_count(config.model)
        muon = count.blocks * count.block_matrices if is_muon else 0
        return ParameterCounts(all=count.total, trainable=count.total, muon=muon)
    with torch.device("meta"):
        if config.task is TaskKind.video_vae:
            modules: list[torch.nn.Module] = [VideoVAE(config.vae.resolved())]
        else:
            dit = DiT(config.model)
            modules = [dit]
            if config.text.kind is TextEncoderKind.bytes:
                modules.append(ByteTextEncoder(config.text))
            elif config.text.kind is TextEncoderKind.umt5_small:
                # As large as its tokenizer may become, which has fewer pieces where the captions are few.
                modules.append(build_encoder(config.text, config.text.vocabulary))
            if config.lora.is_on:
                for module in modules:
                    module.requires_grad_(False)
                add_lora(dit, config.lora)
    held = [(name, parameter) for module in modules for name, parameter in module.named_parameters()]
    trained = [(name, parameter) for name, parameter in held if parameter.requires_grad]
    return ParameterCounts(
        all=sum(parameter.numel() for _, parameter in held),
        trainable=sum(parameter.numel() for _, parameter in trained),
        muon=sum(
            parameter.numel() for name, parameter in trained if is_muon and is_block_matrix(name, parameter.shape)
        ),
    )


def bytes_per_process(config: TrainConfig, world_size: int, counts: ParameterCounts | None = None) -> dict[str, int]:
    """Bytes of one process for weights, gradients, optimizer and averages, by ZeRO stage; activations come on top.

    The first three as in ZeRO (Rajbhandari et al., arXiv:1910.02054, section 3.1) with K = 12 under bf16; what is frozen has but
    its weights. Those of OFFLOADED are on the host with deepspeed.offload_optimizer.
    """
    counts, engine = counts or parameter_counts(config), config.deepspeed
    stage = engine.zero
    width = 2 if engine.precision is Precision.bf16 else 4
    weights = counts.all / world_size if stage == 3 else counts.all
    if engine.node_shards is not None:
        weights += counts.all / engine.node_shards
    trained = counts.trainable
    sharded = trained / world_size
    gradients = width * (sharded if stage >= 2 else trained)
    # Stage 0 updates the fp32 weights in place; the others update an fp32 copy, also where the weights are fp32 themselves. Muon
    # has one state where AdamW has two.
    optimizer = 8 * trained - 4 * counts.muon if stage == 0 else 12 * sharded - 4 * counts.muon / world_size
    if engine.offload_optimizer:
        # The sums over micro-batches, in the precision of the run, and what the optimizer reads, in fp32; a GPU keeps neither.
        optimizer += (width + 4) * sharded
        gradients = 0 if stage >= 2 else gradients
    return {
        "weights": int(width * weights),
        "gradients": int(gradients),
        "optimizer": int(optimizer),
        "EMA": int(4 * len(config.ema.decays) * (trained if stage == 0 else sharded)),
    }


def check_memory(config: TrainConfig) -> None:
    """Raises OutOfMemoryError where the weights and the optimizer alone exceed what one process can have.

    An autoencoder is built whole in fp32 before DeepSpeed casts and shards it, which may be more than it holds later; a diffusion
    model parameter by parameter (see `sharded_model`).
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    counts, parts = parameter_counts(config), bytes_per_process(config, world_size)
    on_host = psutil.virtual_memory().available // processes_here, f"memory for each of {processes_here}"
    whole = 4 * counts.all if config.task is TaskKind.video_vae else 0
    if not torch.cuda.is_available():
        _check_place(config, counts, world_size, parts, whole, *on_host)
        return
    moved = OFFLOADED if config.deepspeed.offload_optimizer else ()
    kept = {name: size for name, size in parts.items() if name not in moved}
    _check_place(config, counts, world_size, kept, whole, torch.cuda.mem_get_info()[0], "the GPU")
    if moved:
        _check_place(config, counts, world_size, {name: parts[name] for name in moved}, 0, *on_host)


def _check_place(
    config: TrainConfig,
    counts: ParameterCounts,
    world_size: int,
    parts: dict[str, int],
    whole: int,
    available: int,
    place: str,
) -> None:
    """Whether parts, and before them all of a model at once (0: never), fit a place."""
    held = sum(parts.values())
    if max(whole, held) <= available:
        return
    shares = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    reason, cure = f"before activations ({shares}", "use more processes, a higher deepspeed.zero, or a smaller model"
    if whole > held:
        reason = f"to start (the whole model in fp32, before it is sharded to {held / GIB:.1f}"
    if whole > available:  # which no sharding changes
        cure = "use a smaller model, or a device with more memory"
    raise OutOfMemoryError(
        f"this run needs {max(whole, held) / GIB:.1f} GiB a process {reason}; "
        f"{counts.all / 1e9:.2f} B parameters, deepspeed.zero={config.deepspeed.zero}, "
        f"{world_size} processes) and {place} has {available / GIB:.1f} GiB: {cure}"
    )


def peak_memory_words(device: torch.device) -> str:
    """The most memory that this process has held so far."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB at most on {device}"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB at most"  # Linux counts in KiB
