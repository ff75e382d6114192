"""GPUs that a run may be planned for: memory and speeds as their makers' data sheets give them."""

import difflib
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """One GPU. Rates are peaks of dense products, without sparsity."""

    name: str
    # What torch reports in all, a little below the size on the label.
    memory_bytes: int
    bf16_flops: float  # FLOP/s of tensor cores, bf16 with fp32 sums
    fp8_flops: float | None  # FLOP/s, null without fp8
    fp32_flops: float  # FLOP/s of ordinary cores
    memory_bytes_per_second: float
    # Bytes/s that one GPU sends to others of its node: NVLink through switches, or PCIe.
    node_bytes_per_second: float
    # All of them in what torch.cuda.get_device_name() says, none of `not_in_name`.
    in_name: tuple[str, ...]
    not_in_name: tuple[str, ...]
    source: str

    @property
    def memory_gib(self) -> float:
        return self.memory_bytes / GIB


def _gpu(
    name: str,
    memory_gib: float,
    *,
    tflops: tuple[float, float | None, float],  # bf16, fp8, fp32
    gb_per_second: tuple[float, float],  # of memory, to another GPU of the node in one direction
    in_name: str,
    not_in_name: str = "",
    source: str,
) -> GPU:
    bf16, fp8, fp32 = tflops
    memory, node = gb_per_second
    words = tuple(in_name.split()), tuple(not_in_name.split())
    return GPU(
        name, int(memory_gib * GIB), bf16 * 1e12, None if fp8 is None else fp8 * 1e12, fp32 * 1e12, memory * 1e9, node * 1e9,
        *words, source,
    )  # fmt: skip


_A100 = (312.0, None, 19.5)
_H100 = (989.4, 1978.9, 66.9)
# NVLink's figures on the sheets are both directions together; PCIe 4.0 and 5.0 x16 have 32 and 64 GB/s in one.
GPUS = [
    _gpu("a100_40gb", 39.4, tflops=_A100, gb_per_second=(1555, 300), in_name="A100 40GB", not_in_name="PCI",
         source="NVIDIA A100 data sheet (SXM)"),
    _gpu("a100", 79.1, tflops=_A100, gb_per_second=(2039, 300), in_name="A100 80GB", not_in_name="PCI",
         source="NVIDIA A100 data sheet (SXM)"),
    _gpu("a100_pcie", 79.1, tflops=_A100, gb_per_second=(1935, 32), in_name="A100 80GB PCI",
         source="NVIDIA A100 data sheet (PCIe)"),
    _gpu("h100", 79.1, tflops=_H100, gb_per_second=(3350, 450), in_name="H100", not_in_name="PCI NVL",
         source="NVIDIA H100 data sheet (SXM)"),
    _gpu("h100_pcie", 79.1, tflops=(756.0, 1513.0, 51.2), gb_per_second=(2039, 64), in_name="H100 PCI",
         source="NVIDIA H100 data sheet (PCIe)"),
    _gpu("h200", 139.8, tflops=_H100, gb_per_second=(4800, 450), in_name="H200", not_in_name="NVL GH200",
         source="NVIDIA H200 data sheet (SXM)"),
    _gpu("b200", 178.4, tflops=(2250.0, 4500.0, 75.0), gb_per_second=(7700, 900), in_name="B200", not_in_name="GB200",
         source="NVIDIA HGX B200 data sheet, an eighth of the board"),
    _gpu("l40s", 44.4, tflops=(362.0, 733.0, 91.6), gb_per_second=(864, 32), in_name="L40S",
         source="NVIDIA L40S data sheet"),
    _gpu("rtx_6000_ada", 47.4, tflops=(364.2, 728.5, 91.1), gb_per_second=(960, 32), in_name="RTX 6000 Ada",
         source="NVIDIA RTX 6000 Ada data sheet"),
    _gpu("rtx_4090", 23.6, tflops=(165.2, 330.3, 82.6), gb_per_second=(1008, 32), in_name="RTX 4090",
         source="NVIDIA Ada GPU architecture paper, appendix A"),
    _gpu("rtx_5090", 31.3, tflops=(209.5, 419.0, 104.8), gb_per_second=(1792, 64), in_name="RTX 5090",
         source="NVIDIA RTX Blackwell GPU architecture paper, appendix A"),
]  # fmt: skip


def gpu_named(name: str, field: str) -> GPU:
    """The GPU of that name; `field` is what named it. Raises ValueError with the nearest names for one that is not known."""
    known = {gpu.name: gpu for gpu in GPUS}
    words = name.lower().replace("-", "_").replace(" ", "_")
    if words not in known:
        nearest = difflib.get_close_matches(words, known, n=3, cutoff=0.4)
        raise ValueError(
            f"{field}={name} must be one of {', '.join(known)}"
            + (f"; did you mean {' or '.join(nearest)}?" if nearest else "")
        )
    return known[words]


def recognised_gpu(device_name: str) -> GPU | None:
    """The GPU of what torch.cuda.get_device_name() says; None where its speeds are not known."""
    for gpu in GPUS:
        has_all = all(word in device_name for word in gpu.in_name)
        if has_all and not any(word in device_name for word in gpu.not_in_name):
            return gpu
    return None
