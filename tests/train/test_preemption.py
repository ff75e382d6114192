import signal
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from muybridge.train import preemption
from muybridge.train.life import Asked
from muybridge.train.preemption import (
    ONE_REQUEST_SECONDS,
    SIGNALS,
    Requests,
    StopAgreed,
    StoppedInSetUp,
    leave_on_signal,
)


@pytest.fixture
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts the process's own signal handlers back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    monkeypatch.setattr(preemption.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(preemption.dist, "get_rank", lambda: 0)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def agreed(request: Requests) -> bool:
    return request.agree(replaced_samples=0, is_unreadable=False, is_written=True, is_lost=False).stop


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_for_a_stop(tmp_path: Path, number: signal.Signals) -> None:
    request = Requests(tmp_path, timeout_seconds=60)
    assert not agreed(request)
    signal.raise_signal(number)
    assert agreed(request)


@pytest.mark.usefixtures("handlers")
def test_what_ranks_wait_for_is_not_cut_short_by_the_time_limit_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[timedelta] = []
    monkeypatch.setattr(preemption.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(preemption.dist, "new_group", lambda backend, timeout: limits.append(timeout))
    Requests(tmp_path, timeout_seconds=7200)
    preemption.gather_over_gloo(7200)
    assert limits == [timedelta(hours=2)] * 2


@pytest.mark.usefixtures("handlers")
def test_a_stop_file_asks_until_it_is_cleared(tmp_path: Path) -> None:
    request = Requests(tmp_path, timeout_seconds=60)
    (tmp_path / "STOP").touch()
    assert agreed(request)
    request.clear()
    assert not (tmp_path / "STOP").exists()
    request.clear()  # a stop by signal left none


@pytest.mark.usefixtures("handlers")
def test_copies_of_a_signal_are_one_request_and_a_later_one_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(preemption, "time", SimpleNamespace(monotonic=lambda: now[0]))
    request = Requests(tmp_path, timeout_seconds=60)
    deadly: list[Any] = []
    fake: Callable[[int, Any], None] = lambda number, handler: deadly.append((number, handler))  # noqa: E731
    for seconds in (0.0, 0.1, ONE_REQUEST_SECONDS - 0.1):
        now[0] = 100.0 + seconds
        signal.raise_signal(signal.SIGTERM)
    assert agreed(request)
    monkeypatch.setattr(
        preemption,
        "signal",
        SimpleNamespace(
            signal=fake, SIG_DFL=signal.SIG_DFL, raise_signal=lambda number: deadly.append((number, "raised"))
        ),
    )
    now[0] = 100.0 + ONE_REQUEST_SECONDS + 0.1
    signal.raise_signal(signal.SIGTERM)
    assert deadly == [(signal.SIGTERM, signal.SIG_DFL), (signal.SIGTERM, "raised")]


@pytest.mark.usefixtures("handlers")
def test_the_batch_script_asks_by_a_file_that_stays(tmp_path: Path, life_folder: Path) -> None:
    requests = Requests(tmp_path, timeout_seconds=60)
    assert not agreed(requests)
    (life_folder / "stop").touch()
    assert agreed(requests)
    assert requests.asked is Asked.scheduler
    requests.clear()
    assert (life_folder / "stop").exists()  # it is the life's, which is over


@pytest.mark.usefixtures("handlers")
def test_repeated_signals_of_slurm_leave_the_save_its_time(
    tmp_path: Path, life_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(preemption, "time", SimpleNamespace(monotonic=lambda: now[0]))
    requests = Requests(tmp_path, timeout_seconds=60)
    for seconds in (0.0, ONE_REQUEST_SECONDS + 1, 30.0):
        now[0] = 100.0 + seconds
        signal.raise_signal(signal.SIGTERM)
        assert agreed(requests)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("number", "stop_files", "asked"),
    [
        (signal.SIGTERM, [], Asked.scheduler),
        (signal.SIGUSR2, [], Asked.scheduler),
        (signal.SIGINT, [], Asked.user),
        (None, ["STOP"], Asked.user),
        (None, ["lives/123.0/stop"], Asked.scheduler),
        # Who stops a run that is about to be started again does not want it started again.
        (signal.SIGTERM, ["STOP"], Asked.user),
        (None, ["lives/123.0/stop", "STOP"], Asked.user),
    ],
)
@pytest.mark.usefixtures("life_folder")
def test_it_is_known_who_asked(
    tmp_path: Path, number: signal.Signals | None, stop_files: list[str], asked: Asked
) -> None:
    requests = Requests(tmp_path, timeout_seconds=60)
    if number is not None:
        signal.raise_signal(number)
    for name in stop_files:
        (tmp_path / name).touch()
    assert agreed(requests)
    assert requests.asked is asked


@pytest.mark.usefixtures("handlers")
def test_a_wait_ends_when_everything_is_there_or_a_stop_is_asked_for(tmp_path: Path) -> None:
    requests = Requests(tmp_path, timeout_seconds=60)
    assert not requests.all_ready(is_ready=False)
    assert requests.all_ready(is_ready=True)
    requests.check()
    signal.raise_signal(signal.SIGUSR2)
    assert requests.all_ready(is_ready=True)  # the step is done first: what was read for it is not lost
    with pytest.raises(StopAgreed):
        requests.all_ready(is_ready=False)
    with pytest.raises(StopAgreed):
        requests.check()


@pytest.mark.usefixtures("handlers")
def test_a_save_file_asks_for_one_checkpoint(tmp_path: Path) -> None:
    requests = Requests(tmp_path, timeout_seconds=60)
    (tmp_path / "SAVE").touch()
    answers = [
        requests.agree(replaced_samples=0, is_unreadable=False, is_written=True, is_lost=False) for _ in range(2)
    ]
    assert [answer.save for answer in answers] == [True, False]
    assert not any(answer.stop for answer in answers)


@pytest.mark.usefixtures("handlers")
def test_a_signal_during_set_up_ends_it(tmp_path: Path) -> None:
    leave_on_signal()
    with pytest.raises(StoppedInSetUp, match="SIGTERM") as stopped:
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.asked is Asked.scheduler
    for number in SIGNALS:
        signal.raise_signal(number)  # copies of the first one, while the attempt ends
    Requests(tmp_path, timeout_seconds=60)
    signal.raise_signal(signal.SIGTERM)  # from here on it asks
