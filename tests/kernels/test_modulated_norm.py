"""The residual and its norm as the models call them, on the CPU: contract, gradients, compile, checkpointing, fake tensors."""

import importlib
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from muybridge.kernels import dispatch
from muybridge.kernels.gated_residual import gated_residual, gated_residual_backward, gated_residual_forward
from muybridge.kernels.modulated_norm import (
    modulated_norm,
    residual_affine_norm,
    residual_modulated_norm,
    residual_norm,
    residual_norm_backward,
)

pytestmark = pytest.mark.skipif(dispatch.INTERPRETED, reason="TRITON_INTERPRET=1 replaces the CPU path tested here")

Block = Callable[..., tuple[Tensor, ...]]


def inputs(rows: int = 3, *, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Tensor, ...]:
    """x, branch [2, 6, 8], weight, bias [8] and a table [2, R, 6, 8]."""
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    x, branch = (torch.randn(2, 6, 8, dtype=dtype, requires_grad=True, **options) for _ in range(2))
    weight, bias = (torch.randn(8, dtype=wide, requires_grad=True, **options) for _ in range(2))
    return x, branch, weight, bias, torch.randn(2, rows, 6, 8, dtype=wide, requires_grad=True, **options)


def public_block(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    """Everything a block calls, on one set of tensors."""
    shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(-2)
    norm: Any = {"eps": 1e-5, "dtype": branch.dtype}
    normed = modulated_norm(x, shift1, scale1, **norm)
    x, normed2 = residual_affine_norm(x, branch, weight, bias, gate=gate1, **norm)
    x, normed3 = residual_modulated_norm(x, branch, shift2, scale2, **norm)
    x, normed4 = residual_modulated_norm(x, branch, shift1, scale1, gate=gate2, **norm)
    return gated_residual(x, branch, gate2), normed, normed2, normed3, normed4


def operator_block(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    """The same through the operators, whose formulas are written out where there is no kernel."""
    shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(-2)
    dtype = branch.dtype
    normed = residual_norm(x, None, None, scale1, shift1, 1.0, 1e-5, dtype)[1]
    affine = (weight.expand(2, 1, 8), bias.expand(2, 1, 8))
    x, normed2 = residual_norm(x, branch, gate1, *affine, 0.0, 1e-5, dtype)[:2]
    x, normed3 = residual_norm(x, branch, None, scale2, shift2, 1.0, 1e-5, dtype)[:2]
    x, normed4 = residual_norm(x, branch, gate2, scale1, shift1, 1.0, 1e-5, dtype)[:2]
    return gated_residual_forward(x, branch, gate2), normed, normed2, normed3, normed4


BLOCKS = [public_block, operator_block]


def gradients(block: Block, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum(out.float().square().sum() for out in block(*tensors)), tensors)


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_is_what_the_model_computed_before(dtype: torch.dtype, rows: int) -> None:
    _, _, weight, bias, table = inputs(rows, dtype=torch.float32)
    x, branch = torch.randn(2, 6, 8), torch.randn(2, 6, 8).to(dtype)
    shift, scale, gate = table.unbind(-2)[:3]
    stream = torch.addcmul(x, branch, gate)
    affine = F.layer_norm(stream, (8,), weight, bias, 1e-6).to(dtype)
    modulated = torch.addcmul(shift, F.layer_norm(stream, (8,), eps=1e-6), 1 + scale).to(dtype)
    assert torch.equal(gated_residual(x, branch, gate), stream)
    assert torch.equal(modulated_norm(stream, shift, scale, eps=1e-6, dtype=dtype), modulated)
    for ours, normed in (
        (residual_affine_norm(x, branch, weight, bias, gate=gate, eps=1e-6, dtype=dtype), affine),
        (residual_modulated_norm(x, branch, shift, scale, gate=gate, eps=1e-6, dtype=dtype), modulated),
    ):
        assert torch.equal(ours[0], stream)
        assert torch.equal(ours[1], normed)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_gradients_are_right(rows: int, block: Block) -> None:
    assert torch.autograd.gradcheck(block, inputs(rows), atol=1e-6, fast_mode=True)


def test_a_row_serves_its_own_tokens() -> None:
    table = torch.arange(3.0).view(1, 3, 1).expand(1, 3, 8)
    ours = gated_residual(torch.zeros(1, 6, 8), torch.ones(1, 6, 8), table)
    assert ours[0, :, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_operators_pass_opcheck() -> None:
    x, branch, _, _, table = inputs(dtype=torch.bfloat16)
    x, (shift, scale, gate) = x.detach().float().requires_grad_(), table.unbind(-2)[:3]
    for given in ((None, None), (branch, None), (branch, gate)):
        torch.library.opcheck(residual_norm, (x, *given, scale, shift, 1.0, 1e-6, torch.bfloat16))
    torch.library.opcheck(gated_residual_forward, (x, branch, gate))


def test_backward_operators_pass_opcheck() -> None:
    with torch.no_grad():
        x, branch, _, _, table = inputs(dtype=torch.bfloat16)
        x, (shift, scale, gate) = x.float(), table.unbind(-2)[:3]
        stream, normed, mean, rstd = residual_norm(x, branch, gate, scale, shift, 1.0, 1e-6, torch.bfloat16)
        for needs in ([True] * 5, [False, True, False, True, False]):
            arguments: Any = (x, normed, stream, mean, rstd, branch, gate, scale, 1.0, torch.bfloat16, needs)
            torch.library.opcheck(residual_norm_backward, arguments)
            torch.library.opcheck(gated_residual_backward, (x, branch, gate, torch.bfloat16, needs[:2]))
        arguments = (None, normed, x, mean, rstd, None, None, scale, 1.0, x.dtype, [True, False, False, True, True])
        torch.library.opcheck(residual_norm_backward, arguments)


@pytest.mark.parametrize("block", BLOCKS)
def test_compile_in_one_graph_gives_the_same(block: Block) -> None:
    tensors = inputs(dtype=torch.float32)
    expected = gradients(block, tensors)
    actual = gradients(torch.compile(block, backend="aot_eager", fullgraph=True), tensors)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("block", BLOCKS)
def test_checkpointing_gives_the_same(block: Block) -> None:
    tensors = inputs(dtype=torch.bfloat16)
    expected = gradients(block, tensors)
    actual = gradients(lambda *x: checkpoint(block, *x, use_reentrant=False), tensors)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("block", BLOCKS)
def test_strides_change_no_bit(block: Block) -> None:
    x, branch, weight, bias, table = inputs(dtype=torch.float32)
    expected = block(x, branch, weight, bias, table)
    strided = block(x.mT.contiguous().mT, torch.stack([branch] * 2, 2)[:, :, 1], weight, bias, table.mT.contiguous().mT)
    assert all(torch.equal(a, b) for a, b in zip(strided, expected, strict=True))


def test_meta_tensors_carry_shapes_dtypes_and_gradients() -> None:
    x, branch, weight, bias, table = inputs(dtype=torch.bfloat16, device="meta")
    tensors = (x.detach().float().requires_grad_(), branch, weight, bias, table)
    out, *normed = public_block(*tensors)
    assert (out.shape, out.dtype) == (x.shape, torch.float32)
    assert all((n.shape, n.dtype) == (x.shape, torch.bfloat16) for n in normed)
    grads = gradients(public_block, tensors)
    assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in tensors]


def test_fake_cuda_tensors_take_the_operators() -> None:
    # Without gradients: the autograd engine of a CPU build of torch cannot walk through a CUDA graph, not even a fake one.
    with FakeTensorMode(), torch.no_grad():
        x, *rest = inputs(dtype=torch.bfloat16, device="cuda")
        outputs = public_block(x, *rest)
    assert all((out.shape, out.dtype, out.device.type) == (x.shape, torch.bfloat16, "cuda") for out in outputs)


def test_dispatch_is_asked_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def choose(op: str, x: Tensor) -> dispatch.Backend:
        asked.append(op)
        return dispatch.Backend.own

    for module in ("modulated_norm", "gated_residual"):
        # As an attribute of the package the module's name is the function.
        monkeypatch.setattr(importlib.import_module(f"muybridge.kernels.{module}"), "pointwise_backend", choose)
    tensors = inputs()
    for ours, expected in zip(public_block(*tensors), operator_block(*tensors), strict=True):
        assert torch.equal(ours, expected)
    assert asked == ["residual_norm"] * 4 + ["gated_residual"]


def test_empty_batch_gives_empty_results() -> None:
    x, branch, weight, bias, table = inputs()
    outputs = public_block(x[:0], branch[:0], weight, bias, table[:0])
    assert all(out.shape == (0, 6, 8) for out in outputs)
    grads = torch.autograd.grad(sum(out.sum() for out in outputs), [x, branch, weight, bias, table])
    assert not any(grad.any() for grad in grads)


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **options)


X, ROWS = zeros(2, 6, 8), zeros(2, 3, 8)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("x", "branch", "tables", "says"),
    [
        (X[0], X[0], [ROWS] * 3, r"x \[6, 8\].*must be x \[B, L, D\]"),
        (X[:, :0], X[:, :0], [ROWS] * 3, r"x \[2, 0, 8\].*at least one token"),
        (zeros(1, 1, 8193), zeros(1, 1, 8193), [zeros(1, 1, 8193)] * 3, r"a width of 1 to 8192"),
        (X, X[:, :3], [ROWS] * 3, r"branch \[2, 3, 8\].*x and branch of one shape"),
        (X, X, [zeros(2, 4, 8)] * 3, r"shift \[2, 4, 8\].*where R divides the number of tokens L"),
        (X, X, [zeros(1, 3, 8)] * 3, r"shift \[1, 3, 8\].*must be \[B, R, D\]"),
        (X, X, [zeros(2, 8)] * 3, r"shift \[2, 8\].*must be \[B, R, D\]"),
        (X, X, [ROWS, ROWS, zeros(2, 1, 8)], r"gate \[2, 1, 8\].*shift, scale, gate of one shape"),
        (X, X, [ROWS.bfloat16()] * 3, r"shift .*bfloat16.*must be float32 for shift, scale, gate"),
        (X.double(), X.double(), [ROWS] * 3, r"x .*float64.*or all of float64"),
        (X, X.int(), [ROWS] * 3, r"branch .*int32.*must be x, branch and output \(torch.float32\) of"),
    ],
)
def test_wrong_inputs_are_named(x: Tensor, branch: Tensor, tables: list[Tensor], says: str, device: str) -> None:
    x, branch, shift, scale, gate = (tensor.to(device) for tensor in (x, branch, *tables))
    with pytest.raises(ValueError, match=says):
        residual_modulated_norm(x, branch, shift, scale, gate=gate, eps=1e-6, dtype=torch.float32)


