"""Attention on a real GPU: accuracy, repeatability, long and large tensors, compile and checkpointing."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from muybridge.kernels import attention
from muybridge.kernels.dispatch import Backend, attention_backend, forced

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def tensors(
    query_length: int, key_length: int, head_width: int, dtype: torch.dtype, *, batch: int = 2, heads: int = 3
) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(query_length + key_length + head_width)
    lengths = (query_length, key_length, key_length, query_length)
    return [torch.randn(batch, heads, n, head_width, device="cuda", dtype=dtype, generator=generator) for n in lengths]


def run(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def math_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


def check(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> None:
    """At most twice the error of eager code in the same dtype, plus one rounding of the answer and of fp32 sums of K terms."""
    exact_dtype = torch.float64 if q.dtype == torch.float32 else torch.float32
    exact = run(math_attention, *(x.to(exact_dtype) for x in (q, k, v, grad_out)))
    for name, ours, eager, truth in zip(
        ("out", "grad_q", "grad_k", "grad_v"),
        run(attention, q, k, v, grad_out),
        run(math_attention, q, k, v, grad_out),
        exact,
        strict=True,
    ):
        assert not ours.isnan().any(), name
        norm = truth.norm()
        floor = torch.finfo(q.dtype).eps * norm + torch.finfo(torch.float32).eps * (q.shape[-1] * truth.numel()) ** 0.5
        error, allowed = (ours - truth).norm(), 2 * (eager - truth).norm() + floor
        assert error <= allowed, f"{name}: error {error / norm:.2e}, allowed {allowed / norm:.2e}"


@pytest.fixture(autouse=True)
def exact_matmuls_and_poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised tensors with NaN
    with forced(attention=Backend.own):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_width", [16, 64, 80, 128, 256])
@pytest.mark.parametrize(("query_length", "key_length"), [(1, 1), (17, 129), (129, 17), (512, 512), (1000, 777)])
def test_output_and_gradients_match_mathematics(
    query_length: int, key_length: int, head_width: int, dtype: torch.dtype
) -> None:
    check(*tensors(query_length, key_length, head_width, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(dtype: torch.dtype) -> None:
    fused = torch.randn(2, 200, 3, 3, 128, device="cuda", dtype=dtype)  # [B, L, (q, k, v), N, K]
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
    check(q, k, v, torch.ones(1, 1, 1, 1, device="cuda", dtype=dtype).expand(2, 3, 200, 128))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_width", [64, 128])
@pytest.mark.parametrize("key_length", [512, 32_760])
def test_long_videos_match_torch_attention(key_length: int, head_width: int, dtype: torch.dtype) -> None:
    """480p, 81 frames: 32 760 tokens. The peer is memory-efficient attention in fp32, since plain scores would not fit."""
    q, k, v, grad_out = tensors(32_760, key_length, head_width, dtype, batch=1, heads=2)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        exact = run(F.scaled_dot_product_attention, *(x.float() for x in (q, k, v, grad_out)))
    for ours, truth in zip(run(attention, q, k, v, grad_out), exact, strict=True):
        # Two roundings of P or dS to the dtype and one of the result, each eps / 2 at worst, against the norm.
        assert (ours - truth).norm() <= 2 * torch.finfo(dtype).eps * truth.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward_repeat_bit_for_bit(dtype: torch.dtype) -> None:
    q, k, v, grad_out = tensors(1000, 777, 128, dtype)
    first = run(attention, q, k, v, grad_out)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(attention, q, k, v, grad_out), strict=True))


def test_offsets_beyond_two_to_the_31() -> None:
    """Rows 2^31 elements into the tensor: the last batch entry, and rows of one head far apart."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    storage = torch.zeros(2**31 + 2**24, device="cuda", dtype=torch.bfloat16)
    row_stride = 2**31 // 64
    wide = storage.as_strided((1, 1, 65, 64), (0, 0, row_stride, 1))
    q, k, v, grad_out = tensors(65, 65, 64, torch.bfloat16, batch=1, heads=1)
    wide.copy_(k)
    expected, actual = run(attention, q, k, v, grad_out), run(attention, q, wide, v, grad_out)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_compile_and_checkpoint_change_nothing() -> None:
    q, k, v, grad_out = tensors(300, 200, 64, torch.bfloat16)
    plain = run(attention, q, k, v, grad_out)
    compiled = run(torch.compile(attention, backend="aot_eager", fullgraph=True), q, k, v, grad_out)
    recomputed = run(lambda *x: checkpoint(attention, *x, use_reentrant=False), q, k, v, grad_out)
    for results in (compiled, recomputed):
        assert all(torch.equal(a, b) for a, b in zip(plain, results, strict=True))


@pytest.mark.parametrize("head_width", [64, 128])
def test_the_backend_that_the_table_names_matches_mathematics(head_width: int) -> None:
    tensors_of_table = tensors(1000, 777, head_width, torch.bfloat16)
    with forced(attention=Backend.auto):
        if attention_backend(tensors_of_table[0], mask="none", key_length=777) is Backend.own:
            pytest.skip("the table names our own kernels on this GPU, which the other tests cover")
        check(*tensors_of_table)
