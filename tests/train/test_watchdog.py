"""A run of which a rank hangs, dies or leaves ends on all ranks, and says which one it was; runs watchdog_program.py."""

import json
import math
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from muybridge.tests.conftest import Command
from muybridge.train.trainer import Trainer
from muybridge.train.verdict import Standing, behind
from muybridge.train.watchdog import Phase, WatchdogConfig

Facts = dict[str, Any]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, launch: Command) -> Path:
    root = tmp_path_factory.mktemp("watchdog")
    answer = launch(0, Path(__file__).with_name("watchdog_program.py"), root)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return root


@pytest.fixture(scope="module")
def found(root: Path) -> dict[str, Facts]:
    """Of each case the ranks' exit codes, when they ended, and what they said."""
    return json.loads((root / "found.json").read_text())


@pytest.mark.parametrize(
    ("case", "setting", "phase"),
    [
        ("hangs_in_data", "data_seconds", "the wait for data, step 57"),
        ("hangs_in_a_step", "step_seconds", "the step, step 3"),
    ],
)
def test_a_rank_that_hangs_is_named_and_all_ask_to_be_started_again(
    found: dict[str, Facts], root: Path, case: str, setting: str, phase: str
) -> None:
    assert found[case]["codes"] == [75, 75]
    said, silence = found[case]["said"]
    assert f"behind is rank 1 ({socket.gethostname()}), in {phase}" in said
    assert f"for more than the 2 s of watchdog.{setting} (raise" in said
    assert f"({case})" in said.split("others wait")[0], "where it hangs"
    assert "such as rank 0 in" in said
    assert "(meet), which called distributed_c10d.py" in said, "where the other waits"
    assert silence == ""
    stacks = [(root / case / "stacks" / f"rank-0000{rank}.txt").read_text() for rank in range(2)]
    assert all(f"in {case}" in stack and "is MainThread" in stack for stack in stacks)
    assert "all_reduce" in stacks[0]
    assert "all_reduce" not in stacks[1]


def test_whoever_ends_hears_why(found: dict[str, Facts], root: Path) -> None:
    said = found["hangs_in_data"]["said"][0].strip().removeprefix("muybridge: ")
    assert [(root / "hangs_in_data" / f"end-{rank}").read_text() for rank in range(2)] == [f"75 {said}"] * 2


@pytest.mark.parametrize("case", ["is_killed", "is_killed_while_others_compute"])
def test_the_death_of_a_rank_is_noticed_by_the_others(found: dict[str, Facts], case: str) -> None:
    assert found[case]["codes"] == [75, -9]
    assert "rank 1 (" in found[case]["said"][0]
    assert "is gone: its process was killed" in found[case]["said"][0]
    assert "Traceback" not in found[case]["said"][0], "what the failed collective says must not hide the cause"
    assert found[case]["seconds"][0] - found[case]["seconds"][1] < 15


def test_the_death_of_rank_0_is_noticed_by_each_of_the_others(found: dict[str, Facts]) -> None:
    assert found["rank_0_is_killed"]["codes"] == [-9, 75]
    assert "rank 0 (" in found["rank_0_is_killed"]["said"][1]


@pytest.mark.parametrize(("case", "stopped"), [("is_stopped", 1), ("rank_0_is_stopped", 0)])
def test_a_rank_that_does_not_answer_is_named(found: dict[str, Facts], case: str, stopped: int) -> None:
    assert found[case]["codes"][1 - stopped] == 75
    assert f"no answer from rank {stopped} (" in found[case]["said"][1 - stopped]


def test_a_rank_that_ends_for_a_reason_of_its_own_gives_the_others_its_exit_code(found: dict[str, Facts]) -> None:
    assert found["leaves"]["codes"] == [78, 78]
    assert "ended: out of memory" in found["leaves"]["said"][0]
    assert "same command goes on" not in found["leaves"]["said"][0]
    assert found["fails_on_its_own"]["codes"] == [1, 1]
    assert "ended: a mistake" in found["fails_on_its_own"]["said"][0]


def test_ranks_that_end_alike_end_by_themselves(found: dict[str, Facts]) -> None:
    assert found["leaves_for_the_same_reason"] == {
        **found["leaves_for_the_same_reason"],
        "codes": [64, 64],
        "said": [""] * 2,
    }


def test_nobody_watches_a_run_that_has_ended(found: dict[str, Facts]) -> None:
    assert found["ends_well"] == {**found["ends_well"], "codes": [0, 0], "said": [""] * 2}


def test_the_first_time_may_take_as_long_as_the_set_up(found: dict[str, Facts]) -> None:
    assert found["compiles_in_the_first_step"]["codes"] == [75, 75]
    said = found["compiles_in_the_first_step"]["said"][0]
    assert said.startswith("first step done\n")
    assert "none of the ranks is alone behind, all are in the step, step 1" in said


