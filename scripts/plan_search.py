"""Other settings and sizes than the ones asked for: which fit, which are the smallest, and what each change gains."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ..data.config import Access
from ..models.diffusion.conditioning import ConditioningForm
from ..train.activations import ActivationPolicy
from ..train.config import TaskKind, TrainConfig
from ..train.config_rules import engine_faults, parallel_faults, process_faults
from ..train.cost_rates import Cluster
from ..train.costs import ClipFlops
from ..train.costs_memory import POLICIES
from ..train.costs_run import Conditions, RunCosts, run_costs
from ..train.memory import ParameterCounts

# Times that differ by less are the same to a prediction.
ALIKE = 1.02
# Of the memory, what a recommendation leaves free: PyTorch's cache has gaps, and no formula here has been checked to the GiB.
SPARE = 0.05
# Nodes that are tried when the smallest cluster is looked for.
NODES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class Choice:
    """Settings that trade memory for time, without another result."""

    policy: ActivationPolicy
    offload_inputs: bool
    sequence: int
    zero: int
    offload_optimizer: bool
    micro_batch: int

    @classmethod
    def of(cls, config: TrainConfig) -> "Choice":
        """Those of a run's settings."""
        engine = config.deepspeed
        return cls(
            config.activations.policy, config.activations.offload, config.parallel.sequence, engine.zero, engine.offload_optimizer,
            config.micro_batch,
        )  # fmt: skip

    def applied_to(self, config: TrainConfig) -> TrainConfig:
        """The run's settings with these."""
        return replace(
            config,
            micro_batch=self.micro_batch,
            activations=replace(config.activations, policy=self.policy, offload=self.offload_inputs),
            parallel=replace(config.parallel, sequence=self.sequence),
            deepspeed=replace(config.deepspeed, zero=self.zero, offload_optimizer=self.offload_optimizer),
        )

    def overrides(self, before: "Choice") -> list[str]:
        """What to write on the command line to come from `before` to these."""
        values = {
            "activations.policy": (before.policy.name, self.policy.name),
            "activations.offload": (before.offload_inputs, self.offload_inputs),
            "parallel.sequence": (before.sequence, self.sequence),
            "deepspeed.zero": (before.zero, self.zero),
            "deepspeed.offload_optimizer": (before.offload_optimizer, self.offload_optimizer),
            "micro_batch": (before.micro_batch, self.micro_batch),
        }
        return [f"{name}={str(new).lower()}" for name, (old, new) in values.items() if new != old]


