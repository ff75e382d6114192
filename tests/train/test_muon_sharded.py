"""Muon at every ZeRO stage in worlds of one, two and three processes, against torch.optim.Muon; runs muon_program.py."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from muybridge.tests.conftest import Command
from muybridge.train.fragments import FragmentReader, read_run_state

Runs = dict[int, list[dict[str, Any]]]
WORLDS = (1, 2, 3)
FP32 = [f"fp32-{zero}" for zero in range(4)]
BF16 = ["bf16-1", "bf16-3"]
CLIPPED = ["clipped-2", "clipped-3"]
MATRICES = ["0.up", "0.mix", "0.down", "1.up", "1.down"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, launch: Command) -> Path:
    """The folder into which the program wrote."""
    root = tmp_path_factory.mktemp("muon")
    answer = launch(0, Path(__file__).with_name("muon_program.py"), root)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "untested optimizer" not in answer.stdout + answer.stderr
    return root


@pytest.fixture(scope="module")
def runs(root: Path) -> Runs:
    """What each rank found, by the number of processes."""
    return {world: json.loads((root / f"w{world}.json").read_text()) for world in WORLDS}


def end_of(root: Path, case: str, world: int, reference: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the checkpoint at the end holds of what the reference has, whole."""
    (folder,) = (root / f"{case}-w{world}" / "end").glob("step-*")
    shapes, found = read_run_state(folder)["shapes"], {}
    with FragmentReader(folder) as reader:
        for key in reference:
            kind, name = key.split("/", 1)
            found[key] = reader.read(kind, name, 0, torch.Size(shapes[name]).numel()).view(shapes[name])
    return found


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", FP32)
def test_matrices_are_those_of_torchs_muon_bit_for_bit_at_every_stage_and_world(
    root: Path, case: str, world: int
) -> None:
    expected = load_file(root / "fp32.safetensors")
    found = end_of(root, case, world, expected)
    for name in MATRICES:
        for key in (f"master/blocks.{name}.weight", f"momentum_buffer/blocks.{name}.weight"):
            assert torch.equal(found[key], expected[key]), key


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", FP32)
def test_other_parameters_are_adamws(root: Path, case: str, world: int) -> None:
    expected = load_file(root / "fp32.safetensors")
    found = end_of(root, case, world, expected)
    matrices = {f"blocks.{name}.weight" for name in MATRICES}
    others = [key for key in expected if key.split("/")[1] not in matrices]
    assert len(others) == 3 * 7  # two weights and five biases
    for key in others:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-6, atol=1e-8, msg=key)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CLIPPED)
def test_gradients_are_clipped_first(root: Path, case: str, world: int) -> None:
    expected, free = load_file(root / "clipped.safetensors"), load_file(root / "fp32.safetensors")
    found = end_of(root, case, world, expected)
    for key, value in expected.items():
        if key.startswith("momentum_buffer"):
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7)
            assert value.norm() < 0.2 * free[key].norm()
        elif key.startswith("master"):  # a direction that rounds to its other neighbour in bf16 moves the whole matrix
            torch.testing.assert_close(found[key], value, rtol=0.01, atol=0.01 * value.abs().max().item())


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", BF16)
def test_bf16_weights_have_the_same_momentum(root: Path, case: str, world: int) -> None:
    expected = load_file(root / "fp32.safetensors")
    found = end_of(root, case, world, expected)
    for key, value in expected.items():
        if key.startswith("momentum_buffer"):  # the gradients are exact in bf16
            assert torch.equal(found[key], value)
        elif key.startswith("master"):  # which began at weights that were rounded to bf16
            torch.testing.assert_close(found[key], value, rtol=0.01, atol=0.01 * value.abs().max().item())


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", FP32 + BF16 + CLIPPED)
def test_steps_that_are_called_off_or_not_finite_are_left_out_on_all_ranks(runs: Runs, case: str, world: int) -> None:
    # That nothing has changed in them shows in the weights, which are those of a reference without them.
    for rank in runs[world]:
        assert [norm is not None for norm in rank[case]["norms"]] == [True, False, True, False, True]
        assert rank[case]["optimizer_steps"] == 3


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", FP32 + BF16)
def test_a_run_goes_on_bit_for_bit_also_from_another_stage_and_world(runs: Runs, case: str, world: int) -> None:
    for rank in runs[world]:
        resumed = rank[case]["resumed"]
        assert f"{case}-w{world}" in resumed
        assert all(resumed.values()), resumed
    if case in FP32:  # the worlds were of 1, 3 and 2 processes, in this order
        assert len(resumed) == {1: 1, 3: 2, 2: 3}[world]


@pytest.mark.parametrize("case", ["fp32-0", "fp32-1", "fp32-3"])
def test_a_checkpoint_holds_one_state_of_a_matrix_and_two_of_any_other_parameter(root: Path, case: str) -> None:
    (folder,) = (root / f"{case}-w2" / "end").glob("step-*")
    kinds: dict[str, set[str]] = {}
    for file in folder.glob("*.safetensors"):
        for key in load_file(file):
            kind, name = key.split("/", 1)
            kinds.setdefault(name, set()).add(kind)
    assert kinds["blocks.0.mix.weight"] == {"master", "ema-0.8", "momentum_buffer"}
    assert kinds["blocks.0.mix.bias"] == kinds["head.weight"] == {"master", "ema-0.8", "exp_avg", "exp_avg_sq"}
    assert "blocks.1.mix.weight" not in kinds
