"""What `muybridge bench kernels` measures: every problem with its contestants, arithmetic and least traffic, as plain numbers.

FLOP conventions: attention forward 4 N K FLOP an allowed pair of tokens (two products); backward 2.5 times that (five products),
whatever an implementation really executes. Bytes: every operand read and every result written once.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

GROUPS = ("ceilings", "attention", "masks", "pointwise", "optimizer")
HEADS = 12
QUICK_HEADS = 2
# Samples and tokens: 17x256x256 in batches of 64, then single clips up to 81x480x832 (32 760) and 81x720x1280 (75 600).
LENGTHS = ((64, 1280), (1, 9360), (1, 32_760), (1, 75_600))
# Latent frames of both long clips.
FRAMES = 21
MASK_TILE = 128
MASKS = ("block_causal", "packed", "tiles_10", "tiles_20")  # the last two: per cent of the tile pairs
# For estimates of how long a measurement takes; deliberately low.
ASSUMED_FLOPS = 250e12
ASSUMED_BYTES = 1.5e12
# Calls of one measurement, warm-up included, and the least time it takes.
ASSUMED_CALLS = 20
LEAST_SECONDS = 0.5
# Seconds that a contestant's compiler may take, both directions.
COMPILE_SECONDS = {"flex": 25.0, "compiled": 15.0, "own": 5.0}

DENSE_CONTESTANTS = (
    "cudnn",
    "flash",
    "efficient",
    "own",
    "own_fused_dq",
    "own_specialized",
    "own_pointers",
    "flex",
)
MASKED_CONTESTANTS = ("flex", "own", "own_fused_dq")
# Variants that are our usual kernels in the other direction.
ONE_DIRECTION = {"own_fused_dq": "backward", "own_specialized": "forward"}
POINTWISE_CONTESTANTS = ("eager", "own", "compiled")


@dataclass(frozen=True)
class Problem:
    """One set of inputs on which contestants compete; the first of them says what the right answer is."""

    group: str
    name: str
    # Which builder in bench_kernels_contestants.py makes the inputs, and what it needs to know.
    kind: str
    sizes: Mapping[str, int]
    contestants: tuple[str, ...]
    directions: tuple[str, ...] = ("forward", "backward")
    # By direction.
    flops: Mapping[str, float] = field(default_factory=dict)
    bytes: Mapping[str, float] = field(default_factory=dict)
    mask: str = "none"

    def entries(self) -> list[tuple[str, str]]:
        """(contestant, direction) in the order of measuring."""
        return [(c, d) for c in self.contestants for d in self.directions if d == ONE_DIRECTION.get(c, d)]

    def seconds(self) -> float:
        """A rough estimate of what measuring everything takes."""
        total = 0.0
        for contestant, direction in self.entries():
            once = self.flops.get(direction, 0) / ASSUMED_FLOPS + self.bytes.get(direction, 0) / ASSUMED_BYTES
            total += max(LEAST_SECONDS, ASSUMED_CALLS * once)
            total += COMPILE_SECONDS.get(contestant.split("_")[0], 0) / len(self.directions)
        return total


def plan(groups: tuple[str, ...] = GROUPS, *, quick: bool = False) -> list[Problem]:
    """The problems of these groups: ceilings first, which the rest is compared with, then from the quickest to the slowest."""
    makers = {
        "ceilings": ceilings,
        "attention": attention_problems,
        "masks": mask_problems,
        "pointwise": pointwise_problems,
        "optimizer": optimizer_problems,
    }
    problems = [problem for group in groups for problem in makers[group](quick)]
    return sorted(problems, key=lambda problem: (problem.group != "ceilings", problem.seconds()))


def ceilings(quick: bool) -> list[Problem]:
    """What the machine can do at most, and the job's own matrix products and convolution."""

    def product(name: str, rows: int, inner: int, columns: int) -> Problem:
        sizes = {"rows": rows, "inner": inner, "columns": columns}
        flops = {"run": 2.0 * rows * inner * columns}
        return Problem("ceilings", name, "matmul", sizes, ("torch",), ("run",), flops)

    side, tokens, dim, ffn, copied = (64, 84, 256, 320, 2**20) if quick else (8192, 32_760, 1536, 8960, 2**32)
    frames, height, width = (3, 8, 8) if quick else (5, 480, 832)
    convolution = {"channels": 96, "frames": frames, "height": height, "width": width}
    return [
        Problem("ceilings", f"copy of {copied} bytes", "copy", {"bytes": copied}, ("torch",), ("run",), {}, {"run": 2.0 * copied}),
        product(f"matmul {side}^3", side, side, side),
        product(f"matmul {tokens} x {dim} x {dim}", tokens, dim, dim),
        product(f"matmul {tokens} x {dim} x {ffn}", tokens, dim, ffn),
        product(f"matmul {tokens} x {ffn} x {dim}", tokens, ffn, dim),
        product(f"weight gradient {dim} x {tokens} x {dim}", dim, tokens, dim),
        product(f"weight gradient {dim} x {tokens} x {ffn}", dim, tokens, ffn),
        Problem(
            "ceilings",
            f"conv3d 96 -> 96, {frames}x{height}x{width}",
            "convolution",
            convolution,
            ("torch",),
            ("run",),
            {"run": 2.0 * 27 * 96 * 96 * (frames - 2) * height * width},
        ),
    ]  # fmt: skip


