"""Bad clips are the same ones on all ranks, and too many of them end a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muybridge.data.ledger import (
    BUDGET_SAMPLES,
    MAX_IN_A_ROW,
    BadClip,
    DataBudget,
    Ledger,
    from_lines,
    to_lines,
)


def bad(row: int, *, step: int = 0, position: int = 0, passes: tuple[int, ...] = (0,), dataset: str = "a") -> BadClip:
    return BadClip(dataset, row, f"k{row}", f"clip {row} is cut", step, position, None, passes)


def test_a_row_is_known_for_the_passes_in_which_it_failed() -> None:
    ledger = Ledger()
    ledger.add([bad(3, passes=(1,)), bad(5)])
    ledger.add([bad(3, step=9, passes=(4,))])
    assert ledger.reason("a", 3, 1) == ledger.reason("a", 3, 4) == "clip 3 is cut"
    assert [ledger.reason("a", 3, number) for number in (0, 2)] == [None, None]
    assert ledger.reason("b", 3, 1) is None
    assert ledger.clips() == [replace(bad(3, passes=(1, 4)), times=2), bad(5)]
    assert len(ledger) == 2


def test_samples_are_counted_and_not_tries() -> None:
    ledger = Ledger()
    for found in ([], [bad(1), bad(2)], [], [bad(1)]):
        ledger.add(found)
    assert ledger.take_replaced() == 2
    assert ledger.take_replaced() == 0


def test_what_an_unfinished_step_has_entered_can_be_taken_back() -> None:
    ledger = Ledger()
    ledger.add([bad(1)])
    ledger.take_replaced()
    before = ledger.clips()
    ledger.add([bad(1, step=1, passes=(1,)), bad(2, step=1)])
    ledger.add([bad(2, step=1, passes=(1,))])
    ledger.forget_unfinished()
    assert ledger.clips() == before
    assert ledger.take_replaced() == 0
    ledger.forget_unfinished()
    assert ledger.clips() == before


def test_a_long_run_of_replaced_samples_is_noticed_and_ends_with_a_good_one() -> None:
    ledger = Ledger()
    for number in range(MAX_IN_A_ROW):
        assert not ledger.has_long_run
        ledger.add([bad(number)])
    assert ledger.has_long_run
    ledger.add([])
    assert not ledger.has_long_run


@settings(max_examples=100, deadline=None)
@given(
    events=st.lists(
        st.tuples(
            st.integers(0, 3), st.integers(0, 4), st.booleans()
        ),  # rank, row, whether ledgers are shared after it
        max_size=30,
    )
)
def test_shared_ledgers_are_what_one_rank_would_have(events: list[tuple[int, int, bool]]) -> None:
    """However often the ranks put theirs together: what was known before is counted once."""
    ranks, alone = [Ledger() for _ in range(4)], Ledger()
    for step, (rank, row, is_shared) in enumerate(events):
        clip = bad(row, step=step, passes=(step // 5,))
        ranks[rank].add([clip])
        alone.add([clip])
        if is_shared:
            everyone = [ledger.clips() for ledger in ranks]
            for ledger in ranks:
                ledger.share(everyone)
            assert {to_lines(ledger.clips()) for ledger in ranks} == {to_lines(alone.clips())}
    everyone = [ledger.clips() for ledger in ranks]
    for ledger in ranks:
        ledger.share(everyone)
        assert ledger.clips() == alone.clips()


def test_a_ledger_that_is_read_back_goes_on_counting(tmp_path: Path) -> None:
    first = Ledger()
    first.add([bad(1), bad(2, step=3)])
    (tmp_path / "bad_clips.jsonl").write_text(to_lines(first.clips()))
    ranks = [Ledger(), Ledger(), Ledger()]
    for ledger in ranks:
        ledger.share([from_lines(tmp_path / "bad_clips.jsonl")])
        assert ledger.clips() == first.clips()
        assert ledger.take_replaced() == 0
    ranks[1].add([bad(1, step=7, passes=(2,))])
    ranks[2].add([bad(1, step=6, passes=(1,)), bad(4, step=6)])
    everyone = [ledger.clips() for ledger in ranks]
    for ledger in ranks:
        ledger.share(everyone)
        assert [(clip.row, clip.times, clip.passes) for clip in ledger.clips()] == [
            (1, 3, (0, 1, 2)),
            (2, 1, (0,)),
            (4, 1, (0,)),
        ]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    clips=st.lists(
        st.builds(
            BadClip,
            dataset=TEXT,
            row=st.integers(0, 2**31),
            key=TEXT,
            reason=TEXT,
            step=st.integers(0, 10**9),
            position=st.integers(0, 10**5),
            substitute=st.none() | st.integers(0, 2**31),
            passes=st.lists(st.integers(0, 99), max_size=4).map(tuple),
            times=st.integers(1, 99),
        ),
        max_size=5,
    )
)
def test_clips_are_the_same_after_a_round_trip_through_lines(
    tmp_path_factory: pytest.TempPathFactory, clips: list[BadClip]
) -> None:
    """Reasons come from libraries and keys from anywhere: line separators of all kinds are in them."""
    text = to_lines(clips)
    assert text.count("\n") == len(clips)
    assert all(json.loads(line)["row"] == clip.row for line, clip in zip(text.splitlines(), clips, strict=True))
    path = tmp_path_factory.getbasetemp() / "ledger.jsonl"
    path.write_text(text, encoding="utf-8")
    assert from_lines(path) == clips


def test_the_summary_names_the_first_few() -> None:
    ledger = Ledger()
    assert ledger.summary() == ""
    for row in range(7, 0, -1):
        ledger.add([bad(row)])
    assert ledger.summary().startswith("k1: clip 1 is cut; k2: clip 2 is cut; ")
    assert ledger.summary().endswith("k5: clip 5 is cut and 2 more")


def test_the_budget_is_a_share_of_the_last_samples() -> None:
    budget = DataBudget(0.01)
    assert not budget.add(8, 0)
    assert not budget.add(1000, 99)
    assert not budget.add(1008, 1)
    assert budget.replaced == 100
    assert budget.add(1016, 1)  # the 101st of 10,000
    assert not budget.add(1000 + BUDGET_SAMPLES, 0)  # the first 99 are too long ago
    assert budget.replaced == 2
    assert not budget.add(1016 + BUDGET_SAMPLES, 0)
    assert budget.replaced == 0
    assert DataBudget(0.0).add(8, 1)
    assert not DataBudget(1.0).add(8, 8)


def test_the_budget_goes_on_where_a_checkpoint_left_it() -> None:
    budget = DataBudget(0.01)
    for step in range(1, 8):
        budget.add(100 * step, step)
    again = DataBudget(0.01, json.loads(json.dumps(budget.state())))
    assert again.replaced == budget.replaced == 28
    assert [again.add(800, 72), again.add(900, 1)] == [budget.add(800, 72), budget.add(900, 1)] == [False, True]
    assert len(budget.state()) == 9
    budget.add(100 * BUDGET_SAMPLES, 0)
    assert budget.state() == []  # it does not grow with the run
