"""The checkpoints of a run as its loop sees them."""

from pathlib import Path

import pytest

from muybridge.tests.train.checkpoint_parts import fake_one_rank, make_checkpointer, names
from muybridge.train.checkpoint import CheckpointConfig, Saved
from muybridge.train.save_schedule import SaveSchedule
from muybridge.train.saving import Saver


@pytest.mark.parametrize("in_background", [False, True])
def test_a_save_that_training_waited_for_is_committed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_background: bool
) -> None:
    fake_one_rank(monkeypatch)
    seen: list[Saved] = []
    schedule = SaveSchedule(CheckpointConfig(), processes=1, on_gpu=False)
    saver = Saver(make_checkpointer(tmp_path, in_background=in_background), schedule, step=None, taken_up=seen.append)
    saver.begin(3, {}, bad_clips="", validation_losses={})
    assert (tmp_path / "step-00000003").exists() != in_background
    assert [saved.step for saved in seen] == ([] if in_background else [3])
    saver.save_now(4, {}, bad_clips="", validation_losses={})
    assert [saved.step for saved in seen] == [3, 4]
    assert saver.saved_step == 4
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    saver.close()
