"""Compiles the transformer's blocks, each as one graph for each shape of its inputs, which all blocks share."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters, get_compilation_metrics

from ..kernels.dispatch import settings
from ..models.dit import DiT
from .activations import ActivationsConfig, keeps_results, traced_selective

# Graphs that one clip shape may take: with and without gradients, of a first block whose input has none (LoRA), for
# validation and for sample videos; as many again for what nobody thought of.
_GRAPHS_PER_SHAPE = 8


@dataclass
class CompileConfig:
    """Whether torch.compile makes code of the transformer's blocks."""

    # On: the operations between matmuls and kernels become few, at the cost of minutes at the start, when every clip shape is
    # compiled. Off: each operation is launched by itself.
    enabled: bool = False

    def faults(self, field: str) -> list[str]:
        return []


def compile_blocks(dit: DiT, config: CompileConfig, activations: ActivationsConfig, *, shapes: int) -> None:
    """Make each block run compiled code, for clips of so many shapes; the last rewiring of a model, before an engine wraps it.

    Only what is inside of a block's hooks is compiled, so that ZeRO 3 gathers and releases its weights around it. A block that
    cannot be one graph, or inputs that differ with every step, are errors and never a silent return to uncompiled code.
    """
    if not config.enabled:
        return
    settings()  # read from the environment here, for a graph may not set a global
    # It says of each traced `selective` what was seen to: a block does nothing in place.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    limit = _GRAPHS_PER_SHAPE * (shapes + 1)
    torch._dynamo.config.recompile_limit = max(limit, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.accumulated_recompile_limit = max(limit, torch._dynamo.config.accumulated_recompile_limit)
    for number, block in enumerate(dit.blocks):
        forward = traced_selective(block.forward) if keeps_results(activations, number) else block.forward
        # What is compiled belongs to the code of the function: the second block finds what the first one made.
        block.forward = torch.compile(forward, fullgraph=True, dynamic=False)
    run_block = dit.run_block

    def run_compiled(number: int, block: nn.Module, *inputs: object) -> Tensor:
        # Which results a block keeps is decided inside of its graph; from outside, it would be all or none.
        return block(*inputs) if keeps_results(activations, number) else run_block(number, block, *inputs)

    dit.run_block = run_compiled


class CompilationCount:
    """Tells of graphs that this process compiled since it was last asked, or since the count was made."""

    def __init__(self) -> None:
        self._seen = _graphs()

    def take(self) -> int:
        """How many there were."""
        graphs = _graphs()
        new, self._seen = graphs - self._seen, graphs
        return new

    def cause(self) -> str:
        """Why the last one was compiled: the guards that failed, where it was not the first one of its function."""
        reasons = [metrics.recompile_reason for metrics in get_compilation_metrics() if metrics.recompile_reason]
        return " ".join(reasons[-1].split()) if reasons else "new code"


def _graphs() -> int:
    return counters["stats"]["unique_graphs"]
