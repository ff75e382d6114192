"""What stands out and what does not, on simulated losses and gradient norms; and what a run does about it."""

import copy
import json
import math
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from muybridge.data.batch import VideoBatch
from muybridge.train.guards import (
    LASTING_SPIKES,
    Diverged,
    Finding,
    GuardConfig,
    SpikePolicy,
    StepGuard,
    not_finite_samples,
)
from muybridge.train.level_losses import LEVEL_BINS, LevelLosses, LevelSums, StepLosses
from muybridge.train.spike_history import MIN_HISTORY

Step = tuple[StepLosses, float]
KNOWN = 150  # steps after which what is usual is known well


def simulate(batch: int, *, sigma: float, seed: int = 0) -> Iterator[Step]:
    """Steps of a training run without spikes: losses that differ sevenfold between noise levels and fall fourfold over the first
    thousand steps, lognormal samples of this sigma, and gradients that add up as random vectors of lognormal length do."""
    rng = np.random.default_rng(seed)
    step = 0
    while True:
        levels = 1 / (1 + np.exp(-rng.standard_normal(batch)))
        usual = (0.25 + 5 * (levels - 0.45) ** 2) * (0.5 + 1.5 * math.exp(-step / 400))
        losses = usual * np.exp(sigma * rng.standard_normal(batch) - sigma**2 / 2)
        lengths = np.exp(sigma * rng.standard_normal(batch) - sigma**2 / 2)
        norm = math.sqrt(0.3**2 + (lengths**2).sum() / batch**2)
        yield in_bins(levels, losses), norm
        step += 1


def in_bins(levels: np.ndarray, losses: np.ndarray) -> StepLosses:
    bins = np.minimum((levels * LEVEL_BINS).astype(int), LEVEL_BINS - 1)
    sums, counts = np.bincount(bins, losses, LEVEL_BINS), np.bincount(bins, minlength=LEVEL_BINS)
    return StepLosses(sums.tolist(), counts.astype(float).tolist())


def times(losses: StepLosses, factor: float) -> StepLosses:
    return StepLosses([factor * loss for loss in losses.losses], losses.weights)


def judge_all(guard: StepGuard, steps: Iterator[Step], count: int, *, bucket: str = "a") -> list[Finding]:
    return [
        guard.judge(number, bucket, losses, norm).finding for number, (losses, norm) in enumerate(islice(steps, count))
    ]


@pytest.mark.parametrize(
    ("batch", "sigma", "count", "most"),
    # At sigma 0.4, of 300,000 simulated steps with 4 to 512 samples none fired. At sigma 1, where the largest of 32 samples is
    # about 8 times their mean, 2 in 10,000 did (gradient norms of 32 samples), fewer with smaller and larger batches.
    [(4, 0.4, 8000, 0), (32, 0.4, 8000, 0), (8, 1.0, 8000, 0), (32, 1.0, 8000, 4)],
)
def test_small_batches_with_long_tails_do_not_fire(batch: int, sigma: float, count: int, most: int) -> None:
    found = judge_all(StepGuard(GuardConfig()), simulate(batch, sigma=sigma), count)
    assert found.count(Finding.spike) <= most


@pytest.mark.parametrize(
    ("batch", "factor"),
    # 3 times the usual is not far from what batches of 8 and fewer do by themselves.
    [(4, 15), (8, 10), (16, 4), (64, 3), (512, 3), (512, 1.5)],
)
def test_a_loss_that_jumps_is_found(batch: int, factor: float) -> None:
    assert share_found(batch, loss=factor, norm=1) >= 0.97


@pytest.mark.parametrize(("batch", "factor"), [(4, 10), (16, 3), (64, 3), (512, 3)])
def test_a_gradient_that_jumps_is_found(batch: int, factor: float) -> None:
    assert share_found(batch, loss=1, norm=factor) >= 0.97


@pytest.mark.parametrize("batch", [64, 512])
def test_what_is_hardly_larger_than_usual_is_no_spike_however_narrow_the_spread(batch: int) -> None:
    assert share_found(batch, loss=1.1, norm=1) == 0
    assert share_found(batch, loss=1, norm=1.6) == 0
    assert share_found(batch, loss=0.1, norm=0.1) == 0


