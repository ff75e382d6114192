"""Thousands of processes of a run are acted out on one machine, and what does not fit together is found."""

from typing import Any

import pytest

from muybridge.scripts import simulate as module
from muybridge.scripts.simulate import act_out, check_slots, chosen_ranks, cluster_words, main, simulate
from muybridge.train.config import load_train_config

SMALL = ["+experiment=wan_14b_480p", "model.num_layers=2", "data.frames=17", "data.height=64", "data.width=128"]


@pytest.mark.parametrize(("processes", "settings"), [(1024, ["parallel.sequence=8"]), (4096, ["deepspeed=zero1"])])
def test_groups_slots_shapes_and_pieces_fit_together(processes: int, settings: list[str]) -> None:
    config = load_train_config([*SMALL, *settings, "global_batch=1000", "dry_run=true"], world_size=processes)
    checks = {check.name: check for check in simulate(config, processes)}
    assert checks.keys() == {"slots", "mesh", "model", "engine"}
    assert all(check.ok for check in checks.values()), checks
    if processes == 1024:
        assert checks["mesh"].finding == "128 data groups x 8 along the sequence"
        assert checks["model"].finding.endswith("20 of 160 tokens in a process")
        assert "2,050 files" in checks["engine"].finding


def test_pieces_that_do_not_meet_are_named() -> None:
    config = load_train_config([*SMALL, "deepspeed=zero1", "dry_run=true"])
    told: dict[int, dict[str, Any]] = {
        0: {"pieces": {"a": (0, 10)}, "file": "0"},
        1: {"pieces": {"a": (11, 10)}, "file": "1"},
    }
    with pytest.raises(AssertionError, match="a: a gap or an overlap between ranks 0 and 1"):
        module._check_pieces(config, 2, told)


def test_a_sample_without_a_place_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_train_config([*SMALL, "parallel.sequence=1", "dry_run=true"])
    local_slots = module.Plan.local_slots
    monkeypatch.setattr(
        module.Plan,
        "local_slots",
        lambda plan, step, *, rank, world_size: local_slots(plan, step, rank=0, world_size=4),
    )
    with pytest.raises(AssertionError, match="a place belongs to two groups"):
        check_slots(config, 4)


def test_a_process_that_fails_is_named_with_its_error() -> None:
    def fail() -> dict[str, Any]:
        raise OSError("no such thing")

    with pytest.raises(RuntimeError, match=r"rank 3 of 64: (?s:.*)OSError: no such thing"):
        act_out(3, 64, fail)


def test_processes_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel.sequence=3 must divide the number of processes, 64 \(nearest: "):
        main(["--processes", "64", *SMALL, "parallel.sequence=3"])


def test_the_chosen_ranks_lie_on_both_sides_of_a_border() -> None:
    assert chosen_ranks(64, 8) == [0, 1, 31, 32, 62, 63]
    assert chosen_ranks(2, 1) == [0, 1]


def test_the_plan_that_comes_next_has_as_many_processes() -> None:
    found = [cluster_words(processes) for processes in (1024, 12, 7)]
    assert found == ["nodes=128 gpus_per_node=8", "nodes=2 gpus_per_node=6", "nodes=1 gpus_per_node=7"]
