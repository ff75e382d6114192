"""Steps that are called off or not finite, at every ZeRO stage, at one and two processes; guard_program.py runs them."""

from typing import Any

import pytest

from muybridge.train.model_hash import differing_ranks

Runs = dict[int, list[dict[str, Any]]]
WORLDS = [1, 2]
SHARED = ["fp32-0", "fp32-1", "fp32-2", "bf16-1", "bf16-2"]
CASES = [*SHARED, "fp32-3", "bf16-3"]
# See PLAN there: the first step is called off, before the optimizer has any state; then a NaN, two more, and an infinite loss.
CALLED_OFF, NOT_FINITE, APPLIED = [0, 5, 6], [3, 7], [1, 2, 4, 8]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES)
def test_a_loss_that_is_not_finite_on_one_rank_leaves_everything_as_it_was_on_all(
    guard_runs: Runs, case: str, world: int
) -> None:
    for rank in guard_runs[world]:
        steps = rank[case]["steps"]
        assert [steps["applied"][step] for step in NOT_FINITE] == [False, False]
        assert [steps["unchanged"][step] for step in NOT_FINITE] == [True, True]
        assert [steps["norms"][step] for step in NOT_FINITE] == [None, None]
        # Nobody is asked whether to apply what cannot be.
        assert [steps["asked"][step] for step in NOT_FINITE] == [[], []]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES)
def test_a_step_that_is_called_off_leaves_everything_as_it_was(guard_runs: Runs, case: str, world: int) -> None:
    for rank in guard_runs[world]:
        steps = rank[case]["steps"]
        assert [step for step, applied in enumerate(steps["applied"]) if applied] == APPLIED
        assert [step for step, unchanged in enumerate(steps["unchanged"]) if not unchanged] == APPLIED
        assert steps["optimizer_steps"] == len(APPLIED)
        assert steps["equals_a_run_without"]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_judged_once_by_the_norm_that_it_reports(guard_runs: Runs, case: str, world: int) -> None:
    for rank in guard_runs[world]:
        steps = rank[case]["steps"]
        judged = [step for step in range(len(steps["asked"])) if step not in NOT_FINITE]
        assert [steps["asked"][step] for step in judged] == [[steps["norms"][step]] for step in judged]
        assert steps["norms"] == guard_runs[world][0][case]["steps"]["norms"]


@pytest.mark.parametrize("case", SHARED)
def test_all_ranks_have_one_fingerprint_until_a_bit_flips_on_one(guard_runs: Runs, case: str) -> None:
    found = guard_runs[2][0][case]["fingerprints"]
    assert len(set(found["first"])) == len(set(found["stepped"])) == 1
    assert len({found["first"][0], found["stepped"][0], *found["flipped"]}) == 3
    assert found["turned"][1] not in (found["flipped"][1], found["stepped"][1])
    assert found["flipped"][0] == found["turned"][0] == found["stepped"][0]
    assert found["differing"] == [0, 1]  # of two, none has a majority
    # The same weights have the same fingerprint however many processes hold them.
    assert guard_runs[1][0][case]["fingerprints"]["first"][0] == found["first"][0]


@pytest.mark.parametrize("case", ["fp32-3", "bf16-3"])
def test_weights_that_are_split_over_the_ranks_have_no_fingerprint(guard_runs: Runs, case: str) -> None:
    assert guard_runs[2][0][case]["fingerprints"]["stepped"] == [None, None]


def test_the_ranks_outside_the_majority_differ() -> None:
    assert differing_ranks([7, 7, -1, 7]) == [2]
    assert differing_ranks([5, 7, 7, 5]) == [0, 1, 2, 3]
    assert differing_ranks([5, 7, 7, 7, 2]) == [0, 4]
    assert differing_ranks([5]) == []


@pytest.mark.parametrize("world", WORLDS)
def test_a_guarded_run_leaves_out_what_is_wrong_on_one_rank_and_says_what_it_was(guard_runs: Runs, world: int) -> None:
    for rank in guard_runs[world]:
        found = rank["guard"]
        assert found["ranks_agree"]
        assert [step for step, applied in enumerate(found["applied"]) if not applied] == [55, 57, 59]
        assert "step 55 (5x8x8) stands out: its gradient norm" in found["texts"]["55"]
        # The gradient of step 57 is finite, its loss is not.
        assert found["texts"]["57"].startswith(
            "step 57 (5x8x8) is left out: its loss is not finite; samples whose loss"
        )
        assert found["texts"]["59"].startswith("step 59 (5x8x8) is left out: its gradient is not finite; samples whose")
        for step in ("57", "59"):
            for slot in (6, 7):
                assert f"slot {slot} (row {100 + slot} of dataset 0, 'clip-{slot}')" in found["texts"][step]
            assert "slot 5" not in found["texts"][step]
        assert found["state_bytes"] < 4000
