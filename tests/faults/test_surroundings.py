"""What a run stands on fails: memory runs out, W&B does not answer or dies."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from muybridge.tests.faults.checks import Reference, after_step, assert_ended, finish
from muybridge.tests.faults.fork_server import Attempt, ForkServer
from muybridge.tests.faults.run_folder import read_rows


@pytest.fixture
def settings(short_run: list[str], run_dir: Path) -> list[str]:
    return [*short_run, "deepspeed=zero2", f"run_dir={run_dir}"]


@pytest.mark.parametrize(
    "kind", ["torch:OutOfMemoryError", pytest.param("builtins:MemoryError", marks=pytest.mark.faults)]
)
def test_a_device_without_memory_ends_the_run_with_what_to_change(
    server: ForkServer, settings: list[str], reference: Reference, kind: str
) -> None:
    fault = {"at": "call muybridge.train.engine:Engine.backward", "nth": 4, "do": "fail", "with": {"kind": kind}}
    outcome = server.run(Attempt(settings, faults={1: [fault]}))
    assert_ended(outcome, [78, 78])
    assert "out of memory at step 3 with clips of " in outcome.ranks[1].output
    assert "micro_batch=2" in outcome.ranks[1].output
    assert "Lower micro_batch" in outcome.ranks[1].output
    assert "Traceback" not in outcome.output
    finish(server, settings, reference(2))


@pytest.mark.faults
def test_a_machine_that_gives_no_more_memory_ends_the_run_in_the_same_way(
    server: ForkServer, settings: list[str], reference: Reference
) -> None:
    limits = [after_step(3, "limit memory", more_bytes=-(2**20)), after_step(3, "limit memory", more_bytes=0)]
    outcome = server.run(Attempt([*settings, "micro_batch=2"], faults={1: limits[:1]}))
    assert_ended(outcome, [78, 78])
    finish(server, settings, reference(2))


def test_a_wandb_service_that_dies_costs_no_row(
    server: ForkServer, settings: list[str], reference: Reference, run_dir: Path
) -> None:
    dead = after_step(3, "kill child", command="wandb")
    outcome = server.run(Attempt([*settings, "tracking.wandb=offline"], faults={0: [dead]}))
    assert_ended(outcome, [0, 0])
    assert "metrics.jsonl has" in outcome.output
    assert read_rows(run_dir) == reference(2).rows


@pytest.mark.faults
def test_a_wandb_server_that_does_not_answer_delays_the_start_only(
    server: ForkServer, settings: list[str], reference: Reference, run_dir: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = {
            "WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "WANDB_API_KEY": "0" * 40,
            "WANDB_INIT_TIMEOUT": "3",
            "WANDB_MODE": "online",
        }
        outcome = server.run(Attempt([*settings, "tracking.wandb=online"], environment=environment))
    assert_ended(outcome, [0, 0])
    assert "W&B is off for this run" in outcome.output
    assert "0" * 40 not in outcome.output
    assert read_rows(run_dir) == reference(2).rows
