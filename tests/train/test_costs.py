"""The planner's formulas against models on the meta device, torch's FLOP counter, and cases that can be worked out by hand."""

import math
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from muybridge.data.buckets import Bucket
from muybridge.data.config import Access
from muybridge.models.dit import DiT, DiTConfig
from muybridge.models.flops import count_flops, count_parameters, parameter_count
from muybridge.models.lora import LoRAConfig, add_lora
from muybridge.models.token_layout import AttentionPattern
from muybridge.models.vae import VideoVAE
from muybridge.models.vae.config import VAEConfig
from muybridge.models.vae.flops import encode_flops
from muybridge.train.activations import ActivationPolicy, ActivationsConfig, set_activation_policy
from muybridge.train.config import TrainConfig, load_train_config
from muybridge.train.cost_rates import Cluster
from muybridge.train.costs import StepFlops, clip_flops, executed_flops, step_time
from muybridge.train.costs_memory import POLICIES, step_memory
from muybridge.train.costs_run import Conditions, run_costs
from muybridge.train.fp8 import Fp8Recipe
from muybridge.train.gpus import GIB, GPUS, gpu_named, recognised_gpu
from muybridge.train.memory import ParameterCounts, parameter_counts

MODELS = sorted(Path(__file__).parents[2].glob("configs/model/*.yaml"))
LATENTS = (6, 16, 24)


def shipped_model(path: Path) -> DiTConfig:
    merged = OmegaConf.merge(OmegaConf.structured(DiTConfig), OmegaConf.load(path))
    return cast(DiTConfig, OmegaConf.to_object(merged))


def wan(*overrides: str, experiment: str = "wan_1_3b_480p", processes: int = 1) -> TrainConfig:
    return load_train_config([f"+experiment={experiment}", "dry_run=true", *overrides], world_size=processes)


def only_bucket(config: TrainConfig, processes: int = 1) -> Bucket:
    (bucket,) = config.buckets(processes)
    return bucket


def on_meta(config: DiTConfig) -> DiT:
    with torch.device("meta"):
        return DiT(config).bfloat16()


def counted_flops(model: DiT, config: DiTConfig, latents: tuple[int, int, int], text: int) -> tuple[int, int]:
    """FLOPs of a forward and of its backward, as torch counts them; attention is our kernels' on the meta device."""
    image = None
    if config.image_dim is not None:
        image = torch.zeros(1, config.image_tokens, config.image_dim, device="meta")
    with FlopCounterMode(display=False) as forward:
        velocity = model(
            torch.zeros(1, config.in_channels, *latents, device="meta"),
            torch.zeros(1, device="meta"),
            torch.zeros(1, text, config.text_dim, device="meta"),
            image,
        )
    with FlopCounterMode(display=False) as backward:
        velocity.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_parameters_are_those_of_the_model(path: Path) -> None:
    config = shipped_model(path)
    model = on_meta(config)
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())
    in_block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    assert parameter_count(config).block == in_block


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_executed_flops_are_those_that_torch_counts_with_each_policy(path: Path) -> None:
    config = replace(wan(), model=replace(shipped_model(path), num_layers=2))
    model, flops = on_meta(config.model), count_flops(config.model, LATENTS, 77)
    for policy in POLICIES:
        config.activations = ActivationsConfig(policy=policy)
        set_activation_policy(model, config.activations)
        forward, backward = counted_flops(model, config.model, LATENTS, 77)
        assert flops.forward == pytest.approx(forward, rel=1e-3)
        assert executed_flops(config, flops) == pytest.approx(forward + backward, rel=1e-3), policy


def test_a_whole_14b_step_is_counted_to_a_thousandth() -> None:
    config = wan("activations.policy=block", "parallel.sequence=1", experiment="wan_14b_480p")
    model = on_meta(config.model)
    set_activation_policy(model, config.activations)
    clip = clip_flops(config, only_bucket(config))
    forward, backward = counted_flops(model, config.model, (21, 60, 104), 512)
    assert clip.tokens == 32760
    assert executed_flops(config, clip.dit) == pytest.approx(forward + backward, rel=1e-3)
    assert clip.model == 3 * clip.dit.forward == pytest.approx(5035e12, rel=1e-3)


