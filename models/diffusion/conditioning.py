"""What of a clip a model is given beside the text, in the two forms that Wan's models take it.

A `Condition` turns noisy latents and timesteps into what the network wants to see; training and samplers need nothing else of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .guidance import VelocityFn

Encode = Callable[[Tensor], Tensor]  # pixels [B, 3, T, H, W] in [-1, 1] -> normalised latents [B, C, T', H', W']


class ConditioningForm(StrEnum):
    """How a model is given the known places of a clip."""

    none = "none"  # not at all: text to video
    clean_frames = "clean_frames"  # in their places among the noisy latents, at timestep 0 (Wan 2.2 TI2V-5B)
    channels = "channels"  # as further channels, a mask and the latents of the masked clip (Wan 2.1 and 2.2 I2V)


class Condition:
    """Nothing is known: latents and timesteps go to the network as they are. The forms below say otherwise."""

    def model_inputs(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is called with for noisy latents [B, C, T', H', W'] at timesteps [B]."""
        return latents, timestep

    def wrap(self, velocity_fn: "VelocityFn") -> "VelocityFn":
        """The velocity function that a sampler follows, given the network's, guidance and experts included."""
        return lambda latents, timestep: velocity_fn(*self.model_inputs(latents, timestep))

    def finish(self, latents: Tensor) -> Tensor:
        """What a sampler ended with, [B, C, T', H', W'], the known places put in."""
        return latents

    def mean_over_unknown(self, error: Tensor) -> Tensor:
        """Per-sample means [B] of [B, C, T', H', W'] over the places that the network has to make."""
        return error.flatten(1).mean(1)


TEXT_ALONE = Condition()


@dataclass(frozen=True)
class CleanFrames(Condition):
    """Known latents stay clean and their tokens have timestep 0; what the network says of them is neither followed nor trained."""

    known_latents: Tensor  # [B, C, T', H', W'], normalised; read where `unknown` is 0
    # [B, 1, T', H', W'], or [B, 1, T', 1, 1] where frames are known as a whole: 1 is to be made, 0 is known; the same all over a
    # token. The short form gives the network one timestep for each frame of tokens, and so a small table of modulation.
    unknown: Tensor
    patch_size: Sequence[int]  # latent frames, rows, columns of a token

    def model_inputs(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Latents with the known places put in, and timesteps [B, R], one for each token or frame of tokens."""
        frames, rows, columns = self.patch_size
        of_tokens = self.unknown[:, 0, ::frames, ::rows, ::columns].flatten(1)  # [B, R]
        return self.finish(latents), of_tokens * timestep.unsqueeze(1)

    def finish(self, latents: Tensor) -> Tensor:
        return torch.where(self.unknown.bool(), latents, self.known_latents.to(latents.dtype))

    def mean_over_unknown(self, error: Tensor) -> Tensor:
        unknown = self.unknown.expand_as(error)
        return (error * unknown).flatten(1).sum(1) / unknown.flatten(1).sum(1)


@dataclass(frozen=True)
class ImageChannels(Condition):
    """Mask and image latents beside the noisy latents; all places are made anew, the known ones after their image."""

    channels: Tensor  # [B, temporal stride + C, T', H', W']: the mask of each latent frame's frames, then image latents

    def model_inputs(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Latents with the channels after their own, timesteps unchanged."""
        return torch.cat((latents, self.channels.to(latents.dtype)), dim=1), timestep


def image_channels(encode: Encode, pixels: Tensor, known: Tensor, *, temporal_stride: int) -> ImageChannels:
    """The condition of a clip's pixels [B, 3, T, H, W] where `known` is 1 and not 0.

    `known` is [B, 1, T, H', W'] with the sides of the latents, or [B, 1, T, 1, 1] where frames are known as a whole. Unknown
    pixels are encoded as 0, mid-grey. The first frame has a latent frame of its own and fills all places of its mask.
    """
    latents = encode(shown_pixels(pixels, known))
    mask = torch.cat((known[:, :, :1].repeat(1, 1, temporal_stride - 1, 1, 1), known), dim=2)
    mask = mask.unflatten(2, (-1, temporal_stride)).squeeze(1).transpose(1, 2)  # [B, stride, T', H'|1, W'|1]
    mask = mask.expand(-1, -1, -1, *latents.shape[3:])
    return ImageChannels(torch.cat((mask.to(latents.dtype), latents), dim=1))


def shown_pixels(pixels: Tensor, known: Tensor) -> Tensor:
    """Pixels [B, 3, T, H, W] where `known` ([B, 1, T, H'|1, W'|1], 1 or 0) is 1, and 0, mid-grey, elsewhere."""
    return pixels * F.interpolate(known.flatten(1, 2), size=pixels.shape[3:], mode="nearest").unsqueeze(1)


def known_frames_condition(
    form: ConditioningForm,
    encode: Encode,
    *,
    first: Tensor,
    last: Tensor | None = None,
    frames: int,
    temporal_stride: int,
    patch_size: Sequence[int],
) -> Condition:
    """The condition under which a clip of `frames` frames is sampled: its first frames, and with `channels` also its last.

    `first` [B, 3, K, H, W] and `last` [B, 3, 1, H, W] in [-1, 1]; K=1 is an image. Raises ValueError for a number of frames
    that the form cannot take.
    """
    count = first.shape[2]
    if form is ConditioningForm.none:
        raise ValueError(
            "conditioning.form=none must be clean_frames or channels: this model makes clips of text alone"
        )
    if count + (last is not None) >= frames:
        raise ValueError(f"{count + (last is not None)} known frames must be fewer than the clip's {frames}")
    if form is ConditioningForm.channels:
        pixels = first.new_zeros((*first.shape[:2], frames, *first.shape[3:]))
        known = first.new_zeros((len(first), 1, frames, 1, 1))
        pixels[:, :, :count], known[:, :, :count] = first, 1
        if last is not None:
            pixels[:, :, -1:], known[:, :, -1:] = last, 1
        return image_channels(encode, pixels, known, temporal_stride=temporal_stride)
    if last is not None:
        raise ValueError("conditioning.form=clean_frames takes first frames only: a last frame needs channels")
    if rule := clean_count_rule(count, temporal_stride, patch_size):
        raise ValueError(rule)
    clean = encode(first)  # [B, C, K', H', W']
    latent_frames = 1 + (frames - 1) // temporal_stride
    known_latents = F.pad(clean, (0, 0, 0, 0, 0, latent_frames - clean.shape[2]))
    unknown = torch.ones((len(clean), 1, latent_frames, 1, 1), dtype=clean.dtype, device=clean.device)
    unknown[:, :, : clean.shape[2]] = 0
    return CleanFrames(known_latents, unknown, patch_size)


def clean_count_rule(count: int, temporal_stride: int, patch_size: Sequence[int]) -> str:
    """Why `count` first frames of a clip cannot be kept clean, "" where they can: a token is known as a whole or not at all."""
    tokens = patch_size[0]
    if (count - 1) % temporal_stride == 0 and (1 + (count - 1) // temporal_stride) % tokens == 0:
        return ""
    rule = f"1 + a multiple of {temporal_stride}"
    if tokens > 1:
        rule = f"a multiple of {temporal_stride * tokens}, less {temporal_stride - 1}"
    return (
        f"{count} known frames must be {rule} (the autoencoder's stride {temporal_stride}, the model's patch {tokens})"
    )
