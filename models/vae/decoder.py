"""Decoder half of the video autoencoder, in the Wan 2.1 form and the residual 2.2 form."""

import torch.nn.functional as F
from torch import Tensor, nn

from .config import VAEConfig
from .frame_cache import FrameCache
from .layers import CausalConv3d, ChannelNorm, MiddleBlock, RepeatUp, ResidualBlock, Upsample


class Decoder(nn.Module):
    """Latents [B, z, T', H', W'] -> folded pixels [B, C, T, H, W]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        base = config.decoder_base_dim or config.base_dim
        widths = [base * mult for mult in [config.dim_mult[-1], *reversed(config.dim_mult)]]
        self.conv_in = CausalConv3d(config.z_dim, widths[0], (3, 3, 3))
        self.mid_block = MiddleBlock(widths[0])
        # One entry per level: does it double time too? None: it is the last one and doubles nothing.
        doublings = [*reversed(config.temporal_downsample), None]
        self.up_blocks = nn.ModuleList()
        for level, (width, next_width, temporal) in enumerate(zip(widths[:-1], widths[1:], doublings, strict=True)):
            if config.is_residual:
                self.up_blocks.append(ResidualUpLevel(width, next_width, config.num_res_blocks, temporal=temporal))
            else:
                halved = width // 2 if level > 0 else width  # the upsampler of the level before halved it
                self.up_blocks.append(UpLevel(halved, next_width, config.num_res_blocks, temporal=temporal))
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], config.folded_channels, (3, 3, 3))

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        x = self.mid_block(self.conv_in(x, cache), cache)
        for block in self.up_blocks:
            x = block(x, cache)
        return self.conv_out(F.silu(self.norm_out(x)), cache)


class UpLevel(nn.Module):
    """A level of the 2.1 decoder: residual blocks, then an upsampler that halves the width."""

    def __init__(self, in_channels: int, out_channels: int, num_res_blocks: int, *, temporal: bool | None) -> None:
        super().__init__()
        self.resnets = _up_resnets(in_channels, out_channels, num_res_blocks)
        self.upsamplers = nn.ModuleList()
        if temporal is not None:
            self.upsamplers.append(Upsample(out_channels, out_channels // 2, temporal=temporal))

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        for block in (*self.resnets, *self.upsamplers):
            x = block(x, cache)
        return x


class ResidualUpLevel(nn.Module):
    """A level of the 2.2 decoder: residual blocks and an upsampler, and a shortcut without weights around them."""

    def __init__(self, in_channels: int, out_channels: int, num_res_blocks: int, *, temporal: bool | None) -> None:
        super().__init__()
        self.resnets = _up_resnets(in_channels, out_channels, num_res_blocks)
        self.upsampler = self.avg_shortcut = None
        if temporal is not None:
            self.upsampler = Upsample(out_channels, out_channels, temporal=temporal)
            self.avg_shortcut = RepeatUp(in_channels, out_channels, time_factor=2 if temporal else 1, space_factor=2)

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        hidden = x
        for block in self.resnets:
            hidden = block(hidden, cache)
        if self.upsampler is None or self.avg_shortcut is None:
            return hidden
        return self.upsampler(hidden, cache) + self.avg_shortcut(x, cache)


def _up_resnets(in_channels: int, out_channels: int, num_res_blocks: int) -> nn.ModuleList:
    """One block more than an encoder level has."""
    return nn.ModuleList(
        ResidualBlock(in_channels if block == 0 else out_channels, out_channels) for block in range(num_res_blocks + 1)
    )
