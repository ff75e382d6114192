"""The inputs of every problem of `muybridge bench kernels`, and the implementations that compete on them."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels.adamw import adamw_
from ..kernels.attention import attention
from ..kernels.attention_mask import TileMask, block_causal_mask, packed_mask, tile_mask
from ..kernels.dispatch import Backend, attention_backend, forced, pointwise_backend
from ..kernels.gated_residual import gated_residual
from ..kernels.gelu import gelu_tanh
from ..kernels.modulated_norm import modulated_norm, residual_affine_norm, residual_modulated_norm
from ..kernels.norm_rope import build_rope, rms_norm_rope
from .bench_kernels_plan import FRAMES, MASK_TILE, Problem, documents, key_tiles

Function = Callable[..., Any]
# Well over the 60 MB of a Hopper GPU's L2 cache: inputs are copied until all together pass this.
ROTATED_BYTES = 2**28
EPS = 1e-6


@dataclass
class Contest:
    """A problem made real: `functions` take each list of `inputs`; one that is missing cannot run on this device."""

    inputs: list[list[Tensor]]
    functions: dict[str, Function]
    # What the dispatch table takes here.
    chosen: str | None = None
    # Settings that hold while a contestant runs.
    contexts: Mapping[str, Callable[[], AbstractContextManager[Any]]] = field(default_factory=dict)
    # The first contestant's answer by direction, which the others are compared with.
    answers: dict[str, list[Tensor]] = field(default_factory=dict)


def build_contest(problem: Problem, device: torch.device) -> Contest:
    """Inputs from a fixed seed. On a CPU only plain PyTorch competes, to show that the command itself works."""
    torch.manual_seed(0)
    builders = {
        "copy": build_copy,
        "matmul": build_matmul,
        "convolution": build_convolution,
        "attention": build_attention,
        "adamw": build_adamw,
    }
    contest = builders.get(problem.kind, build_pointwise)(problem, device)
    if device.type != "cuda":
        portable = ("torch", "math", "eager", "own", "foreach")
        contest.functions = {name: function for name, function in contest.functions.items() if name in portable}
    return contest


def build_copy(problem: Problem, device: torch.device) -> Contest:
    source = torch.randint(0, 127, (problem.sizes["bytes"],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Contest([[source]], {"torch": target.copy_})


def build_matmul(problem: Problem, device: torch.device) -> Contest:
    rows, inner, columns = (problem.sizes[name] for name in ("rows", "inner", "columns"))
    a, b = _random(device, rows, inner), _random(device, inner, columns)
    return Contest(_rotated([a, b]), {"torch": partial(torch.mm, out=a.new_empty(rows, columns))})


def build_convolution(problem: Problem, device: torch.device) -> Contest:
    """The autoencoder's largest: 3x3x3, causal in time (the padding there is part of the input)."""
    channels, frames, height, width = (problem.sizes[name] for name in ("channels", "frames", "height", "width"))
    x, weight = _random(device, 1, channels, frames, height, width), _random(device, channels, channels, 3, 3, 3)
    return Contest(_rotated([x, weight]), {"torch": partial(F.conv3d, padding=(0, 1, 1))})


def build_attention(problem: Problem, device: torch.device) -> Contest:
    """q, k and v as the model has them: token-major, seen as [B, N, L, K]."""
    batch, heads, length, width = (problem.sizes[name] for name in ("batch", "heads", "length", "head_width"))
    q, k, v = (_random(device, batch, length, heads, width).transpose(1, 2).requires_grad_() for _ in range(3))
    mask = build_tile_mask(problem.mask, length)
    mask = None if mask is None else mask.to(device)
    own = partial(attention, mask=mask)
    functions: dict[str, Function] = {
        **dict.fromkeys(("cudnn", "flash", "efficient"), F.scaled_dot_product_attention),
        **dict.fromkeys(("own", "own_fused_dq", "own_specialized", "own_pointers"), own),
        "math": partial(math_attention, mask=mask),
        "flex": _flex(problem.mask, length, mask, device),
    }
    contexts: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "cudnn": partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION),
        "flash": partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION),
        "efficient": partial(sdpa_kernel, SDPBackend.EFFICIENT_ATTENTION),
        "own_fused_dq": partial(forced, attention=Backend.own, fused_backward=True),
        "own_specialized": partial(own_with_launches, specialized),
        "own_pointers": partial(own_with_launches, by_pointers),
    }
    if device.type == "cuda":
        contexts["own"] = partial(forced, attention=Backend.own, fused_backward=False)
    chosen = attention_backend(q, mask="none" if mask is None else mask.kind, key_length=length)
    return Contest(_rotated([q, k, v]), functions, chosen.value, contexts)


