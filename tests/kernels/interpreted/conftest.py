"""What every interpreted case gets: buffers that start as NaN, programs in a shuffled order, and a quicker interpreter."""

import math
import random
from collections.abc import Iterator

import pytest
import torch

from muybridge.kernels.dispatch import INTERPRETED


@pytest.fixture(autouse=True, scope="session")
def cheap_helper_calls() -> None:
    """The interpreter rewires triton.language at every call of a helper, which takes 3/4 of the time; once is enough."""
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter._patch_lang(tl.sum.fn)  # for the helpers of Triton itself, which see another module than ours do
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    """In deterministic mode torch fills every uninitialised tensor with NaN: an element that no program writes shows."""
    assert INTERPRETED
    torch.use_deterministic_algorithms(True)
    assert torch.ones(2).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def shuffled_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs programs one after another in order; a GPU does not, so neither does a test."""
    from triton.runtime.interpreter import interpreter_builder

    place, size = interpreter_builder.set_grid_idx, interpreter_builder.set_grid_dim
    grid = [1, 1, 1]
    order: list[int] = []

    def resize(x: int, y: int, z: int) -> None:
        grid[:] = [x, y, z]
        order[:] = random.Random(0).sample(range(math.prod(grid)), math.prod(grid))
        size(x, y, z)

    def shuffle(x: int, y: int, z: int) -> None:
        index = order[x + grid[0] * (y + grid[1] * z)]
        place(index % grid[0], index // grid[0] % grid[1], index // (grid[0] * grid[1]))

    monkeypatch.setattr(interpreter_builder, "set_grid_dim", resize)
    monkeypatch.setattr(interpreter_builder, "set_grid_idx", shuffle)
