"""The optimizer's states on the host: what they are after training, saving and loading, and what DeepSpeed does; runs
offload_program.py, whose second world is two processes."""

import json
from pathlib import Path
from typing import Any

import pytest

from muybridge.tests.conftest import Command
from muybridge.tests.train.test_deepspeed_contract import FACTS
from muybridge.tests.train.test_guarded_steps import APPLIED, CALLED_OFF, NOT_FINITE
from muybridge.train.engine_config import EngineConfig, deepspeed_settings

CASES = ["fp32-1", "fp32-3", "bf16-2"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, launch: Command) -> dict[int, list[dict[str, Any]]]:
    """What offload_program.py found on each rank, by the number of processes."""
    root = tmp_path_factory.mktemp("offload")
    answer = launch(0, Path(__file__).with_name("offload_program.py"), root)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return {world: json.loads((root / f"w{world}.json").read_text()) for world in (1, 2)}


@pytest.mark.parametrize(("world", "case"), [(1, "fp32-1"), *((2, case) for case in CASES)])
def test_training_on_the_host_equals_training_on_the_device(found: dict[int, Any], world: int, case: str) -> None:
    for rank in found[world]:
        on_device, on_host = rank[case]["norms"]
        assert on_host == pytest.approx(on_device, rel=1e-6)
        # Masters, states, averages and weights; the stages take the norm that clips in another order.
        assert rank[case]["largest_difference"] < 2e-7
        assert rank[case]["a validation sees the average"]


@pytest.mark.parametrize(("world", "case"), [(1, "fp32-1"), *((2, case) for case in CASES)])
def test_a_run_on_the_host_resumes_exactly_also_what_was_saved_on_a_device(
    found: dict[int, Any], world: int, case: str
) -> None:
    for rank in found[world]:
        assert rank[case]["resumed from the host"] == 0
        assert rank[case]["resumed from the device"] < 2e-7


def test_two_processes_without_it_continue_what_one_saved_on_its_host(found: dict[int, Any]) -> None:
    expected = found[1][0]["fp32-1"]["norms"][1]
    norms = found[2][0]["elsewhere"]
    assert norms == pytest.approx(expected[-len(norms) :], rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_steps_on_the_host_can_be_called_off(found: dict[int, Any], case: str) -> None:
    for rank in found[2]:
        steps = rank[case]["steps"]
        assert [step for step, applied in enumerate(steps["applied"]) if applied] == APPLIED
        assert [step for step, unchanged in enumerate(steps["unchanged"]) if not unchanged] == APPLIED
        assert [steps["norms"][step] for step in NOT_FINITE] == [None, None]
        assert [steps["asked"][step] for step in CALLED_OFF] == [[steps["norms"][step]] for step in CALLED_OFF]
        assert steps["optimizer_steps"] == len(APPLIED)
        assert steps["equals_a_run_without"]


@pytest.mark.parametrize("case", CASES)
def test_deepspeed_offloads_as_the_engine_relies_on(found: dict[int, Any], case: str) -> None:
    for rank in found[2]:
        assert [fact for fact in FACTS if not rank[case]["contract"][fact]] == []


def test_stage_0_has_nothing_to_offload() -> None:
    assert (
        EngineConfig(zero=0, offload_optimizer=True)
        .faults("deepspeed")[-1]
        .startswith("deepspeed.offload_optimizer=true must come with deepspeed.zero=1, 2 or 3")
    )
    assert EngineConfig(zero=1, offload_optimizer=True).faults("deepspeed") == []


def test_deepspeed_is_told_to_take_the_optimizer_that_it_is_given() -> None:
    # Otherwise it refuses torch's AdamW, and compiles its own.
    config = EngineConfig(zero=1, offload_optimizer=True)
    settings = deepspeed_settings(config, micro_batch=1, gradient_clipping=1.0, largest_gather=10, elements=100)
    assert settings["zero_force_ds_cpu_optimizer"] is False
    assert settings["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
