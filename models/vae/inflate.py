"""Image autoencoder to video autoencoder: the same weights, made to treat every frame as an image."""

import torch
from torch import nn

from .layers import CausalConv3d, Downsample, Upsample


@torch.no_grad()
def inflate(vae: nn.Module) -> None:
    """Keep of each causal kernel only the last time tap and make the temporal convolutions pass frames through, in place.

    A single frame meets zeros in the past, so only the last tap of a 3x3x3 kernel ever worked on images: that tap stays,
    the others become zero. Images are encoded and decoded as before, exactly. In the 2.1 form a clip is then encoded as
    its frames 0, 4, 8, ... and decoded as each latent frame repeated, exact for a still clip; in the residual form the
    shortcuts mix frames, so later frames are only close and the video stage has to mend them.
    """
    for module in vae.modules():
        if isinstance(module, CausalConv3d):
            module.weight[:, :, :-1] = 0.0
        if isinstance(module, Downsample | Upsample) and module.time_conv is not None:
            if module.time_conv.bias is not None:
                nn.init.zeros_(module.time_conv.bias)
            nn.init.zeros_(module.time_conv.weight)
            # [C, C, 3, 1, 1] down; up has 2C outputs, for the earlier and the later frame of each pair.
            last_tap = module.time_conv.weight[:, :, -1, 0, 0]
            identity = torch.eye(last_tap.shape[1], dtype=last_tap.dtype, device=last_tap.device)
            last_tap.copy_(identity.repeat(last_tap.shape[0] // last_tap.shape[1], 1))
