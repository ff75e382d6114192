"""A rank killed at any moment of a save, a clean-up or a load: the next attempt goes on from the newest whole checkpoint.

Every case is two attempts: one in which the fault strikes in or after the second save (step 4), and one that must finish with the
rows and weights of an uninterrupted run, bit for bit, and leave nothing of the first one behind.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from muybridge.tests.faults.checks import Reference, after_step, assert_killed_alone, finish, in_writer
from muybridge.tests.faults.fork_server import Attempt, Fault, ForkServer
from muybridge.tests.faults.run_folder import checkpoint_names, read_rows, resumed_step

FOREGROUND, BACKGROUND = "checkpoint.in_background=false", "checkpoint.in_background=true"


@dataclass(frozen=True)
class KillPoint:
    """Where one rank is killed, and the step that the next attempt goes on from."""

    rank: int
    faults: list[Fault]
    resumes: int


def at_file(operation: str, of: str, do: str = "kill", **more: object) -> Fault:
    return {"at": f"file {operation}", "of": of, "do": do, **more}


STAGING = r"step-00000004\.tmp.*"
SHARD_0, SHARD_1 = STAGING + r"/shard-00000.*safetensors$", STAGING + r"/shard-00001.*safetensors$"
# What rank 0 does at a save, whoever wrote the shards, and at what comes after it.
COMMITS = {
    "K0 before the staging folder": KillPoint(0, [at_file("mkdir", STAGING)], resumes=2),
    "K3 before the manifest": KillPoint(0, [at_file("open", STAGING + r"/MANIFEST\.json")], resumes=2),
    "K4 half a manifest": KillPoint(0, [at_file("fsync", STAGING + r"/MANIFEST\.json", "cut and kill")], resumes=2),
    "K5 before the rename": KillPoint(0, [at_file("rename", STAGING + r" -> .*/step-00000004$")], resumes=2),
    "K6 after the rename": KillPoint(0, [at_file("fsync", r"/checkpoints$", nth=2)], resumes=4),
    "K7 before LATEST": KillPoint(0, [at_file("rename", r"-> .*/LATEST$", nth=2)], resumes=4),
    "K7 half a LATEST": KillPoint(0, [at_file("fsync", r"/LATEST", "cut and kill", nth=2)], resumes=4),
    "K8 before the oldest becomes trash": KillPoint(0, [at_file("rename", r"step-00000002 -> .*\.trash")], resumes=6),
    "K8 before the trash is deleted": KillPoint(0, [at_file("shutil.rmtree", r"\.trash")], resumes=6),
    "K8 in the middle of the trash": KillPoint(0, [at_file("remove", r"\.trash", nth=2)], resumes=6),
}
IN_FOREGROUND = COMMITS | {
    "K1 in the middle of rank 0's shard": KillPoint(0, [at_file("fsync", SHARD_0, "cut and kill")], resumes=2),
    "K1 in the middle of rank 1's shard": KillPoint(1, [at_file("fsync", SHARD_1, "cut and kill")], resumes=2),
    "K2 before the table of rank 1's shard": KillPoint(
        1, [at_file("open", STAGING + r"/shard-00001.*json")], resumes=2
    ),
}
# The writer stands still until its rank is gone: it must go, too, and what it wrote never counts.
SLOW_WRITER = in_writer(at_file("open", SHARD_1, "wait for parent"))
TAKE = {"at": "call muybridge.train.snapshot:SharedImage.take", "nth": 2, "do": "kill"}
IN_BACKGROUND = COMMITS | {
    "K9 during the snapshot": KillPoint(1, [TAKE], resumes=2),
    "K9 while its writer runs": KillPoint(1, [SLOW_WRITER, after_step(5, "kill")], resumes=2),
    "K9 when its writer is done": KillPoint(
        1, [{"at": "call muybridge.train.checkpoint:Checkpointer.commit", "nth": 2, "do": "kill"}], resumes=2
    ),
}


FAST = {
    FOREGROUND: {"K1 in the middle of rank 1's shard", "K2 before the table of rank 1's shard"},
    BACKGROUND: {
        *("K0 before the staging folder", "K3 before the manifest", "K4 half a manifest", "K5 before the rename"),
        *("K6 after the rename", "K7 half a LATEST", "K8 in the middle of the trash", "K9 while its writer runs"),
    },
}


def cases() -> Iterator[object]:
    """In the default suite each kind of point once, at the stage in the middle."""
    for mode, points in ((FOREGROUND, IN_FOREGROUND), (BACKGROUND, IN_BACKGROUND)):
        for name in points:
            for zero in (1, 2, 3):
                is_fast = zero == 2 and name in FAST[mode]
                marks = [] if is_fast else [pytest.mark.faults]
                yield pytest.param(mode, name, zero, id=f"{name}, zero{zero}, {mode.partition('=')[2]}", marks=marks)


@pytest.mark.parametrize(("mode", "name", "zero"), list(cases()))
def test_a_rank_killed_in_a_save_costs_at_most_that_save(
    server: ForkServer, short_run: list[str], reference: Reference, run_dir: Path, mode: str, name: str, zero: int
) -> None:
    point = (IN_FOREGROUND if mode == FOREGROUND else IN_BACKGROUND)[name]
    settings = [*short_run, f"deepspeed=zero{zero}", f"run_dir={run_dir}", mode]
    broken = server.run(Attempt(settings, faults={point.rank: point.faults}))
    assert_killed_alone(broken, point.rank)
    resumed = finish(server, settings, reference(zero))
    assert resumed_step(resumed.output) == point.resumes


# --- the process that writes in the background -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strike",
    [
        pytest.param(at_file("open", SHARD_1), id="before its file"),
        pytest.param(at_file("fsync", SHARD_1, "cut and kill"), id="in the middle of its file"),
        pytest.param(at_file("open", STAGING + r"/shard-00001.*json"), id="before its table", marks=pytest.mark.faults),
    ],
)
@pytest.mark.parametrize(
    "zero", [pytest.param(1, marks=pytest.mark.faults), 2, pytest.param(3, marks=pytest.mark.faults)]
)
def test_a_writer_that_is_killed_costs_its_checkpoint_only(
    server: ForkServer, short_run: list[str], reference: Reference, run_dir: Path, strike: Fault, zero: int
) -> None:
    settings = [*short_run, f"deepspeed=zero{zero}", f"run_dir={run_dir}", BACKGROUND]
    outcome = server.run(Attempt(settings, faults={1: [in_writer(strike)]}))
    assert outcome.codes == [0, 0], outcome.output
    assert len(outcome.faults) == 1
    assert (
        "step-00000004 was not written: rank 1: the process that writes checkpoints ended (SIGKILL)" in outcome.output
    )
    assert checkpoint_names(run_dir) == ["step-00000002", "step-00000006"]
    finish(server, settings, reference(zero))


# --- every single operation on a file --------------------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", [FOREGROUND, BACKGROUND])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_before_any_operation_on_a_checkpoint_file_is_survived(
    server: ForkServer, short_run: list[str], reference: Reference, tmp_path: Path, rank: int, mode: str
) -> None:
    moment = {"at": "file any", "of": r"/checkpoints(/|$)", "nth": 0, "do": "nothing"}
    traced = server.run(
        Attempt([*short_run, "deepspeed=zero2", f"run_dir={tmp_path / 'trace'}", mode], faults={rank: [moment]})
    )
    assert traced.codes == [0, 0], traced.output
    if rank == 1 and mode == BACKGROUND:
        assert traced.faults == []  # it leaves the disk to its writer
    # Of the second save, and of what follows the last one.
    texts = [operation["text"] for operation in traced.faults]
    second = next((n for n, text in enumerate(texts) if "step-00000004" in text), 0)
    third = next((n for n, text in enumerate(texts) if "step-00000006" in text), len(texts))
    last = max((n for n, text in enumerate(texts) if "step-00000006.tmp" in text), default=len(texts))
    seen: list[int] = []
    for number in [*range(second, third), *range(last, len(texts))]:
        settings = [*short_run, "deepspeed=zero2", f"run_dir={tmp_path / str(number)}", mode]
        broken = server.run(Attempt(settings, faults={rank: [{**moment, "nth": number + 1, "do": "kill"}]}))
        assert broken.codes[rank] == -signal.SIGKILL, texts[number]
        assert not broken.is_late, texts[number]
        resumed = finish(server, settings, reference(2))
        seen.append(resumed_step(resumed.output) or 0)
    # The later the kill, the more is kept.
    assert seen == sorted(seen)
    if rank == 0:
        assert set(seen) == {2, 4, 6}


# --- loads -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "zero", [pytest.param(1, marks=pytest.mark.faults), 2, pytest.param(3, marks=pytest.mark.faults)]
)
def test_a_rank_killed_while_it_loads_changes_nothing(
    server: ForkServer, short_run: list[str], reference: Reference, run_dir: Path, zero: int
) -> None:
    settings = [*short_run, f"deepspeed=zero{zero}", f"run_dir={run_dir}"]
    server.run(Attempt(settings, faults={0: [at_file("rename", r"-> .*/step-00000006$")]}))
    before = read_rows(run_dir), checkpoint_names(run_dir)
    refresh = {"at": "call muybridge.train.engine:Engine.refresh_weights", "do": "kill"}
    broken = server.run(Attempt(settings, faults={1: [refresh]}))
    assert_killed_alone(broken, 1)
    assert (read_rows(run_dir), checkpoint_names(run_dir)) == before
    assert resumed_step(finish(server, settings, reference(zero)).output) == 4
