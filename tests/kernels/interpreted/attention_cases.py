"""Dense attention in Triton's interpreter, which test_interpreted.py switches on before anything is imported.

The first half compares the output and all three gradients with fp64 mathematics. The second half does so for each way in which
the forward kernels load and mask (masked_attention_cases.py has the masks that users build, and their gradients).
"""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from muybridge.kernels import attention, attention_forward
from muybridge.kernels.attention_forward import run_forward
from muybridge.kernels.attention_tiles import Launch, can_describe

LENGTHS = (1, 17, 63, 129)
NAMES = ("out", "grad_q", "grad_k", "grad_v")


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.softmax(q @ k.mT * scale, -1) @ v


def run(function: Callable[..., Tensor], inputs: list[Tensor], grad_out: Tensor, dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]  # keeps strides
    out = function(*leaves)
    assert out.dtype == dtype
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(dtype))]


def check(inputs: list[Tensor], grad_out: Tensor, dtype: torch.dtype, scale: float | None = None) -> None:
    """Holds the error to twice that of eager code in the same dtype, plus a floor where eager is lucky or exact.

    The floor is one rounding of the exact answer, and fp32 rounding of two kinds of sums: the K terms behind dP and delta
    (which cancel), and scores minus log-sum-exp, which are rounded in proportion to the largest score.
    Both grow with the square root of the rows that a gradient adds up.
    """
    inputs, grad_out = [x.to(dtype).double() for x in inputs], grad_out.to(dtype).double()
    scale_value = inputs[0].shape[-1] ** -0.5 if scale is None else scale
    exact = run(lambda q, k, v: plain_attention(q, k, v, scale_value), inputs, grad_out, torch.float64)
    eager = run(lambda q, k, v: plain_attention(q, k, v, scale_value), inputs, grad_out, dtype)
    ours = run(lambda q, k, v: attention(q, k, v, scale=scale), inputs, grad_out, dtype)
    hold(NAMES, ours, eager, exact, inputs, dtype, scale_value)


def hold(
    names: Sequence[str],
    ours: Sequence[Tensor],
    eager: Sequence[Tensor],
    exact: Sequence[Tensor],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    scale: float,
) -> None:
    largest_score = (inputs[0].double() @ inputs[1].double().mT * scale).abs().max()
    growth = max(1, scale * max(x.shape[2] for x in inputs) ** 0.5)
    sums = 2 * torch.finfo(torch.float32).eps * (inputs[0].shape[-1] ** 0.5 + largest_score) * growth
    for name, result, peer, truth in zip(names, ours, eager, exact, strict=True):
        floor = torch.finfo(dtype).eps * truth.abs().max() + sums
        error, allowed = (result - truth).abs().max(), 2 * (peer - truth).abs().max() + floor
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def normals(
    heads: int, query_length: int, key_length: int, head_width: int, batch: int = 1
) -> tuple[list[Tensor], Tensor]:
    lengths = (query_length, key_length, key_length, query_length)
    q, k, v, grad_out = (normal(batch, heads, n, head_width, seed=i) for i, n in enumerate(lengths))
    return [q, k, v], grad_out


@pytest.mark.parametrize(("query_length", "key_length"), list(itertools.product(LENGTHS, LENGTHS)))
def test_odd_lengths_match_fp64(query_length: int, key_length: int) -> None:
    check(*normals(1, query_length, key_length, 32), torch.float16)


@pytest.mark.parametrize(("query_length", "key_length"), [(1, 1), (1, 129), (17, 63), (63, 17), (63, 63), (129, 1)])
def test_odd_lengths_match_fp64_in_full_precision(query_length: int, key_length: int) -> None:
    check(*normals(1, query_length, key_length, 32), torch.float32)


@pytest.mark.parametrize("head_width", [16, 48, 64, 80, 128, 208, 256])
def test_every_kind_of_head_width_matches_fp64(head_width: int) -> None:
    check(*normals(1, 33, 70, head_width), torch.float16)
    check(*normals(1, 17, 33, head_width), torch.float32)


def test_batch_and_heads_are_told_apart() -> None:
    check(*normals(3, 20, 70, 16, batch=2), torch.float16)


def test_scale_is_used() -> None:
    check(*normals(1, 20, 40, 16), torch.float32, scale=0.7)


def test_long_keys_pass_the_main_loop_many_times() -> None:
    check(*normals(1, 65, 400, 16), torch.float16)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    (q, k, v), grad_out = normals(1, 33, 70, 16)
    for sign in (1, -1):  # all scores far above 0, then far below: a padded key would win the softmax
        check([q.abs() * 20 * sign, k.abs() * 20, v], grad_out, torch.float32)


def test_strided_and_expanded_inputs_match_fp64() -> None:
    fused = normal(2, 19, 3, 2, 16)  # [B, L, (q, k, v), N, K], as one projection writes it
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
    check([q, k, v], normal(1, 2, 19, 16).expand(2, 2, 19, 16), torch.float32)
    transposed = normal(2, 2, 16, 19).mT  # head width without unit stride
    check([transposed, k, v], normal(2, 2, 19, 16), torch.float32)
    check([q, k[:, :, ::2], v[:, :, ::2]], normal(2, 2, 19, 16), torch.float32)


