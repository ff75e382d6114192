"""Settings of the averages of the weights; what they compute is tested in test_engine.py and test_shard_adamw.py."""

import pytest

from muybridge.train.ema import EMAConfig, average_name


def test_averages_are_named_by_their_decays() -> None:
    assert [average_name(decay) for decay in (0.9999, 0.5, 0.999995)] == ["ema-0.9999", "ema-0.5", "ema-0.999995"]


@pytest.mark.parametrize(
    ("decays", "fault"),
    [
        ([], "ema.decays=[] must name at least one decay"),
        ([0.9, 1.0], "ema.decays=1.0 must lie between 0 and 1"),
        ([0.9, 0.0], "ema.decays=0.0 must lie between 0 and 1"),
        ([0.9, 0.9], "ema.decays=[0.9, 0.9] must differ from each other"),
        ([0.9999999], "ema.decays=0.9999999 must have at most 6 digits: its average is named ema-1"),
    ],
)
def test_decays_that_make_no_average_are_refused(decays: list[float], fault: str) -> None:
    assert EMAConfig(decays).faults("ema") == [fault]
    assert EMAConfig([0.9999, 0.5]).faults("ema") == []