@dataclass
class Search:
    """Costs of variants of one run."""

    config: TrainConfig
    counts: ParameterCounts
    conditions: Conditions
    _flops: dict[str, ClipFlops] = field(default_factory=dict)

    def costs(self, cluster: Cluster, choice: Choice | None = None) -> RunCosts:
        """Costs on a cluster, of the settings as they are or with a choice."""
        config = self.config if choice is None else choice.applied_to(self.config)
        return run_costs(config, self.counts, cluster, self.conditions, self._flops)

    def fastest_that_fits(self, cluster: Cluster) -> RunCosts | None:
        """The fastest choice that leaves `SPARE` of these GPUs; None where none does, or the batch does not close with any.

        Of those that hardly differ, the one that changes least.
        """
        fitting = [costs for choice in self._choices(cluster) if has_room(costs := self.costs(cluster, choice))]
        best = min((costs.step_seconds or 0.0 for costs in fitting), default=0.0)
        close = [costs for costs in fitting if (costs.step_seconds or 0.0) <= ALIKE * best]
        before = Choice.of(self.config)
        return min(close, key=lambda costs: len(Choice.of(costs.config).overrides(before)), default=None)

    def smallest_that_fits(self, cluster: Cluster) -> RunCosts | None:
        """The same on the fewest nodes, each as large as those of `cluster`."""
        for smaller in self.clusters(cluster):
            if found := self.fastest_that_fits(smaller):
                return found
        return None

    def least_memory(self, cluster: Cluster) -> RunCosts | None:
        """The choice that takes the least memory; None where the batch closes with none."""
        return min(
            (self.costs(cluster, choice) for choice in self._choices(cluster)), key=lambda c: c.peak, default=None
        )

    def clusters(self, cluster: Cluster) -> Iterator[Cluster]:
        """From one node up: what a machine has besides is paid for with its GPUs."""
        for nodes in sorted({*NODES, cluster.nodes}):
            yield replace(cluster, nodes=nodes)

    def single_changes(self, asked: RunCosts) -> list[tuple[list[str], RunCosts]]:
        """One setting changed at a time, where that takes less memory than what was asked for; most gained first."""
        cluster, before = asked.cluster, Choice.of(self.config)
        tried: list[tuple[list[str], RunCosts]] = []
        for choice in self._choices(cluster):
            # A policy and what it does with its inputs count as one.
            sections = {
                text.partition("=")[0].replace("activations.offload", "activations.policy")
                for text in choice.overrides(before)
            }
            if len(sections) == 1:
                tried.append((choice.overrides(before), self.costs(cluster, choice)))
        data = self.config.data
        # A clip's known frames are encoded for each draw of them.
        can_cache = self.config.conditioning.form is not ConditioningForm.channels
        if self.config.task is TaskKind.text_to_video and data.access is not Access.latents and can_cache:
            latents = data.latents or "latents"
            cached = replace(self.config, data=replace(data, access=Access.latents, latents=latents))
            if not cached.faults(cluster.world):
                costs = run_costs(cached, self.counts, cluster, self.conditions, self._flops)
                tried.append((["data.access=latents", *([] if data.latents else [f"data.latents={latents}"])], costs))
        for nodes in (2 * cluster.nodes, 4 * cluster.nodes):
            more = replace(cluster, nodes=nodes)
            if self.can_be(more, before):
                tried.append(([f"nodes={nodes}"], self.costs(more)))
        better = [(texts, costs) for texts, costs in tried if costs.peak < asked.peak]
        return sorted(better, key=lambda one: one[1].peak)

    def _choices(self, cluster: Cluster) -> Iterator[Choice]:
        asked = Choice.of(self.config)
        policies: list[tuple[ActivationPolicy, bool]] = [(asked.policy, asked.offload_inputs)]
        sequences, zeros, offloads = [asked.sequence], [asked.zero], [asked.offload_optimizer]
        if self.config.task is TaskKind.text_to_video:
            policies += [(policy, False) for policy in POLICIES] + [(ActivationPolicy.block, True)]
            if self.config.data.access is not Access.stream:
                sequences += [1, 2, 4, 8]
        zeros += [stage for stage in (2, 3) if stage > asked.zero > 0]
        offloads += [True] if asked.zero > 0 else []
        combinations = itertools.product(
            dict.fromkeys(policies),
            dict.fromkeys(sequences),
            dict.fromkeys(zeros),
            dict.fromkeys(offloads),
            dict.fromkeys([asked.micro_batch, 1]),
        )
        for (policy, inputs), sequence, zero, offload, micro in combinations:
            choice = Choice(policy, inputs, sequence, zero, offload, micro)
            is_in_node = cluster.gpus_per_node % sequence == 0 or choice == asked
            if is_in_node and self.can_be(cluster, choice):
                yield choice

    def can_be(self, cluster: Cluster, choice: Choice) -> bool:
        """Whether training takes these settings on so many GPUs, and a step's samples fill all places."""
        config = choice.applied_to(self.config)
        # Of all rules, those that a choice can break: the others go through files.
        own = [*config.activations.faults("activations"), *config.deepspeed.faults("deepspeed")]
        if own or process_faults(config, cluster.world) or parallel_faults(config) or engine_faults(config):
            return False
        return config.global_batch % (config.micro_batch * config.data_groups(cluster.world)) == 0


def has_room(costs: RunCosts) -> bool:
    """Whether it fits with something to spare."""
    return costs.peak <= (1 - SPARE) * costs.cluster.gpu.memory_bytes
