"""A rank or a group that computes slowly is named, chance and short rows are not."""

import pytest

from muybridge.train import slow_ranks
from muybridge.train.slow_ranks import SlowRanks


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the other ranks tell, which a test fills in."""
    told: list[float] = []
    monkeypatch.setattr(slow_ranks, "from_all_ranks", lambda own: [own, *((f"node-{s:g}", s) for s in told)])
    monkeypatch.setattr(slow_ranks.dist, "get_world_size", lambda: 4)
    return told


def test_a_rank_that_is_slow_for_long_is_named_once(seconds: list[float]) -> None:
    seconds += [10.0, 11.0, 12.0]
    ranks = SlowRanks(1)
    assert [ranks.add(10.0) for _ in range(2)] == [[], []]
    [said] = ranks.add(10.0)
    assert said.startswith("rank 3 (node-12) takes 1.20 times as long to compute as the median rank")
    assert [ranks.add(10.0) for _ in range(5)] == [[]] * 5
    seconds[2] = 10.0
    assert ranks.add(10.0) == []
    seconds[2] = 12.0
    assert [len(ranks.add(10.0)) for _ in range(3)] == [0, 0, 1]


def test_chance_is_no_slowness(seconds: list[float]) -> None:
    seconds += [10.0, 10.0, 10.0]
    ranks = SlowRanks(1)
    for row in range(12):
        seconds[row % 3] = 20.0
        assert ranks.add(10.0) == []
        seconds[row % 3] = 10.0


def test_short_rows_are_put_together(seconds: list[float]) -> None:
    seconds += [1.0, 1.0, 1.0]
    ranks = SlowRanks(1)
    for row in range(30):  # six windows, each with one long row
        seconds[2] = 1.5 if row % 5 == 0 else 1.0
        assert ranks.add(1.0) == []
    assert any(ranks.add(2.0) for _ in range(15))


def test_a_machine_may_be_slow_as_a_whole(seconds: list[float]) -> None:
    seconds += [30.0, 30.0, 30.0]
    ranks = SlowRanks(1)
    assert not any(ranks.add(10.0) for _ in range(10))


def test_ranks_that_share_clips_are_named_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single member that stands out is not: the others would have waited for it. Nor is a group that is all there is."""
    told = [("a", 10.0), ("a", 10.2), ("b", 12.0), ("b", 12.1), ("c", 10.0), ("d", 10.1), ("c", 9.0), ("d", 14.0)]
    monkeypatch.setattr(slow_ranks, "from_all_ranks", lambda own: told)
    monkeypatch.setattr(slow_ranks.dist, "get_world_size", lambda: len(told))
    ranks = SlowRanks(2)
    said = [ranks.add(10.0) for _ in range(5)]
    assert said[:2] + said[3:] == [[]] * 4
    [sentence] = said[2]
    assert sentence.startswith("one of ranks 2 to 3 (b) takes 1.20 times as long to compute as the median group")
    assert "look at the machine " in sentence
    everyone = SlowRanks(8)
    assert not any(everyone.add(10.0) for _ in range(10))
