"""GELU as the rest of the project calls it, on the CPU: contract, gradients, compile, checkpointing, fake tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from muybridge.kernels.dispatch import INTERPRETED
from muybridge.kernels.gelu import gelu_backward, gelu_forward, gelu_tanh

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 replaces the CPU path tested here")

both = pytest.mark.parametrize("run", [gelu_tanh, gelu_forward])


def normal(*shape: int, **options: Any) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(*shape, requires_grad=True, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@both
def test_cpu_is_torch_gelu(run: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = normal(4, 5, dtype=dtype)
    expected = F.gelu(x, approximate="tanh")
    out = run(x)
    assert torch.equal(out, expected)
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), x)[0])


@both
def test_gradients_are_right(run: Callable[[Tensor], Tensor]) -> None:
    assert torch.autograd.gradcheck(run, normal(3, 4, dtype=torch.float64))


@both
def test_only_the_input_is_saved(run: Callable[[Tensor], Tensor]) -> None:
    x = normal(4, 5)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        run(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


@both
def test_strides_do_not_matter(run: Callable[[Tensor], Tensor]) -> None:
    x = normal(4, 5, 6)
    (expected,) = torch.autograd.grad(run(x).square().sum(), x)
    for strided in (x.detach().transpose(0, 2).contiguous().transpose(0, 2), torch.stack((x, x), -1).detach()[..., 0]):
        strided.requires_grad_()
        out = run(strided)
        torch.testing.assert_close(out, run(x))
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), strided)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_pass_opcheck(dtype: torch.dtype) -> None:
    x = normal(4, 5, 6, dtype=dtype)
    for strided in (x, x.detach().transpose(0, 2).requires_grad_(), x.detach()[:, ::2].requires_grad_()):
        torch.library.opcheck(gelu_forward, (strided,))
        torch.library.opcheck(gelu_backward, (torch.randn_like(strided), strided.detach()))


@both
def test_compile_in_one_graph_gives_the_same(run: Callable[[Tensor], Tensor]) -> None:
    x = normal(4, 5)
    (expected,) = torch.autograd.grad(run(x).square().sum(), x)
    (actual,) = torch.autograd.grad(torch.compile(run, backend="aot_eager", fullgraph=True)(x).square().sum(), x)
    torch.testing.assert_close(actual, expected)


@both
def test_checkpointing_gives_the_same(run: Callable[[Tensor], Tensor]) -> None:
    x = normal(4, 5)
    (expected,) = torch.autograd.grad(run(x).square().sum(), x)
    (actual,) = torch.autograd.grad(checkpoint(run, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(actual, expected)


def test_meta_tensors_carry_shape_strides_and_gradients() -> None:
    x = normal(4, 5, 6, device="meta", dtype=torch.bfloat16)
    out = gelu_tanh(x.transpose(0, 2))
    assert (out.shape, out.stride(), out.dtype) == ((6, 5, 4), (1, 6, 30), torch.bfloat16)
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


def test_fake_cuda_tensors_take_the_operator() -> None:
    # Without gradients: the autograd engine of a CPU build of torch cannot walk through a CUDA graph, not even a fake one.
    with FakeTensorMode(), torch.no_grad():
        out = gelu_tanh(normal(4, 5, device="cuda"))
    assert (out.shape, out.device.type) == ((4, 5), "cuda")


def test_empty_and_scalar_tensors_pass() -> None:
    assert gelu_tanh(torch.empty(0, 5)).shape == (0, 5)
    assert gelu_tanh(torch.tensor(0.0)) == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_dtypes_are_named(device: str) -> None:
    with pytest.raises(ValueError, match=rf"gelu_tanh: x \[2, 3\] torch.int32 on {device} must be float32"):
        gelu_tanh(torch.zeros(2, 3, dtype=torch.int32, device=device))
