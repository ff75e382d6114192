"""RMSNorm with rotary positions, and GELU, on a real GPU: accuracy, repeatability, large tensors, compile and checkpointing."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from muybridge.kernels.dispatch import Backend, forced
from muybridge.kernels.gelu import gelu_tanh
from muybridge.kernels.norm_rope import Rope, build_packed_rope, build_rope, rms_norm_heads, rms_norm_rope

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CUDA = torch.device("cuda")
NAMES = ("out", "grad_x", "grad_weight")


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised tensors with NaN
    yield
    torch.use_deterministic_algorithms(False)


def normalise(x: Tensor, weight: Tensor, rope: Rope | None, heads: int) -> Tensor:
    if rope is None:
        return rms_norm_heads(x, weight, heads=heads, eps=1e-6)
    return rms_norm_rope(x, weight, rope, heads=heads, eps=1e-6)


def reference(x: Tensor, weight: Tensor, rope: Rope | None, heads: int) -> Tensor:
    with forced(pointwise=Backend.reference):
        return normalise(x, weight, rope, heads)


def run(
    function: Callable[..., Tensor], x: Tensor, weight: Tensor, rope: Rope | None, grad_out: Tensor
) -> list[Tensor]:
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    out = function(x, weight, rope, grad_out.shape[2])
    return [out.detach(), *torch.autograd.grad(out, [x, weight], grad_out)]


def check(x: Tensor, weight: Tensor, rope: Rope | None, grad_out: Tensor) -> None:
    """The kernel computes in fp32 and rounds once: eps / 2 at most, and fp32 rounding of sums over a row and over tokens."""
    exact = run(reference, x.double(), weight.double(), rope, grad_out.double())
    terms = x.shape[-1] + x.shape[0] * x.shape[1]
    for name, result, truth in zip(NAMES, run(normalise, x, weight, rope, grad_out), exact, strict=True):
        eps = torch.finfo(result.dtype).eps + 2 * terms**0.5 * torch.finfo(torch.float32).eps
        error, norm = (result - truth).norm(), truth.norm()
        assert error <= eps * norm, f"{name}: error {error / norm:.2e}, allowed {eps:.2e}"


def tensors(batch: int, length: int, heads: int, head_width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(CUDA).manual_seed(length + heads)
    x = 3 * torch.randn(batch, length, heads * head_width, device=CUDA, dtype=dtype, generator=generator)
    weight = torch.randn(heads * head_width, device=CUDA, generator=generator)
    return x, weight, torch.randn(batch, length, heads, head_width, device=CUDA, dtype=dtype, generator=generator)


def positions(*shape: int, head_width: int) -> Rope:
    coordinates = torch.randint(0, 64, (*shape, 3), generator=torch.Generator().manual_seed(0))
    return build_packed_rope(coordinates, positions=64, head_width=head_width, device=CUDA)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_width"), [(12, 128), (40, 128), (2, 64), (7, 96), (30, 64), (16, 128), (3, 6)])
@pytest.mark.parametrize("length", [1, 17, 1000])
def test_output_and_gradients_match_mathematics(length: int, heads: int, head_width: int, dtype: torch.dtype) -> None:
    x, weight, grad_out = tensors(2, length, heads, head_width, dtype)
    check(x, weight, positions(2, length, head_width=head_width), grad_out)
    check(x, weight, None, grad_out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_projection_and_attention_gradients_are_read_in_place(dtype: torch.dtype) -> None:
    fused, weight, _ = tensors(2, 300, 36, 128, dtype)
    grad_out = tensors(2, 12, 300, 128, dtype)[2].transpose(1, 2)
    rope = build_rope(3, 10, 10, head_width=128, device=CUDA)
    for x, w in zip(fused.split(1536, dim=-1), weight.split(1536), strict=True):
        check(x, w, rope, grad_out)


def test_a_long_video_matches_mathematics() -> None:
    """480p, 81 frames: 32 760 tokens of the 1.3B model."""
    x, weight, grad_out = tensors(1, 32_760, 12, 128, torch.bfloat16)
    check(x, weight, build_rope(21, 30, 52, head_width=128, device=CUDA), grad_out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward_repeat_bit_for_bit(dtype: torch.dtype) -> None:
    x, weight, grad_out = tensors(2, 4000, 12, 128, dtype)
    rope = positions(4000, head_width=128)
    first = run(normalise, x, weight, rope, grad_out)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(normalise, x, weight, rope, grad_out), strict=True))


def test_compile_and_checkpoint_change_nothing() -> None:
    x, weight, grad_out = tensors(2, 300, 12, 128, torch.bfloat16)
    rope = positions(300, head_width=128)
    plain = run(normalise, x, weight, rope, grad_out)
    compiled = run(torch.compile(normalise, backend="aot_eager", fullgraph=True), x, weight, rope, grad_out)
    recomputed = run(lambda *a: checkpoint(normalise, *a, use_reentrant=False), x, weight, rope, grad_out)
    for results in (compiled, recomputed):
        assert all(torch.equal(a, b) for a, b in zip(plain, results, strict=True))


def test_offsets_beyond_two_to_the_31() -> None:
    """Rows 2^31 elements into the tensor."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x, weight, grad_out = tensors(1, 65, 12, 128, torch.bfloat16)
    wide = torch.zeros(2**31 + 2**24, device=CUDA, dtype=torch.bfloat16).as_strided(x.shape, (0, 2**31 // 64, 1))
    wide.copy_(x)
    rope = positions(65, head_width=128)
    expected, actual = (run(normalise, t, weight, rope, grad_out) for t in (x, wide))
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def run_gelu(function: Callable[[Tensor], Tensor], x: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = function(x)
    return out.detach(), torch.autograd.grad(out, x, grad_out)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (17, 63), (1000, 129), (2, 512, 8960)])
def test_gelu_matches_mathematics(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator(CUDA).manual_seed(0)
    x, grad_out = (3 * torch.randn(shape, device=CUDA, dtype=dtype, generator=generator) for _ in range(2))
    exact = run_gelu(lambda t: F.gelu(t, approximate="tanh"), x.double(), grad_out.double())
    for result, truth in zip(run_gelu(gelu_tanh, x, grad_out), exact, strict=True):
        # One rounding, and that of the sigmoid's argument where it is steepest.
        allowed = torch.finfo(dtype).eps * truth.abs() + 2**-19 * (1 + grad_out.abs())
        assert ((result - truth).abs() <= allowed).all()
    assert all(torch.equal(a, b) for a, b in zip(run_gelu(gelu_tanh, x, grad_out), run_gelu(gelu_tanh, x, grad_out)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_of_huge_values_and_of_any_strides(dtype: torch.dtype) -> None:
    x = torch.tensor([6e4, 30.0, -30.0, -6e4], device=CUDA, dtype=dtype)
    assert torch.equal(gelu_tanh(x), x.clamp(min=0))
    wide = torch.randn(64, 48, 96, device=CUDA, dtype=dtype)
    grad_out = torch.randn(64, 48, 48, device=CUDA, dtype=dtype)
    for strided in (wide[..., :48], wide[..., ::2], wide[..., :48].contiguous().transpose(0, 1).mT.permute(2, 0, 1)):
        copied = run_gelu(gelu_tanh, strided.contiguous(), grad_out)
        assert all(torch.equal(a, b) for a, b in zip(run_gelu(gelu_tanh, strided, grad_out), copied, strict=True))