def share_found(batch: int, *, loss: float, norm: float) -> float:
    """The share of spikes of this size that are found, each alone in its run."""
    steps, guard = simulate(batch, sigma=0.4), StepGuard(GuardConfig())
    judge_all(guard, steps, KNOWN)
    found = 0
    for number in range(100):
        losses, grad_norm = next(steps)
        verdict = copy.deepcopy(guard).judge(number, "a", times(losses, loss), norm * grad_norm)
        found += verdict.finding is Finding.spike
        guard.judge(number, "a", losses, grad_norm)
    return found / 100


def test_spikes_do_not_become_usual() -> None:
    steps, guard = simulate(64, sigma=0.4), StepGuard(GuardConfig())
    judge_all(guard, steps, KNOWN)
    plain = StepGuard(GuardConfig())
    plain.restore(json.loads(json.dumps(guard.state())))
    for number in range(60):
        losses, norm = next(steps)
        assert guard.judge(number, "a", times(losses, 5), 5 * norm).finding is Finding.spike
        losses, norm = next(steps)
        assert guard.judge(number, "a", losses, norm).finding is plain.judge(number, "a", losses, norm).finding
    assert guard.state()["buckets"] == plain.state()["buckets"]


def test_nothing_is_judged_before_enough_is_known() -> None:
    steps, guard = simulate(64, sigma=0.4), StepGuard(GuardConfig())
    for number in range(MIN_HISTORY):
        losses, norm = next(steps)
        wild = 3 if number == MIN_HISTORY - 1 else 1
        assert guard.judge(number, "a", times(losses, wild), wild * norm).finding is Finding.fine
    losses, norm = next(steps)
    # Another shape of clips is not known by what is known of this one.
    assert guard.judge(0, "b", losses, 100 * norm).finding is Finding.fine
    assert guard.judge(0, "a", losses, 100 * norm).finding is Finding.spike


@pytest.mark.parametrize("buckets", [("a",), ("a", "b", "c")])
def test_a_new_level_is_a_spike_for_a_few_steps_only_and_is_guarded_in_its_turn(buckets: tuple[str, ...]) -> None:
    steps, guard = simulate(64, sigma=0.4), StepGuard(GuardConfig())
    for bucket in buckets:
        judge_all(guard, steps, KNOWN, bucket=bucket)
    found = []
    for number in range(KNOWN * len(buckets)):
        losses, norm = next(steps)
        found.append(guard.judge(number, buckets[number % len(buckets)], times(losses, 3), 3 * norm))
    assert [verdict.finding for verdict in found].count(Finding.spike) == LASTING_SPIKES
    assert "from here on it counts as usual" in found[LASTING_SPIKES - 1].text
    losses, norm = next(steps)
    assert guard.judge(0, buckets[0], times(losses, 9), 9 * norm).finding is Finding.spike


def test_a_new_level_of_one_shape_of_clips_is_found_among_others() -> None:
    steps, guard = simulate(64, sigma=0.4), StepGuard(GuardConfig())
    for bucket in ("a", "b"):
        judge_all(guard, steps, KNOWN, bucket=bucket)
    found = []
    for number in range(60):
        losses, norm = next(steps)
        assert guard.judge(number, "a", losses, norm).finding is Finding.fine
        losses, norm = next(steps)
        found.append(guard.judge(number, "b", times(losses, 3), 3 * norm).finding)
    assert found.count(Finding.spike) == LASTING_SPIKES


def test_dear_noise_levels_are_no_spike() -> None:
    rng = np.random.default_rng(0)
    guard, blind = StepGuard(GuardConfig()), StepGuard(GuardConfig())

    def draw(low: float) -> tuple[np.ndarray, np.ndarray]:
        levels = rng.uniform(low, 1, 16)
        return levels, levels**4 * np.exp(0.1 * rng.standard_normal(16))

    for number in range(KNOWN):
        levels, losses = draw(0)
        assert guard.judge(number, "a", in_bins(levels, losses), 1.0).finding is Finding.fine
        blind.judge(number, "a", in_bins(0 * levels, losses), 1.0)
    # Levels from 0.9 on cost about 0.8, all levels 0.2.
    dear_levels, dear_losses = draw(0.9)
    assert guard.judge(0, "a", in_bins(dear_levels, dear_losses), 1.0).finding is Finding.fine
    verdict = guard.judge(0, "a", in_bins(dear_levels, 2 * dear_losses), 1.0)
    assert verdict.finding is Finding.spike
    assert float(verdict.text.split("times the ")[1].split()[0]) == pytest.approx(dear_losses.mean(), rel=0.1)
    # Who does not know the levels sees no more in a doubled loss than in some draw of levels.
    levels, losses = draw(0)
    assert guard.judge(0, "a", in_bins(levels, 2 * losses), 1.0).finding is Finding.spike
    assert blind.judge(0, "a", in_bins(0 * levels, 2 * losses), 1.0).finding is Finding.fine


