"""What a whole run costs on a cluster: its steps on all buckets, checkpoints, failures, days and GPU hours."""

from dataclasses import dataclass
from functools import cached_property

from ..data.buckets import Bucket
from .config import TaskKind, TrainConfig
from .cost_rates import HOST_LINK_BYTES_PER_SECOND, Cluster
from .costs import ClipFlops, StepTime, clip_flops, step_time
from .costs_memory import StepMemory, step_memory
from .memory import ParameterCounts
from .save_schedule import GPU_HOURS_PER_FAILURE, MIN_SECONDS, young_daly_seconds


@dataclass(frozen=True)
class Conditions:
    """What a plan takes for granted of the place where a run is."""

    gpu_hours_per_failure: float = GPU_HOURS_PER_FAILURE
    # From a failure to the next step: the queue, set-up, reading the checkpoint.
    restart_seconds: float = 300.0
    # That all processes write to storage together.
    storage_bytes_per_second: float = 2e9


@dataclass(frozen=True)
class BucketCosts:
    """A step on clips of one bucket; of an autoencoder's training, only what it holds in memory is known."""

    bucket: Bucket
    share: float  # of the steps
    memory: StepMemory
    clip: ClipFlops | None
    time: StepTime | None


@dataclass(frozen=True)
class RunCosts:
    """A run's settings on a cluster."""

    config: TrainConfig
    cluster: Cluster
    counts: ParameterCounts
    conditions: Conditions
    buckets: list[BucketCosts]

    @property
    def peak(self) -> int:
        """Bytes of one process in the worst bucket."""
        return max(costs.memory.peak for costs in self.buckets)

    @property
    def worst(self) -> BucketCosts:
        """The bucket that takes most memory."""
        return max(self.buckets, key=lambda costs: costs.memory.peak)

    @property
    def fits(self) -> bool:
        return self.peak <= self.cluster.gpu.memory_bytes

    @cached_property
    def step_seconds(self) -> float | None:
        """Of the mean step."""
        if self.config.task is TaskKind.video_vae:
            return None
        return sum(costs.share * costs.time.total for costs in self.buckets if costs.time is not None)

    @property
    def samples(self) -> float:
        """Of the whole run."""
        return self.config.steps * sum(costs.share * costs.bucket.global_batch for costs in self.buckets)

    @property
    def mfu(self) -> float:
        """Over all steps, by their time."""
        times = [(costs.share, costs.time) for costs in self.buckets if costs.time is not None]
        seconds = sum(share * time.total for share, time in times)
        return sum(share * time.total * time.mfu for share, time in times) / seconds

    @property
    def tokens_per_second(self) -> float:
        """Over all steps, by their time."""
        times = [(costs.share, costs.time) for costs in self.buckets if costs.time is not None]
        seconds = sum(share * time.total for share, time in times)
        return sum(share * time.total * time.tokens_per_second for share, time in times) / seconds

    @property
    def checkpoint_bytes(self) -> int:
        """Of all processes together: fp32 weights, the optimizer's states (two, of which Muon has one) and the averages."""
        return 4 * self.counts.trainable * (3 + len(self.config.ema.decays)) - 4 * self.counts.muon

    @property
    def checkpoint_blocking_seconds(self) -> float:
        """How long training stands still for a checkpoint."""
        if not self.config.checkpoint.in_background:
            return self.checkpoint_write_seconds
        writers = self.cluster.world if self.config.deepspeed.zero else 1
        return self.checkpoint_bytes / writers / HOST_LINK_BYTES_PER_SECOND

    @property
    def checkpoint_write_seconds(self) -> float:
        """Until it is on the disk."""
        return self.checkpoint_bytes / self.conditions.storage_bytes_per_second

    @property
    def host_bytes(self) -> int:
        """Memory that a node needs for what its GPUs do without, and for the copy from which a checkpoint is written."""
        image = 0
        if self.config.checkpoint.in_background and self.config.checkpoint.every_steps != 0:
            image = self.checkpoint_bytes // (self.cluster.world if self.config.deepspeed.zero else 1)
        moved = max(sum(costs.memory.host.values()) for costs in self.buckets)
        return self.cluster.gpus_per_node * (moved + image)

    @property
    def seconds_between_failures(self) -> float:
        return 3600 * self.conditions.gpu_hours_per_failure / self.cluster.world

    @property
    def checkpoint_seconds_apart(self) -> float:
        """Seconds from one checkpoint to the next, as the run's settings say or `SaveSchedule` will find."""
        settings = self.config.checkpoint
        assert self.step_seconds is not None
        if settings.every_steps is not None:
            return (settings.every_steps or self.config.steps) * self.step_seconds
        if settings.every_samples is not None:
            return settings.every_samples * self.config.steps / self.samples * self.step_seconds
        if settings.every_minutes is not None:
            return 60 * settings.every_minutes
        best = young_daly_seconds(self.checkpoint_blocking_seconds, 1 / self.seconds_between_failures)
        return max(best, MIN_SECONDS, 2 * self.checkpoint_write_seconds)

    @property
    def effective_share(self) -> float:
        """Share of the wall time that goes into steps which stay: saving, restarts and steps done again take the rest."""
        apart = self.checkpoint_seconds_apart
        saving = self.checkpoint_blocking_seconds / apart
        lost = (apart / 2 + self.conditions.restart_seconds) / self.seconds_between_failures
        return 1 / (1 + saving + lost)

    @property
    def wall_seconds(self) -> float:
        """From start to end, failures included."""
        assert self.step_seconds is not None
        return self.config.steps * self.step_seconds / self.effective_share

    @property
    def gpu_hours(self) -> float:
        return self.wall_seconds * self.cluster.world / 3600

    @property
    def failures(self) -> float:
        """Expected over the whole run."""
        return self.wall_seconds / self.seconds_between_failures


def run_costs(
    config: TrainConfig,
    counts: ParameterCounts,
    cluster: Cluster,
    conditions: Conditions,
    flops: dict[str, ClipFlops],
) -> RunCosts:
    """Costs of a run; `flops` remembers those of each bucket by its shape and micro-batch between calls."""
    buckets = config.buckets(cluster.world)
    found = []
    for bucket, share in zip(buckets, _shares_of_steps(config, buckets), strict=True):
        memory, clip, time = step_memory(config, counts, bucket, cluster.world), None, None
        if config.task is TaskKind.text_to_video:
            key = f"{bucket.name} {bucket.micro_batch} {config.data.access.name}"
            if key not in flops:
                flops[key] = clip_flops(config, bucket)
            clip = flops[key]
            time = step_time(config, counts, bucket, clip, cluster)
        found.append(BucketCosts(bucket, share, memory, clip, time))
    return RunCosts(config, cluster, counts, conditions, found)


def _shares_of_steps(config: TrainConfig, buckets: list[Bucket]) -> list[float]:
    """How often each bucket's turn is, which depends on the clips: taken as equal, but for a share of images that is set."""
    images = config.data.image_share
    weights = [1.0] * len(buckets)
    if images is not None:
        of_kind = {kind: sum((bucket.frames == 1) is kind for bucket in buckets) for kind in (True, False)}
        samples = [(images if b.frames == 1 else 1 - images) / of_kind[b.frames == 1] for b in buckets]
        weights = [share / bucket.global_batch for share, bucket in zip(samples, buckets, strict=True)]
    return [weight / sum(weights) for weight in weights]
