"""Encoder half of the video autoencoder, in the Wan 2.1 form and the residual 2.2 form."""

import torch.nn.functional as F
from torch import Tensor, nn

from .config import VAEConfig
from .frame_cache import FrameCache
from .layers import AverageDown, CausalConv3d, ChannelNorm, Downsample, MiddleBlock, ResidualBlock


class Encoder(nn.Module):
    """Folded pixels [B, C, T, H, W] -> mean and log-variance side by side [B, 2z, T', H', W']."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base_dim * mult for mult in [1, *config.dim_mult]]
        self.conv_in = CausalConv3d(config.folded_channels, widths[0], (3, 3, 3))
        self.down_blocks = nn.ModuleList()
        # One entry per level: does it halve time too? None: it is the last one and halves nothing.
        halvings = [*config.temporal_downsample, None]
        for width, next_width, temporal in zip(widths[:-1], widths[1:], halvings, strict=True):
            if config.is_residual:
                level = ResidualDownLevel(width, next_width, config.num_res_blocks, temporal=temporal)
                self.down_blocks.append(level)
                continue
            # The 2.1 form keeps all levels in one flat list; weight files number them so.
            for block in range(config.num_res_blocks):
                self.down_blocks.append(ResidualBlock(width if block == 0 else next_width, next_width))
            if temporal is not None:
                self.down_blocks.append(Downsample(next_width, temporal=temporal))
        self.mid_block = MiddleBlock(widths[-1])
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config.z_dim, (3, 3, 3))

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        x = self.conv_in(x, cache)
        for block in self.down_blocks:
            x = block(x, cache)
        x = self.mid_block(x, cache)
        return self.conv_out(F.silu(self.norm_out(x)), cache)


class ResidualDownLevel(nn.Module):
    """A level of the 2.2 encoder: residual blocks and a downsampler, and a shortcut without weights around them."""

    def __init__(self, in_channels: int, out_channels: int, num_res_blocks: int, *, temporal: bool | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(in_channels if block == 0 else out_channels, out_channels) for block in range(num_res_blocks)
        )
        self.downsampler = None if temporal is None else Downsample(out_channels, temporal=temporal)
        self.avg_shortcut = AverageDown(
            out_channels, time_factor=2 if temporal else 1, space_factor=1 if temporal is None else 2
        )

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        hidden = x
        for block in self.resnets:
            hidden = block(hidden, cache)
        if self.downsampler is not None:
            hidden = self.downsampler(hidden, cache)
        return hidden + self.avg_shortcut(x)