def test_every_tensor_has_strides_of_its_own() -> None:
    """Four memory orders of [B, N, L, K], so that no tensor can be read with another's strides."""
    q, k, v, grad_out = (
        normal(2, 3, 20, 16),
        normal(2, 37, 3, 16).transpose(1, 2),
        normal(37, 3, 2, 16).permute(2, 1, 0, 3),
        normal(3, 2, 20, 16).transpose(0, 1),
    )
    check([q, k, v], grad_out, torch.float16)


def test_strides_reach_the_kernel_uncopied() -> None:
    fused = normal(2, 19, 3, 2, 16).float()
    strided = [fused[:, :, i].transpose(1, 2) for i in range(3)]
    assert not any(x.is_contiguous() for x in strided)
    out = attention(*strided)
    assert torch.equal(out, attention(*(x.contiguous() for x in strided)))
    assert out.transpose(1, 2).is_contiguous()


def test_empty_batch_gives_empty_results() -> None:
    q, k, v = (torch.empty(0, 2, n, 16, requires_grad=True) for n in (5, 7, 7))
    grads = torch.autograd.grad(attention(q, k, v).sum(), [q, k, v])
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


def test_bf16_goes_around_the_interpreter() -> None:
    q, k, v = (torch.randn(1, 1, 20, 16, dtype=torch.bfloat16) for _ in range(3))
    exact = plain_attention(q.double(), k.double(), v.double(), 0.25)
    assert (attention(q, k, v) - exact).abs().max() < 0.02


