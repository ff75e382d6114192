"""What training samples are told of their clips: the configured shares, the same on every rank, whole tokens only."""

from typing import Any

import pytest
import torch
from torch import Tensor

from muybridge.models.diffusion.conditioning import ConditioningForm
from muybridge.models.diffusion.known_places import ConditioningConfig, draw_known_places, latent_known

LATENTS = (3, 8, 12)  # nine frames
PATCH = [1, 2, 2]
ALL_MODES = ConditioningConfig(
    form=ConditioningForm.clean_frames, t2v=0.1, i2v=0.4, continuation=0.2, inpainting=0.3, continuation_frames=5
)


def draw(config: ConditioningConfig, slots: range | list[int], latents: tuple[int, int, int] = LATENTS) -> Tensor:
    return draw_known_places(config, latents, temporal_stride=4, patch_size=PATCH, seed=5, step=7, slots=list(slots))


def test_known_places_are_the_same_however_slots_are_split_over_ranks() -> None:
    together = draw(ALL_MODES, range(8))
    assert torch.equal(
        torch.cat([draw(ALL_MODES, [0, 1, 2]), draw(ALL_MODES, [3]), draw(ALL_MODES, [4, 5, 6, 7])]), together
    )


def test_modes_come_in_their_shares() -> None:
    known = draw(ALL_MODES, range(2000))
    whole_frames = known.amin((1, 3, 4)).sum(1)  # [B], frames known as a whole
    any_place = known.amax((1, 2, 3, 4))
    t2v = (any_place == 0).float().mean().item()
    i2v = (whole_frames == 1).float().mean().item()
    continuation = (whole_frames == 5).float().mean().item()
    boxes = ((whole_frames == 0) & (any_place == 1)).float().mean().item()
    # Three standard deviations of a share of 2000. One box in 24 covers the clip, and its sample counts as text to video.
    assert i2v == pytest.approx(0.4, abs=0.033)
    assert continuation == pytest.approx(0.2, abs=0.027)
    assert boxes == pytest.approx(0.3 * 23 / 24, abs=0.031)
    assert t2v == pytest.approx(0.1 + 0.3 / 24, abs=0.021)


def test_a_box_is_of_whole_tokens_in_all_frames_and_anywhere() -> None:
    known = draw(ConditioningConfig(form=ConditioningForm.channels, i2v=0.0, inpainting=1.0), range(400))
    assert torch.equal(known, known[:, :, :1].expand_as(known))
    tokens = known.unflatten(3, (4, 2)).unflatten(5, (6, 2))  # [B, 1, T, H/2, 2, W/2, 2]
    assert torch.equal(tokens, tokens[..., :1, :, :1].expand_as(tokens))
    unknown = 1 - known[:, 0, 0]  # [B, H', W']
    assert unknown.sum((1, 2)).min() > 0
    often = unknown.mean(0)
    assert often.min() > 0.08  # also in the corners
    assert len({int(n) for n in unknown.amax(2).sum(1)}) == 4  # every height in tokens


def test_frames_alone_need_no_places_within_them() -> None:
    config = ConditioningConfig(form=ConditioningForm.clean_frames, i2v=0.0, continuation=1.0)
    known = draw(config, range(2))
    assert known.shape == (2, 1, 9, 1, 1)
    assert known.flatten(1).tolist() == [[1.0] * 5 + [0.0] * 4] * 2
    assert latent_known(known, 4).flatten(1).tolist() == [[1.0, 1.0, 0.0]] * 2


def test_a_single_image_is_made_of_text_alone() -> None:
    config = ConditioningConfig(form=ConditioningForm.clean_frames, i2v=0.5, continuation=0.5)
    assert draw(config, range(8), (1, 8, 12)).sum() == 0


def test_validation_is_drawn_apart_from_training() -> None:
    arguments: dict[str, Any] = {
        "temporal_stride": 4,
        "patch_size": PATCH,
        "seed": 5,
        "step": 7,
        "slots": list(range(16)),
    }
    training = draw_known_places(ALL_MODES, LATENTS, **arguments)
    validation = draw_known_places(ALL_MODES, LATENTS, **arguments, purpose="validation/")
    assert not torch.equal(training, validation)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ConditioningConfig(ConditioningForm.channels, t2v=0.5), "c.t2v and the other shares must sum to 1"),
        (ConditioningConfig(ConditioningForm.channels, t2v=-0.5, i2v=1.5), "c.t2v=-0.5 must be 0 or more"),
        (ConditioningConfig(ConditioningForm.channels, continuation_frames=0), "c.continuation_frames=0 must be"),
    ],
)
def test_a_wrong_share_is_named(config: ConditioningConfig, words: str) -> None:
    [fault] = config.faults("c")
    assert words in fault
    config.form = ConditioningForm.none
    assert config.faults("c") == []
