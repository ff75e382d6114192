"""Masked attention on a real GPU: accuracy of every kind of mask, long videos, repeatability, compile, and no waiting."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from muybridge.kernels import (
    TileMask,
    attention,
    block_causal_mask,
    packed_mask,
    radial_mask,
    sliding_tile_mask,
    tile_mask,
)
from muybridge.kernels.dispatch import Backend, forced

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAMES = ("out", "grad_q", "grad_k", "grad_v")


def some_tiles() -> TileMask:
    allowed = torch.rand(8, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    allowed[3] = allowed[:, 2] = False  # queries without keys, keys without queries
    return tile_mask(allowed, 1000, 777)


MASKS: dict[str, Callable[[], TileMask]] = {
    "packed": lambda: packed_mask(torch.tensor([0, 1, 17, 300, 63, 500]), length=1000),
    "packed with text": lambda: packed_mask(
        torch.tensor([[1, 700, 0, 129], [999, 0, 1, 0]]),
        torch.tensor([[129, 63, 17, 0], [0, 5, 300, 1]]),
        length=1000,
        key_length=310,
    ),
    "block causal": lambda: block_causal_mask(7, 130),
    "block causal, window": lambda: block_causal_mask(9, 100, window=2),
    "sliding tile, padded": lambda: sliding_tile_mask((4, 12, 30), (2, 6, 10), (1, 1, 3)),
    "sliding tile, whole": lambda: sliding_tile_mask((4, 16, 24), (2, 8, 8), (1, 1, 1)),
    "radial": lambda: radial_mask((9, 10, 16), width=0.5),
    "tiles": some_tiles,
}


def masked_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: TileMask) -> Tensor:
    """PyTorch's attention with a dense mask, 2048 queries at a time."""
    allowed = mask.dense()[:, None]
    parts = []
    for start in range(0, q.shape[2], 2048):
        rows = allowed[:, :, start : start + 2048]
        meets = rows.any(-1, keepdim=True)
        out = F.scaled_dot_product_attention(q[:, :, start : start + 2048], k, v, attn_mask=rows | ~meets)
        parts.append(torch.where(meets, out, 0.0))
    return torch.cat(parts, 2)