def test_ranks_that_wait_for_each_other_in_different_collectives_are_told_apart(found: dict[str, Facts]) -> None:
    assert found["goes_another_way"]["codes"] == [75, 75]
    said = found["goes_another_way"]["said"][0]
    assert "ranks went different ways: rank 0 is in the step, step 3" in said
    assert "(gloo:all_reduce of [[8]] in group ['0', 'default_pg'])" in said
    assert "(gloo:all_gather of [[1]] in group ['0', 'default_pg'])" in said


def test_time_in_which_all_were_suspended_does_not_count(found: dict[str, Facts]) -> None:
    assert found["is_suspended"]["codes"] == [0, 0]
    assert "muybridge" not in "".join(found["is_suspended"]["said"])


def test_a_single_process_is_watched_too(found: dict[str, Facts]) -> None:
    assert found["is_alone"]["codes"] == [75]
    assert "rank 0 is in the validation, step 9" in found["is_alone"]["said"][0]


def test_behind_a_block_its_surroundings_are_watched_again(found: dict[str, Facts]) -> None:
    assert found["hangs_behind_a_block"]["codes"] == [75]
    assert found["hangs_behind_a_block"]["said"][0].startswith("saved\n")


def test_a_validation_that_gets_on_has_its_limit_anew() -> None:
    done: list[Any] = []
    trainer = SimpleNamespace(
        step=7,
        requests=SimpleNamespace(check=lambda: done.append("asked")),
        watchdog=SimpleNamespace(enter=lambda *position: done.append(position)),
    )
    Trainer._may_stop(trainer)
    assert done == ["asked", (Phase.validation, 7)]


def test_ranks_that_cannot_tell_each_other_are_watched_on_their_own(found: dict[str, Facts]) -> None:
    assert found["cannot_reach_rank_0"]["codes"] == [75, 75]
    said = found["cannot_reach_rank_0"]["said"]
    assert "each rank is watched on its own" in said[0]
    assert "no route" in said[0]
    assert ["the run hangs: rank 0 (" in said[0], "the run hangs: rank 1 (" in said[1]] == [True, True]


def test_nobody_else_can_speak_for_a_rank(found: dict[str, Facts]) -> None:
    assert found["is_visited_by_strangers"] == {**found["is_visited_by_strangers"], "codes": [0, 0], "said": [""] * 2}


def test_a_watch_that_fails_says_so_and_ends_nothing(found: dict[str, Facts]) -> None:
    assert found["loses_its_watch"]["codes"] == [0, 0]
    assert found["loses_its_watch"]["said"] == ["", "muybridge: the watch failed: KeyError: 'kind'\n"]


def test_a_held_interpreter_shows_its_stack(found: dict[str, Facts]) -> None:
    assert found["holds_the_interpreter"]["codes"] == [0]
    assert "in holds_the_interpreter" in found["holds_the_interpreter"]["said"][0]


def standing(rank: int, step: int, phase: Phase, *, waits: bool = False, begun: int = 9) -> Standing:
    return Standing(rank, "node", step, phase.order, phase.value, 1.0, "somewhere", waits, begun, "all_reduce")


@pytest.mark.parametrize(
    ("standings", "late"),
    [
        ([standing(0, 5, Phase.data), standing(1, 4, Phase.save), standing(2, 5, Phase.data)], [1]),
        ([standing(0, 5, Phase.step), standing(1, 5, Phase.data), standing(2, 6, Phase.save)], [1]),
        ([standing(0, 5, Phase.agreement, waits=True), standing(1, 5, Phase.save)], [1]),
        ([standing(0, 5, Phase.step, waits=True), standing(1, 5, Phase.step), standing(2, 6, Phase.data)], [1]),
        ([standing(0, 5, Phase.data, waits=True), standing(1, 6, Phase.data)], [0]),
        ([standing(0, 5, Phase.step), standing(1, 5, Phase.step, begun=8)], [1]),
        ([standing(0, 5, Phase.step, waits=True, begun=8), standing(1, 5, Phase.step)], [0]),
        ([standing(0, 5, Phase.step), standing(1, 5, Phase.step)], []),
        ([standing(0, 5, Phase.step, waits=True), standing(1, 5, Phase.step, waits=True)], []),
    ],
)
def test_behind_are_those_who_are_first_in_the_order_of_a_step_and_wait_for_nobody(
    standings: list[Standing], late: list[int]
) -> None:
    assert [found.rank for found in behind(standings)] == late


def test_a_negative_limit_is_a_fault() -> None:
    assert WatchdogConfig().faults("watchdog") == []
    assert WatchdogConfig(step_seconds=-1, setup_seconds=0, data_seconds=math.nan).faults("watchdog") == [
        "watchdog.data_seconds=nan must be 0 (no limit) or more seconds",
        "watchdog.step_seconds=-1 must be 0 (no limit) or more seconds",
    ]
