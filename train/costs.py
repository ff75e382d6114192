"""What a step costs on paper: FLOPs, bytes moved and communicated, and the time that follows; pure functions of the settings.

The training's own MFU (`StepFlops`, `device_peak`) and `muybridge plan` go by the same formulas.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..data.buckets import Bucket
from ..data.config import Access
from ..data.plan import micro_steps
from ..models.diffusion.conditioning import ConditioningForm
from ..models.flops import DiTFlops, count_flops, count_tokens
from ..models.text import TextEncoderKind
from ..models.token_layout import AttentionPattern
from ..models.vae.flops import encode_flops
from . import cost_rates
from .activations import ActivationPolicy, is_recomputed
from .config import TaskKind, TrainConfig
from .cost_rates import Cluster, Rates, peak_flops, rates
from .engine_config import Precision
from .gpus import recognised_gpu
from .memory import ParameterCounts
from .muon import muon_costs
from .optimizer import OptimizerKind

# umT5-XXL: 24 layers of width 4096 with q, k, v, out and a gated feed-forward of 10 240.
_UMT5_LAYERS, _UMT5_DIM, _UMT5_HIDDEN = 24, 4096, 10240
# Bytes that a step reads and writes for each parameter of a process's shard; see `ShardAdamW`.
_OPTIMIZER_BYTES = {Precision.bf16: 74, Precision.fp32: 72}


@dataclass(frozen=True)
class ClipFlops:
    """FLOPs for one clip of a bucket, on whatever machine."""

    tokens: int
    dit: DiTFlops
    # Forward and backward that the model asks for, whatever is computed twice: what MFU counts.
    model: int
    vae: int  # of encoding; 0 with cached latents
    text: int  # of a frozen text encoder; 0 with cached features


def clip_flops(config: TrainConfig, bucket: Bucket) -> ClipFlops:
    """FLOPs for a clip of a diffusion run."""
    vae, is_cached = config.vae.resolved(), config.data.access is Access.latents
    latents = vae.latent_shape(bucket.frames, bucket.height, bucket.width)[1:]
    tokens = count_tokens(config.model, latents)
    rows = tokens if config.conditioning.form is ConditioningForm.clean_frames else 1
    dit = count_flops(config.model, latents, config.text.max_tokens, timestep_rows=rows)
    encoding = 0
    if not is_cached:
        clips = bucket.micro_batch
        encoding = encode_flops(vae, clips, bucket.frames, bucket.height, bucket.width) // clips
        # The masked clip is encoded as well.
        encoding *= 2 if config.conditioning.form is ConditioningForm.channels else 1
    text = 0
    if not is_cached and config.text.kind is TextEncoderKind.umt5:
        rows_of_text = config.text.max_tokens
        weights = 4 * _UMT5_DIM**2 + 3 * _UMT5_DIM * _UMT5_HIDDEN
        text = _UMT5_LAYERS * (2 * rows_of_text * weights + 4 * rows_of_text**2 * _UMT5_DIM)
    return ClipFlops(tokens, dit, dit.forward + _model_backward(config, dit), encoding, text)


def _model_backward(config: TrainConfig, dit: DiTFlops) -> int:
    """Twice the forward; frozen weights under a LoRA need no gradient, but pass one on."""
    if not config.lora.is_on:
        return 2 * dit.forward
    return dit.linear + 2 * dit.attention


def _backward(config: TrainConfig, dit: DiTFlops) -> tuple[int, int]:
    """What the backward executes: FLOPs of Linear layers and of attention, of which the scores are computed again."""
    attention = 5 * dit.attention // 2
    return (dit.linear if config.lora.is_on else dit.backward - attention), attention


def recomputed_share(config: TrainConfig) -> float:
    """Share of the blocks whose matmuls and attention run again in the backward."""
    layers = config.model.num_layers
    return sum(is_recomputed(config.activations, number) for number in range(layers)) / layers


def executed_flops(config: TrainConfig, dit: DiTFlops) -> int:
    """Forward and backward of the transformer for one clip as they run, with what the policy computes again."""
    again = recomputed_share(config) * dit.blocks_again
    return dit.forward + sum(_backward(config, dit)) + round(again)


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of the diffusion model in steps on clips of each bucket, for the MFU of a run."""

    of_clip: dict[tuple[int, int, int], int]  # (frames, height, width) in pixels -> FLOPs of forward and backward

    @classmethod
    def of(cls, config: TrainConfig, world_size: int) -> "StepFlops | None":
        """Those of a run's settings; None for an autoencoder, whose training is not counted."""
        if config.task is TaskKind.video_vae:
            return None
        buckets = config.buckets(world_size)
        return cls({(b.frames, b.height, b.width): clip_flops(config, b).model for b in buckets})

    def step(self, shape: tuple[int, int, int], samples: int) -> int:
        """Model FLOPs of `samples` clips of a shape, whatever is computed twice for them or by whom."""
        return samples * self.of_clip[shape]


