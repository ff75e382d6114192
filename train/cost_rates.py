"""How fast the parts of a step run on a cluster: peaks of the GPUs times the share of them that kernels reach.

Every share is an estimate until a measurement replaces it: none was taken on the cluster that is planned for. They are not adjusted
to make a prediction look right; `muybridge plan` prints its error against each measured step instead.
"""

from dataclasses import dataclass

from .engine_config import Precision
from .gpus import GPU

# Shares of the peak for dense products, from figures of H100 and H200 (peak 989 TFLOP/s in bf16), taken over for other GPUs.
GEMM_SHARE = 700 / 989  # cuBLAS at the shapes of these models; 790 at 8192^3 (estimate)
ATTENTION_FORWARD_SHARE = 700 / 989  # cuDNN's: 702 published for heads of 128
ATTENTION_BACKWARD_SHARE = 610 / 989  # cuDNN's: 612 published
MASKED_FORWARD_SHARE = (
    560 / 989
)  # our kernels, which serve masks (estimate from their serial bound of 471 and TLX's 580)
MASKED_BACKWARD_SHARE = 430 / 989  # our kernels (estimate; serial bound 382)
# The frozen autoencoder encodes in fp32, which convolutions round to tf32: half of bf16's peak, of which 3-D ones reach a third
# (assumed; 250 to 400 TFLOP/s in bf16).
CONV_SHARE = 0.5 / 3
FP32_SHARE = 0.8  # products on ordinary cores (estimate)
FP8_SHARE = 1000 / 1979  # cuBLAS's scaled products at the shapes of these models, casts apart (estimate)
MEMORY_SHARE = 4.0 / 4.8  # what kernels that copy reach of an H200's bandwidth (estimate)
NETWORK_SHARE = 0.8  # of links, what NCCL's large collectives reach (estimate)
HOST_LINK_BYTES_PER_SECOND = 50e9  # pinned copies over PCIe 5 (estimate)
HOST_MEMORY_BYTES_PER_SECOND = (
    40e9  # of the host's memory, for one process of eight: the optimizer on the CPU (estimate)
)

# Bytes moved for an element that is cast to fp8: it is read for the largest value, read again, and written (estimate).
FP8_CAST_BYTES = 5

# What the GPU waits for Python where its own work is shorter: launches of a block's forward and backward (estimates).
LAUNCHES_PER_BLOCK = 25, 45
LAUNCHES_PER_COMPILED_BLOCK = 18, 30
LAUNCH_SECONDS = 7e-6
# Of the time of a backward, what the reduction of gradients can hide behind: the last gradients come when it is over.
HIDDEN_SHARE = 0.9


@dataclass(frozen=True)
class Cluster:
    """The machines of a plan, all alike."""

    gpu: GPU
    nodes: int
    gpus_per_node: int
    # Of one GPU to other nodes, in one direction.
    network_bytes_per_second: float = 50e9

    @property
    def world(self) -> int:
        """Processes, one a GPU."""
        return self.nodes * self.gpus_per_node

    def link_bytes_per_second(self, ranks: int) -> float:
        """What NCCL moves per rank among so many neighbours: rings over all of a node's network ports where they are in several."""
        inside = self.gpu.node_bytes_per_second
        between = self.gpus_per_node * self.network_bytes_per_second
        return NETWORK_SHARE * (inside if self._are_in_node(ranks) else min(inside, between))

    def exchange_bytes_per_second(self, ranks: int) -> float:
        """The same for an all-to-all, where most of what a rank sends goes over its own port once there are several nodes."""
        inside = self.gpu.node_bytes_per_second
        return NETWORK_SHARE * (inside if self._are_in_node(ranks) else min(inside, self.network_bytes_per_second))

    def _are_in_node(self, ranks: int) -> bool:
        """Whether groups of so many neighbours never lie in two nodes."""
        return self.nodes == 1 or self.gpus_per_node % ranks == 0


@dataclass(frozen=True)
class Rates:
    """FLOP/s that kernels reach on one GPU, and bytes/s of its memory."""

    gemm: float
    attention_forward: float
    attention_backward: float
    conv: float
    memory: float


def rates(gpu: GPU, precision: Precision, *, is_masked: bool) -> Rates:
    """What kernels reach; `is_masked` says whether self-attention has a sparse pattern."""
    forward, backward = ATTENTION_FORWARD_SHARE, ATTENTION_BACKWARD_SHARE
    if is_masked:
        forward, backward = MASKED_FORWARD_SHARE, MASKED_BACKWARD_SHARE
    memory, conv = MEMORY_SHARE * gpu.memory_bytes_per_second, CONV_SHARE * gpu.bf16_flops
    if precision is Precision.fp32:
        fp32 = FP32_SHARE * gpu.fp32_flops
        return Rates(fp32, fp32, fp32, conv, memory)
    peak = gpu.bf16_flops
    return Rates(GEMM_SHARE * peak, forward * peak, backward * peak, conv, memory)


def peak_flops(gpu: GPU, precision: Precision) -> float:
    """What MFU is measured against: tensor cores in bf16, ordinary cores in fp32."""
    return gpu.bf16_flops if precision is Precision.bf16 else gpu.fp32_flops