def test_frozen_weights_under_a_lora_need_no_gradient() -> None:
    config = wan("lora.rank=4", "init_from=weights", "activations.policy=none")
    config.model.num_layers = 8
    model = on_meta(config.model)
    model.requires_grad_(False)
    with torch.device("meta"):
        add_lora(model, LoRAConfig(rank=4))
    flops = count_flops(config.model, LATENTS, 77)
    forward, backward = counted_flops(model.bfloat16(), config.model, LATENTS, 77)
    # The factors' own products and the first block, whose inputs are data, are what is left out.
    assert executed_flops(config, flops) == pytest.approx(forward + backward, rel=0.04)


@pytest.mark.parametrize(
    ("vae", "clips", "pixels"),
    [
        (VAEConfig(), 1, (81, 480, 832)),
        (VAEConfig(), 2, (17, 64, 96)),
        (VAEConfig(), 3, (1, 64, 64)),
        (VAEConfig(base_dim=160, decoder_base_dim=256, z_dim=48, patch_size=2, is_residual=True), 1, (9, 736, 1280)),
        (VAEConfig(base_dim=16, temporal_downsample=[True, True], dim_mult=[1, 2, 2]), 1, (13, 40, 56)),
    ],
    ids=["2.1 in chunks", "2.1 at once", "images", "2.2", "tiny"],
)
def test_encoding_costs_what_torch_counts(vae: VAEConfig, clips: int, pixels: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        model = VideoVAE(vae)
    with FlopCounterMode(display=False) as counter:
        model.encode_chunked(torch.zeros(clips, 3, *pixels, device="meta"))
    assert encode_flops(vae, clips, *pixels) == counter.get_total_flops()
    if pixels == (81, 480, 832):
        assert counter.get_total_flops() == pytest.approx(164e12, rel=0.005)


def test_a_step_takes_what_its_parts_take_at_the_rates_of_the_kernels() -> None:
    """81 x 480 x 832 on one H200, cached, nothing computed again: 1.535 s worked out by hand from the same rates."""
    config = wan("global_batch=1", "deepspeed=zero1", "data.access=latents", "data.latents=cache")
    cluster = Cluster(gpu_named("h200", "gpu"), nodes=1, gpus_per_node=1)
    config.activations.policy = ActivationPolicy.none
    bucket = only_bucket(config)
    time = step_time(config, parameter_counts(config), bucket, clip_flops(config, bucket), cluster)
    assert time.total == pytest.approx(1.535, rel=0.05)
    assert time.mfu == pytest.approx(0.559, rel=0.05)
    assert time.seconds["communication"] == time.seconds["recomputation"] == time.seconds["VAE encode"] == 0
    assert time.tokens_per_second == pytest.approx(32760 / time.total)


def test_computing_blocks_again_costs_a_forward() -> None:
    config, cluster = wan("global_batch=1"), Cluster(gpu_named("h100", "gpu"), 1, 1)
    bucket, counts = only_bucket(config), parameter_counts(config)
    times = {}
    for policy in (ActivationPolicy.none, ActivationPolicy.block):
        config.activations.policy = policy
        times[policy.name] = step_time(config, counts, bucket, clip_flops(config, bucket), cluster)
    gained = times["block"].seconds["recomputation"]
    assert gained == pytest.approx(times["none"].seconds["forward"], rel=0.01)
    assert times["block"].mfu < times["none"].mfu


def test_processes_that_share_a_clip_share_its_work_and_its_activations() -> None:
    clusters = Cluster(gpu_named("h100", "gpu"), 1, 8)
    alone, shared = (wan(f"parallel.sequence={width}", "global_batch=8", processes=8) for width in (1, 4))
    counts = parameter_counts(alone)
    found = []
    for config in (alone, shared):
        bucket = only_bucket(config, 8)
        memory = step_memory(config, counts, bucket, 8)
        found.append((step_time(config, counts, bucket, clip_flops(config, bucket), clusters), memory))
    (time_alone, memory_alone), (time_shared, memory_shared) = found
    assert time_shared.seconds["forward"] == pytest.approx(time_alone.seconds["forward"], rel=0.01)
    assert time_shared.seconds["communication"] > time_alone.seconds["communication"]
    activations = [memory.training["activations"] for memory in (memory_alone, memory_shared)]
    assert activations[1] == pytest.approx(activations[0] / 4, rel=0.06)  # but for the text's rows


def test_float8_speeds_up_wide_matmuls_and_pays_for_casts() -> None:
    config = wan("global_batch=1", "activations.policy=none", "parallel.sequence=1", experiment="wan_14b_480p")
    cluster, counts, bucket = Cluster(gpu_named("h100", "gpu"), 1, 1), parameter_counts(config), only_bucket(config)
    plain = step_time(config, counts, bucket, clip_flops(config, bucket), cluster)
    config.fp8.recipe = Fp8Recipe.tensorwise
    eight = step_time(config, counts, bucket, clip_flops(config, bucket), cluster)
    assert eight.seconds["forward"] < plain.seconds["forward"]
    assert eight.seconds["casts to fp8"] > 0 == plain.seconds["casts to fp8"]
    config.fp8.min_width = 8192  # no Linear is as wide
    assert step_time(config, counts, bucket, clip_flops(config, bucket), cluster).seconds == plain.seconds


def test_a_small_step_waits_for_launches_and_less_so_where_blocks_are_compiled() -> None:
    small = ("data.frames=5", "data.height=64", "data.width=64", "global_batch=1")
    cached = ("data.access=latents", "data.latents=cache")
    waiting = []
    for enabled in ("false", "true"):
        config = wan(*small, *cached, f"compile.enabled={enabled}")
        bucket, cluster = only_bucket(config), Cluster(gpu_named("h100", "gpu"), 1, 1)
        time = step_time(config, parameter_counts(config), bucket, clip_flops(config, bucket), cluster)
        waiting.append(time.seconds["waiting for launches"])
    assert waiting[0] > waiting[1] > 0


def test_links_between_nodes_carry_what_leaves_a_node() -> None:
    cluster = Cluster(gpu_named("h100", "gpu"), nodes=2, gpus_per_node=8, network_bytes_per_second=10e9)
    assert cluster.link_bytes_per_second(8) == pytest.approx(0.8 * 450e9)
    assert cluster.link_bytes_per_second(16) == pytest.approx(0.8 * 80e9)  # rings over the 8 ports of a node
    assert cluster.exchange_bytes_per_second(16) == pytest.approx(0.8 * 10e9)
    assert cluster.exchange_bytes_per_second(4) == pytest.approx(0.8 * 450e9)
    assert cluster.link_bytes_per_second(3) < cluster.link_bytes_per_second(4)  # 8 GPUs are no three and three


def test_a_node_s_own_copy_of_the_weights_keeps_gathers_in_the_node() -> None:
    cluster, seconds, sent = Cluster(gpu_named("h100", "gpu"), 4, 8, network_bytes_per_second=1e9), [], []
    for shards in ("null", "8"):
        shared = ("parallel.sequence=1", f"deepspeed.node_shards={shards}")
        config = wan(*shared, experiment="wan_14b_full", processes=32)
        bucket = only_bucket(config, 32)
        time = step_time(config, parameter_counts(config), bucket, clip_flops(config, bucket), cluster)
        seconds.append(time.seconds["communication"] + time.hidden_communication)
        sent.append(time.communicated_bytes)
    assert seconds[1] < 0.8 * seconds[0]
    weights = 2 * 14_288_491_584
    assert sent[0] == pytest.approx(3 * weights * 31 / 32)  # two gathers and a reduction
    assert sent[1] == pytest.approx(2 * weights * 31 / 32 + weights * 7 / 8)


def test_activations_are_a_block_s_input_where_blocks_are_computed_again() -> None:
    config = wan("activations.policy=block")
    memory = step_memory(config, parameter_counts(config), only_bucket(config), 1)
    stream = 30 * 32760 * 1536 * 4  # in fp32
    assert stream < memory.training["activations"] < 1.1 * stream
    assert memory.training["backward of the last block"] > 20 * 32760 * 1536


def test_memory_falls_from_policy_to_policy() -> None:
    config = wan("data.access=latents", "data.latents=cache", processes=8)
    counts, bucket = parameter_counts(config), only_bucket(config, 8)
    peaks = {}
    for policy in POLICIES:
        chosen = replace(config, activations=ActivationsConfig(policy=policy))
        peaks[policy] = step_memory(chosen, counts, bucket, 8).peak
    assert list(peaks.values()) == sorted(peaks.values(), reverse=True)


def test_cached_clips_need_no_frozen_models() -> None:
    raw, cached = wan(), wan("data.access=latents", "data.latents=cache")
    counts = parameter_counts(raw)
    held = [step_memory(config, counts, only_bucket(config), 1).held for config in (raw, cached)]
    assert held[0]["frozen text encoder"] == pytest.approx(10.6 * GIB, rel=0.01)
    assert not any("frozen" in name for name in held[1])
    assert clip_flops(cached, only_bucket(cached)).vae == 0 < clip_flops(raw, only_bucket(raw)).vae


def test_sparse_attention_counts_the_pairs_that_meet() -> None:
    full, sparse = wan(), wan("model.self_attention.pattern=radial")
    flops = [clip_flops(config, only_bucket(config)).dit for config in (full, sparse)]
    assert flops[1].self_attention < 0.7 * flops[0].self_attention
    assert flops[1].linear == flops[0].linear
    assert sparse.model.self_attention.pattern is AttentionPattern.radial


def test_checkpoints_failures_and_days_follow_from_the_step() -> None:
    config = wan("checkpoint.every_minutes=30", processes=8)
    cluster = Cluster(gpu_named("h100", "gpu"), 1, 8)
    conditions = Conditions(gpu_hours_per_failure=8000, restart_seconds=600, storage_bytes_per_second=1e9)
    costs = run_costs(config, parameter_counts(config), cluster, conditions, {})
    assert costs.seconds_between_failures == 1000 * 3600
    assert costs.checkpoint_bytes == 4 * 4 * costs.counts.trainable  # weights, two moments, one average
    assert costs.checkpoint_write_seconds == pytest.approx(costs.checkpoint_bytes / 1e9)
    lost = (900 + 600) / costs.seconds_between_failures + costs.checkpoint_blocking_seconds / 1800
    assert costs.effective_share == pytest.approx(1 / (1 + lost))
    assert costs.step_seconds is not None
    assert costs.wall_seconds == pytest.approx(20000 * costs.step_seconds * (1 + lost))
    assert costs.samples == 20000 * 64
    assert costs.gpu_hours == pytest.approx(costs.wall_seconds * 8 / 3600)


def test_images_have_the_share_of_samples_that_was_set() -> None:
    buckets = "data.buckets=[{frames: 81, height: 480, width: 832}, {frames: 1, height: 480, width: 832}]"
    config = wan(buckets, "data.image_share=0.25", processes=8)
    costs = run_costs(config, parameter_counts(config), Cluster(gpu_named("h100", "gpu"), 1, 8), Conditions(), {})
    video, image = costs.buckets
    samples = [one.share * one.bucket.global_batch for one in (video, image)]
    assert samples[1] / sum(samples) == pytest.approx(0.25)
    assert video.share + image.share == pytest.approx(1)


def test_the_flops_of_a_run_s_steps_are_known_by_the_shape_of_their_clips() -> None:
    config = wan("activations.policy=block", processes=8)
    flops = StepFlops.of(config, 8)
    assert flops is not None
    assert flops.step((81, 480, 832), 64) == pytest.approx(64 * 849e12, rel=1e-3)
    assert StepFlops.of(wan(experiment="quickstart_vae"), 1) is None


def test_a_gpu_is_known_by_its_name_and_by_what_torch_calls_it() -> None:
    assert gpu_named("H100", "gpu").name == "h100"
    with pytest.raises(ValueError, match=r"gpu=h10 must be one of .*did you mean h100"):
        gpu_named("h10", "gpu")
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 PCIe": "h100_pcie",
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA A100-SXM4-40GB": "a100_40gb",
        "NVIDIA A100 80GB PCIe": "a100_pcie",
        "NVIDIA B200": "b200",
        "NVIDIA GeForce RTX 4090": "rtx_4090",
        "NVIDIA GeForce RTX 5090": "rtx_5090",
        "NVIDIA RTX 6000 Ada Generation": "rtx_6000_ada",
        "NVIDIA L40S": "l40s",
        "NVIDIA GH200 480GB": None,
        "NVIDIA H100 NVL": None,
        "Tesla T4": None,
    }
    for name, expected in names.items():
        gpu = recognised_gpu(name)
        assert (gpu.name if gpu is not None else None) == expected, name
    for gpu in GPUS:
        assert gpu.source
        assert math.isfinite(gpu.bf16_flops)
        assert gpu.bf16_flops > gpu.fp32_flops


def test_states_are_sharded_and_frozen_weights_have_none() -> None:
    config = wan("data.access=latents", "data.latents=cache")
    config.deepspeed.zero = 3
    counts = ParameterCounts(all=1000, trainable=100)
    held = step_memory(config, counts, only_bucket(config), 4).held
    assert held["weights"] == 2 * 1000 // 4
    assert held["gradients"] == 2 * 100 // 4
    assert config.data.access is Access.latents
