"""Building blocks of the video autoencoder.

Everything is causal in time: a frame depends on itself and earlier frames only. Without a cache the layers see all frames
of a clip at once, so they can be trained; with one (`FrameCache`) they take it in chunks and compute the same function.
Layers that change the number of frames treat the first frame of a clip apart.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .frame_cache import FrameCache, starts_clip


class CausalConv3d(nn.Conv3d):
    """Convolution over [B, C, T, H, W] whose time padding is all in front: `kernel - 1` frames of zeros."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: tuple[int, int, int]) -> None:
        _, height, width = kernel_size
        super().__init__(in_channels, out_channels, kernel_size, padding=(0, height // 2, width // 2))

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        """[B, C, T, H, W] -> [B, C_out, T, H, W]"""
        frames, past = x.shape[2], self.kernel_size[0] - 1
        if cache is not None and past:
            x = cache.prepend(self, x, past)
        if x.shape[2] == 1:
            # In front of a single frame there are only zeros: the last tap is the whole kernel, a third of the work.
            frame = F.conv2d(x.squeeze(2), self.weight[:, :, -1], self.bias, padding=self.padding[1:])
            return frame.unsqueeze(2)
        missing = frames + past - x.shape[2]
        return super().forward(F.pad(x, (0, 0, 0, 0, missing, 0)) if missing else x)


class ChannelNorm(nn.Module):
    """x / rms(x over channels) * gamma. Statistics in fp32. `spatial_dims` only shapes gamma: 3 for clips, 2 for frames."""

    def __init__(self, channels: int, spatial_dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * spatial_dims))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape and dtype"""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        # The released code divides by max(||x||, 1e-12); the squares are clamped to match where a position is all zero.
        scale = wide.square().sum(1, keepdim=True).clamp_min(1e-24).rsqrt() * wide.shape[1] ** 0.5
        return ((wide * scale) * self.gamma).to(x.dtype)


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, plus the input (through a 1x1x1 convolution when widths differ)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, (3, 3, 3))
        self.norm2 = ChannelNorm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, (3, 3, 3))
        widths_differ = in_channels != out_channels
        self.conv_shortcut = CausalConv3d(in_channels, out_channels, (1, 1, 1)) if widths_differ else nn.Identity()

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)), cache)
        hidden = self.conv2(F.silu(self.norm2(hidden)), cache)
        return hidden + self.conv_shortcut(x)


class FrameAttention(nn.Module):
    """Single-head attention among the positions of each frame, added to the input; starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, spatial_dims=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        frames = merge_time(x)  # [B*T, C, H, W]
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)  # [B*T, H*W, 3C]
        query, key, value = qkv.unsqueeze(1).chunk(3, dim=-1)  # one head, as wide as the layer
        mixed = F.scaled_dot_product_attention(query, key, value).squeeze(1)
        mixed = mixed.transpose(1, 2).reshape(frames.shape)
        return x + split_time(self.proj(mixed), x.shape[2])


class MiddleBlock(nn.Module):
    """Residual block, attention within frames, residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels), ResidualBlock(channels, channels)])
        self.attentions = nn.ModuleList([FrameAttention(channels)])

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, cache)), cache)


class Downsample(nn.Module):
    """Halves height and width, and with `temporal` also time: 1 + 2k frames become 1 + k; later chunks of 2k frames k."""

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        # The convolution sits at index 1 because its name in weight files is `resample.1`.
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        # Stride 2 without padding: output k sees frames 2k-2, 2k-1 and 2k.
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        x = split_time(self.resample(merge_time(x)), x.shape[2])
        if self.time_conv is None:
            return x
        if cache is not None:
            x = cache.prepend(self, x, 1)
        if not starts_clip(cache):
            return self.time_conv(x)
        return x if x.shape[2] == 1 else torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)


class Upsample(nn.Module):
    """Doubles height and width, and with `temporal` also time: 1 + k frames become 1 + 2k; later chunks of k frames 2k."""

    def __init__(self, channels: int, out_channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(NearestDouble(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        if self.time_conv is not None:
            # The first frame is one frame on both sides, and the convolution of the later ones does not see it.
            alone = int(starts_clip(cache))
            if x.shape[2] > alone:
                pairs = self.time_conv(x[:, :, alone:], cache).unflatten(1, (2, -1))  # [B, 2, C, T-1, H, W]
                x = torch.cat([x[:, :, :alone], pairs.movedim(1, 3).flatten(2, 3)], dim=2)
        return split_time(self.resample(merge_time(x)), x.shape[2])


class NearestDouble(nn.Module):
    """Every pixel of [B, C, H, W] twice along height and width; a copy, so exact in any dtype."""

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        doubled = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2)
        return doubled.reshape(batch, channels, 2 * height, 2 * width)


class AverageDown(nn.Module):
    """Shortcut around an encoder level: fold space (and time) into channels, then average groups of channels."""

    def __init__(self, out_channels: int, *, time_factor: int, space_factor: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.time_factor = time_factor
        self.space_factor = space_factor

    def forward(self, x: Tensor) -> Tensor:
        time, space = self.time_factor, self.space_factor
        # Odd lengths get zero frames in front, so the first frame shares its group with zeros; released weights expect it.
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % time, 0))
        batch, channels, frames, height, width = x.shape
        x = x.reshape(batch, channels, frames // time, time, height // space, space, width // space, space)
        x = x.permute(0, 1, 3, 5, 7, 2, 4, 6)  # [B, C, time, space, space, T', H', W']
        return x.flatten(1, 4).unflatten(1, (self.out_channels, -1)).mean(2)


class RepeatUp(nn.Module):
    """Shortcut around a decoder level: repeat channels, then unfold them into space (and time)."""

    def __init__(self, in_channels: int, out_channels: int, *, time_factor: int, space_factor: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.time_factor = time_factor
        self.space_factor = space_factor
        self.repeats = out_channels * time_factor * space_factor**2 // in_channels

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        time, space = self.time_factor, self.space_factor
        x = x.repeat_interleave(self.repeats, dim=1)
        x = x.unflatten(1, (self.out_channels, time, space, space))
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)  # [B, C, T, time, H, space, W, space]
        x = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        # The first latent frame stands for one frame: of its copies only the last is kept.
        return x[:, :, time - 1 :] if starts_clip(cache) else x


def merge_time(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B*T, C, H, W]; a view when x is channels-last."""
    return x.transpose(1, 2).flatten(0, 1)


def split_time(x: Tensor, frames: int) -> Tensor:
    """[B*T, C, H, W] -> [B, C, T, H, W]"""
    return x.unflatten(0, (-1, frames)).transpose(1, 2)


def fold_pixels(x: Tensor, patch_size: int) -> Tensor:
    """[B, C, T, H, W] -> [B, C*p*p, T, H/p, W/p]; channel (c*p + column)*p + row, as released weights have it."""
    batch, channels, frames, height, width = x.shape
    p = patch_size
    x = x.reshape(batch, channels, frames, height // p, p, width // p, p)
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unfold_pixels(x: Tensor, patch_size: int) -> Tensor:
    """Inverse of `fold_pixels`."""
    x = x.unflatten(1, (-1, patch_size, patch_size))  # [B, C, column, row, T, H, W]
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
