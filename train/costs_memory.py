"""Bytes that one process holds on its GPU while it trains on clips of one shape, by part; pure functions of the settings."""

import math
from dataclasses import dataclass

from ..data.buckets import Bucket
from ..data.config import Access
from ..models.diffusion.conditioning import ConditioningForm
from ..models.flops import count_tokens, parameter_count
from ..models.text import TextEncoderKind
from ..models.vae.chunks import default_latent_frames
from .activation_bytes import ActivationShape, activation_bytes
from .activations import ActivationPolicy
from .config import TaskKind, TrainConfig
from .engine_config import Precision, stage3_settings
from .gpus import GIB
from .memory import OFFLOADED, ParameterCounts, bytes_per_process

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
    """Bytes of one process by part, and when they are there."""

    held: dict[str, int]  # throughout: states, frozen models, context
    host: dict[str, int]  # in the memory of the machine, where something was moved there
    training: dict[str, int]  # on top while a micro-batch is in its backward, where the peak usually is
    encoding: int  # on top while clips are encoded, before there are activations
    updating: int  # on top while the optimizer steps, when there are none any more

    @property
    def peak(self) -> int:
        """Bytes at the worst moment."""
        passing = sum(self._passing().values())
        return sum(self.held.values()) + math.ceil((1 + FRAGMENTATION_SHARE) * passing)

    @property
    def parts(self) -> dict[str, int]:
        """What the peak consists of: first what is held, then what comes and goes."""
        passing = self._passing()
        passing["fragmentation"] = self.peak - sum(self.held.values()) - sum(passing.values())
        return {name: size for name, size in (*self.held.items(), *passing.items()) if size > 0}

    def _passing(self) -> dict[str, int]:
        passing = self.training
        for moment in ({"encoding clips": self.encoding}, {"gradients in fp32": self.updating}):
            if sum(moment.values()) > sum(passing.values()):
                passing = moment
        return dict(passing)


def step_memory(config: TrainConfig, counts: ParameterCounts, bucket: Bucket, world_size: int) -> StepMemory:
    """Memory of one process of `world_size` in a step on clips of `bucket`.

    Of an autoencoder's training, activations are not modelled: `training` then holds what the engine takes only.
    """
    held, host = dict(bytes_per_process(config, world_size, counts)), {}
    if config.deepspeed.offload_optimizer:
        host = {name: held.pop(name) for name in OFFLOADED}
    held |= {name: size for name, size in _frozen_models(config).items() if size}
    held["CUDA context"] = CONTEXT_BYTES
    training = engine_buffers(config, counts)
    encoding = 0
    if config.task is TaskKind.text_to_video:
        shape = activation_shape(config, bucket)
        found = activation_bytes(config.model, shape, config.activations)
        training |= {"activations": found.kept, "backward of the last block": found.peak - found.kept}
        # Noise, latents, their mixture, velocity, target and loss: whole in fp32 on each process.
        values = math.prod(config.model.patch_size) * config.model.out_channels
        training["latents and velocity"] = 6 * 4 * shape.batch * shape.tokens * values
        host |= {"inputs of blocks": found.host} if found.host else {}
        encoding = _encoding_bytes(config, bucket)
    # DeepSpeed's copy of this process's gradients for the fp32 optimizer.
    engine = config.deepspeed
    has_copy = engine.precision is Precision.bf16 and not engine.offload_optimizer
    return StepMemory(held, host, training, encoding, 4 * counts.trainable // world_size if has_copy else 0)


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


def activation_shape(config: TrainConfig, bucket: Bucket) -> ActivationShape:
    """What goes through the model for a micro-batch of clips of `bucket`."""
    latents = config.vae.resolved().latent_shape(bucket.frames, bucket.height, bucket.width)
    tokens = count_tokens(config.model, latents[1:])
    return ActivationShape(
        tokens=tokens,
        text_tokens=config.text.max_tokens,
        batch=bucket.micro_batch,
        modulation_rows=tokens if config.conditioning.form is ConditioningForm.clean_frames else 1,
        image_tokens=config.model.image_tokens,
        sequence=config.parallel.sequence,
        width=2 if config.deepspeed.precision is Precision.bf16 else 4,
    )


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
