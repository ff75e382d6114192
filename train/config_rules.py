"""Rules between the parts of a run's settings: sizes, channels and choices that do not go together."""

from typing import TYPE_CHECKING

from ..data.buckets import BucketConfig
from ..data.config import Access, DataConfig
from ..models.diffusion.conditioning import ConditioningForm
from ..models.text import TextEncoderKind
from ..models.vae.config import VAEConfig
from .activations import ActivationPolicy
from .experts import Expert, expert_faults
from .guards import SpikePolicy
from .initial_weights import initial_faults, initial_kind_fault
from .optimizer import OptimizerKind

if TYPE_CHECKING:
    from .config import TrainConfig


def size_faults(config: "TrainConfig") -> list[str]:
    """Clip sizes and widths that do not fit each other."""
    from .config import TaskKind  # which imports this module

    vae, data = config.vae.resolved(), config.data
    diffusion = config.task is TaskKind.text_to_video
    patch = config.model.patch_size if diffusion else [1, 1, 1]
    shapes: dict[str, DataConfig | BucketConfig] = {
        "data": data,
        **{f"data.buckets[{i}]": bucket for i, bucket in enumerate(data.buckets)},
    }
    found = []
    for field_name, shape in shapes.items():
        if (shape.frames - 1) % vae.temporal_stride:
            found.append(
                f"{field_name}.frames={shape.frames} must be 1 + a multiple of {vae.temporal_stride} (the autoencoder's stride)"
            )
        for name, patch_side in (("height", patch[1]), ("width", patch[2])):
            value, stride = getattr(shape, name), vae.spatial_stride * patch_side
            if value % stride:
                found.append(
                    f"{field_name}.{name}={value} must be a multiple of {stride} "
                    f"(the autoencoder's stride {vae.spatial_stride} x the model's patch {patch_side})"
                )
        if (1 + (shape.frames - 1) // vae.temporal_stride) % patch[0]:
            found.append(
                f"{field_name}.frames={shape.frames} must give a multiple of model.patch_size[0]={patch[0]} latent frames"
            )
    return found + (_diffusion_faults(config) if diffusion else _autoencoder_faults(config))


def _autoencoder_faults(config: "TrainConfig") -> list[str]:
    """Settings that only a diffusion run can have."""
    of_blocks = {
        "optimizer.kind": (config.optimizer.kind.name, "adamw"),
        "activations.policy": (config.activations.policy.name, "none"),
        "compile.enabled": (str(config.compile.enabled).lower(), "false"),
        "fp8.recipe": (config.fp8.recipe.name, "off"),
    }
    found = [
        f"{field}={value} must be {wanted} with task=video_vae: it is about the blocks of a transformer"
        for field, (value, wanted) in of_blocks.items()
        if value != wanted
    ]
    if config.data.access is Access.latents:
        found.append("data.access=latents must be raw with task=video_vae (it learns from pixels)")
    for name, value in (("conditioning.form", config.conditioning.form), ("expert", config.expert)):
        if value.name != "none":
            found.append(f"{name}={value.name} must be none with task=video_vae")
    if config.lora.is_on:
        found.append(f"lora.rank={config.lora.rank} must be 0 (off) with task=video_vae")
    return found


def _diffusion_faults(config: "TrainConfig") -> list[str]:
    """The transformer against its autoencoder, text encoder, conditioning, noise levels and initial weights."""
    vae, model, data = config.vae.resolved(), config.model, config.data
    found = []
    if config.vae.path is None:
        found.append("vae.path must name a trained autoencoder's folder with task=text_to_video")
    with_image = config.conditioning.form is ConditioningForm.channels
    found += _channel_faults(config, vae)
    if config.text.kind is TextEncoderKind.umt5_small and data.access is Access.stream:
        found.append(
            "text.kind=umt5_small must not go with data.access=stream: its tokenizer is made of an index's captions"
        )
    if model.text_dim != config.text.dim:
        found.append(f"model.text_dim={model.text_dim} must be text.dim={config.text.dim}")
    if with_image and data.access is Access.latents:
        found.append(
            "data.access=latents must be raw or stream with conditioning.form=channels (image latents are of masked pixels)"
        )
    found += config.conditioning.clip_faults(
        "conditioning",
        frames=max(data.frames, *(bucket.frames for bucket in data.buckets), 0),
        temporal_stride=vae.temporal_stride,
        patch_size=model.patch_size,
    )
    if model.image_dim is None and config.conditioning.image_encoder is not None:
        found.append(
            f"conditioning.image_encoder={config.conditioning.image_encoder} must be null where model.image_dim is null"
        )
    if model.image_dim is not None:
        if not with_image or config.conditioning.image_encoder is None:
            found.append(
                f"model.image_dim={model.image_dim} must come with conditioning.form=channels and conditioning.image_encoder"
            )
        if model.pos_embed_seq_len is not None:
            found.append(
                f"model.pos_embed_seq_len={model.pos_embed_seq_len} must be null: training gives features of one image"
            )
    found += expert_faults(config.objective, config.expert, config.boundary)
    if config.validation.prompts and (with_image or config.expert is not Expert.none):
        cause = f"expert={config.expert} (a video takes both)"
        if with_image:
            cause = "conditioning.form=channels (a video takes an image)"
        found.append(f"validation.prompts={list(config.validation.prompts)} must be empty with {cause}")
    if config.lora.is_on and not config.init_from:
        found.append(f"init_from must name the weights under the LoRA with lora.rank={config.lora.rank}")
    if config.init_from:
        found += initial_faults(config.init_from, model, config.text, expert=config.expert, boundary=config.boundary)
    if fault := initial_kind_fault(config.init_from, config.init_weights):
        found.append(fault)
    return found


def _channel_faults(config: "TrainConfig", vae: VAEConfig) -> list[str]:
    """The transformer's channels against the autoencoder's and those of the conditioning."""
    model, wanted = config.model, config.input_channels()
    if model.in_channels == model.out_channels != vae.z_dim:
        return [
            f"model.in_channels and out_channels={model.out_channels} must be the autoencoder's z_dim={vae.z_dim}: they "
            "are of different models (Wan 2.2 TI2V-5B has 48 latent channels, the other Wan models 16)"
        ]
    found = []
    if model.out_channels != vae.z_dim:
        found.append(f"model.out_channels={model.out_channels} must be the autoencoder's z_dim={vae.z_dim}")
    if model.in_channels != wanted:
        rule = f"the autoencoder's z_dim={vae.z_dim}"
        if config.conditioning.form is ConditioningForm.channels:
            parts = f"{vae.z_dim} of noise, {vae.temporal_stride} of a mask, {vae.z_dim} of image latents"
            rule = f"{wanted} with conditioning.form=channels: {parts}"
        elif model.in_channels == 2 * vae.z_dim + vae.temporal_stride:
            rule += ", or conditioning.form must be channels (the model also takes a mask and image latents)"
        found.append(f"model.in_channels={model.in_channels} must be {rule}")
    return found


def process_faults(config: "TrainConfig", world_size: int) -> list[str]:
    """What so many processes cannot do together."""
    found = []
    width, node = config.parallel.sequence, config.deepspeed.node_shards
    if world_size % width:
        near = max(size for size in range(1, min(width, world_size) + 1) if world_size % size == 0)
        found.append(
            f"parallel.sequence={width} must divide the number of processes, {world_size} (nearest: parallel.sequence={near}, or "
            f"{-(-world_size // width) * width} processes)"
        )
    if node is not None and world_size % node:
        found.append(f"deepspeed.node_shards={node} must divide the number of processes, {world_size}")
    return found


def parallel_faults(config: "TrainConfig") -> list[str]:
    """What clips that are shared by several processes do not go with."""
    from .config import TaskKind

    width, heads = config.parallel.sequence, config.model.num_attention_heads
    if width == 1:
        return []
    found = []
    if config.task is TaskKind.video_vae:
        return [f"parallel.sequence={width} must be 1 with task=video_vae"]
    if width > heads:
        near = max(size for size in range(1, heads + 1) if width % size == 0)  # divides the processes as well
        found.append(
            f"parallel.sequence={width} must be at most model.num_attention_heads={heads}: they share the heads (nearest: "
            f"parallel.sequence={near})"
        )
    if config.data.access is Access.stream:
        found.append(f"parallel.sequence={width} must be 1 with data.access=stream")
    return found


def engine_faults(config: "TrainConfig") -> list[str]:
    """What the engine does with weights and optimizer against what others do with them."""
    found, engine = [], config.deepspeed
    if engine.offload_optimizer and config.optimizer.kind is OptimizerKind.muon:
        found.append(
            "optimizer.kind=muon must be adamw with deepspeed.offload_optimizer=true: pieces of matrices travel between GPUs"
        )
    if config.compile.enabled and engine.zero == 3 and config.lora.is_on:
        found.append(
            "compile.enabled=true must be false with deepspeed.zero=3 and a LoRA: where weights are frozen, ZeRO 3 gathers each "
            "part of a block by itself, which no graph of a whole block can hold"
        )
    kept = config.activations.policy
    if config.fp8.is_on and engine.zero == 3 and kept not in (ActivationPolicy.block, ActivationPolicy.auto):
        found.append(
            f"activations.policy={kept.name} must be block or auto with fp8.recipe={config.fp8.recipe.name} and deepspeed.zero=3: "
            "torchao keeps the gathered weights of each block until its backward"
        )
    if config.fp8.is_on and config.lora.is_on:
        found.append(
            f"fp8.recipe={config.fp8.recipe.name} must be off with a LoRA, whose layers have matmuls of their own"
        )
    if config.fp8.is_on and config.model.dim < config.fp8.min_width:
        found.append(
            f"fp8.min_width={config.fp8.min_width} must be at most model.dim={config.model.dim}, or no Linear computes in float8"
        )
    return found


def reliability_faults(config: "TrainConfig") -> list[str]:
    """What a run does about faults against what it has for that."""
    found = []
    if config.guards.spike_policy is SpikePolicy.roll_back and config.data.access is Access.stream:
        found.append("guards.spike_policy=roll_back must be another with data.access=stream, which cannot go back")
    if config.checkpoint.keep_best and not (config.validation.every_steps and config.validation.path):
        kept = config.checkpoint.keep_best
        found.append(f"checkpoint.keep_best={kept} must be 0 without validation.path and validation.every_steps")
    elif config.checkpoint.keep_best and not _coincide(config.checkpoint.every_steps, config.validation.every_steps):
        found.append(
            f"checkpoint.every_steps={config.checkpoint.every_steps} must divide validation.every_steps="
            f"{config.validation.every_steps} or be a multiple of it with checkpoint.keep_best={config.checkpoint.keep_best}: only "
            "a checkpoint of a validation's step has a loss to be kept for"
        )
    limit, name = max((seconds, name) for name, seconds in vars(config.watchdog).items())
    if config.deepspeed.timeout_seconds <= limit:
        found.append(
            f"deepspeed.timeout_seconds={config.deepspeed.timeout_seconds} must be above watchdog.{name}={limit:g}: the watchdog "
            "says who is to blame, a collective that ends before it does not"
        )
    return found


def _coincide(checkpoint_steps: int | None, validation_steps: int) -> bool:
    # A null goes by samples or time, and meets a validation by chance; a 0 leaves the last checkpoint only.
    if not checkpoint_steps:
        return False
    return checkpoint_steps % validation_steps == 0 or validation_steps % checkpoint_steps == 0