def device_peak(device: torch.device, precision: Precision) -> float | None:
    """Peak FLOP/s of this process's device; None on the CPU, or a GPU that is not in the table."""
    gpu = recognised_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if gpu is None else peak_flops(gpu, precision)


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of one optimizer step by what they go into, on every process alike."""

    seconds: dict[str, float]
    hidden_communication: float  # seconds of communication behind the backward, not in `seconds`
    communicated_bytes: int  # that a process sends
    mfu: float
    tokens_per_second: float  # of all processes; ghosts are not counted
    idle_share: float  # of the places of the step that hold no sample

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def step_time(
    config: TrainConfig, counts: ParameterCounts, bucket: Bucket, clip: ClipFlops, cluster: Cluster
) -> StepTime:
    """Time of a step on clips of `bucket`: the parts' rooflines one after the other; the data arrive in time."""
    precision, width = config.deepspeed.precision, config.parallel.sequence
    is_masked = config.model.self_attention.pattern is not AttentionPattern.full
    speed = rates(cluster.gpu, precision, is_masked=is_masked)
    groups = config.data_groups(cluster.world)
    steps = micro_steps(bucket.global_batch, world_size=groups, micro_batch=bucket.micro_batch)
    samples = steps * bucket.micro_batch / width  # a process's share of the clips it is given

    dit, again = clip.dit, recomputed_share(config)
    work = samples * _filled(config, clip)
    linear, cast = _linear_seconds(config, clip, cluster, speed)  # of a FLOP; of a clip
    backward_linear, backward_attention = _backward(config, dit)
    attention_seconds = dit.attention / speed.attention_forward
    forward = work * (dit.linear * linear + dit.outside / speed.gemm + attention_seconds)
    backward = work * (backward_linear * linear + backward_attention / speed.attention_backward)
    repeated = work * again * (dit.linear * linear + attention_seconds)
    pointwise = _pointwise_bytes(config, clip.tokens) * samples / speed.memory
    casts = samples * cast
    launches = cost_rates.LAUNCHES_PER_COMPILED_BLOCK if config.compile.enabled else cost_rates.LAUNCHES_PER_BLOCK
    host = steps * config.model.num_layers * (sum(launches) + again * launches[0]) * cost_rates.LAUNCH_SECONDS
    waiting = max(0.0, host - forward - backward - repeated - pointwise - casts)

    reduction, after_step, gathering, sent = _zero_traffic(config, counts, cluster, steps)
    exchange_seconds, exchanged = _exchange(config, clip, cluster, steps * bucket.micro_batch)
    hidden = min(reduction, cost_rates.HIDDEN_SHARE * (backward + repeated))
    hidden_gathering = min(gathering, cost_rates.HIDDEN_SHARE * (forward + backward + repeated))
    seconds = {
        "VAE encode": samples * clip.vae / speed.conv,
        "text encode": samples * clip.text / speed.gemm,
        "forward": forward,
        "backward": backward,
        "recomputation": repeated,
        "norms and pointwise": pointwise,
        "casts to fp8": casts,
        "waiting for launches": waiting,
        "communication": reduction - hidden + gathering - hidden_gathering + after_step + exchange_seconds,
        "optimizer": optimizer_seconds(config, counts, cluster),
    }
    total = sum(seconds.values())
    useful = clip.model * bucket.global_batch / cluster.world / total
    places = steps * groups * bucket.micro_batch
    return StepTime(
        seconds=seconds,
        hidden_communication=hidden + hidden_gathering,
        communicated_bytes=sent + exchanged,
        mfu=useful / peak_flops(cluster.gpu, precision),
        tokens_per_second=clip.tokens * bucket.global_batch / total,
        idle_share=1 - bucket.global_batch / places,
    )


