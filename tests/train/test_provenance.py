from dataclasses import replace
from pathlib import Path

import pytest

from muybridge.train import provenance
from muybridge.train.config import TrainConfig
from muybridge.train.optimizer import OptimizerConfig
from muybridge.train.provenance import changed_settings_note, changed_versions_note, versions, write_provenance


def test_an_attempt_says_which_settings_are_others_than_before(tmp_path: Path) -> None:
    config = TrainConfig(run_dir=str(tmp_path), steps=10)
    assert changed_settings_note(config) == ""  # the first one
    write_provenance(config, data_fingerprint="data")
    assert changed_settings_note(config) == ""
    changed = replace(config, steps=20, optimizer=OptimizerConfig(lr=0.5))
    found = changed_settings_note(changed)
    assert (
        found
        == "settings changed since the last attempt: steps: 10 before, 20 now; optimizer.lr: 0.0001 before, 0.5 now"
    )


@pytest.mark.parametrize("content", ["steps: [10", "", "nothing", "\0"])
def test_settings_of_which_a_part_was_written_are_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    assert changed_settings_note(TrainConfig(run_dir=str(tmp_path))) == ""


def test_a_disk_that_fails_leaves_the_settings_of_the_last_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(run_dir=str(tmp_path), steps=10)
    write_provenance(config, data_fingerprint="data")

    def half(path: Path, text: str, **options: str) -> None:
        path.write_bytes(text.encode()[: len(text) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(OSError, match="No space left"):
            write_provenance(replace(config, steps=20), data_fingerprint="data")
    assert changed_settings_note(config) == ""


def test_an_attempt_says_which_versions_are_others_than_before(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = versions()
    assert {"muybridge", "python", "torch", "deepspeed"} <= saved.keys()
    assert changed_versions_note(saved) == ""
    monkeypatch.setattr(provenance, "version", lambda name: "99" if name == "torch" else saved[name])
    found = changed_versions_note(saved)
    assert found.startswith(f"versions changed since the checkpoint: torch {saved['torch']} before, 99 now: results")
