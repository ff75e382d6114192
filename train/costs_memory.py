"""Bytes that one process holds on its GPU while it trains on clips of one shape, by part; pure functions of the settings."""

import math
from dataclasses import dataclass, replace

from ..data.buckets import Bucket
from ..data.config import Access
from ..models.diffusion.conditioning import ConditioningForm
from ..models.flops import count_tokens, parameter_count
from ..models.text import TextEncoderKind
from ..models.vae.chunks import default_latent_frames
from .activations import ActivationPolicy, is_recomputed
from .config import TaskKind, TrainConfig
from .engine_config import Precision, stage3_settings
from .gpus import GIB
from .memory import ParameterCounts, bytes_per_process, parameter_counts

# Estimates, to be replaced by measurements: CUDA context, cuBLAS and cuDNN workspaces, NCCL's buffers, Triton's modules.
CONTEXT_BYTES = 2 * GIB
# What the caching allocator holds and cannot use, of all that comes and goes in a step.
FRAGMENTATION_SHARE = 0.05
# Tensors as large as an outermost layer's output that live at once while a chunk is encoded: input, norm, padded copy, output.
ENCODER_TENSORS = 4

# Frozen models that are read for captions and images: parameters, and bytes of each in the dtype they have in training.
UMT5_XXL_PARAMETERS = 5_680_910_336
CLIP_PARAMETERS = 632_076_800
WAN_VAE_PARAMETERS = {16: 126_892_531, 48: 704_688_668}  # by latent channels


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one process by part, in three groups that differ in when they are there."""

    held: dict[str, int]  # throughout: states, frozen models, context
    training: dict[str, int]  # on top while a micro-batch is in its backward, where the peak usually is
    encoding: int  # on top while clips are encoded, before there are activations

    @property
    def peak(self) -> int:
        """Bytes at the worst moment."""
        passing = max(sum(self.training.values()), self.encoding)
        return sum(self.held.values()) + math.ceil((1 + FRAGMENTATION_SHARE) * passing)

    @property
    def parts(self) -> dict[str, int]:
        """What the peak consists of; the largest first within what is held and what comes and goes."""
        if self.encoding > sum(self.training.values()):
            passing = {"encoding clips": self.encoding}
        else:
            passing = dict(self.training)
        passing["fragmentation"] = self.peak - sum(self.held.values()) - sum(passing.values())
        return {name: size for name, size in (*self.held.items(), *passing.items()) if size > 0}


def step_memory(config: TrainConfig, counts: ParameterCounts, bucket: Bucket, world_size: int) -> StepMemory:
    """Memory of one process of `world_size` in a step on clips of `bucket`.

    Of an autoencoder's training, activations are not modelled: `training` then holds what the engine takes only.
    """
    held = dict(bytes_per_process(config, world_size, counts))
    held |= {name: size for name, size in _frozen_models(config).items() if size}
    held["CUDA context"] = CONTEXT_BYTES
    training = engine_buffers(config, counts)
    encoding = 0
    if config.task is TaskKind.text_to_video:
        training |= _activations(config, bucket)
        encoding = _encoding_bytes(config, bucket)
    return StepMemory(held, training, encoding)


def engine_buffers(config: TrainConfig, counts: ParameterCounts) -> dict[str, int]:
    """What DeepSpeed takes for itself: buckets of gradients on their way, and weights that ZeRO 3 has gathered."""
    engine = config.deepspeed
    width = 2 if engine.precision is Precision.bf16 else 4
    # One that fills while another is reduced.
    buffers = {"gradient buckets": 2 * width * min(engine.bucket_elements, counts.trainable) if engine.zero else 0}
    if engine.zero == 3:
        if config.task is TaskKind.text_to_video:
            of_model = parameter_count(config.model)
            largest = max(of_model.block, of_model.outside)
        else:
            largest = counts.all
        gathered = stage3_settings(largest, counts.all)["stage3_max_live_parameters"]
        buffers["gathered weights"] = width * min(gathered, counts.all)
    return buffers


def local_tokens(config: TrainConfig, bucket: Bucket) -> int:
    """Video tokens of one clip on one process of a sequence group, with those that fill up."""
    latents = config.vae.resolved().latent_shape(bucket.frames, bucket.height, bucket.width)
    return -(-count_tokens(config.model, latents[1:]) // config.parallel.sequence)


def _activations(config: TrainConfig, bucket: Bucket) -> dict[str, int]:
    model, tokens, samples = config.model, local_tokens(config, bucket), bucket.micro_batch
    activations = config.activations
    width = 2 if config.deepspeed.precision is Precision.bf16 else 4
    dim, hidden = model.dim, model.ffn_dim
    rows = tokens if config.conditioning.form is ConditioningForm.clean_frames else 1
    inputs, everything = 4 * dim * tokens, _kept_by_block(config, ActivationPolicy.none, tokens, rows)
    layers, again = model.num_layers, 0
    whole = sum(is_recomputed(activations, number) for number in range(layers))
    match activations.policy:
        case ActivationPolicy.block:
            kept, again = layers * inputs, everything
        case ActivationPolicy.every_k:
            kept = (layers - whole) * _kept_by_block(config, ActivationPolicy.selective, tokens, rows) + whole * inputs
            again = everything
        case ActivationPolicy.selective:
            kept = layers * _kept_by_block(config, ActivationPolicy.selective, tokens, rows)
            again = everything - kept // layers
        case _:
            kept = layers * everything
    if activations.offload:  # two on their way, the others on the host
        kept -= max(0, whole - 2) * inputs
    # Gradients that one block's backward has at once: of the stream, of the feed-forward's width twice, of q, k, v and out.
    passing = (2 * 4 * dim + 2 * width * hidden + 4 * width * dim) * tokens
    # Before and behind the blocks: modulation rows, the stream that enters and leaves, the velocity and its loss in fp32.
    outside = (2 * 4 * dim + 6 * 4 * math.prod(model.patch_size) * model.out_channels) * tokens + 7 * 4 * dim * rows
    return {
        "activations": samples * kept,
        "recomputed block": samples * max(0, again),
        "backward of a block": samples * passing,
        "head and loss": samples * outside,
    }


def _kept_by_block(config: TrainConfig, policy: ActivationPolicy, tokens: int, rows: int) -> int:
    """Bytes that one block keeps of a sample for its backward, without the text's few rows."""
    model = config.model
    width = 2 if config.deepspeed.precision is Precision.bf16 else 4
    dim, hidden = model.dim, model.ffn_dim
    # q, k, v before their norms; what attention gives, and its output layer; the same of cross-attention; the feed-forward.
    matmuls = width * (3 * dim + 2 * dim + dim + 2 * dim + hidden + dim) + 4 * model.num_attention_heads * 2
    if policy is ActivationPolicy.selective:
        return (4 * dim + matmuls) * tokens
    # Also three states of the stream, inputs of the four kinds of Linear, normed and turned q and k, GELU; a row of modulation.
    return (3 * 4 * dim + matmuls + width * (3 * dim + 3 * dim + hidden)) * tokens + 2 * 6 * 4 * dim * rows


