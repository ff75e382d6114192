"""Our AdamW under DeepSpeed against torch's, as shard_adamw_program.py found them; the kernel runs in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")

CASES = ("fp32-0", "fp32-1", "fp32-2", "fp32-3", "bf16-1")
SHARDED = CASES[1:]


def limit(case: str) -> float:
    """A few fp32 roundings; a bf16 weight that rounds to its other neighbour moves all that follows."""
    return 1e-6 if case.startswith("fp32") else 1e-2


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("shard_adamw")
    program = [sys.executable, str(Path(__file__).with_name("shard_adamw_program.py")), str(root)]
    env = {**os.environ, "TRITON_INTERPRET": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(program, capture_output=True, text=True, check=False, env=env)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "untested optimizer" not in answer.stdout + answer.stderr
    return json.loads((root / "found.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_weights_states_and_average_equal_those_of_torch(found: dict[str, Any], case: str) -> None:
    own = found[case]
    assert (own["own_is"], own["reference_is"]) == ("ShardAdamW", "AdamW")
    assert own["distances"] == pytest.approx(dict.fromkeys(own["distances"], 0.0), abs=limit(case))
    assert own["norms"][0] == pytest.approx(own["norms"][1], rel=10 * limit(case))
    assert min(own["norms"][1]) > 1  # clipped at 0.1


@pytest.mark.parametrize("case", CASES)
def test_without_clipping_the_gradient_is_left_whole(found: dict[str, Any], case: str) -> None:
    own = found[case]["without clipping"]
    assert own == pytest.approx(dict.fromkeys(own, 0.0), abs=limit(case))


@pytest.mark.parametrize("case", SHARDED)
def test_the_average_waits_for_the_next_step_and_is_right_when_looked_at(found: dict[str, Any], case: str) -> None:
    assert found[case]["own_defers"]
    assert not found[case]["reference_defers"]
    assert all(found[case][f"{name}_{what}"] for name in ("own", "reference") for what in ("swaps", "swaps_back"))


def test_without_shards_torch_does_the_step(found: dict[str, Any]) -> None:
    assert not found["fp32-0"]["own_defers"]
    assert set(found["fp32-0"]["distances"].values()) == {0.0}


@pytest.mark.parametrize("case", CASES)
def test_either_optimizer_continues_the_checkpoints_of_both(found: dict[str, Any], case: str) -> None:
    resumed = found[case]["resumed"]
    for kept in ("own to own", "reference to reference"):
        assert set(resumed[kept].values()) == {0.0}
    for crossed in ("own to reference", "reference to own"):
        assert resumed[crossed] == pytest.approx(dict.fromkeys(resumed[crossed], 0.0), abs=limit(case))
