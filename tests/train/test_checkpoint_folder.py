"""The folder of checkpoints: which one a run resumes from, what damage does, and what is kept, set aside and deleted."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from muybridge.tests.train.checkpoint_parts import (
    DAMAGES,
    fake_one_rank,
    flip_a_bit,
    go_on,
    make_checkpointer,
    names,
    save,
)
from muybridge.train import checkpoint_folder, fragments
from muybridge.train.checkpoint_folder import (
    check_checkpoint,
    choose_checkpoint,
    committed_checkpoints,
    move_to_trash,
    newest_checkpoint,
    refuse_damaged,
    resume_fault,
    retained,
    space_fault,
)
from muybridge.train.fragments import FragmentReader, read_run_state, read_weights


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_one_rank(monkeypatch)


@pytest.mark.parametrize("name", ["shard-00000-of-00001.safetensors", "shard-00000-of-00001.json", "run.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_set_aside_and_the_older_one_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, name: str
) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    DAMAGES[damage](newer / name)
    assert go_on(tmp_path) == older
    assert str(newer / name) in capsys.readouterr().out
    # It must not win once a file of it is put right, nor be deleted as if it were old.
    assert names(tmp_path) == ["set_aside", "step-00000001"]
    assert [path.name.rpartition("-")[0] for path in (tmp_path / "set_aside").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "{}", '{"run.json": 3}', '{"run.json": {"bytes": 1, "crc32": 2}, "../x": {}}']
)
def test_a_damaged_manifest_is_named_and_the_older_checkpoint_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    (newer / "MANIFEST.json").write_text(content)
    assert choose_checkpoint(tmp_path) == older
    assert str(newer / "MANIFEST.json") in capsys.readouterr().out


def test_no_valid_checkpoint_is_an_error_and_no_fresh_start(tmp_path: Path) -> None:
    for step in (1, 2):
        flip_a_bit(save(tmp_path, step) / "run.json")
    before = names(tmp_path)
    with pytest.raises(ValueError, match=r"no checkpoint under .* is valid.*step-00000002/run.json.*step-00000001/run"):
        choose_checkpoint(tmp_path)
    assert names(tmp_path) == before


def test_an_empty_folder_is_a_fresh_start(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        assert choose_checkpoint(folder) is None
        assert choose_checkpoint(folder, "never") is None


def test_a_resume_that_must_be_is_no_fresh_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resume=must: there is no checkpoint under"):
        choose_checkpoint(tmp_path, "must")
    folder = save(tmp_path, 1)
    assert choose_checkpoint(tmp_path, "must") == folder


def test_a_fresh_start_that_must_be_does_not_bury_a_run(tmp_path: Path) -> None:
    save(tmp_path, 1)
    flip_a_bit(save(tmp_path, 2) / "run.json")
    with pytest.raises(ValueError, match=r"resume=never: .* step-00000002, step-00000001"):
        choose_checkpoint(tmp_path, "never")


def test_a_run_can_go_back_to_a_step(tmp_path: Path) -> None:
    saved = [save(tmp_path, step) for step in (10, 20, 30)]
    assert go_on(tmp_path, "20") == saved[1]
    assert names(tmp_path) == ["set_aside", "step-00000010", "step-00000020"]
    (aside,) = (tmp_path / "set_aside").iterdir()
    assert check_checkpoint(aside) == ""
    # What it did after that step must not win later.
    assert choose_checkpoint(tmp_path) == saved[1]


@pytest.mark.parametrize("resume", ["auto", "10"])
def test_a_choice_alone_changes_nothing(tmp_path: Path, resume: str) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    flip_a_bit(tmp_path / "step-00000020" / "run.json")
    (tmp_path / "step-00000030.tmp-0123456789ab").mkdir()
    before = names(tmp_path)
    assert choose_checkpoint(tmp_path, resume) == tmp_path / "step-00000010"
    assert names(tmp_path) == before


def test_going_back_to_a_step_takes_no_other(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    with pytest.raises(ValueError, match=r"resume=15: .* there are: step-00000020, step-00000010"):
        choose_checkpoint(tmp_path, "15")
    flip_a_bit(tmp_path / "step-00000010/run.json")
    with pytest.raises(ValueError, match=r"resume=10: .*step-00000010/run.json does not match"):
        choose_checkpoint(tmp_path, "10")
    assert names(tmp_path) == ["step-00000010", "step-00000020"]


@pytest.mark.parametrize("resume", ["", "newest", "-3", "1.5", "²"])
def test_other_words_for_a_resume_are_refused(tmp_path: Path, resume: str) -> None:
    with pytest.raises(ValueError, match=f"^resume={resume} must be auto, must, never or the step"):
        choose_checkpoint(tmp_path, resume)
    assert resume_fault("resume", resume).startswith(f"resume={resume} ")
    assert resume_fault("resume", "0120") == ""


def test_only_our_own_leftovers_are_deleted(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (tmp_path / "elsewhere").mkdir()
    kept = ["step-00000002.tmp-mine", "step-2", ".trash-notes", "notes", "elsewhere"]
    for name in (*kept, "step-00000002.tmp-0123456789ab", ".trash-step-00000001-01234567"):
        (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / "step-00000003.tmp-0123456789ab").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "LATEST.tmp-0123456789ab").write_text("half")
    assert go_on(tmp_path) == folder
    assert names(tmp_path) == sorted([*kept, folder.name, "step-00000003.tmp-0123456789ab"])


def test_damage_is_refused_by_those_who_read_weights_alone(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    refuse_damaged(folder)
    flip_a_bit(folder / "shard-00000-of-00001.safetensors")
    with pytest.raises(ValueError, match=r"shard-00000-of-00001\.safetensors does not match its size and checksum"):
        refuse_damaged(folder)


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    checkpointer = make_checkpointer(tmp_path)
    for step in (2, 9, 10, 100):
        checkpointer.begin(step, {}, "", {})
        checkpointer.commit()
    checkpointer.close()
    assert [path.name for path in committed_checkpoints(tmp_path)] == ["step-00000010", "step-00000100"]
    assert names(tmp_path) == ["step-00000010", "step-00000100"]


def test_those_of_round_steps_and_of_the_lowest_losses_stay_too(tmp_path: Path) -> None:
    checkpointer = make_checkpointer(tmp_path, keep_every=40, keep_best=1)
    losses = {10: 0.5, 20: 0.3, 30: 0.4, 50: 0.31}
    for step in range(10, 100, 10):
        checkpointer.begin(step, {}, "", {at: loss for at, loss in losses.items() if at < step})
        checkpointer.commit()
    checkpointer.close()
    assert [int(name[-2:]) for name in names(tmp_path)] == [20, 40, 80, 90]


def test_retention_is_a_function_of_steps_and_losses() -> None:
    steps = [10, 20, 30, 40, 50]
    off = {"keep_every": 0, "keep_best": 0}
    assert retained(steps, keep_last=2, validation_loss={10: 0.1}, **off) == {40, 50}
    assert retained(steps, keep_last=9, validation_loss={}, **off) == set(steps)
    # One without a loss cannot be among the best; the later one of equal losses goes.
    losses = {10: 0.2, 30: 0.2, 60: 0.0}
    assert retained(steps, keep_last=2, keep_every=0, keep_best=1, validation_loss=losses) == {10, 40, 50}


@pytest.mark.parametrize("worst", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_not_the_lowest(worst: float) -> None:
    losses = {10: worst, 20: 0.1, 30: worst}
    kept = retained([10, 20, 30, 40, 50], keep_last=2, keep_every=0, keep_best=2, validation_loss=losses)
    assert kept == {20, 40, 50}


def test_room_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert space_fault(tmp_path / "not" / "yet", 1000) == ""
    assert "1.2 times its 1e+09 GB" in space_fault(tmp_path / "not" / "yet", 10**18)


def test_a_manifest_lists_every_other_file(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert sorted(manifest) == sorted(path.name for path in folder.iterdir() if path.name != "MANIFEST.json")


def test_a_checkpoint_that_a_run_removes_meanwhile_is_no_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def removed_meanwhile(folder: Path) -> str:
        asked.append(folder.name)
        if len(asked) == 1:
            move_to_trash(folder)
            save(tmp_path, 2)
        return check_checkpoint(folder)

    assert newest_checkpoint(tmp_path) is None
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint_folder, "check_checkpoint", removed_meanwhile)
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000002"
    assert asked == ["step-00000001", "step-00000002"]
    flip_a_bit(tmp_path / "step-00000002" / "run.json")
    with pytest.raises(ValueError, match=r"step-00000002/run\.json does not match"):
        newest_checkpoint(tmp_path)


def test_a_reader_says_that_a_checkpoint_was_removed_and_reads_on_what_it_has_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    opened = fragments.safe_open

    def open_behind_the_removal(path: Path, **options: Any) -> Any:
        move_to_trash(first)
        return opened(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(fragments, "safe_open", open_behind_the_removal)
        with pytest.raises(ValueError, match=r"step-00000001 is not there any more.*repeat the command"):
            FragmentReader(first)
    for read in (read_run_state, FragmentReader, read_weights):
        with pytest.raises(ValueError, match=r"step-00000001 is not there any more"):
            read(first)
    with FragmentReader(second) as reader:
        checkpoint_folder.delete_leftover(move_to_trash(second))
        assert reader.read("master", "w", 0, 15).unique().tolist() == [2.0]
    third = save(tmp_path, 3)
    (third / "shard-00000-of-00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError):  # that is damage
        FragmentReader(third)
