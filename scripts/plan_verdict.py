"""What a plan comes to: the run as asked, what fits beside it and what does not, and all of it as plain numbers."""

from dataclasses import dataclass, replace
from typing import Any

from ..train.config import TaskKind
from ..train.cost_rates import Cluster
from ..train.costs import executed_flops
from ..train.costs_memory import POLICIES
from ..train.costs_run import BucketCosts, RunCosts
from ..train.gpus import GIB
from ..train.memory import bytes_per_process
from .plan_measured import Measured
from .plan_search import ALIKE, Choice, Search


@dataclass(frozen=True)
class Verdict:
    """The run as asked for, and others to compare it with."""

    asked: RunCosts
    # The fastest choice of settings on the same GPUs; None where none fits.
    fastest: RunCosts | None
    # On the fewest nodes; None where none fits on as many as are looked at.
    smallest: RunCosts | None
    # The nearest that does not fit: less saving on the same GPUs, or fewer GPUs with all there is to save.
    too_large: RunCosts | None
    # One setting changed at a time, where what was asked for does not fit.
    changes: list[tuple[list[str], RunCosts]]

    def changes_to(self, other: RunCosts) -> list[str]:
        """What to write on the command line to come to it from what was asked for."""
        changed = Choice.of(other.config).overrides(Choice.of(self.asked.config))
        for name in ("nodes", "gpus_per_node"):
            if getattr(other.cluster, name) != getattr(self.asked.cluster, name):
                changed.append(f"{name}={getattr(other.cluster, name)}")
        return changed

    @property
    def faster(self) -> RunCosts | None:
        """The fastest on the same GPUs, where what was asked for fits and takes longer."""
        asked, fastest = self.asked, self.fastest
        if not asked.fits or fastest is None or asked.step_seconds is None or fastest.step_seconds is None:
            return None
        return fastest if asked.step_seconds > ALIKE * fastest.step_seconds else None


def verdict_of(search: Search, cluster: Cluster) -> Verdict:
    """Look at what was asked for and around it."""
    asked = search.costs(cluster)
    fastest, smallest = search.fastest_that_fits(cluster), search.smallest_that_fits(cluster)
    changes = [] if asked.fits else search.single_changes(asked)
    return Verdict(asked, fastest, smallest, _too_large(search, asked, smallest), changes)


def _too_large(search: Search, asked: RunCosts, smallest: RunCosts | None) -> RunCosts | None:
    """Something near that does not fit, if anything: it shows what the memory goes into."""
    if not asked.fits:
        return asked
    if asked.config.task is TaskKind.text_to_video:
        before = Choice.of(search.config)
        for policy in reversed(POLICIES):
            choice = replace(before, policy=policy, offload_inputs=False)
            costs = search.costs(asked.cluster, choice)
            if not costs.fits and search.can_be(asked.cluster, choice):
                return costs
    last = None
    for smaller in search.clusters(asked.cluster):
        if smallest is None or smaller.world >= smallest.cluster.world:
            break
        last = search.least_memory(smaller) or last
    return last


def advice(verdict: Verdict) -> str:
    """What is slow about the run as asked for, in a sentence; nothing where there is nothing to say."""
    asked, faster = verdict.asked, verdict.faster
    width, node = asked.config.parallel.sequence, asked.cluster.gpus_per_node
    words = []
    if asked.cluster.nodes > 1 and node % width:
        words.append(
            f"parallel.sequence={width} crosses nodes of {node} GPUs: each layer waits for the network between them"
        )
    if faster is not None and asked.step_seconds and faster.step_seconds:
        changed = " ".join(verdict.changes_to(faster))
        times = asked.step_seconds / faster.step_seconds
        words.append(f"{changed} is {times:.2f} times as fast on the same GPUs")
    return "; ".join(words) + "." if words else ""


def reason(costs: RunCosts) -> str:
    """Why a configuration does not fit: how much it lacks, and what takes most."""
    available, worst = costs.cluster.gpu.memory_bytes, costs.worst
    parts = sorted(worst.memory.parts.items(), key=lambda part: -part[1])[:2]
    largest = " and ".join(f"{name} {size / GIB:.1f}" for name, size in parts)
    return (
        f"lacks {(costs.peak - available) / GIB:.1f} GiB of {available / GIB:.1f}: {largest} GiB are the largest parts"
    )


