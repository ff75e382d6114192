"""The residual, its norm and the gated residual in Triton's interpreter, which test_interpreted.py switches on.

Every case compares outputs and all gradients with fp64 mathematics.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from muybridge.kernels.dispatch import Backend, forced
from muybridge.kernels.gated_residual import gated_residual
from muybridge.kernels.modulated_norm import modulated_norm, residual_affine_norm, residual_modulated_norm

EPS = 1e-6
PLACES = (
    "modulated",
    "residual_modulated",
    "gated_residual_modulated",
    "residual_affine",
    "gated_residual_affine",
    "gated",
)


@dataclass(frozen=True)
class Case:
    """Where in a block (one of PLACES), sizes, and the dtypes of the stream and of branch and norm."""

    place: str
    tokens: int
    width: int
    batch: int = 1
    rows: int = 1
    stream: torch.dtype = torch.float32
    other: torch.dtype = torch.float16
    mean: float = 0.0

    def inputs(self) -> list[Tensor]:
        """x, branch, weight, bias and a table [B, R, 6, D] of gate, shift and scale (and three that nobody reads)."""
        generator = torch.Generator().manual_seed(self.tokens + self.width + self.rows)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        activations = (self.batch, self.tokens, self.width)
        x, branch = normal(*activations) + self.mean, normal(*activations)
        weight, bias, table = normal(self.width), normal(self.width), normal(self.batch, self.rows, 6, self.width)
        return [x.to(self.stream), branch.to(self.other), weight, bias, table]

    def grads(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(7)
        shape = (self.batch, self.tokens, self.width)
        return [torch.randn(*shape, generator=generator).to(dtype) for dtype in (self.stream, self.other)]

    def run(self, x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, table: Tensor) -> list[Tensor]:
        """x' and its norm, as far as the place has them."""
        gate, shift, scale = table.unbind(-2)[:3]
        dtype = self.other if x.dtype == self.stream else torch.float64
        if self.place == "modulated":
            return [modulated_norm(x, shift, scale, eps=EPS, dtype=dtype)]
        if self.place == "gated":
            return [gated_residual(x, branch, gate)]
        gated = gate if self.place.startswith("gated") else None
        if self.place.endswith("affine"):
            return [*residual_affine_norm(x, branch, weight, bias, gate=gated, eps=EPS, dtype=dtype)]
        return [*residual_modulated_norm(x, branch, shift, scale, gate=gated, eps=EPS, dtype=dtype)]

    def mathematics(self, x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, table: Tensor) -> list[Tensor]:
        """`run` in the plainest terms."""
        gate, shift, scale = table.repeat_interleave(self.tokens // self.rows, 1).unbind(-2)[:3]
        if self.place != "modulated":
            x = x + (gate * branch if self.place.startswith("gated") else branch)
        if self.place == "gated":
            return [x]
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
        normed = normed * weight + bias if self.place.endswith("affine") else normed * (1 + scale) + shift
        return [normed] if self.place == "modulated" else [x, normed]


NAMES = ("grad_x", "grad_branch", "grad_weight", "grad_bias", "grad_table")


def with_gradients(
    function: Callable[..., list[Tensor]], inputs: Sequence[Tensor], grads: Sequence[Tensor], trained: str = ""
) -> dict[str, Tensor]:
    """Outputs and gradients by name: of every input that matters, or of the one whose gradient is called `trained`."""
    leaves = [x.detach().requires_grad_(name == (trained or name)) for name, x in zip(NAMES, inputs, strict=True)]
    outputs = function(*leaves)
    grads = [grad.to(out.dtype) for grad, out in zip(grads[-len(outputs) :], outputs, strict=True)]
    named = {f"out{i}": out.detach() for i, out in enumerate(outputs)}
    wanted = {name: leaf for name, leaf in zip(NAMES, leaves, strict=True) if leaf.requires_grad}
    results = torch.autograd.grad(outputs, [*wanted.values()], grads, allow_unused=True)
    return named | {name: grad for name, grad in zip(wanted, results, strict=True) if grad is not None}


def check(case: Case) -> None:
    """Holds the error to twice that of eager code in the same dtypes, plus a floor where eager is lucky or exact.

    The floor is one rounding of the exact answer, and the fp32 rounding of a sum over a row and of one over the tokens, which
    grow with the square root of their lengths; a large mean is rounded in proportion, and spoils the norm by that much.
    """
    inputs, grads = case.inputs(), case.grads()
    exact = with_gradients(case.mathematics, [x.double() for x in inputs], [x.double() for x in grads])
    ours = with_gradients(case.run, inputs, grads)
    with forced(pointwise=Backend.reference):
        eager = with_gradients(case.run, inputs, grads)
    assert exact.keys() == ours.keys() == eager.keys()
    sums = torch.finfo(torch.float32).eps * (case.width**0.5 + case.tokens**0.5 + abs(case.mean))
    for name, truth in exact.items():
        assert (ours[name].dtype, ours[name].shape) == (eager[name].dtype, truth.shape)
        floor = (torch.finfo(ours[name].dtype).eps + sums) * truth.abs().max() if truth.numel() else 0
        error, allowed = ((result[name] - truth).abs().max() if truth.numel() else 0 for result in (ours, eager))
        assert error <= 2 * allowed + floor, f"{name}: error {error:.2e}, allowed {2 * allowed + floor:.2e}"


@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("place", PLACES)
def test_every_place_and_kind_of_row_matches_fp64(place: str, rows: int) -> None:
    check(Case(place, tokens=6, width=96, batch=2, rows=rows))


@pytest.mark.parametrize("place", PLACES)
def test_half_precision_stream_matches_fp64(place: str) -> None:
    check(Case(place, tokens=5, width=160, stream=torch.float16))
    check(Case(place, tokens=5, width=160, stream=torch.float16, other=torch.float32))


@pytest.mark.parametrize("tokens", [1, 17, 63, 129])
def test_odd_lengths_match_fp64(tokens: int) -> None:
    check(Case("gated_residual_affine", tokens, 40))


def test_long_sequences_pass_every_chunk() -> None:
    check(Case("gated_residual_modulated", 1000, 16))
    check(Case("gated", 1000, 16, rows=10))


@pytest.mark.parametrize("width", [1, 8, 100, 128, 1000, 1152, 1536, 5120])
def test_every_kind_of_width_matches_fp64(width: int) -> None:
    check(Case("gated_residual_modulated", 5, width, stream=torch.float32, other=torch.float32))


def test_a_large_mean_does_not_cancel_the_variance() -> None:
    check(Case("modulated", 5, 160, other=torch.float32, mean=1000.0))
    check(Case("gated_residual_affine", 5, 160, other=torch.float32, mean=-3000.0))


@given(
    st.sampled_from(PLACES),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 7),
    st.integers(4, 300),
    st.sampled_from([torch.float32, torch.float16]),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_shape_matches_fp64(
    place: str, batch: int, rows: int, tokens_per_row: int, width: int, dtype: torch.dtype
) -> None:
    check(Case(place, rows * tokens_per_row, width, batch, rows, other=dtype))


@pytest.mark.parametrize("rows", [1, 4])
def test_strides_of_tables_and_activations_change_no_bit(rows: int) -> None:
    case = Case("gated_residual_modulated", tokens=4, width=48, batch=2, rows=rows)
    x, branch, weight, bias, table = case.inputs()
    expected = with_gradients(case.run, [x, branch, weight, bias, table], case.grads())
    x = x.transpose(1, 2).contiguous().transpose(1, 2)  # as a patch embedding leaves it
    branch = torch.stack([branch, branch], 2)[:, :, 1]
    table = table.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)  # rows without unit stride
    ours = with_gradients(
        case.run, [x, branch, weight, bias, table], [grad.mT.contiguous().mT for grad in case.grads()]
    )
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_every_table_has_strides_of_its_own() -> None:
    x, branch, _, _, table = Case("", tokens=4, width=48, batch=2, rows=4).inputs()
    gate, shift, scale = (part.contiguous() for part in table.unbind(-2)[:3])
    expected = residual_modulated_norm(x, branch, shift, scale, gate=gate, eps=EPS, dtype=torch.float32)
    gate, shift, scale = (
        table[:, :, 0],
        shift.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([scale] * 2, 1)[:, 4:],
    )
    ours = residual_modulated_norm(x, branch, shift, scale, gate=gate, eps=EPS, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_norm_is_that_of_the_stream_as_it_was_rounded() -> None:
    case = Case("gated_residual_modulated", tokens=4, width=48, stream=torch.float16, other=torch.float32)
    x, branch, _, _, table = case.inputs()
    gate, shift, scale = table.unbind(-2)[:3]
    stream, normed = residual_modulated_norm(x, branch, shift, scale, gate=gate, eps=EPS, dtype=torch.float32)
    assert torch.equal(normed, modulated_norm(stream, shift, scale, eps=EPS, dtype=torch.float32))


def test_backward_repeats_bit_for_bit() -> None:
    case = Case("gated_residual_affine", tokens=40, width=32)
    first, second = (with_gradients(case.run, case.inputs(), case.grads()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("place", PLACES)
def test_empty_batch_gives_empty_results(place: str) -> None:
    check(Case(place, tokens=6, width=32, batch=0, rows=3))


def test_outputs_may_be_used_alone() -> None:
    case = Case("gated_residual_modulated", tokens=4, width=32)
    x, branch, weight, bias, table = (tensor.requires_grad_() for tensor in case.inputs())
    for used in (0, 1):
        ours = torch.autograd.grad(case.run(x, branch, weight, bias, table)[used].sum(), [x, branch, table])
        with forced(pointwise=Backend.reference):
            eager = torch.autograd.grad(case.run(x, branch, weight, bias, table)[used].sum(), [x, branch, table])
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=2e-3)


@pytest.mark.parametrize("place", PLACES)
def test_each_gradient_alone_is_the_same(place: str) -> None:
    case = Case(place, tokens=4, width=32)
    expected = with_gradients(case.run, case.inputs(), case.grads())
    for trained in expected.keys() & {*NAMES}:
        alone = with_gradients(case.run, case.inputs(), case.grads(), trained)
        assert torch.equal(alone[trained], expected[trained]), trained