def _filled(config: TrainConfig, clip: ClipFlops) -> float:
    """What tokens and heads that only fill up cost, as a factor."""
    width, heads = config.parallel.sequence, config.model.num_attention_heads
    tokens = -(-clip.tokens // width) * width / clip.tokens
    attention_share = clip.dit.self_attention / clip.dit.forward
    return tokens * (1 + attention_share * (math.ceil(heads / width) * width / heads - 1))


def _linear_seconds(config: TrainConfig, clip: ClipFlops, cluster: Cluster, speed: Rates) -> tuple[float, float]:
    """Seconds of one FLOP of the blocks' Linear layers, and those that casts to fp8 take for a clip."""
    model, peak = config.model, cluster.gpu.fp8_flops
    if not config.fp8.is_on or peak is None or model.dim < config.fp8.min_width:
        return 1 / speed.gemm, 0.0
    # Keys and values of text and image stay as they are.
    of_text = 2 * model.num_layers * 2 * model.dim**2 * (config.text.max_tokens + model.image_tokens)
    share = 1 - of_text / clip.dit.linear
    # What goes in is cast for the forward and for the weight's gradient, the gradient of what comes out for both products.
    elements = clip.tokens * model.num_layers * 4 * (7 * model.dim + model.ffn_dim)
    seconds = share / (cost_rates.FP8_SHARE * peak) + (1 - share) / speed.gemm
    return seconds, cost_rates.FP8_CAST_BYTES * elements / speed.memory


def _pointwise_bytes(config: TrainConfig, tokens: int) -> float:
    """Bytes that norms, modulation, rotary embedding and GELU of all blocks move for a clip, each kernel at its least.

    The stream is fp32, what goes into matmuls 2 bytes in bf16. Of a block's forward, in units of one 2-byte row of D: first norm 3,
    QK norm with rotary 4, second norm with the gated residual 6, norm of the cross-attention's queries 2, third norm 6, last gated
    residual 5, GELU 2 F / D. The backward moves half as much again.
    """
    model = config.model
    unit = tokens * model.dim * (2 if config.deepspeed.precision is Precision.bf16 else 4)
    forward = 26 + 2 * model.ffn_dim / model.dim
    recomputed = 1.0 if config.activations.policy is not ActivationPolicy.none else 0.0
    return model.num_layers * unit * forward * (1 + 1.5 + recomputed)


def optimizer_seconds(config: TrainConfig, counts: ParameterCounts, cluster: Cluster) -> float:
    """Time of the update of this process's shard, where its states are."""
    engine = config.deepspeed
    shard = counts.trainable / (cluster.world if engine.zero else 1)
    moved = shard * (_OPTIMIZER_BYTES[engine.precision] + 8 * (len(config.ema.decays) - 1))
    if engine.offload_optimizer:
        width = 2 if engine.precision is Precision.bf16 else 4
        carried = 2 * width * shard / cost_rates.HOST_LINK_BYTES_PER_SECOND
        return carried + moved / cost_rates.HOST_MEMORY_BYTES_PER_SECOND
    return moved / (cost_rates.MEMORY_SHARE * cluster.gpu.memory_bytes_per_second) + _muon_seconds(config, cluster)


def _muon_seconds(config: TrainConfig, cluster: Cluster) -> float:
    """What Muon's matrices take beside the update: their iteration, and the way to the process that does it and back."""
    # The factors of a LoRA are so narrow that it does not show.
    if config.optimizer.kind is not OptimizerKind.muon or config.lora.is_on or config.task is TaskKind.video_vae:
        return 0.0
    flops, exchanged = _muon_work(
        config.model.num_layers,
        config.model.dim,
        config.model.ffn_dim,
        config.model.image_dim is not None,
        cluster.world,
    )
    seconds = exchanged / cluster.exchange_bytes_per_second(cluster.world) if cluster.world > 1 else 0.0
    return seconds + flops / (cost_rates.GEMM_SHARE * cluster.gpu.bf16_flops)


@lru_cache(maxsize=64)
def _muon_work(layers: int, dim: int, hidden: int, has_image: bool, world: int) -> tuple[int, int]:
    """FLOPs of the process that has most to do, and bytes that a process sends."""
    shapes = {}
    for number in range(layers):
        for name in range(10 if has_image else 8):
            shapes[f"blocks.{number}.{name}"] = (dim, dim)
        shapes |= {f"blocks.{number}.up": (hidden, dim), f"blocks.{number}.down": (dim, hidden)}
    costs = muon_costs(shapes, world)
    return costs.flops, costs.exchanged_bytes


def _zero_traffic(
    config: TrainConfig, counts: ParameterCounts, cluster: Cluster, steps: int
) -> tuple[float, float, float, int]:
    """Seconds of ZeRO's reductions, of the weights' way back after a step, and of gathers; bytes sent in all."""
    engine, world = config.deepspeed, cluster.world
    if world == 1:
        return 0.0, 0.0, 0.0, 0
    width = 2 if engine.precision is Precision.bf16 else 4
    share, link = (world - 1) / world, cluster.link_bytes_per_second(world)
    gradients, weights = width * counts.trainable * share, width * counts.all * share
    # Stage 0's all-reduce is a reduction and a gather; stages 2 and 3 reduce after each micro-batch.
    reductions = {0: 2, 1: 1}.get(engine.zero, steps)
    after = width * counts.trainable * share if engine.zero > 0 else 0.0  # each updates its part
    if engine.zero < 3:
        return reductions * gradients / link, after / link, 0.0, int(reductions * gradients + after)
    # ZeRO 3 gathers each block for its forward and for its backward, where a block that runs again is there already.
    nearby = engine.node_shards or world
    for_backward = width * counts.all * (nearby - 1) / nearby
    gathering = steps * (weights / link + for_backward / cluster.link_bytes_per_second(nearby))
    sent = int(reductions * gradients + steps * (weights + for_backward))
    return reductions * gradients / link, 0.0, gathering, sent


def _exchange(config: TrainConfig, clip: ClipFlops, cluster: Cluster, samples: int) -> tuple[float, int]:
    """Seconds and bytes of what the processes of a sequence group trade: q, k, v and out of each layer, there and back."""
    ranks, model = config.parallel.sequence, config.model
    if ranks == 1:
        return 0.0, 0
    width = 2 if config.deepspeed.precision is Precision.bf16 else 4
    tokens = -(-clip.tokens // ranks)
    row = tokens * model.dim * width * (ranks - 1) / ranks
    # Whatever a policy keeps, it keeps no results of an exchange.
    again = 0.0 if config.activations.policy is ActivationPolicy.none else 1.0
    velocity = 4 * math.prod(model.patch_size) * model.out_channels * tokens * (ranks - 1)
    sent = int(samples * (model.num_layers * 4 * (2 + again) * row + velocity))
    return sent / cluster.exchange_bytes_per_second(ranks), sent
