"""The precision of the DiT under bf16, against its equations written out in float64 with a rounding at any place one names."""

from collections.abc import Callable
from enum import Enum, auto

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from muybridge.models.dit import DiT, DiTConfig

CONFIGS = {
    "text": DiTConfig(
        in_channels=4,
        out_channels=4,
        num_layers=4,
        num_attention_heads=2,
        dim=64,
        ffn_dim=160,
        text_dim=24,
        freq_dim=64,
    ),
    "image": DiTConfig(
        in_channels=9,
        out_channels=4,
        num_layers=4,
        num_attention_heads=2,
        dim=64,
        ffn_dim=160,
        text_dim=24,
        freq_dim=64,
        image_dim=12,
        pos_embed_seq_len=6,
    ),
}


class Place(Enum):
    """What may be computed in bf16. Wan's own code, which sets the rule, does so with the matmuls alone."""

    matmuls = (
        auto()
    )  # patch embedding, text and image embedding, q, k, v, out, feed-forward; with their inputs and outputs
    time = auto()  # the sinusoid's Linears and the projection to modulations
    modulation = auto()  # shifts, scales, gates
    stream = auto()  # the residual stream
    head = auto()


class Equations:
    """The velocity by the published equations, in float64: what is in `rounded` goes through bf16."""

    def __init__(self, model: DiT, rounded: set[Place]) -> None:
        self.config = model.config
        self.rounded = rounded
        self.weights = {name: value.detach().double().requires_grad_() for name, value in model.state_dict().items()}

    def low(self, place: Place, x: Tensor) -> Tensor:
        return x.bfloat16().double() if place in self.rounded else x

    def linear(self, name: str, x: Tensor, place: Place = Place.matmuls) -> Tensor:
        weight, bias = (self.low(place, self.weights[f"{name}.{part}"]) for part in ("weight", "bias"))
        return self.low(place, self.low(place, x) @ weight.T + bias)

    def __call__(self, latents: Tensor, timestep: Tensor, text: Tensor, image: Tensor | None) -> Tensor:
        weights, config = self.weights, self.config
        patch = F.conv3d(
            self.low(Place.matmuls, latents.double()),
            self.low(Place.matmuls, weights["patch_embedding.weight"]),
            weights["patch_embedding.bias"],
            stride=(1, 2, 2),
        )
        grid = patch.shape[2:]
        x = self.low(Place.matmuls, patch).flatten(2).transpose(1, 2)

        index = torch.arange(config.freq_dim // 2, dtype=torch.float64)
        angles = timestep.double()[:, None] * 10000 ** (-2 * index / config.freq_dim)
        time = self.mlp("condition_embedder.time_embedder.linear_{}", (1, 2), F.silu, self.sinusoid(angles), Place.time)
        modulation = self.linear("condition_embedder.time_proj", F.silu(time), Place.time).unflatten(1, (6, -1))

        text = self.mlp("condition_embedder.text_embedder.linear_{}", (1, 2), gelu_tanh, text.double())
        if image is not None:
            embedder = "condition_embedder.image_embedder"
            normed = self.affine(f"{embedder}.norm1", image.double() + weights[f"{embedder}.pos_embed"])
            image = self.affine(f"{embedder}.norm2", self.mlp(f"{embedder}.ff.net.{{}}", ("0.proj", 2), F.gelu, normed))
        turns = token_turns(grid, config.attention_head_dim)
        for layer in range(config.num_layers):
            x = self.block(f"blocks.{layer}", x, modulation, text, image, turns)

        shift, scale = self.low(Place.modulation, weights["scale_shift_table"] + time[:, None]).unbind(1)
        tokens = self.linear("proj_out", layer_norm(x, 1e-6) * (1 + scale[:, None]) + shift[:, None], Place.head)
        return unpatch(tokens.unflatten(1, grid), config.out_channels)

    def block(
        self, name: str, x: Tensor, modulation: Tensor, text: Tensor, image: Tensor | None, turns: Tensor
    ) -> Tensor:
        table = self.low(Place.modulation, self.weights[f"{name}.scale_shift_table"] + modulation)[:, :, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(1)  # [B, 1, D] each
        normed = layer_norm(x, 1e-6) * (1 + scale1) + shift1
        query, key, value = (self.heads(f"{name}.attn1", part, normed, turns) for part in ("q", "k", "v"))
        x = self.low(Place.stream, x + gate1 * self.linear(f"{name}.attn1.to_out.0", self.attend(query, key, value)))

        query = self.heads(f"{name}.attn2", "q", self.affine(f"{name}.norm2", x, eps=1e-6))
        read = self.attend(query, *(self.heads(f"{name}.attn2", part, text) for part in ("k", "v")))
        if image is not None:
            key, value = (self.heads(f"{name}.attn2", part, image) for part in ("added_k", "added_v"))
            read = self.low(Place.matmuls, read + self.attend(query, key, value))
        x = self.low(Place.stream, x + self.linear(f"{name}.attn2.to_out.0", read))

        hidden = self.mlp(f"{name}.ffn.net.{{}}", ("0.proj", 2), gelu_tanh, layer_norm(x, 1e-6) * (1 + scale2) + shift2)
        return self.low(Place.stream, x + gate2 * hidden)

    def heads(self, name: str, part: str, x: Tensor, turns: Tensor | None = None) -> Tensor:
        """A projection, normed over all heads together and turned unless it is of values, [B, N, L, K]."""
        added = part.startswith("added")
        projected = self.linear(f"{name}.add_{part[-1]}_proj" if added else f"{name}.to_{part}", x)
        if part[-1] != "v":
            rms = (projected.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            projected = projected / rms * self.weights[f"{name}.norm_{part}.weight"]
        split = projected.unflatten(-1, (self.config.num_attention_heads, -1)).transpose(1, 2)
        if turns is not None and part != "v":
            split = torch.view_as_real(torch.view_as_complex(split.unflatten(-1, (-1, 2))) * turns).flatten(-2)
        return self.low(Place.matmuls, split)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, -1)
        return self.low(Place.matmuls, weights @ value).transpose(1, 2).flatten(2)

    def mlp(
        self,
        name: str,
        layers: tuple[str | int, str | int],
        activation: Callable[[Tensor], Tensor],
        x: Tensor,
        place: Place = Place.matmuls,
    ) -> Tensor:
        up, down = (name.format(layer) for layer in layers)
        return self.linear(down, activation(self.linear(up, x, place)), place)

    def affine(self, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        return layer_norm(x, eps) * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    @staticmethod
    def sinusoid(angles: Tensor) -> Tensor:
        return torch.cat((angles.cos(), angles.sin()), -1)


def layer_norm(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def gelu_tanh(x: Tensor) -> Tensor:
    return x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2


def token_turns(grid: torch.Size, head_dim: int) -> Tensor:
    """Unit complex numbers [L, K/2], by which neighbouring channels of a token turn: first of time, then of row and column."""
    side = 2 * (head_dim // 6)
    parts = []
    for axis, dims in enumerate((head_dim - 2 * side, side, side)):
        place = torch.meshgrid(*map(torch.arange, grid), indexing="ij")[axis].flatten()
        parts.append(place[:, None] * 10000 ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims))
    angles = torch.cat(parts, -1)
    return torch.polar(torch.ones_like(angles), angles)


def unpatch(tokens: Tensor, channels: int) -> Tensor:
    """[B, T, H, W, 4 C], channel fastest, to [B, C, T, 2 H, 2 W]."""
    batch, frames, rows, columns, _ = tokens.shape
    out = tokens.new_zeros(batch, channels, frames, 2 * rows, 2 * columns)
    for corner in range(4):
        part = tokens[..., corner * channels : (corner + 1) * channels].permute(0, 4, 1, 2, 3)
        out[..., corner // 2 :: 2, corner % 2 :: 2] = part
    return out


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> DiT:
    """A DiT in which nothing is zero and every branch counts."""
    torch.manual_seed(0)
    model = DiT(CONFIGS[request.param])
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.2)
        elif "scale_shift_table" in name or "pos_embed" in name:
            nn.init.normal_(parameter, std=0.5)
        else:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def draw_inputs(config: DiTConfig) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, config.in_channels, 3, 4, 6, generator=generator)
    text = torch.randn(2, 5, config.text_dim, generator=generator)
    image = None
    if config.image_dim is not None:
        image = torch.randn(2, config.image_tokens, config.image_dim, generator=generator)
    return latents, torch.tensor([987.6, 43.2]), text, image


def run(model: DiT | Equations, config: DiTConfig) -> tuple[Tensor, Tensor]:
    """The velocity, and the gradients of all weights in the order of the state dict."""
    velocity = model(*draw_inputs(config))
    weights = list(model.weights.values()) if isinstance(model, Equations) else list(model.parameters())
    grad = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad(velocity, weights, grad.to(velocity.dtype))
    return velocity.detach().double(), torch.cat([gradient.double().flatten() for gradient in gradients])


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_float32_is_the_equations_to_rounding(model: DiT) -> None:
    equations = Equations(model, rounded=set())
    assert list(equations.weights) == [name for name, _ in model.named_parameters()]
    for found, expected in zip(run(model, model.config), run(equations, model.config), strict=True):
        assert relative_error(found, expected) < 3e-6


def test_bf16_loses_no_more_than_the_matmuls_do(model: DiT) -> None:
    """The error is that of the rule, to which a backward pass adds: gradients of a tensor read three times are summed in bf16."""
    exact = run(Equations(model, rounded=set()), model.config)
    rule = run(Equations(model, rounded={Place.matmuls}), model.config)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(model, model.config)
    velocity, gradients = (relative_error(*pair) for pair in zip(ours, exact, strict=True))
    velocity_rule, gradients_rule = (relative_error(*pair) for pair in zip(rule, exact, strict=True))
    assert velocity < min(1.1 * velocity_rule, 0.01)
    assert gradients < min(1.4 * gradients_rule, 0.01)


@pytest.mark.parametrize("place", [place for place in Place if place is not Place.matmuls])
def test_a_further_place_in_bf16_would_cost_precision(model: DiT, place: Place) -> None:
    """Why these stay float32: of four layers, each alone adds 7 to 55 percent to the error."""
    exact = run(Equations(model, rounded=set()), model.config)[0]
    rule = relative_error(run(Equations(model, rounded={Place.matmuls}), model.config)[0], exact)
    worse = relative_error(run(Equations(model, rounded={Place.matmuls, place}), model.config)[0], exact)
    assert worse > 1.05 * rule


# Operators that multiply matrices, and those that only move or convert numbers.
MATMULS = frozenset("linear mm bmm addmm baddbmm _scaled_dot_product_flash_attention_for_cpu".split())
MOVES = frozenset(
    "view _unsafe_view t transpose permute expand clone copy_ _to_copy detach alias select slice unsqueeze empty_like unbind"
    " new_empty split".split()
)


class LowPrecisionOps(TorchDispatchMode):
    """Names of the operators that return bf16 and compute."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in MOVES and any(
            isinstance(leaf, Tensor) and leaf.dtype == torch.bfloat16 for leaf in tree_leaves(out)
        ):
            self.names.add(name)
        return out


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_nothing_but_matmuls_and_their_activations_is_computed_in_bf16(model: DiT, autocast: bool) -> None:
    if not autocast:
        model.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), LowPrecisionOps() as low:
        velocity = model(*draw_inputs(model.config))
    sums = set() if model.config.image_dim is None else {"add"}  # of what is read from text and from the image
    assert low.names - MATMULS == {"gelu"} | sums
    assert low.names & MATMULS
    assert velocity.dtype == torch.float32
