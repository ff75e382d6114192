"""The data settings work as a structured config and name all their faults at once."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from muybridge.data.config import Access, DataConfig
from muybridge.data.decode import Decoder


def test_members_are_typed_by_name() -> None:
    config = OmegaConf.merge(OmegaConf.structured(DataConfig), {"access": "latents", "decoder": "pyav", "fps": 16})
    settings = OmegaConf.to_object(config)
    assert isinstance(settings, DataConfig)
    assert settings.access is Access.latents
    assert settings.decoder is Decoder.pyav
    assert settings.fps == 16.0


def test_a_sound_config_has_no_faults() -> None:
    assert DataConfig(path="x").faults("data") == []
    assert DataConfig(path="x", frames=81, height=480, width=832, workers=0, prefetch=0).faults("data") == []


def test_all_faults_are_named() -> None:
    config = DataConfig(frames=50, fps=0, height=-8, workers=-1, prefetch=-1, timeout_seconds=0, caption_dropout=1.5)
    faults = config.faults("data")
    assert "data.frames=50 must be 1 + a multiple of 4 (the autoencoder's temporal stride)" in faults
    assert "data.caption_dropout=1.5 must be in 0..1" in faults
    assert len(faults) == 8


@pytest.mark.parametrize("frames", [0, -3, 4])
def test_frames_follow_the_stride(frames: int) -> None:
    assert len(DataConfig(path="x", frames=frames).faults("data")) == 1