def plan_facts(verdict: Verdict, measured: list[Measured], *, price_per_gpu_hour: float | None) -> dict[str, Any]:
    """Everything that the plan says, as plain numbers: bytes, seconds, FLOPs."""
    asked = verdict.asked
    return {
        "gpu": {
            "name": asked.cluster.gpu.name,
            "memory_bytes": asked.cluster.gpu.memory_bytes,
            "bf16_flops_per_second": asked.cluster.gpu.bf16_flops,
            "source": asked.cluster.gpu.source,
        },
        "parameters": asked.counts.all,
        "trained_parameters": asked.counts.trainable,
        "asked": run_facts(asked, price_per_gpu_hour=price_per_gpu_hour),
        "fastest_on_these_gpus": _other_facts(verdict, verdict.fastest),
        "smallest_that_fits": _other_facts(verdict, verdict.smallest),
        "does_not_fit": None
        if verdict.too_large is None
        else {**(_other_facts(verdict, verdict.too_large) or {}), "reason": reason(verdict.too_large)},
        "changes": [{"settings": texts, **_size_facts(costs)} for texts, costs in verdict.changes],
        "measured": [one.facts() for one in measured],
    }


def run_facts(costs: RunCosts, *, price_per_gpu_hour: float | None) -> dict[str, Any]:
    """A run's figures, each bucket's among them."""
    facts = _size_facts(costs) | {
        "states_bytes": bytes_per_process(costs.config, costs.cluster.world, costs.counts),
        "buckets": [_bucket_facts(costs, one) for one in costs.buckets],
        "steps": costs.config.steps,
        "samples": costs.samples,
        "host_bytes_of_a_node": costs.host_bytes,
        "checkpoint_bytes": costs.checkpoint_bytes,
        "checkpoint_blocking_seconds": costs.checkpoint_blocking_seconds,
        "checkpoint_write_seconds": costs.checkpoint_write_seconds,
        "seconds_between_failures": costs.seconds_between_failures,
    }
    if costs.step_seconds is None:
        return facts
    return facts | {
        "mfu": costs.mfu,
        "tokens_per_second": costs.tokens_per_second,
        "checkpoint_seconds_apart": costs.checkpoint_seconds_apart,
        "failures_expected": costs.failures,
        "effective_share": costs.effective_share,
        "wall_seconds": costs.wall_seconds,
        "gpu_hours": costs.gpu_hours,
        "price": None if price_per_gpu_hour is None else costs.gpu_hours * price_per_gpu_hour,
    }


def _other_facts(verdict: Verdict, costs: RunCosts | None) -> dict[str, Any] | None:
    return None if costs is None else {"changes": verdict.changes_to(costs), **_size_facts(costs)}


def _size_facts(costs: RunCosts) -> dict[str, Any]:
    return {
        "nodes": costs.cluster.nodes,
        "gpus_per_node": costs.cluster.gpus_per_node,
        "activations.policy": costs.config.activations.policy.name,
        "activations.offload": costs.config.activations.offload,
        "parallel.sequence": costs.config.parallel.sequence,
        "deepspeed.zero": costs.config.deepspeed.zero,
        "deepspeed.offload_optimizer": costs.config.deepspeed.offload_optimizer,
        "peak_bytes": costs.peak,
        "fits": costs.fits,
        "step_seconds": costs.step_seconds,
    }


def _bucket_facts(costs: RunCosts, one: BucketCosts) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "clip": one.bucket.name,
        "global_batch": one.bucket.global_batch,
        "micro_batch": one.bucket.micro_batch,
        "share_of_steps": one.share,
        "memory_bytes": one.memory.parts,
        "host_bytes": one.memory.host,
        "peak_bytes": one.memory.peak,
    }
    if one.clip is None or one.time is None:
        return facts
    return facts | {
        "tokens": one.clip.tokens,
        "model_flops_of_a_clip": one.clip.model,
        "executed_flops_of_a_clip": executed_flops(costs.config, one.clip.dit),
        "vae_flops_of_a_clip": one.clip.vae,
        "text_flops_of_a_clip": one.clip.text,
        "communicated_bytes": one.time.communicated_bytes,
        "hidden_communication_seconds": one.time.hidden_communication,
        "seconds": one.time.seconds,
        "step_seconds": one.time.total,
        "mfu": one.time.mfu,
        "tokens_per_second": one.time.tokens_per_second,
        "idle_share": one.time.idle_share,
    }
