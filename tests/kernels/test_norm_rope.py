"""RMSNorm and rotary positions as the rest of the project calls them, on the CPU: contract, gradients, compile, fake tensors."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from muybridge.kernels.dispatch import INTERPRETED, Backend, forced
from muybridge.kernels.norm_rope import (
    Rope,
    build_packed_rope,
    build_rope,
    norm_rope_backward,
    norm_rope_forward,
    rms_norm_heads,
    rms_norm_rope,
    rope_axis_pairs,
)

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 replaces the CPU path tested here")

CPU = torch.device("cpu")
EPS = 1e-6
HEADS = 2


def inputs(length: int = 12, head_width: int = 16, **options: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    width = HEADS * head_width
    return torch.randn(2, length, width, requires_grad=True, **options), torch.randn(
        width, requires_grad=True, **options
    )


def grid(head_width: int = 16) -> Rope:
    return build_rope(2, 3, 2, head_width=head_width, device=CPU)


def packed() -> Rope:
    """Every sample has positions of its own."""
    coordinates = torch.randint(0, 40, (2, 12, 3), generator=torch.Generator().manual_seed(0))
    return build_packed_rope(coordinates, positions=40, head_width=16, device=CPU)


def function(x: Tensor, weight: Tensor, rope: Rope | None) -> Tensor:
    if rope is None:
        return rms_norm_heads(x, weight, heads=HEADS, eps=EPS)
    return rms_norm_rope(x, weight, rope, heads=HEADS, eps=EPS)


def operator(x: Tensor, weight: Tensor, rope: Rope | None) -> Tensor:
    positions = (None, None, ()) if rope is None else (rope.table, rope.coordinates, rope.axis_pairs)
    return norm_rope_forward(x, weight, *positions, HEADS, EPS, x.dtype)[0]


both = pytest.mark.parametrize("run", [function, operator])
ropes = pytest.mark.parametrize("rope", [None, grid(), packed()], ids=["none", "grid", "packed"])


@both
def test_norm_is_over_all_heads_together(run: Callable[..., Tensor]) -> None:
    x = torch.zeros(1, 1, 4)
    x[0, 0, 0] = 3.0  # rms is 1.5
    out = run(x, torch.tensor([1.0, 1.0, 1.0, 1.0]), None)
    torch.testing.assert_close(out, torch.tensor([[[[2.0, 0.0], [0.0, 0.0]]]]))
    x, weight = inputs()
    expected = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, EPS).unflatten(-1, (HEADS, -1))
    torch.testing.assert_close(run(x, weight, None), expected)


@both
def test_pairs_turn_by_the_position_on_their_axis(run: Callable[..., Tensor]) -> None:
    """Each of a head's three pairs (1, 0) becomes (cos, sin) of the token's frame, row or column (of frequency 1)."""
    rope = build_packed_rope(torch.tensor([[1, 2, 3]]), positions=4, head_width=6, device=CPU)
    assert rope.axis_pairs == (1, 1, 1)
    x = torch.tensor([1.0, 0.0] * 6).view(1, 1, 12)
    out = run(x, torch.full((12,), 0.5**0.5), rope)
    angles = torch.tensor([1.0, 2.0, 3.0])
    expected = torch.stack((angles.cos(), angles.sin()), -1).flatten()
    torch.testing.assert_close(out, expected.expand(1, 1, 2, 6))


def test_slow_pairs_follow_the_published_frequencies() -> None:
    table = grid(head_width=128).table  # [3, 64, 2]
    frequencies = torch.cat([10000.0 ** -(torch.arange(n, dtype=torch.float64) / n) for n in (22, 21, 21)])
    torch.testing.assert_close(table[2, :, 1], (2 * frequencies).sin().float())


@pytest.mark.parametrize(
    ("head_width", "pairs"), [(128, (22, 21, 21)), (64, (12, 10, 10)), (6, (1, 1, 1)), (2, (1, 0, 0))]
)
def test_axes_share_a_head_as_wan_does(head_width: int, pairs: tuple[int, int, int]) -> None:
    assert rope_axis_pairs(head_width) == pairs


def test_grid_is_in_raster_order_and_built_once() -> None:
    assert grid().coordinates.tolist()[:7] == [
        [0, 0, 0],
        [0, 0, 1],
        [0, 1, 0],
        [0, 1, 1],
        [0, 2, 0],
        [0, 2, 1],
        [1, 0, 0],
    ]
    assert grid() is grid()
    assert grid().rotations is grid().rotations


def test_tables_built_while_sampling_can_be_trained_with() -> None:
    build_rope.cache_clear()
    x, weight = inputs()
    with torch.inference_mode():
        function(x, weight, grid())
    function(x, weight, grid()).sum().backward()
    assert x.grad is not None


def test_packed_positions_of_a_grid_are_the_grid() -> None:
    x, weight = inputs()
    shared = grid()
    own = build_packed_rope(shared.coordinates.expand(2, 12, 3), positions=3, head_width=16, device=CPU)
    assert torch.equal(function(x, weight, own), function(x, weight, shared))


@ropes
@both
def test_gradients_are_right(run: Callable[..., Tensor], rope: Rope | None) -> None:
    x, weight = inputs(dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, weight: run(x, weight, rope), (x, weight))


@ropes
def test_operator_and_reference_agree(rope: Rope | None) -> None:
    x, weight = inputs()
    grad_out = torch.randn(2, HEADS, 12, 16).transpose(1, 2)  # as attention's backward pass lays it out
    expected, actual = (run(x, weight, rope) for run in (function, operator))
    assert torch.equal(actual, expected)
    for a, b in zip(*(torch.autograd.grad(out, [x, weight], grad_out) for out in (actual, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@ropes
@both
def test_half_precision_is_rounded_once(
    run: Callable[..., Tensor], rope: Rope | None, weight_dtype: torch.dtype
) -> None:
    x, weight = (t.detach() for t in inputs())
    x, weight = x.bfloat16().requires_grad_(), weight.to(weight_dtype).requires_grad_()
    grad_out = torch.randn(2, 12, HEADS, 16).bfloat16()
    wide = [t.detach().float().requires_grad_() for t in (x, weight)]
    expected = function(wide[0], wide[1], rope)
    expected_grads = torch.autograd.grad(expected, wide, grad_out.float())
    out = run(x, weight, rope)
    grads = torch.autograd.grad(out, [x, weight], grad_out)
    assert torch.equal(out, expected.bfloat16())
    assert [g.dtype for g in grads] == [torch.bfloat16, weight_dtype]
    for grad, truth in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, truth.to(grad.dtype))


def test_result_may_have_another_dtype() -> None:
    x, weight = inputs()
    half = x.detach().bfloat16()
    out = rms_norm_rope(half, weight, grid(), heads=HEADS, eps=EPS, dtype=torch.float32)
    assert torch.equal(out, function(half.float(), weight, grid()))
    assert rms_norm_heads(x, weight, heads=HEADS, eps=EPS, dtype=torch.bfloat16).dtype == torch.bfloat16


@both
def test_strided_inputs_give_the_same(run: Callable[..., Tensor]) -> None:
    x, weight = (t.detach() for t in inputs())
    fused = torch.cat((torch.zeros_like(x), x, torch.zeros_like(x)), -1)
    for strided in (fused[..., 32:64], x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT):
        out = run(strided, weight, grid())
        torch.testing.assert_close(out, run(x, weight, grid()))
        assert out.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@ropes
def test_operators_pass_opcheck(rope: Rope | None, dtype: torch.dtype) -> None:
    x, weight = inputs(dtype=dtype)
    positions = (None, None, []) if rope is None else (rope.table, rope.coordinates, list(rope.axis_pairs))
    torch.library.opcheck(norm_rope_forward, (x, weight, *positions, HEADS, EPS, dtype))
    with torch.no_grad():
        out, rstd = norm_rope_forward(x, weight, *positions, HEADS, EPS, dtype)
        torch.library.opcheck(norm_rope_backward, (torch.randn_like(out), x, weight, rstd, *positions))


@ropes
@both
def test_compile_in_one_graph_gives_the_same(run: Callable[..., Tensor], rope: Rope | None) -> None:
    x, weight = inputs()
    expected = torch.autograd.grad(run(x, weight, rope).square().sum(), [x, weight])
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    unused = None if rope is None else dataclasses.replace(rope)  # what eager code keeps with a Rope is not there yet
    actual = torch.autograd.grad(compiled(x, weight, unused).square().sum(), [x, weight])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@ropes
@both
def test_checkpointing_gives_the_same(run: Callable[..., Tensor], rope: Rope | None) -> None:
    x, weight = inputs()
    expected = torch.autograd.grad(run(x, weight, rope).square().sum(), [x, weight])
    out = checkpoint(run, x, weight, rope, use_reentrant=False)
    actual = torch.autograd.grad(out.square().sum(), [x, weight])
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", [Backend.auto, Backend.reference])
def test_meta_tensors_carry_shape_dtype_and_gradients(backend: Backend) -> None:
    x, weight = inputs(device="meta", dtype=torch.bfloat16)
    rope = build_rope(2, 3, 2, head_width=16, device=torch.device("meta"))
    with forced(pointwise=backend):
        for out in (function(x, weight, rope), function(x, weight, None)):
            assert (out.shape, out.dtype, out.device.type) == ((2, 12, 2, 16), torch.bfloat16, "meta")
            assert out.is_contiguous()
            grads = torch.autograd.grad(out.sum(), [x, weight])
            assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype), (weight.shape, weight.dtype)]


def test_fake_cuda_tensors_take_the_operator() -> None:
    # Without gradients: the autograd engine of a CPU build of torch cannot walk through a CUDA graph, not even a fake one.
    with FakeTensorMode(), torch.no_grad():
        x, weight = inputs(device="cuda", dtype=torch.bfloat16)
        table = torch.zeros(5, 8, 2, device="cuda")
        rope = Rope(table, torch.zeros(12, 3, dtype=torch.int16, device="cuda"), rope_axis_pairs(16))
        out = function(x, weight, rope)
    assert (out.shape, out.device.type) == ((2, 12, 2, 16), "cuda")


@both
def test_empty_batch_is_allowed(run: Callable[..., Tensor]) -> None:
    x, weight = torch.empty(0, 12, 32, requires_grad=True), torch.ones(32, requires_grad=True)
    out = run(x, weight, grid())
    assert out.shape == (0, 12, 2, 16)
    grad_x, grad_weight = torch.autograd.grad(out.sum(), [x, weight])
    assert grad_x.shape == x.shape
    assert torch.equal(grad_weight, torch.zeros(32))


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **options)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("x", "weight", "options", "says"),
    [
        (zeros(12, 32), zeros(32), {}, "x [12, 32] torch.float32 on DEVICE, weight [32]"),
        (zeros(2, 12, 32), zeros(16), {}, "weight [16] torch.float32 on DEVICE, table [3, 8, 2]"),
        (zeros(2, 12, 32), zeros(2, 16), {}, "must be x [B, L, D] with weight [D]"),
        (zeros(2, 12, 32), zeros(32), {"heads": 0}, "heads=0 split into an even number of channels"),
        (zeros(2, 12, 32), zeros(32), {"heads": 5}, "heads=5 split into an even number of channels"),
        (zeros(2, 12, 32), zeros(32), {"heads": 32}, "heads=32 split into an even number of channels"),
        (zeros(2, 12, 32), zeros(32), {"heads": 1}, "half as many pairs as a head of heads=1 has channels"),
        (zeros(2, 12, 32).int(), zeros(32), {}, "must have x in float32"),
        (zeros(2, 12, 32), zeros(32).half(), {}, "the weight in float32 or the same"),
        (zeros(2, 12, 32), zeros(32), {"dtype": torch.int8}, "dtype=torch.int8 must be float32"),
        (zeros(2, 12, 32), zeros(32), {"dtype": torch.float64}, "dtype=torch.float64 must be float32"),
        (zeros(2, 11, 32), zeros(32), {}, "coordinates [12, 3] torch.int16 on DEVICE: coordinates must be [L, 3] or [B, L, 3]"),
        (zeros(2, 12, 32), zeros(32), {"eps": 0.0}, "eps=0.0 must be positive and finite"),
        (zeros(2, 12, 32), zeros(32), {"eps": float("nan")}, "eps=nan must be positive and finite"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_named(x: Tensor, weight: Tensor, options: dict[str, Any], says: str, device: str) -> None:
    rope = build_rope(2, 3, 2, head_width=16, device=torch.device(device))
    with pytest.raises(ValueError, match=re.escape(says.replace("DEVICE", device))):
        rms_norm_rope(x.to(device), weight.to(device), rope, **({"heads": HEADS, "eps": EPS} | options))


def test_positions_of_another_batch_are_named() -> None:
    x, weight = inputs()
    with pytest.raises(ValueError, match=re.escape("coordinates [2, 12, 3]")):
        function(x[:1], weight, packed())
    with pytest.raises(ValueError, match="rms_norm_heads: x"):
        rms_norm_heads(x[0], weight, heads=HEADS, eps=EPS)


def test_mixed_devices_are_named() -> None:
    x, weight = inputs()
    with pytest.raises(ValueError, match="must be on one device"):
        function(x, weight.to("meta"), grid())
    with pytest.raises(ValueError, match="must be on one device"):
        function(x.to("meta"), weight.to("meta"), grid())


def test_wrong_positions_are_named_when_they_are_built() -> None:
    where: dict[str, Any] = {"head_width": 16, "device": CPU}
    with pytest.raises(ValueError, match=re.escape("coordinates from -1 to 0 must be in [0, positions=4)")):
        build_packed_rope(torch.tensor([[0, -1, 0]]), positions=4, **where)
    with pytest.raises(ValueError, match=re.escape("coordinates from 0 to 4 must be in [0, positions=4)")):
        build_packed_rope(torch.tensor([[0, 0, 4]]), positions=4, **where)
    with pytest.raises(ValueError, match="coordinates on meta must be on the CPU"):
        build_packed_rope(torch.zeros(1, 3, device="meta"), positions=4, **where)
    with pytest.raises(ValueError, match="positions=32769 must be from 1 to 32768"):
        build_rope(32769, 1, 1, **where)
    rope = grid()
    for changes in (
        {"table": rope.table.double()},
        {"table": rope.table[:, :4]},
        {"axis_pairs": (1, 1, 1)},
        {"coordinates": rope.coordinates.long()},
        {"coordinates": rope.coordinates[:, :2]},
        {"coordinates": rope.coordinates.to("meta")},
    ):
        with pytest.raises(ValueError, match=r"Rope: table \[3, .*coordinates \[12"):
            replace(rope, **changes)
