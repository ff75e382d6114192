"""The engine, the average and the checkpoints at every ZeRO stage, at one and two processes; runs engine_program.py."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from muybridge.tests.conftest import Command
from muybridge.train.fragments import read_weights

FP32 = [f"fp32-{zero}" for zero in range(4)]
BF16 = [f"bf16-{zero}" for zero in (1, 2, 3)]
WORLDS = [1, 2]
AVERAGES = ["ema-0.8", "ema-0.3"]  # (1 + t) / (10 + t) is below 0.3 for two steps


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, launch: Command) -> Path:
    """The folder into which both programs wrote; the second loads what the first one saved."""
    root = tmp_path_factory.mktemp("engine")
    for world in WORLDS:
        answer = launch(world, Path(__file__).with_name("engine_program.py"), root)
        assert answer.returncode == 0, answer.stdout + answer.stderr
    return root


@pytest.fixture(scope="module")
def found(root: Path) -> dict[int, dict[str, Any]]:
    """What each program found, by its number of processes."""
    return {world: json.loads((root / f"w{world}.json").read_text()) for world in WORLDS}


@pytest.fixture(scope="module")
def reference(found: dict[int, dict[str, Any]]) -> dict[str, list[float]]:
    """Losses and gradient norms of plain torch."""
    return found[1]["reference"]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", FP32)
def test_every_stage_trains_as_plain_torch_does(
    found: dict[int, dict[str, Any]], reference: dict[str, list[float]], case: str, world: int
) -> None:
    assert found[world][case]["losses"] == pytest.approx(reference["losses"], rel=1e-5)
    assert found[world][case]["norms"] == pytest.approx(reference["norms"], rel=1e-4)
    assert all(found[world][case]["applied"])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", BF16)
def test_bf16_with_fp32_masters_stays_near_fp32(
    found: dict[int, dict[str, Any]], reference: dict[str, list[float]], case: str, world: int
) -> None:
    assert found[world][case]["losses"] == pytest.approx(reference["losses"], rel=0.03)
    assert found[world][case]["norms"] == pytest.approx(reference["norms"], rel=0.03)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", FP32)
@pytest.mark.parametrize("kind", ["master", *AVERAGES])
def test_weights_and_averages_equal_those_of_plain_torch(
    root: Path, found: dict[int, dict[str, Any]], kind: str, case: str, world: int
) -> None:
    expected = load_file(root / "reference.safetensors")
    (checkpoint,) = (root / f"{case}-w{world}" / "end").glob("step-*")
    weights = read_weights(checkpoint, kind)
    assert sorted(f"{kind}/{name}" for name in weights) == sorted(name for name in expected if name.startswith(kind))
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[f"{kind}/{name}"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", FP32 + BF16)
def test_resume_at_the_same_world_size_is_exact(
    root: Path, found: dict[int, dict[str, Any]], case: str, world: int
) -> None:
    own = found[world][case]
    assert own["resumed"] == own["losses"][-len(own["resumed"]) :]
    (end,) = (root / f"{case}-w{world}" / "end").glob("step-*")
    (again,) = (root / f"{case}-w{world}" / "again").glob("step-*")
    shards = sorted(end.glob("*.safetensors"))
    assert len(shards) == (1 if case == "fp32-0" else world)
    for shard in shards:
        expected, got = load_file(shard), load_file(again / shard.name)
        assert {name.split("/")[0] for name in expected} == {"master", "exp_avg", "exp_avg_sq", *AVERAGES}
        assert expected.keys() == got.keys()
        assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("case", FP32)
def test_two_processes_continue_what_one_process_saved_at_another_stage(
    found: dict[int, dict[str, Any]], case: str
) -> None:
    own = found[2][case]
    zero = int(case[-1])
    assert set(own["elastic"]) == {f"fp32-{zero}-w1", f"fp32-{(zero + 1) % 4}-w1"}
    for losses in own["elastic"].values():
        assert losses == pytest.approx(own["resumed"], abs=1e-6)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", FP32 + BF16)
def test_groups_keep_their_hyper_parameters_through_a_load(
    found: dict[int, dict[str, Any]], case: str, world: int
) -> None:
    assert found[world][case]["groups_are_kept"]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", FP32 + BF16)
def test_the_average_is_what_a_validation_sees_and_nothing_of_it_stays(
    found: dict[int, dict[str, Any]], case: str, world: int
) -> None:
    own = found[world][case]
    assert own["swap_change"] > 0.05
    assert own["swap_error"] == 0
    assert own["swap_back_is_exact"]


def test_checkpoints_hold_safetensors_and_json_only(root: Path, found: dict[int, dict[str, Any]]) -> None:
    suffixes = {path.suffix for path in root.rglob("*") if path.is_file() and path.name != "LATEST"}
    assert suffixes == {".safetensors", ".json", ".jsonl"}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("zero", range(4))
def test_a_step_with_nan_is_left_out_and_the_next_one_is_whole(
    found: dict[int, dict[str, Any]], reference: dict[str, list[float]], zero: int, world: int
) -> None:
    own = found[world][f"faults-{zero}"]
    assert own["applied"] == [True, True, False, True, True, True]
    assert own["losses"][:3] == pytest.approx(reference["losses"][:3], rel=1e-5)
    # What follows is the same whatever counts the micro-batches, the engine or the ZeRO optimizer.
    assert own["losses"][3:] == pytest.approx(found[1]["faults-1"]["losses"][3:], rel=1e-5)


@pytest.mark.parametrize(("world", "zero"), [(1, 0), (2, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize(("fault", "words"), [("full disk", "File too large"), ("NaN", "NaN or infinite")])
def test_a_rank_that_cannot_save_fails_the_checkpoint_on_all(
    found: dict[int, dict[str, Any]], fault: str, words: str, world: int, zero: int
) -> None:
    own = found[world][f"faults-{zero}"]
    messages = [reports[fault] for reports in own["reports"]]
    assert len(messages) == world
    assert len(set(messages)) == 1
    assert words in messages[0]
    assert f"rank {world - 1}:" in messages[0]
    assert own["left"] == []
    assert all(reports["mended"] == "" for reports in own["reports"])
