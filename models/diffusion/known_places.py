"""What each training sample of a conditional model is told of its clip: nothing, its first frames, or all of it but a box."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from .conditioning import ConditioningForm, clean_count_rule
from .objective import keyed_uniform


class ConditioningMode(StrEnum):
    """What is known of a clip."""

    t2v = "t2v"  # nothing
    i2v = "i2v"  # the first frame
    continuation = "continuation"  # the first frames
    inpainting = "inpainting"  # all frames outside of a box


@dataclass
class ConditioningConfig:
    """What a model is given of a clip beside the text; the four shares of the samples sum to 1."""

    # none: text alone; clean_frames: known latents without noise, at timestep 0 (Wan 2.2 TI2V-5B); channels: mask and image
    # latents beside the noisy ones (Wan 2.1 and 2.2 I2V), which takes clips and no cached latents.
    form: ConditioningForm = ConditioningForm.none
    t2v: float = 0.0  # share of samples of which nothing is known
    i2v: float = 1.0  # share of which the first frame is known
    continuation: float = 0.0  # share of which the first `continuation_frames` are known
    inpainting: float = 0.0  # share of which a box is unknown, drawn for each sample, the same in all frames
    continuation_frames: int = 5  # frames, not latent frames
    # Pipeline folder whose image_encoder/ and image_processor/ read the first frame for a model with image_dim (Wan 2.1 I2V).
    image_encoder: str | None = None

    def share(self, mode: ConditioningMode) -> float:
        """The share of samples of a mode."""
        return {
            ConditioningMode.t2v: self.t2v,
            ConditioningMode.i2v: self.i2v,
            ConditioningMode.continuation: self.continuation,
            ConditioningMode.inpainting: self.inpainting,
        }[mode]

    def known_frames(self, mode: ConditioningMode) -> int:
        """Frames from the first that are known whole."""
        return {ConditioningMode.i2v: 1, ConditioningMode.continuation: self.continuation_frames}.get(mode, 0)

    def faults(self, field: str) -> list[str]:
        """All breaches of this config's own rules, as messages that name the field, the value and the rule."""
        if self.form is ConditioningForm.none:
            return []
        shares = {mode: self.share(mode) for mode in ConditioningMode}
        found = [f"{field}.{mode}={share} must be 0 or more" for mode, share in shares.items() if share < 0]
        if not found and not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
            named = ", ".join(f"{mode}={share}" for mode, share in shares.items())
            found.append(f"{field}.{ConditioningMode.t2v} and the other shares must sum to 1 ({named})")
        if self.continuation_frames < 1:
            found.append(f"{field}.continuation_frames={self.continuation_frames} must be at least 1")
        return found

    def clip_faults(self, field: str, *, frames: int, temporal_stride: int, patch_size: Sequence[int]) -> list[str]:
        """Breaches against the longest clips, of `frames` frames, the autoencoder's stride and the model's patch."""
        found = []
        for mode, name in ((ConditioningMode.i2v, "i2v"), (ConditioningMode.continuation, "continuation_frames")):
            count = self.known_frames(mode)
            if self.form is ConditioningForm.none or not self.share(mode):
                continue
            setting = f"{field}.{name}={getattr(self, name)}"
            if count >= frames:
                found.append(f"{setting}: {count} known frames must be fewer than the clips' {frames}")
            elif self.form is ConditioningForm.clean_frames and (
                rule := clean_count_rule(count, temporal_stride, patch_size)
            ):
                found.append(f"{setting}: {rule}")
        return found


def draw_known_places(
    config: ConditioningConfig,
    latent_size: tuple[int, int, int],
    *,
    temporal_stride: int,
    patch_size: Sequence[int],
    seed: int,
    step: int,
    slots: Sequence[int],
    purpose: str = "",
) -> Tensor:
    """Which places of the slots' clips are known, 1 or 0, float32 on the CPU; latents are of (T', H', W') = `latent_size`.

    [B, 1, T, H', W'] over the T frames of the clips, or [B, 1, T, 1, 1] where no share asks for boxes. A clip that is known
    as a whole by the mode drawn, such as a single image, is made of text alone.
    """
    latent_frames, *sides = latent_size
    frames = 1 + (latent_frames - 1) * temporal_stride
    modes = draw_modes(config, keyed_uniform(seed, step, slots, purpose=f"{purpose}conditioning_mode"))
    size = sides if config.inpainting else [1, 1]
    known = torch.zeros((len(slots), 1, frames, *size))
    boxes = [
        keyed_uniform(seed, step, slots, purpose=f"{purpose}conditioning_{name}").tolist()
        for name in ("height", "top", "width", "left")
    ]
    for row, mode in enumerate(modes):
        if mode is ConditioningMode.inpainting:
            height, top, width, left = (numbers[row] for numbers in boxes)
            known[row] = 1
            rows = _draw_span(sides[0] // patch_size[1], patch_size[1], height, top)
            columns = _draw_span(sides[1] // patch_size[2], patch_size[2], width, left)
            known[row, :, :, rows, columns] = 0
        elif (count := config.known_frames(mode)) < frames:
            known[row, :, :count] = 1
    return known


def draw_modes(config: ConditioningConfig, uniform: Tensor) -> list[ConditioningMode]:
    """A mode for each number [B] in (0, 1), by the shares."""
    modes = [mode for mode in ConditioningMode if config.share(mode) > 0]
    ends = torch.tensor([config.share(mode) for mode in modes], dtype=torch.float64).cumsum(0)
    # The last end may be a rounding below 1.
    places = torch.searchsorted(ends, uniform).clamp(max=len(modes) - 1)
    return [modes[place] for place in places.tolist()]


def latent_known(known: Tensor, temporal_stride: int) -> Tensor:
    """Known places of latent frames, [B, 1, T', H', W'], from those of frames: a latent frame is known with its last frame.

    Right for known frames from the first on, and for boxes in all frames.
    """
    return known[:, :, ::temporal_stride]


def _draw_span(tokens: int, patch: int, size: float, start: float) -> slice:
    """A span along an axis of `tokens` tokens from two uniform numbers: its length from one token to all, then its place."""
    length = 1 + int(size * tokens)
    first = int(start * (tokens - length + 1))
    return slice(first * patch, (first + length) * patch)
