"""What the fault tests share: the fork server, a run of six steps with three checkpoints, and what it comes to when nothing fails.

Most cases are marked `faults` and run with `-m faults` only; without `-m` those run that stand for the others.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from muybridge.tests.faults.checks import Reference
from muybridge.tests.faults.fork_server import Attempt, ForkServer
from muybridge.tests.faults.run_folder import Story, read_story

STEPS = 6
# One micro-batch a rank and step; a row a step, a checkpoint every second one, two of which are kept.
SHORT = [
    *("global_batch=4", "micro_batch=2", f"steps={STEPS}", "checkpoint.every_steps=2", "checkpoint.keep_last=2"),
    *("optimizer.warmup_steps=2", "optimizer.lr=3e-3"),
]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "faults: takes part in the long suite of faults only (-m faults)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # A test that is asked for by its name runs.
    if config.option.markexpr or config.option.keyword or any("::" in argument for argument in config.args):
        return
    left_out = [item for item in items if item.get_closest_marker("faults")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def short_run(tiny_run: list[str]) -> list[str]:
    """Settings of the run that faults befall, all but its run_dir and ZeRO stage."""
    return [*tiny_run, *SHORT]


@pytest.fixture(scope="session")
def reference(server: ForkServer, short_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """What an uninterrupted run of two ranks comes to at a ZeRO stage."""

    @cache
    def run(zero: int) -> Story:
        run_dir = tmp_path_factory.mktemp("reference") / "run"
        outcome = server.run(Attempt([*short_run, f"deepspeed=zero{zero}", f"run_dir={run_dir}"]))
        assert outcome.codes == [0, 0], outcome.output
        assert outcome.left_behind == []
        return read_story(run_dir)

    return run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Where the run of a case lies, under the same name as the reference's."""
    return tmp_path / "run"