def test_a_resumed_run_comes_to_the_same_verdicts() -> None:
    whole, first, second = (StepGuard(GuardConfig(spike_policy=SpikePolicy.skip)) for _ in range(3))

    def verdicts(guard: StepGuard, steps: Iterator[Step], numbers: range) -> list[str]:
        found = []
        for number in numbers:
            losses, norm = next(steps)
            factor = 4.0 if number % 37 == 0 or (180 < number < 220 and number % 2) else 1.0
            found.append(guard.judge(number, "ab"[number % 2], times(losses, factor), factor * norm).text)
        return found

    expected = verdicts(whole, simulate(64, sigma=0.4), range(400))
    steps = simulate(64, sigma=0.4)
    found = verdicts(first, steps, range(186))  # amid a new level of b
    second.restore(json.loads(json.dumps(first.state())))
    assert found + verdicts(second, steps, range(186, 400)) == expected
    assert second.state() == whole.state()
    assert sum(bool(text) for text in expected) > 10


def test_the_state_of_many_shapes_is_small() -> None:
    guard, steps = StepGuard(GuardConfig()), simulate(64, sigma=0.4)
    for bucket in range(10):
        judge_all(guard, steps, KNOWN, bucket=f"{bucket}x256x256")
    assert len(json.dumps(guard.state())) < 10 * 4000


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """A world of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def run_step(guard: StepGuard, step: int, *, loss: float, norm: float | None) -> tuple[bool, Finding, str]:
    """Whether a step is applied, and the verdict; a gradient without a norm is not finite."""
    guard.begin_step(step, "a")
    losses = torch.tensor([1.0, 1.0, 1.0, loss]) + 0.02 * (step % 5)
    guard.add(losses, None, video_batch(step))
    applied = norm is not None and guard.accept(norm + 0.02 * (step % 5))
    verdict = guard.end_step(applied=applied)
    return applied, verdict.finding, verdict.text


def video_batch(step: int) -> VideoBatch:
    places = torch.arange(4)
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0])
    return VideoBatch(step, 4, places, 0 * places, 10 * places, weights, [f"clip\x1b{i}" for i in range(4)], [""] * 4)


@pytest.mark.parametrize(
    ("policy", "applied", "found", "words"),
    [
        (SpikePolicy.off, True, Finding.fine, ""),
        (SpikePolicy.warn, True, Finding.spike, "it is applied"),
        (SpikePolicy.skip, False, Finding.spike, "it is left out"),
        (SpikePolicy.roll_back, False, Finding.spike, "goes back to the last checkpoint"),
    ],
)
def test_the_policy_decides_what_comes_of_a_spike(
    alone: None, policy: SpikePolicy, applied: bool, found: Finding, words: str
) -> None:
    guard = StepGuard(GuardConfig(spike_policy=policy))
    for step in range(100):
        assert run_step(guard, step, loss=1.0, norm=1.0)[:2] == (True, Finding.fine)
    was_applied, finding, text = run_step(guard, 100, loss=20.0, norm=5.0)
    assert (was_applied, finding) == (applied, found)
    assert text.endswith(words)
    if text:
        assert "its gradient norm of 5 is 4.81 times the usual 1.04 (" in text
        assert "its loss of 5.75 is 5.52 times the 1.04 that is usual at its noise levels (" in text


def test_a_loss_that_is_not_finite_is_left_out_whatever_the_gradient(alone: None) -> None:
    guard = StepGuard(GuardConfig(spike_policy=SpikePolicy.off))
    assert run_step(guard, 7, loss=float("inf"), norm=1.0)[:2] == (False, Finding.not_finite)
    applied, finding, text = run_step(guard, 8, loss=float("nan"), norm=None)
    assert (applied, finding) == (False, Finding.not_finite)
    assert "its gradient is not finite; samples whose loss is not: slot 3 (row 30 of dataset 0, 'clip\\x1b3')" in text
    assert run_step(guard, 9, loss=1.0, norm=None)[2].endswith("the losses of all samples are")


def test_too_many_steps_left_out_in_a_row_end_the_run(alone: None) -> None:
    guard = StepGuard(GuardConfig(max_skipped_in_a_row=3))
    run_step(guard, 0, loss=1.0, norm=1.0)
    for step in range(1, 4):
        run_step(guard, step, loss=1.0, norm=None)
    run_step(guard, 4, loss=1.0, norm=1.0)  # breaks the row
    for step in range(5, 8):
        run_step(guard, step, loss=1.0, norm=None)
    resumed = StepGuard(guard.config)
    resumed.restore(guard.state())
    with pytest.raises(
        Diverged, match=r"4 steps in a row.*guards\.max_skipped_in_a_row; lower .* The last: step 8 \(a\)"
    ):
        run_step(guard, 8, loss=1.0, norm=None)
    run_step(resumed, 8, loss=1.0, norm=None)  # with what somebody has changed meanwhile


def test_too_large_a_share_of_steps_left_out_ends_the_run(alone: None) -> None:
    guard = StepGuard(GuardConfig(max_skipped_share=0.01))
    for step in range(10):
        run_step(guard, 100 * step, loss=1.0, norm=None)
        run_step(guard, 100 * step + 1, loss=1.0, norm=1.0)
    run_step(guard, 1000, loss=1.0, norm=None)  # that of step 0 is forgotten
    with pytest.raises(Diverged, match=r"11 of the last 1000 steps.*guards\.max_skipped_share=0\.01"):
        run_step(guard, 1050, loss=1.0, norm=None)


def test_going_back_too_often_ends_the_run(alone: None) -> None:
    guard = StepGuard(GuardConfig(spike_policy=SpikePolicy.roll_back, max_roll_backs=2))
    for step in range(100):
        run_step(guard, step, loss=1.0, norm=1.0)
    saved = json.loads(json.dumps(guard.state()))
    for count in (1, 2):
        assert run_step(guard, 100, loss=1.0, norm=50.0)[1] is Finding.spike
        guard.restore(saved)
        assert guard.state() == saved
        guard.roll_backs = count
    with pytest.raises(Diverged, match=r"went back to a checkpoint 2 times"):
        run_step(guard, 100, loss=1.0, norm=50.0)


def test_ghosts_and_levels_count_as_they_should(alone: None) -> None:
    sums = LevelSums()
    sums.add(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.0, 0.99, 1.0]), torch.tensor([1.0, 1.0, 0.0]))
    sums.add(torch.tensor([4.0]), torch.tensor([1.0]), torch.tensor([1.0]))
    losses, norm = sums.reduce(2.5)
    assert norm == 2.5
    assert losses == StepLosses([1.0, *[0.0] * 8, 6.0], [1.0, *[0.0] * 8, 2.0])
    assert losses.mean == pytest.approx(7 / 3)


def test_a_step_is_not_judged_by_levels_of_which_little_is_known() -> None:
    levels = LevelLosses(100)
    known = StepLosses([16.0, *[0.0] * 9], [8.0, *[0.0] * 9])
    assert levels.ratio(known) is None
    levels.update(known)
    assert levels.ratio(StepLosses([12.0, 90.0, *[0.0] * 8], [4.0, 3.0, *[0.0] * 8])) == pytest.approx(1.5)
    assert levels.ratio(StepLosses([12.0, 90.0, *[0.0] * 8], [4.0, 5.0, *[0.0] * 8])) is None


def test_samples_whose_loss_is_not_finite_are_named() -> None:
    losses = torch.tensor([1.0, float("inf"), 2.0, float("nan")])
    assert not_finite_samples(losses, video_batch(0)) == [
        "slot 1 (row 10 of dataset 0, 'clip\\x1b1')",
        "slot 3 (row 30 of dataset 0, 'clip\\x1b3')",
    ]
    batch = video_batch(0)
    batch.weights[1] = 0.0  # a ghost, or of a process that shares its clips with another
    assert not_finite_samples(losses, batch) == ["slot 3 (row 30 of dataset 0, 'clip\\x1b3')"]


def test_wrong_settings_are_named() -> None:
    wrong = GuardConfig(
        spike_threshold=0, spike_history=10, max_roll_backs=-1, max_skipped_in_a_row=0, max_skipped_share=0
    )
    faults = wrong.faults("guards")
    assert len(faults) == 5
    assert "guards.spike_history=10 must be at least 48" in faults
    assert GuardConfig().faults("guards") == []


def test_the_settings_are_a_structured_config() -> None:
    config = OmegaConf.merge(OmegaConf.structured(GuardConfig), {"spike_policy": "roll_back", "hash_every_steps": 0})
    assert OmegaConf.to_object(config) == GuardConfig(spike_policy=SpikePolicy.roll_back, hash_every_steps=0)
