"""How DeepSpeed shards and computes: the settings of a run, and what DeepSpeed is told of them for a model's sizes."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"


@dataclass
class EngineConfig:
    """How DeepSpeed shards and computes."""

    # ZeRO stage: 0 replicates everything, 1 shards optimizer states, 2 also gradients, 3 also weights.
    zero: int = 1
    # bf16 keeps bf16 weights with fp32 master weights in the optimizer; fp32 is for CPU runs and debugging.
    precision: Precision = Precision.bf16
    # Optimizer states, fp32 master weights and their averages in the memory of the host, where a step then runs on its cores: for
    # weights that just fit a GPU, or long accumulation. off keeps all on the GPU.
    offload_optimizer: bool = False
    # ZeRO 3 over several nodes: so many neighbouring processes, those of a node, together keep a second copy of the weights, from
    # which the backward gathers them without the network (hpZ of ZeRO++, arXiv:2306.10209). null keeps none.
    node_shards: int | None = None
    # Elements in one gradient reduction (and one all-gather); smaller needs less memory, larger hides more latency.
    bucket_elements: int = 50_000_000
    # Seconds a collective may take; above the limits of `watchdog`, which says more about who is to blame.
    timeout_seconds: int = 3600

    def faults(self, field: str) -> list[str]:
        found = []
        if self.zero not in (0, 1, 2, 3):
            found.append(f"{field}.zero={self.zero} must be 0, 1, 2 or 3")
        if self.zero == 0 and self.precision is Precision.bf16:
            found.append(
                f"{field}.zero=0 must be 1 or more with {field}.precision=bf16 "
                "(DeepSpeed's stage-0 bf16 optimizer shifts Adam's bias correction)"
            )
        if self.offload_optimizer and self.zero == 0:
            found.append(
                f"{field}.offload_optimizer=true must come with {field}.zero=1, 2 or 3 (stage 0 has nothing apart)"
            )
        if self.node_shards is not None and (self.zero != 3 or self.node_shards < 2):
            found.append(f"{field}.node_shards={self.node_shards} must be 2 or more, with {field}.zero=3, or null")
        for name in ("bucket_elements", "timeout_seconds"):
            if getattr(self, name) < 1:
                found.append(f"{field}.{name}={getattr(self, name)} must be at least 1")
        return found


# Parameters of so many elements or fewer stay gathered at ZeRO 3: a gather of 0.2 MB lasts as long as its latency. Biases, norms
# and modulation tables are below it at every width (the tables of 14B have 30 720), matrices above.
PERSISTENT_ELEMENTS = 100_000


def deepspeed_settings(
    config: EngineConfig, *, micro_batch: int, gradient_clipping: float, largest_gather: int, elements: int
) -> dict[str, Any]:
    """What `deepspeed.initialize` is given for a model of so many `elements`, of which ZeRO 3 gathers `largest_gather` at once."""
    on_cuda = torch.cuda.is_available()
    zero: dict[str, Any] = {
        "stage": config.zero,
        # What a smaller model cannot fill would only be reserved.
        "reduce_bucket_size": min(config.bucket_elements, elements),
        "allgather_bucket_size": min(config.bucket_elements, elements + elements % 2),  # must be even
        # The reduction in a side stream needs CUDA; on the CPU it only adds copies.
        "overlap_comm": on_cuda,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_cuda}
    if config.zero == 3:
        zero |= stage3_settings(largest_gather, elements)
        zero["zero_hpz_partition_size"] = config.node_shards or 1
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,  # differs by bucket: `backward` is told the last micro-batch of a step
        "gradient_clipping": gradient_clipping,  # the default would be 1.0
        # The check is the default: without it, bf16 would apply a gradient that is not finite.
        "bf16": {"enabled": config.precision is Precision.bf16, "check_grad_overflow": True},
        "zero_optimization": zero,
        # Its own optimizer for the host would be compiled first; torch's fused AdamW runs there as well.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def stage3_settings(largest_gather: int, elements: int) -> dict[str, int]:
    """How much of a model ZeRO 3 holds gathered, in elements, given its largest gather (a block's) and all it has.

    DeepSpeed's own numbers know no model: the 1e9 elements that it may hold gathered are all of a model of 1 B, and of one of 14 B
    2 GB, where two blocks are 1.4 GB.
    """
    return {
        # While a block computes, the next one is fetched, and no more: DeepSpeed goes on until it has so many.
        "stage3_prefetch_bucket_size": largest_gather,
        # The block that computes, the one that is fetched, and one whose memory is not free yet; the others, of which the time and
        # text embeddings are the largest, are no larger than a block.
        "stage3_max_live_parameters": 3 * largest_gather,
        # The last block stays from its forward to its backward, between which there is only the head.
        "stage3_max_reuse_distance": largest_gather,
        "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
        # A model of many small tensors (LoRA) is not kept whole for that.
        "stage3_model_persistence_threshold": max(PERSISTENT_ELEMENTS, elements // 50),
    }