def run(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def tensors(
    mask: TileMask, head_width: int, dtype: torch.dtype, *, batch: int | None = None, heads: int = 2
) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(head_width)
    length, key_length = mask.query_low.shape[1], mask.key_position.shape[1]
    shape = (2 if batch is None else batch, heads)
    return [
        torch.randn(*shape, n, head_width, device="cuda", dtype=dtype, generator=generator)
        for n in (length, key_length, key_length, length)
    ]


def check(mask: TileMask, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> None:
    """At most twice the error of PyTorch in the same dtype, plus one rounding of the answer and of fp32 sums of K terms."""
    exact_dtype = torch.float64 if q.dtype == torch.float32 else torch.float32
    exact = run(lambda *x: masked_attention(*x, mask=mask), *(x.to(exact_dtype) for x in (q, k, v, grad_out)))
    eager = run(lambda *x: masked_attention(*x, mask=mask), q, k, v, grad_out)
    ours = run(lambda *x: attention(*x, mask=mask), q, k, v, grad_out)
    for name, result, peer, truth in zip(NAMES, ours, eager, exact, strict=True):
        assert not result.isnan().any(), name
        norm = truth.norm()
        floor = torch.finfo(q.dtype).eps * norm + torch.finfo(torch.float32).eps * (q.shape[-1] * truth.numel()) ** 0.5
        error, allowed = (result - truth).norm(), 2 * (peer - truth).norm() + floor
        assert error <= allowed, f"{name}: error {error / norm:.2e}, allowed {allowed / norm:.2e}"


@pytest.fixture(autouse=True)
def exact_matmuls_and_poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised tensors with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_width", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("name", list(MASKS))
def test_every_mask_matches_mathematics(name: str, head_width: int, dtype: torch.dtype, deterministic: bool) -> None:
    mask = MASKS[name]().to("cuda")
    with forced(fused_backward=not deterministic):
        check(mask, *tensors(mask, head_width, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "build",
    [
        lambda: packed_mask(torch.tensor([10_000, 0, 20_001, 2_000]), length=32_760),
        lambda: block_causal_mask(21, 1560),
        lambda: sliding_tile_mask((21, 30, 52), (3, 10, 4), (3, 3, 3)),
        lambda: radial_mask((21, 30, 52)),
    ],
    ids=["packed", "block causal", "sliding tile", "radial"],
)
def test_long_videos_match_torch_attention(build: Callable[[], TileMask], dtype: torch.dtype) -> None:
    """480p, 81 frames: 32 760 tokens, against PyTorch's attention in fp32."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    mask = build().to("cuda")
    inputs = tensors(mask, 128, dtype, batch=1, heads=1)
    exact = run(lambda *x: masked_attention(*x, mask=mask), *(x.float() for x in inputs))
    for name, ours, truth in zip(NAMES, run(lambda *x: attention(*x, mask=mask), *inputs), exact, strict=True):
        # Two roundings of P or dS to the dtype and one of the result, each eps / 2 at worst, against the norm.
        assert (ours - truth).norm() <= 2 * torch.finfo(dtype).eps * truth.norm(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(MASKS))
def test_forward_and_backward_repeat_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    mask = MASKS[name]().to("cuda")
    inputs = tensors(mask, 128, dtype)
    first = run(lambda *x: attention(*x, mask=mask), *inputs)
    for _ in range(5):
        again = run(lambda *x: attention(*x, mask=mask), *inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(dtype: torch.dtype) -> None:
    mask = packed_mask(torch.tensor([17, 150, 33])).to("cuda")
    fused = torch.randn(2, 200, 3, 3, 128, device="cuda", dtype=dtype)  # [B, L, (q, k, v), N, K]
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
    check(mask, q, k, v, torch.ones(1, 1, 1, 1, device="cuda", dtype=dtype).expand(2, 3, 200, 128))


def test_compile_and_checkpoint_change_nothing() -> None:
    mask = block_causal_mask(3, 100).to("cuda")
    inputs = tensors(mask, 64, torch.bfloat16)
    plain = run(lambda *x: attention(*x, mask=mask), *inputs)
    compiled_attention = torch.compile(attention, backend="aot_eager", fullgraph=True)
    compiled = run(lambda *x: compiled_attention(*x, mask=mask), *inputs)
    recomputed = run(lambda *x: checkpoint(attention, *x, mask=mask, use_reentrant=False), *inputs)
    for results in (compiled, recomputed):
        assert all(torch.equal(a, b) for a, b in zip(plain, results, strict=True))


def test_lengths_on_the_gpu_are_packed_without_waiting() -> None:
    lengths, texts = torch.tensor([100, 0, 150], device="cuda"), torch.tensor([7, 9, 0], device="cuda")
    expected = packed_mask(lengths.cpu(), texts.cpu(), length=300, key_length=20)
    q, k, v, _ = tensors(expected, 64, torch.bfloat16)
    attention(q, k, v, mask=expected.to("cuda"))  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask = packed_mask(lengths, texts, length=300, key_length=20)
        attention(q, k, v, mask=mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a.cpu(), b) for a, b in zip(mask.tensors(), expected.tensors(), strict=True))


@pytest.mark.parametrize("name", ["packed", "packed with text", "tiles"])
def test_the_reference_backend_gives_the_same(name: str) -> None:
    mask = MASKS[name]().to("cuda")
    inputs = tensors(mask, 64, torch.float32)
    ours = run(lambda *x: attention(*x, mask=mask), *inputs)
    with forced(attention=Backend.reference):
        reference = run(lambda *x: attention(*x, mask=mask), *inputs)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cudnn_gives_the_same_dense_attention(dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("the dispatch table asks cuDNN from compute capability 9.0 on")
    inputs = tensors(block_causal_mask(3, 100), 128, dtype)
    with forced(attention=Backend.own):
        ours = run(attention, *inputs)
    with forced(attention=Backend.cudnn):
        cudnn = run(attention, *inputs)
    for a, b in zip(ours, cudnn, strict=True):
        assert (a - b).norm() <= 4 * torch.finfo(dtype).eps * b.norm()