def test_every_function_checks_its_inputs() -> None:
    with pytest.raises(ValueError, match=r"modulated_norm: .*where R divides"):
        modulated_norm(X, zeros(2, 4, 8), zeros(2, 4, 8), eps=1e-6, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"gated_residual: .*where R divides"):
        gated_residual(X, X, zeros(2, 4, 8))
    with pytest.raises(ValueError, match=r"residual_affine_norm: .*one shape"):
        residual_affine_norm(X, X[:1], zeros(8), zeros(8), eps=1e-6, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"residual_affine_norm: weight \[7\].*must be \[D\] on the device of x"):
        residual_affine_norm(X, X, zeros(7), zeros(7), eps=1e-6, dtype=torch.float32)
    with pytest.raises(ValueError, match="must be on one device"):
        gated_residual(X, X.to("meta"), ROWS)
    with pytest.raises(ValueError, match=r"output \(torch.int32\)"):
        modulated_norm(X, ROWS, ROWS, eps=1e-6, dtype=torch.int32)


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan"), float("inf")])
def test_eps_must_be_positive_and_finite(eps: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        modulated_norm(X, ROWS, ROWS, eps=eps, dtype=torch.float32)


@pytest.mark.parametrize("direction", ["residual_norm", "residual_norm_backward"])
def test_kernels_read_and_write_vectors(direction: str) -> None:
    """Of all global accesses only mean and deviation are single numbers; fp32 moves 16 bytes a thread and bf16 8."""
    triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
    from muybridge.kernels.modulated_norm_kernels import compile_cases
    from muybridge.scripts.machine_code import _source

    (case,) = (
        case
        for case in compile_cases()
        if case.architecture == 90 and case.name.startswith(f"{direction}/gated") and case.name.endswith("/1536")
    )
    target = triton.backends.compiler.GPUTarget("cuda", case.architecture, 32)
    compiled = triton.compile(_source(case), target=target, options={"num_warps": case.warps})
    accesses = re.findall(r"(?:ld|st)\.global\S*?\.((?:v\d\.)?b\d+)\s", compiled.asm["ptx"])
    assert Counter(accesses).keys() == {"v4.b32", "v2.b32", "b32"}
    assert Counter(accesses)["b32"] == 2