def attention_problems(quick: bool) -> list[Problem]:
    """Attention of every token to every token."""
    found = []
    heads = QUICK_HEADS if quick else HEADS
    for batch, length in ((1, 250),) if quick else LENGTHS:
        for head_width in (64, 128):
            found.append(_attention("attention", "none", (batch, heads, length, head_width), DENSE_CONTESTANTS))
    return found


def mask_problems(quick: bool) -> list[Problem]:
    """Attention under masks that cuDNN does not take, against FlexAttention with the same mask."""
    lengths, heads = ((1260,), QUICK_HEADS) if quick else ((32_760, 75_600), HEADS)
    return [
        _attention("masks", mask, (1, heads, length, 128), MASKED_CONTESTANTS) for length in lengths for mask in MASKS
    ]


def _attention(group: str, mask: str, shape: tuple[int, int, int, int], contestants: tuple[str, ...]) -> Problem:
    batch, heads, length, head_width = shape
    sizes = {"batch": batch, "heads": heads, "length": length, "head_width": head_width}
    forward = 4.0 * batch * heads * head_width * allowed_pairs(mask, length)
    described = f"{batch} x {length} tokens, {heads} heads of {head_width}"
    name = described if mask == "none" else f"{mask}, {described}"
    flops = {"forward": forward, "backward": 2.5 * forward}
    if length <= 1280:  # plain scores of the smallest cases alone fit into memory
        contestants = ("math", *contestants)
    return Problem(group, name, "attention", sizes, contestants, flops=flops, mask=mask)


def allowed_pairs(mask: str, length: int) -> int:
    """Pairs of a query and a key that the mask allows."""
    if mask == "none":
        return length**2
    if mask == "block_causal":
        return (length // FRAMES) ** 2 * FRAMES * (FRAMES + 1) // 2
    if mask == "packed":
        return sum(tokens**2 for tokens in documents(length))
    tokens = [min(MASK_TILE, length - start) for start in range(0, length, MASK_TILE)]
    rows = key_tiles(int(mask.removeprefix("tiles_")), len(tokens))
    return sum(tokens[i] * sum(tokens[j] for j in row) for i, row in enumerate(rows))


def documents(length: int) -> list[int]:
    """Tokens of the clips packed into a row: long and short ones."""
    parts = [length * share // 28 for share in (8, 8, 4, 4, 2, 1)]
    return [*parts, length - sum(parts)]


@cache
def key_tiles(percent: int, count: int) -> tuple[tuple[int, ...], ...]:
    """For each of `count` query tiles its own key tile and others drawn at random, `percent` of all together."""
    generator = random.Random(percent)
    chosen = max(1, round(count * percent / 100))
    others = [[j for j in range(count) if j != i] for i in range(count)]
    return tuple(tuple(sorted([i, *generator.sample(others[i], chosen - 1)])) for i in range(count))


def pointwise_problems(quick: bool) -> list[Problem]:
    """The norms, rotations, gates and activation of a block of the 1.3B model at 81x480x832.

    The stream between blocks is fp32 (4 bytes), what enters and leaves projections is bf16 (2 bytes). Tables that are shared by
    all tokens, and statistics of one number a token, are not counted.
    """
    rows, columns, width, ffn = (4, 4, 256, 320) if quick else (30, 52, 1536, 8960)
    tokens = FRAMES * rows * columns
    # Bytes an element of [tokens, width], forward and backward.
    traffic = {
        "rms_norm_rope": (2 + 2, 2 + 2 + 2),
        "modulated_norm": (4 + 2, 2 + 4 + 4),
        "residual_modulated_norm": (4 + 2 + 4 + 2, 4 + 2 + 4 + 2 + 4 + 2),
        "residual_affine_norm": (4 + 2 + 4 + 2, 4 + 2 + 4 + 2 + 4 + 2),
        "gated_residual": (4 + 2 + 4, 4 + 2 + 2),
        "gelu_tanh": (2 + 2, 2 + 2 + 2),
    }
    found = []
    for kind, (forward, backward) in traffic.items():
        channels = ffn if kind == "gelu_tanh" else width
        heads = (QUICK_HEADS if quick else HEADS) if kind == "rms_norm_rope" else 1
        sizes = {"frames": FRAMES, "rows": rows, "columns": columns, "width": channels, "heads": heads}
        elements = float(tokens * channels)
        moved = {"forward": forward * elements, "backward": backward * elements}
        name = f"{kind}, {tokens} x {channels}"
        found.append(Problem("pointwise", name, kind, sizes, POINTWISE_CONTESTANTS, bytes=moved))
    return found


def optimizer_problems(quick: bool) -> list[Problem]:
    """One step of AdamW with clipping and a moving average, fp32: 28 bytes a parameter, and 8 for the average."""
    numel = 2**16 if quick else 2**29
    contestants = ("foreach", "fused", "own")
    moved = {"step": 36.0 * numel}
    return [
        Problem(
            "optimizer", f"AdamW of {numel} parameters", "adamw", {"numel": numel}, contestants, ("step",), {}, moved
        )
    ]