def test_backward_repeats_bit_for_bit() -> None:
    inputs, grad_out = normals(2, 129, 100, 32)
    first, second = (run(attention, inputs, grad_out, torch.float16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


POINTERS = Launch(128, 64, 4, 2)
DESCRIPTORS = Launch(64, 128, 4, 2, descriptors=True)
SPECIALIZED = Launch(128, 64, 4, 2, descriptors=True, warp_specialize=True)
DENSE_LAUNCHES = pytest.mark.parametrize("launch", [POINTERS, DESCRIPTORS, SPECIALIZED])
MASKED_LAUNCHES = pytest.mark.parametrize("launch", [POINTERS, DESCRIPTORS, Launch(32, 32, 4, 1)])


def check_forward(
    inputs: list[Tensor],
    launch: Launch | None,
    dtype: torch.dtype = torch.float16,
    mask: Sequence[Tensor] = (),
    allowed: Tensor | None = None,
) -> None:
    """Holds the forward kernel to fp64; `allowed` [M, L, S] is what the mask's tensors stand for."""
    q, k, v = (x.to(dtype) for x in inputs)
    scale = q.shape[-1] ** -0.5
    out, lse = run_forward(q, k, v, mask, scale=scale, launch=launch)
    exact = plain_forward(q.double(), k.double(), v.double(), scale, allowed)
    eager = plain_forward(q, k, v, scale, allowed)
    is_empty = exact[1] == -math.inf
    assert torch.equal(lse == math.inf, is_empty)
    assert (out[is_empty] == 0).all()
    lse, exact_lse, eager_lse = (x.masked_fill(is_empty, 0) for x in (lse, exact[1], eager[1]))
    hold(("out", "lse"), (out, lse), (eager[0], eager_lse), (exact[0], exact_lse), [q, k, v], dtype, scale)


def plain_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT * scale
    if allowed is not None:
        scores = scores.masked_fill(~allowed[:, None], -math.inf)
    return torch.softmax(scores, -1).nan_to_num() @ v, torch.logsumexp(scores, -1) / math.log(2)


@DENSE_LAUNCHES
@pytest.mark.parametrize(("query_length", "key_length", "head_width"), [(1, 1, 16), (129, 1000, 32), (200, 256, 80)])
def test_each_way_of_loading_matches_fp64(query_length: int, key_length: int, head_width: int, launch: Launch) -> None:
    check_forward(normals(2, query_length, key_length, head_width)[0], launch)


@settings(
    max_examples=16,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    lengths=st.tuples(st.integers(1, 150), st.integers(1, 280)),
    head_width=st.integers(1, 8).map(lambda n: 16 * n),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    launch=st.sampled_from([POINTERS, DESCRIPTORS, SPECIALIZED]),
    is_token_major=st.booleans(),
)
def test_any_shape_matches_fp64(
    lengths: tuple[int, int],
    head_width: int,
    batch: int,
    heads: int,
    dtype: torch.dtype,
    launch: Launch,
    is_token_major: bool,
) -> None:
    inputs, _ = normals(heads, *lengths, head_width, batch)
    if is_token_major:
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    check_forward(inputs, launch, dtype)


def test_a_thousand_tokens_match_fp64() -> None:
    check(*normals(1, 1000, 1000, 16), torch.float16)


def test_hopper_loads_through_descriptors_where_they_can_address_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    described: list[Tensor] = []
    describe = attention_forward.describe

    def listed(tensor: Tensor, rows: int) -> object:
        described.append(tensor)
        return describe(tensor, rows)

    monkeypatch.setattr(attention_forward, "is_hopper", lambda device: True)
    monkeypatch.setattr(attention_forward, "describe", listed)
    q, k, v = (x.half() for x in normals(2, 150, 140, 96)[0])
    check_forward([q, k, v], None)
    assert [tensor.data_ptr() for tensor in described] == [q.data_ptr(), k.data_ptr(), v.data_ptr()]
    check_forward([q, k[:, :1].expand_as(k), v], None)
    assert len(described) == 3


@DENSE_LAUNCHES
def test_the_stride_of_a_single_row_is_not_looked_at(launch: Launch) -> None:
    single = normal(1, 1, 1, 16).half().as_strided((1, 1, 1, 16), (7, 5, 3, 1))
    _, k, v = normals(1, 1, 20, 16)[0]
    check_forward([single, k, v], launch)
    check_forward([k, single, single], launch)


def test_what_descriptors_can_address() -> None:
    tensor = torch.empty(2, 3, 40, 32, dtype=torch.float16)
    for good in (tensor, tensor.transpose(1, 2), tensor[..., 8:24], tensor[:1].expand(1, 3, 40, 32), tensor[:, :, ::2]):
        assert can_describe(good)
    for bad in (
        tensor[..., 4:20],
        tensor.mT,
        tensor[:1].expand(2, 3, 40, 32),
        torch.empty(2, 3, 40, 36).half()[..., :32],
    ):
        assert not can_describe(bad)


def as_mask(rows: Sequence[Sequence[object]]) -> list[Tensor]:
    """Key tiles, key counts, query_low, query_high and key_position of each sample as a mask's seven tensors.

    The transposed lists are for the backward pass only.
    """
    key_tiles, key_counts, low, high, position = (torch.tensor(x, dtype=torch.int32) for x in zip(*rows, strict=True))
    return [key_tiles, key_counts, torch.empty(0), torch.empty(0), low, high, position]


UNREAD = 10**6  # a tile so far away that reading it crashes


@MASKED_LAUNCHES
def test_documents_in_one_row_attend_to_themselves(launch: Launch) -> None:
    """150 tokens, 40 tokens and 10 of padding; the second sample is all padding but for its first token."""
    document = torch.tensor([0] * 150 + [1] * 40 + [-1] * 10)
    lonely = torch.tensor([0] + [-1] * 199)
    tiles = (
        [[0, 1], [1, 0]],
        [[0, UNREAD], [UNREAD, UNREAD]],
    )  # the first tile of the first sample is full, the rest partial
    counts = [[1, 2], [0, 2]], [[0, 1], [0, 0]]
    rows = [
        (t, c, d.clamp(min=0).tolist(), (d + 1).tolist(), d.tolist())
        for t, c, d in zip(tiles, counts, (document, lonely), strict=True)
    ]
    allowed = torch.stack([(d[:, None] == d[None, :]) & (d[:, None] >= 0) for d in (document, lonely)])
    check_forward(normals(2, 200, 200, 32, batch=2)[0], launch, mask=as_mask(rows), allowed=allowed)


@MASKED_LAUNCHES
def test_one_mask_serves_every_sample(launch: Launch) -> None:
    """Two query rows past a tile's end in a full tile, and a ragged last key tile, listed out of order."""
    tiles, counts = [[2, 0, 1], [0, UNREAD, UNREAD]], [[0, 3], [1, 1]]
    position = torch.arange(300)
    low, high = torch.arange(130), torch.arange(130) + 160
    mask = as_mask([(tiles, counts, low.tolist(), high.tolist(), position.tolist())])
    allowed = (low[:, None] <= position) & (position < high[:, None])
    allowed[128:] = position < 128  # a full tile asks nobody
    check_forward(normals(2, 130, 300, 16, batch=2)[0], launch, mask=mask, allowed=allowed[None])


@MASKED_LAUNCHES
def test_rows_without_keys_give_zero(launch: Launch) -> None:
    """A query tile that meets no key tile, one whose listed tile allows nothing, and single rows of a third."""
    tiles, counts = [[UNREAD], [0], [0]], [[0, 0], [0, 1], [0, 1]]
    low = torch.cat([torch.zeros(128), torch.full((128,), 9), torch.arange(44) % 2 * 3]).int()
    high = low + 2
    position = torch.cat([torch.zeros(30), torch.full((70,), 1)]).int()
    mask = as_mask([(tiles, counts, low.tolist(), high.tolist(), position.tolist())])
    allowed = (low[:, None] <= position) & (position < high[:, None])
    allowed[:128] = False
    check_forward(normals(1, 300, 100, 16)[0], launch, mask=mask, allowed=allowed[None])
