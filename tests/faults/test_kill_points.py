"""A rank killed at any moment of a save, a clean-up or a load: the next attempt goes on from the newest whole checkpoint.

Every case is two attempts: one in which the fault strikes in or after the second save (step 4), and one that must finish with the
rows and weights of an uninterrupted run, bit for bit, and leave nothing of the first one behind.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from muybridge.tests.faults.conftest import Reference
from muybridge.tests.faults.fork_server import Attempt, Fault, ForkServer, Outcome
from muybridge.tests.faults.run_folder import checkpoint_names, leftovers, read_rows, read_story, resumed_step

# Seconds from a rank's death to the end of the others, which wait for it in a collective.
DETECTION_SECONDS = 10.0


@dataclass(frozen=True)
class KillPoint:
    """Where one rank is killed, and the step that the next attempt goes on from."""

    rank: int
    fault: Fault
    resumes: int


def at_file(operation: str, of: str, **more: object) -> Fault:
    return {"at": f"file {operation}", "of": of, "do": "kill", **more}


POINTS = {
    "K0 before the staging folder": KillPoint(0, at_file("mkdir", r"step-00000004\.tmp"), resumes=2),
    "K1 in the middle of rank 0's shard": KillPoint(
        0, at_file("fsync", r"step-00000004\.tmp.*/shard-00000.*safetensors$", do="cut and kill"), resumes=2
    ),
    "K1 in the middle of rank 1's shard": KillPoint(
        1, at_file("fsync", r"step-00000004\.tmp.*/shard-00001.*safetensors$", do="cut and kill"), resumes=2
    ),
    "K2 before the table of rank 1's shard": KillPoint(
        1, at_file("open", r"step-00000004\.tmp.*/shard-00001.*json"), resumes=2
    ),
    "K3 before the manifest": KillPoint(0, at_file("open", r"step-00000004\.tmp.*/MANIFEST\.json"), resumes=2),
    "K4 half a manifest": KillPoint(
        0, at_file("fsync", r"step-00000004\.tmp.*/MANIFEST\.json", do="cut and kill"), resumes=2
    ),
    "K5 before the rename": KillPoint(0, at_file("rename", r"step-00000004\.tmp.* -> .*/step-00000004$"), resumes=2),
    "K6 after the rename": KillPoint(0, at_file("fsync", r"/checkpoints$", nth=2), resumes=4),
    "K8 before the oldest becomes trash": KillPoint(0, at_file("rename", r"step-00000002 -> .*\.trash"), resumes=6),
    "K8 before the trash is deleted": KillPoint(0, at_file("shutil.rmtree", r"\.trash"), resumes=6),
    "K8 in the middle of the trash": KillPoint(0, at_file("remove", r"\.trash", nth=2), resumes=6),
}
# Each once in the default suite, at the stage in the middle.
CASES = [
    pytest.param(name, zero, id=f"{name}-zero{zero}", marks=[] if zero == 2 else pytest.mark.faults)
    for name in POINTS
    for zero in (1, 2, 3)
]


def finish(server: ForkServer, settings: list[str], run_dir: Path, expected: Reference, zero: int) -> Outcome:
    """A second attempt, which must end as if nothing had happened."""
    outcome = server.run(Attempt(settings))
    assert outcome.codes == [0, 0], outcome.output
    assert outcome.left_behind == []
    got = read_story(run_dir)
    assert got.rows == expected(zero).rows
    assert got.last == expected(zero).last
    assert got.shards == expected(zero).shards
    assert leftovers(run_dir) == []
    assert checkpoint_names(run_dir)[-2:] == ["step-00000004", "step-00000006"]
    return outcome


def assert_killed_alone(outcome: Outcome, rank: int) -> None:
    """One rank was killed; the other one noticed in time, and nothing that either had started runs on."""
    assert outcome.codes[rank] == -signal.SIGKILL, outcome.output
    assert outcome.codes[1 - rank] not in (0, -signal.SIGKILL), outcome.output
    assert not outcome.is_late
    assert outcome.ranks[1 - rank].seconds_after_fault < DETECTION_SECONDS
    assert outcome.left_behind == []


@pytest.mark.parametrize(("name", "zero"), CASES)
def test_a_rank_killed_in_a_save_costs_at_most_that_save(
    server: ForkServer, short_run: list[str], reference: Reference, run_dir: Path, name: str, zero: int
) -> None:
    point = POINTS[name]
    settings = [*short_run, f"deepspeed=zero{zero}", f"run_dir={run_dir}"]
    broken = server.run(Attempt(settings, faults={point.rank: [point.fault]}))
    assert_killed_alone(broken, point.rank)
    resumed = finish(server, settings, run_dir, reference, zero)
    assert resumed_step(resumed.output) == point.resumes


# --- every single operation on a file ------------------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_before_any_operation_on_a_checkpoint_file_is_survived(
    server: ForkServer, short_run: list[str], reference: Reference, tmp_path: Path, rank: int
) -> None:
    moment = {"at": "file any", "of": r"/checkpoints(/|$)", "nth": 0, "do": "nothing"}
    traced = server.run(
        Attempt([*short_run, "deepspeed=zero2", f"run_dir={tmp_path / 'trace'}"], faults={rank: [moment]})
    )
    assert traced.codes == [0, 0], traced.output
    assert len(traced.faults) > 5
    seen = []
    for number, operation in enumerate(traced.faults, start=1):
        folder = tmp_path / str(number)
        settings = [*short_run, "deepspeed=zero2", f"run_dir={folder}"]
        broken = server.run(Attempt(settings, faults={rank: [{**moment, "nth": number, "do": "kill"}]}))
        what = f"{operation['operation']} {operation['text']}"
        assert broken.codes[rank] == -signal.SIGKILL, what
        assert not broken.is_late, what
        resumed = finish(server, settings, folder, reference, 2)
        seen.append(resumed_step(resumed.output))
    # The later the kill, the more is kept.
    assert [step or 0 for step in seen] == sorted(step or 0 for step in seen)
    assert set(seen) == {None, 2, 4, 6}


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
    assert resumed_step(finish(server, settings, run_dir, reference, zero).output) == 4
