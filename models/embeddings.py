"""Layers around the blocks: patch, time, text and image embedding, norms and Linears that stay float32 under bf16 weights."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a matmul with this weight runs: autocast's, or the weight's own."""
    device_type = weight.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return weight.dtype


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Casts nothing in its body; meta tensors know no autocast."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


class Fp32Linear(nn.Linear):
    """A Linear that computes in float32 whatever the dtype of its weight, under autocast too.

    The cast happens in the module's own forward, so sharded weights (ZeRO-3) are whole when it runs.
    """

    def forward(self, input: Tensor) -> Tensor:
        with no_autocast(input.device.type):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(input.float(), self.weight.float(), bias)


class Fp32LayerNorm(nn.LayerNorm):
    """LayerNorm computed and returned in float32."""

    def forward(self, input: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps)


class PatchEmbedding(nn.Conv3d):
    """Latents [B, C, T, H, W] to tokens [B, L, D] in raster order (frame, row, column).

    Kernel and stride are equal, so the convolution is a matmul over unfolded patches, which is faster everywhere; the
    weight keeps the Conv3d shape that public checkpoints have.
    """

    def __init__(self, in_channels: int, dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, input: Tensor) -> Tensor:
        batch, channels, frames, height, width = input.shape
        pt, ph, pw = self.kernel_size
        patches = input.view(batch, channels, frames // pt, pt, height // ph, ph, width // pw, pw)
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)  # [B, L, C*pt*ph*pw]
        return F.linear(patches.to(compute_dtype(self.weight)), self.weight.flatten(1), self.bias)  # [B, L, D]


class TimestepEmbedder(nn.Module):
    """Model timestep in [0, 1000] to a vector, in float32; any leading dims."""

    def __init__(self, freq_dim: int, dim: int) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.linear_1 = Fp32Linear(freq_dim, dim)
        self.linear_2 = Fp32Linear(dim, dim)

    def forward(self, timestep: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(timestep_sinusoid(timestep, self.freq_dim))))


def timestep_sinusoid(timestep: Tensor, freq_dim: int) -> Tensor:
    """[..., freq_dim] = [cos | sin] of t * 10000^(-i / half), in float64 inside because t reaches 1000, float32 outside."""
    half = freq_dim // 2
    index = torch.arange(half, dtype=torch.float64, device=timestep.device)
    angles = timestep.double().unsqueeze(-1) * torch.exp(index * (-math.log(10000.0) / half))
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


class TextEmbedder(nn.Module):
    """Text features [B, S, text_dim] to context [B, S, D], in the matmul dtype."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(text_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, text: Tensor) -> Tensor:
        text = text.to(compute_dtype(self.linear_1.weight))
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))


class ImageEmbedder(nn.Module):
    """Features of an image [B, I, image_dim] to context [B, I, D], in the matmul dtype; the norms are float32."""

    pos_embed: nn.Parameter | None

    def __init__(self, image_dim: int, dim: int, num_positions: int | None) -> None:
        """`num_positions` rows get a learned place: they tell a first image from a last one. None has no places."""
        super().__init__()
        self.norm1 = Fp32LayerNorm(image_dim)
        self.ff = ImageFeedForward(image_dim, dim)
        self.norm2 = Fp32LayerNorm(dim)
        places = None if num_positions is None else nn.Parameter(torch.zeros(1, num_positions, image_dim))
        self.register_parameter("pos_embed", places)

    def forward(self, features: Tensor) -> Tensor:
        features = features.float()
        if self.pos_embed is not None:
            features = features + self.pos_embed.float()
        hidden = self.ff(self.norm1(features))
        return self.norm2(hidden).to(hidden.dtype)


class ImageFeedForward(nn.Module):
    """Linear, GELU, Linear; named `net.0.proj` and `net.2` as in public checkpoints."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([ImageProjection(image_dim), nn.Identity(), nn.Linear(image_dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class ImageProjection(nn.Module):
    """Linear in the matmul dtype, then GELU in its exact form, where the text and the blocks have the tanh form."""

    def __init__(self, image_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(image_dim, image_dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x.to(compute_dtype(self.proj.weight))))


class ConditionEmbedder(nn.Module):
    """Timestep, text and image to what the blocks and the head are conditioned on; the DiT calls `image_embedder` itself."""

    def __init__(
        self,
        freq_dim: int,
        text_dim: int,
        dim: int,
        *,
        image_dim: int | None = None,
        image_positions: int | None = None,
    ) -> None:
        """Without `image_dim` there is no image embedder."""
        super().__init__()
        self.time_embedder = TimestepEmbedder(freq_dim, dim)
        self.time_proj = Fp32Linear(dim, 6 * dim)
        self.text_embedder = TextEmbedder(text_dim, dim)
        if image_dim is not None:
            self.image_embedder = ImageEmbedder(image_dim, dim, image_positions)

    def forward(self, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Timestep [B, R] as in `DiT.forward` -> head embedding [B, R, D], block modulation [B, R, 6, D], context [B, S, D]."""
        embedding = self.time_embedder(timestep)
        modulation = self.time_proj(F.silu(embedding)).unflatten(-1, (6, -1))
        return embedding, modulation, self.text_embedder(text)
