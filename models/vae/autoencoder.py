"""The causal video autoencoder: pixels to a distribution over latents and back, with diffusers' parameter names."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .chunks import chunk_bounds, default_latent_frames
from .config import VAEConfig
from .decoder import Decoder
from .encoder import Encoder
from .frame_cache import FrameCache
from .inflate import inflate
from .layers import CausalConv3d, FrameAttention, ResidualBlock, fold_pixels, unfold_pixels


@dataclass
class LatentDistribution:
    """A diagonal Gaussian over raw latents; both tensors are [B, z, T', H', W'], logvar within [-30, 20]."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, for standard normal noise of the same shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def mode(self) -> Tensor:
        """The latents that diffusion models are trained on."""
        return self.mean


class VideoVAE(nn.Module):
    """Autoencoder of clips of 1 + k * temporal_stride frames; the first frame alone is an image.

    Equal to diffusers' `AutoencoderKLWan`, whose chunks and caches compute the same function, and `state_dict()` has
    its keys. Fresh weights look at single frames (see `inflate`), so that an image stage trains all that it uses.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        if faults := config.faults("vae"):
            raise ValueError("; ".join(faults))
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
        self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh weights from which short training runs get away (300 image steps at 64x64: 24.5 to 28.1 dB
        in three runs; one from torch's defaults: 21.3 dB).

        Every convolution keeps the variance of its input on the last time tap, all that images use; residual branches
        start small and attention at zero, so that a fresh model is nearly linear; and the latent noise starts small.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                kernel = module.weight[:, :, -1] if module.weight.dim() == 5 else module.weight
                nn.init.normal_(kernel, std=kernel[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                module.conv2.weight.mul_(0.1)
            if isinstance(module, FrameAttention):
                nn.init.zeros_(module.proj.weight)
        # A standard deviation of 0.05 beside latents of about 0.5; from logvar 0 the noise drowns them for long.
        self.quant_conv.weight[self.config.z_dim :].mul_(0.1)
        self.quant_conv.bias[self.config.z_dim :] = -6.0  # type: ignore[index]
        inflate(self)

    def encode(self, pixels: Tensor) -> LatentDistribution:
        """Pixels [B, 3, T, H, W] in [-1, 1] -> distribution over latents [B, z, T', H/stride, W/stride].

        Pixels are cast to the dtype of the weights. Raises ValueError where the frames are not 1 + k * temporal_stride,
        or the stride does not divide a side.
        """
        self.check_pixels(pixels)
        return self.encode_part(pixels)

    @torch.no_grad()
    def encode_chunked(self, pixels: Tensor, *, latent_frames_per_chunk: int | None = None) -> LatentDistribution:
        """What `encode` gives, without gradients, in memory for a chunk of that many latent frames, not for all frames.

        By default a chunk has as many frames as `CHUNK_PIXELS` holds, at least those of one latent frame.
        """
        self.check_pixels(pixels)
        length = self.chunk_length(latent_frames_per_chunk, len(pixels), *pixels.shape[3:])
        cache, parts = FrameCache(), []
        for start, stop in chunk_bounds(self.config, pixels.shape[2], length):
            parts.append(self.encode_part(pixels[:, :, start:stop], cache))
            cache.is_first = False
        return LatentDistribution(
            *(torch.cat([getattr(part, name) for part in parts], dim=2) for name in ("mean", "logvar"))
        )

    def encode_part(self, pixels: Tensor, cache: FrameCache | None = None) -> LatentDistribution:
        """`encode` of some frames of clips; the cache has those before them. Nothing is checked."""
        pixels = pixels.to(self.quant_conv.weight.dtype)
        if self.config.patch_size > 1:
            pixels = fold_pixels(pixels, self.config.patch_size)
        mean, logvar = self.quant_conv(self.encoder(pixels, cache)).chunk(2, dim=1)
        return LatentDistribution(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, latents: Tensor) -> Tensor:
        """Raw latents [B, z, T', H', W'] -> pixels [B, 3, T, H, W], not clamped to [-1, 1] (diffusers clamps).

        Latents are cast to the dtype of the weights. Raises ValueError where they have not z_dim channels.
        """
        self._check_latents(latents)
        return self._decode(latents)

    @torch.no_grad()
    def decode_chunked(self, latents: Tensor, *, latent_frames_per_chunk: int | None = None) -> Iterator[Tensor]:
        """What `decode` gives, without gradients, in parts along time: pixels [B, 3, t, H, W] of that many latent frames each.

        Takes memory for a chunk, as large as that of `encode_chunked`, not for all frames. The first part has
        temporal_stride - 1 frames less than the others.
        """
        self._check_latents(latents)
        stride = self.config.spatial_stride
        height, width = latents.shape[3] * stride, latents.shape[4] * stride
        cache = FrameCache()
        for part in latents.split(self.chunk_length(latent_frames_per_chunk, len(latents), height, width), dim=2):
            yield self._decode(part, cache)
            cache.is_first = False

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, LatentDistribution]:
        """Reconstruct pixels through latents sampled with `noise` [B, z, T', H', W'], as training does."""
        distribution = self.encode(pixels)
        return self.decode(distribution.sample(noise)), distribution

    def normalise(self, mean: Tensor) -> Tensor:
        """Raw latents -> (mean - latents_mean) / latents_std, what a diffusion model sees; unmeasured: unchanged."""
        centre, spread = self._statistics_like(mean)
        return (mean - centre) / spread

    def denormalise(self, latents: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        centre, spread = self._statistics_like(latents)
        return latents * spread + centre

    def _decode(self, latents: Tensor, cache: FrameCache | None = None) -> Tensor:
        pixels = self.decoder(self.post_quant_conv(latents.to(self.post_quant_conv.weight.dtype)), cache)
        return unfold_pixels(pixels, self.config.patch_size) if self.config.patch_size > 1 else pixels

    def chunk_length(self, latent_frames: int | None, clips: int, height: int, width: int) -> int:
        """Latent frames of a chunk: those asked for, or what `CHUNK_PIXELS` holds. Raises ValueError below 1."""
        if latent_frames is None:
            return default_latent_frames(self.config, clips, height, width)
        if latent_frames < 1:
            raise ValueError(f"latent_frames_per_chunk={latent_frames} must be at least 1")
        return latent_frames

    def _statistics_like(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std [z, 1, 1, 1]. Not buffers: the weight files have no such keys, and casts would round them."""
        channels = self.config.z_dim
        pair = []
        for values in (self.config.latents_mean or [0.0] * channels, self.config.latents_std or [1.0] * channels):
            pair.append(torch.tensor(values, dtype=latents.dtype, device=latents.device).view(-1, 1, 1, 1))
        return pair[0], pair[1]

    def check_pixels(self, pixels: Tensor) -> None:
        """Raises ValueError for pixels [B, 3, T, H, W] that the strides do not fit."""
        frames, height, width = pixels.shape[2:]
        stride = self.config.temporal_stride
        if (frames - 1) % stride:
            raise ValueError(f"frames={frames} must be 1 + a multiple of {stride} (the autoencoder's temporal stride)")
        stride = self.config.spatial_stride
        for name, size in (("height", height), ("width", width)):
            if size % stride:
                raise ValueError(f"{name}={size} must be a multiple of {stride} (the autoencoder's spatial stride)")

    def _check_latents(self, latents: Tensor) -> None:
        channels = latents.shape[1]
        if channels != self.config.z_dim:
            raise ValueError(
                f"latents with {channels} channels must have z_dim={self.config.z_dim}, the autoencoder's: "
                "they are those of another autoencoder"
            )