def build_tile_mask(name: str, length: int) -> TileMask | None:
    """The mask of a problem, on the CPU."""
    if name == "none":
        return None
    if name == "block_causal":
        return block_causal_mask(FRAMES, length // FRAMES)
    if name == "packed":
        return packed_mask(torch.tensor(documents(length)))
    return tile_mask(_tile_map(name, length), length, length)


def _tile_map(name: str, length: int) -> Tensor:
    count = -(-length // MASK_TILE)
    allowed = torch.zeros(count, count, dtype=torch.bool)
    for i, row in enumerate(key_tiles(int(name.removeprefix("tiles_")), count)):
        allowed[i, list(row)] = True
    return allowed


def math_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: TileMask | None) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask.dense()[:, None], float("-inf"))
    return torch.softmax(scores, -1) @ v


def flex_block_mask(name: str, length: int, mask: TileMask, device: torch.device) -> Any:
    """FlexAttention's form of the same mask: our tile lists, and the rule as its users would write it."""
    from torch.nn.attention.flex_attention import BlockMask

    if name == "block_causal":
        tokens = length // FRAMES

        def rule(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return query // tokens >= key // tokens

    elif name == "packed":
        document = torch.repeat_interleave(torch.tensor(documents(length))).to(device)

        def rule(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return document[query] == document[key]

    else:
        allowed = _tile_map(name, length).to(device)

        def rule(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return allowed[query // MASK_TILE, key // MASK_TILE]

    full, listed = mask.key_counts[:, None, :, 0], mask.key_counts[:, None, :, 1]  # [M, 1, QT]
    tiles = mask.key_tiles[:, None]  # [M, 1, QT, KT]
    place = torch.arange(tiles.shape[-1], device=device) + full[..., None]
    partial_tiles = tiles.gather(-1, place.clamp(max=tiles.shape[-1] - 1).long())
    counts = [x.int().contiguous() for x in (listed - full, full)]
    return BlockMask.from_kv_blocks(
        counts[0],
        partial_tiles.contiguous(),
        counts[1],
        tiles.contiguous(),
        BLOCK_SIZE=MASK_TILE,
        mask_mod=rule,
        seq_lengths=(length, length),
    )


def _flex(name: str, length: int, mask: TileMask | None, device: torch.device) -> Function:
    from torch.nn.attention.flex_attention import flex_attention

    block_mask = None if mask is None else flex_block_mask(name, length, mask, device)
    # Uncompiled, it materialises all scores: for a CPU's small sizes only.
    function = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention
    return partial(function, block_mask=block_mask)


@contextlib.contextmanager
def own_with_launches(change: Callable[[str, int, Any], Any]) -> Iterator[None]:
    """Our attention with other launches on Hopper: `change` takes a table's name, the head width and the launch."""
    from ..kernels import attention_backward_launches, attention_forward

    tables = {
        name: table
        for module in (attention_forward, attention_backward_launches)
        for name, table in vars(module).items()
        if name.startswith("HOPPER_") and isinstance(table, dict)
    }
    kept = {name: dict(table) for name, table in tables.items()}
    for name, table in tables.items():
        table.update({width: change(name, width, launch) for width, launch in kept[name].items()})
    try:
        with forced(attention=Backend.own, fused_backward=False):
            yield
    finally:
        for name, table in tables.items():
            table.update(kept[name])


def specialized(table: str, head_width: int, launch: Any) -> Any:
    """Warps that only load, in the forward pass, where there is a launch of that kind."""
    from ..kernels.attention_forward import SPECIALIZED_FORWARD

    return SPECIALIZED_FORWARD.get(head_width, launch) if table == "HOPPER_FORWARD" else launch


def by_pointers(table: str, head_width: int, launch: Any) -> Any:
    """Loads through pointers instead of tensor descriptors."""
    return replace(launch, descriptors=False)


def build_pointwise(problem: Problem, device: torch.device) -> Contest:
    """Ours, the same in plain torch, and that compiled; everything but the positions gets a gradient."""
    frames, rows, columns = (problem.sizes[name] for name in ("frames", "rows", "columns"))
    length, width, heads = frames * rows * columns, problem.sizes["width"], problem.sizes["heads"]
    activation = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = _random(device, 1, length, width, dtype=activation).requires_grad_()
    stream = _random(device, 1, length, width, dtype=torch.float32).requires_grad_()
    branch = _random(device, 1, length, width, dtype=activation).requires_grad_()
    row = [_random(device, 1, 1, width, dtype=torch.float32).requires_grad_() for _ in range(3)]
    weight, bias = (_random(device, width, dtype=torch.float32).requires_grad_() for _ in range(2))
    rope = build_rope(frames, rows, columns, head_width=width // heads, device=device)
    cosine, sine = (part.contiguous() for part in torch.view_as_real(rope.rotations).unbind(-1))  # [L, 1, K/2]
    norm: dict[str, Any] = {"eps": EPS, "dtype": activation}
    contests: dict[str, tuple[list[Tensor], Function, Function]] = {
        "rms_norm_rope": (
            [x, weight],
            lambda x, weight: rms_norm_rope(x, weight, rope, heads=heads, eps=EPS),
            lambda x, weight: plain_rms_norm_rope(x, weight, cosine, sine, heads),
        ),
        "modulated_norm": (
            [stream, *row[:2]],
            partial(modulated_norm, **norm),
            partial(plain_modulated_norm, dtype=activation),
        ),
        "residual_modulated_norm": (
            [stream, branch, *row],
            lambda x, branch, shift, scale, gate: residual_modulated_norm(x, branch, shift, scale, gate=gate, **norm),
            lambda x, branch, shift, scale, gate: plain_residual_modulated_norm(x, branch, shift, scale, gate, activation),
        ),
        "residual_affine_norm": (
            [stream, branch, weight, bias, row[0]],
            lambda x, branch, weight, bias, gate: residual_affine_norm(x, branch, weight, bias, gate=gate, **norm),
            lambda x, branch, weight, bias, gate: plain_residual_affine_norm(x, branch, weight, bias, gate, activation),
        ),
        "gated_residual": ([stream, branch, row[0]], gated_residual, plain_gated_residual),
        "gelu_tanh": ([x], gelu_tanh, partial(F.gelu, approximate="tanh")),
    }  # fmt: skip
    inputs, own, plain = contests[problem.kind]
    functions = {"eager": plain, "own": own}
    if device.type == "cuda":
        functions["compiled"] = torch.compile(plain, dynamic=False)
    cuda_own = partial(forced, pointwise=Backend.own) if device.type == "cuda" else contextlib.nullcontext
    return Contest(_rotated(inputs), functions, pointwise_backend(problem.kind, inputs[0]).value, {"own": cuda_own})


def plain_rms_norm_rope(x: Tensor, weight: Tensor, cosine: Tensor, sine: Tensor, heads: int) -> Tensor:
    normed = F.rms_norm(x.float(), x.shape[-1:], weight, EPS).unflatten(-1, (heads, -1, 2))
    even, odd = normed.unbind(-1)
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), -1).flatten(-2).to(x.dtype)


def plain_modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    return (F.layer_norm(x.float(), x.shape[-1:], eps=EPS) * (1 + scale) + shift).to(dtype)


def plain_residual_modulated_norm(
    x: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    stream = plain_gated_residual(x, branch, gate)
    return stream, plain_modulated_norm(stream, shift, scale, dtype=dtype)


def plain_residual_affine_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    stream = plain_gated_residual(x, branch, gate)
    return stream, F.layer_norm(stream.float(), stream.shape[-1:], weight, bias, EPS).to(dtype)


def plain_gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return x + branch * gate


def build_adamw(problem: Problem, device: torch.device) -> Contest:
    """One flat fp32 shard; clipping by a coefficient that is known, as the norm costs all contestants alike."""
    param, gradient, average = (_random(device, problem.sizes["numel"], dtype=torch.float32) for _ in range(3))
    moments = torch.zeros_like(param), torch.zeros_like(param)
    clip = torch.full((), 0.5, device=device)
    settings: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}

    def torch_step(optimizer: torch.optim.Optimizer) -> None:
        gradient.mul_(clip)
        optimizer.step()
        torch._foreach_lerp_([average], [param], 0.001)

    def own_step() -> None:
        adamw_(
            param, gradient, *moments, step=10, **settings, clip_coefficient=clip, average=average, average_weight=0.001
        )

    param.grad = gradient
    functions: dict[str, Function] = {"own": own_step}
    for name in ("foreach", "fused"):
        optimizer = torch.optim.AdamW([param], foreach=name == "foreach", fused=name == "fused", **settings)
        functions[name] = partial(torch_step, optimizer)
    return Contest([[]], functions, pointwise_backend("adamw", param).value)


def _random(device: torch.device, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Standard normal numbers, in bf16 on a GPU and fp32 on a CPU unless told otherwise."""
    return torch.randn(
        *shape, device=device, dtype=dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    )


def _rotated(inputs: Sequence[Tensor]) -> list[list[Tensor]]:
    """The inputs and copies of them, two to eight, so that no call finds its own in a cache."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in inputs)
    copies = min(8, max(2, ROTATED_BYTES // size)) if inputs[0].is_cuda else 2
    return [
        [tensor if i == 0 else tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs]
        for i in range(copies)
    ]