def _frozen_models(config: TrainConfig) -> dict[str, int]:
    """Weights of the frozen models that a step needs: none where latents are cached."""
    if config.task is TaskKind.video_vae or config.data.access is Access.latents:
        return {}
    frozen = {"frozen VAE": 4 * WAN_VAE_PARAMETERS.get(config.vae.resolved().z_dim, 0)}
    if config.text.kind is TextEncoderKind.umt5:
        frozen["frozen text encoder"] = 2 * UMT5_XXL_PARAMETERS
    if config.model.image_dim is not None:
        frozen["frozen image encoder"] = 4 * CLIP_PARAMETERS
    return frozen


def _encoding_bytes(config: TrainConfig, bucket: Bucket) -> int:
    """What encoding a micro-batch takes in fp32: some outputs of an outermost layer, for one chunk of the frames."""
    if config.data.access is Access.latents:
        return 0
    vae = config.vae.resolved()
    later = vae.temporal_stride * default_latent_frames(vae, bucket.micro_batch, bucket.height, bucket.width)
    frames = min(bucket.frames, later + 2)  # with the two frames before them
    pixels = bucket.micro_batch * frames * bucket.height * bucket.width // vae.patch_size**2
    return ENCODER_TENSORS * 4 * vae.base_dim * vae.dim_mult[0] * pixels


# From what costs no time to what saves most memory.
POLICIES = (ActivationPolicy.none, ActivationPolicy.selective, ActivationPolicy.every_k, ActivationPolicy.block)


def cheapest_policy(config: TrainConfig, world_size: int, memory_bytes: int) -> ActivationPolicy:
    """What `activations.policy=auto` is on GPUs of that memory: the first of `POLICIES` that fits in all buckets, or the last."""
    counts, buckets = parameter_counts(config), config.buckets(world_size)
    for policy in POLICIES:
        chosen = replace(config, activations=replace(config.activations, policy=policy))
        if all(step_memory(chosen, counts, bucket, world_size).peak <= memory_bytes for bucket in buckets):
            return policy
    return POLICIES[-1]
