"""Disks that are full, fail, or give back other bytes than were written: nothing half is ever taken for a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from muybridge.tests.faults.checks import Reference, after_step, assert_ended, finish, in_writer
from muybridge.tests.faults.fork_server import Attempt, Fault, ForkServer
from muybridge.tests.faults.run_folder import checkpoint_names, flip_bit, leftovers, read_rows, resumed_step

FOREGROUND = "checkpoint.in_background=false"
SHARD_1 = r"step-00000004\.tmp.*/shard-00001.*safetensors$"


@pytest.fixture
def settings(short_run: list[str], run_dir: Path) -> list[str]:
    return [*short_run, "deepspeed=zero2", f"run_dir={run_dir}"]


def fail(operation: str, of: str, number: str, **more: object) -> Fault:
    return {"at": f"file {operation}", "of": of, "do": "fail", "with": {"number": number}, **more}


def limited(nbytes: int, step: int) -> Fault:
    # Real: the kernel refuses the write of a file that gets too long. The rank's other files are short.
    return after_step(step, "limit file size", nbytes=nbytes)


def limited_at(path: str, nbytes: int) -> Fault:
    return {"at": "file open", "of": path, "do": "limit file size", "with": {"nbytes": nbytes}}


@pytest.mark.parametrize(
    ("own", "faults", "words"),
    [
        pytest.param(
            [FOREGROUND], {1: [limited(20_000, 4), limited(-1, 5)]}, "File too large", id="too large, foreground"
        ),
        pytest.param(
            [],
            {1: [in_writer(limited_at(SHARD_1, 20_000), limited_at("step-00000006", -1))]},
            "File too large",
            id="too large, background",
        ),
        pytest.param(
            [FOREGROUND],
            {1: [fail("fsync", SHARD_1, "ENOSPC")]},
            "No space left",
            id="full, foreground",
            marks=pytest.mark.faults,
        ),
        pytest.param([], {1: [in_writer(fail("fsync", SHARD_1, "ENOSPC"))]}, "No space left", id="full, background"),
        pytest.param(
            [],
            {0: [fail("fsync", r"step-00000004\.tmp.*/MANIFEST", "EIO")]},
            "Input/output error",
            id="manifest",
            marks=pytest.mark.faults,
        ),
        pytest.param(
            [],
            {0: [fail("mkdir", r"step-00000004\.tmp", "EROFS")]},
            "Read-only",
            id="staging folder",
            marks=pytest.mark.faults,
        ),
        pytest.param(
            [],
            {0: [fail("rename", r" -> .*/step-00000004$", "EIO")]},
            "Input/output",
            id="rename",
            marks=pytest.mark.faults,
        ),
    ],
)
def test_a_save_that_fails_on_one_rank_fails_on_all_and_training_goes_on(
    server: ForkServer,
    settings: list[str],
    reference: Reference,
    run_dir: Path,
    own: list[str],
    faults: dict[int, list[Fault]],
    words: str,
) -> None:
    outcome = server.run(Attempt([*settings, *own], faults=faults))
    assert_ended(outcome, [0, 0])
    (line,) = [line for line in outcome.output.splitlines() if "was not written" in line]
    assert "step-00000004" in line
    assert f"rank {next(iter(faults))}" in line
    assert words in line
    assert checkpoint_names(run_dir) == ["step-00000002", "step-00000006"]
    assert leftovers(run_dir) == []
    assert read_rows(run_dir) == reference(2).rows


@pytest.mark.faults
def test_a_disk_that_refuses_the_diary_is_an_error_on_all_ranks(server: ForkServer, settings: list[str]) -> None:
    full = {"at": "call muybridge.train.one_attempt:Attempts", "do": "fail", "with": {"number": "ENOSPC"}}
    outcome = server.run(Attempt(settings, faults={0: [full]}))
    assert_ended(outcome, [1, 1])
    assert all("No space left on device" in rank.output for rank in outcome.ranks)


@pytest.mark.faults
def test_a_full_disk_under_sample_videos_costs_these_only(
    server: ForkServer, settings: list[str], reference: Reference, run_dir: Path
) -> None:
    own = ["validation.every_steps=3", "validation.prompts=[a red circle,a blue square]", "sampler.steps=2"]
    full = {"at": "call muybridge.train.generate:write_mp4", "do": "fail", "with": {"number": "ENOSPC"}}
    outcome = server.run(Attempt([*settings, *own], faults={1: [full]}))
    assert_ended(outcome, [0, 0])
    assert "not all sample videos were written: [Errno 28] No space left on device" in outcome.output
    assert sorted(path.parent.name + path.name[:4] for path in run_dir.rglob("validation/*/*.mp4")) == [
        *("step-000000030000", "step-000000060000", "step-000000060001")
    ]
    assert read_rows(run_dir) == reference(2).rows


def test_a_disk_that_fails_at_every_save_ends_the_run(
    server: ForkServer, settings: list[str], reference: Reference, run_dir: Path
) -> None:
    own = ["checkpoint.every_steps=1"]
    outcome = server.run(Attempt([*settings, *own], faults={0: [fail("fsync", "MANIFEST", "EIO", nth=0)]}))
    assert_ended(outcome, [75, 75])
    assert "3 checkpoints in a row were not written" in outcome.output
    assert "Traceback" not in outcome.output
    assert checkpoint_names(run_dir) == []
    finish(server, settings, reference(2))


@pytest.mark.faults
def test_old_checkpoints_that_cannot_be_deleted_are_reported(
    server: ForkServer, settings: list[str], reference: Reference, run_dir: Path
) -> None:
    outcome = server.run(Attempt(settings, faults={0: [fail("rename", r" -> .*\.trash", "EACCES", nth=0)]}))
    assert_ended(outcome, [0, 0])
    assert "Permission denied" in outcome.output
    assert checkpoint_names(run_dir) == ["step-00000002", "step-00000004", "step-00000006"]
    assert read_rows(run_dir) == reference(2).rows


def mounted(folder: Path, nbytes: int) -> Fault:
    return {"at": "start", "do": "mount small disk", "with": {"folder": str(folder), "nbytes": nbytes}}


def skip_without_mounts(output: str) -> None:
    if "NO RIGHT TO MOUNT" in output:
        pytest.skip("this system lets nobody mount a small disk in a namespace of its own")


def test_a_disk_with_too_little_room_is_found_at_the_start(
    server: ForkServer, settings: list[str], run_dir: Path
) -> None:
    outcome = server.run(Attempt(settings, world=1, faults={0: [mounted(run_dir / "checkpoints", 65536)]}))
    skip_without_mounts(outcome.output)
    assert_ended(outcome, [64])
    assert "GB free, and a checkpoint needs" in outcome.output
    assert str(run_dir / "checkpoints") in outcome.output
    assert read_rows(run_dir) == []


def test_a_disk_that_is_full_for_a_while_costs_neither_training_nor_rows(
    server: ForkServer, settings: list[str], run_dir: Path
) -> None:
    filler = {"path": str(run_dir / "filler")}
    faults = [mounted(run_dir, 30_000_000), after_step(3, "fill disk", **filler), after_step(5, "take", **filler)]
    # The disk goes with the process: what is on it must be told by that.
    show = {
        "at": "call muybridge.train.exit_codes:os._exit",
        "do": "show",
        "with": {"path": str(run_dir / "metrics.jsonl")},
    }
    outcome = server.run(Attempt(settings, world=1, faults={0: [*faults, show]}))
    skip_without_mounts(outcome.output)
    assert_ended(outcome, [0])
    assert "step-00000004 was not written" in outcome.output
    assert "No space left on device" in outcome.output
    assert outcome.output.count('"loss"') == 6


@pytest.mark.faults
def test_a_full_disk_for_the_log_does_not_end_the_run(
    server: ForkServer, settings: list[str], reference: Reference, run_dir: Path
) -> None:
    full = after_step(2, "fill log disk")
    outcome = server.run(Attempt(settings, faults={0: [full], 1: [full]}))
    assert_ended(outcome, [0, 0])
    assert read_rows(run_dir) == reference(2).rows


# --- checkpoints that changed on the disk ----------------------------------------------------------------------------------------


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def delete(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.fixture
def two_checkpoints(server: ForkServer, settings: list[str], run_dir: Path) -> Path:
    """A run that was stopped after step 4: the folder of its checkpoints of steps 2 and 4."""
    stopped = server.run(Attempt(settings, faults={0: [after_step(4, "send", name="SIGTERM")]}))
    assert_ended(stopped, [75, 75])
    assert checkpoint_names(run_dir) == ["step-00000002", "step-00000004"]
    return run_dir / "checkpoints"


@pytest.mark.faults
def test_a_disk_that_is_full_at_a_resume_ends_the_attempt_and_not_the_run(
    server: ForkServer, settings: list[str], reference: Reference, two_checkpoints: Path
) -> None:
    full = {"at": "after muybridge.train.trainer:space_fault", "nth": 0, "do": "answer", "with": {"value": "no room"}}
    outcome = server.run(Attempt(settings, faults={0: [full]}))
    assert_ended(outcome, [75, 75])
    assert "no room; the same command goes on" in outcome.output
    assert "Traceback" not in outcome.output
    finish(server, settings, reference(2))
    # With all steps done there is nothing to save.
    assert_ended(server.run(Attempt(settings, faults={0: [full]})), [0, 0])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("shard-00001-of-00002.safetensors", flip_bit),
        pytest.param("shard-00000-of-00002.safetensors", cut_short, marks=pytest.mark.faults),
        pytest.param("shard-00000-of-00002.json", flip_bit, marks=pytest.mark.faults),
        pytest.param("run.json", flip_bit, marks=pytest.mark.faults),
        pytest.param("run.json", delete, marks=pytest.mark.faults),
        pytest.param("MANIFEST.json", flip_bit, marks=pytest.mark.faults),
        pytest.param("MANIFEST.json", empty, marks=pytest.mark.faults),
        pytest.param("MANIFEST.json", delete, marks=pytest.mark.faults),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    server: ForkServer,
    settings: list[str],
    reference: Reference,
    run_dir: Path,
    two_checkpoints: Path,
    name: str,
    damage: Callable[[Path], None],
) -> None:
    damage(two_checkpoints / "step-00000004" / name)
    resumed = finish(server, settings, reference(2))
    assert resumed_step(resumed.output) == 2
    assert f"step-00000004/{name}" in resumed.output
    (aside,) = (two_checkpoints / "set_aside").iterdir()
    assert aside.name.startswith("step-00000004-")


def test_a_run_with_nothing_but_damaged_checkpoints_is_not_started_anew(
    server: ForkServer, settings: list[str], run_dir: Path, two_checkpoints: Path
) -> None:
    rows = read_rows(run_dir)
    for step in checkpoint_names(run_dir):
        flip_bit(two_checkpoints / step / "shard-00000-of-00002.safetensors")
    outcome = server.run(Attempt(settings))
    assert_ended(outcome, [64, 64])
    assert "no checkpoint under" in outcome.output
    assert "Traceback" not in outcome.output
    assert checkpoint_names(run_dir) == ["step-00000002", "step-00000004"]
    assert read_rows(run_dir) == rows


@pytest.mark.faults
@pytest.mark.parametrize("content", [None, "", "step-000", "step-00000099\n"])
def test_the_name_of_the_newest_is_a_hint_only(
    server: ForkServer, settings: list[str], reference: Reference, two_checkpoints: Path, content: str | None
) -> None:
    latest = two_checkpoints / "LATEST"
    assert latest.read_text().strip() == "step-00000004"
    latest.unlink()
    if content is not None:
        latest.write_text(content)
    assert resumed_step(finish(server, settings, reference(2)).output) == 4
    assert latest.read_text().strip() == "step-00000006"


def test_times_and_what_another_rank_sees_of_the_disk_do_not_matter(
    server: ForkServer, settings: list[str], reference: Reference, two_checkpoints: Path
) -> None:
    set_times_back(two_checkpoints / "step-00000004")
    # Rank 1 sees an older state of the folder, as through the attribute cache of a network file system.
    blind = [
        {"at": "after pathlib:Path.exists", "of": "checkpoints", "nth": 0, "do": "answer", "with": {"value": False}},
        {
            "at": "after muybridge.train.checkpoint_folder:committed_checkpoints",
            "nth": 0,
            "do": "answer",
            "with": {"value": []},
        },
    ]
    outcome = server.run(Attempt(settings, faults={1: blind}))
    assert_ended(outcome, [0, 0])
    assert resumed_step(outcome.output) == 4
    finish(server, settings, reference(2))


def set_times_back(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        os.utime(path, (1, 1))
