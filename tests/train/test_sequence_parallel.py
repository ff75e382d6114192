"""Processes that share the tokens of a clip against one process that has them all, as sequence_program.py found them."""

import json
from pathlib import Path

import pytest
import torch

from muybridge.models.dit import DiT
from muybridge.models.dit_config import DiTConfig
from muybridge.tests.conftest import Command
from muybridge.train.mesh import Axis
from muybridge.train.sequence_parallel import split_sequence

Runs = dict[int, list[dict[str, dict[str, float]]]]
PLAIN = [(2, "1x2"), (3, "1x3"), (4, "1x4")]  # processes, data x sequence
STAGES = [(world, place, zero) for world, place in [*PLAIN, (4, "2x2")] for zero in (1, 2, 3)]
STAGES += [(6, "2x3", 2), (8, "2x4", 3)]
CASES = [
    "plain",
    "divided by 2 and 4",
    "a timestep a frame",
    "a timestep a token",
    "fewer tokens than processes",
    "image",
    "packed",
    "recomputed",
    "block-causal",
    "sliding tiles",
    "radial",
]
# Relative to the largest entry of a tensor. Sums over the tokens are taken in another order: of a few hundred terms in fp32, each
# rounded by at most 6e-8, and larger than their sum where they cancel. Weights move by at most 2 % of their size.
LOSS, GRADIENT, WEIGHT = 1e-6, 1e-5, 1e-6


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, launch: Command) -> Runs:
    """What each rank found, by the number of processes."""
    root = tmp_path_factory.mktemp("sequence")
    answer = launch(0, Path(__file__).with_name("sequence_program.py"), root)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return {world: json.loads((root / f"w{world}.json").read_text()) for world in (2, 3, 4, 6, 8)}


@pytest.mark.parametrize(("world", "place"), PLAIN)
def test_attention_around_the_exchange_is_attention_to_all_tokens(found: Runs, world: int, place: str) -> None:
    for rank in found[world]:
        errors = rank[f"{place} exchange"]
        assert len(errors) == 4
        assert {name: error for name, error in errors.items() if error > (1e-2 if "bfloat16" in name else 1e-6)} == {}


@pytest.mark.parametrize(("world", "place"), PLAIN)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_all_gradients_are_those_of_one_process(found: Runs, world: int, place: str, case: str) -> None:
    for rank in found[world]:
        errors = rank[f"{place} {case}"]
        assert errors["loss within the group"] == 0
        assert errors["loss"] < LOSS
        assert errors["gradient"] < GRADIENT


@pytest.mark.parametrize(("world", "place", "zero"), STAGES)
def test_training_at_every_stage_is_that_of_one_process(found: Runs, world: int, place: str, zero: int) -> None:
    for rank in found[world]:
        errors = rank[f"{place} zero {zero}"]
        assert errors["loss"] < LOSS
        assert errors["gradient"] < GRADIENT
        assert errors["weight"] < WEIGHT


def test_a_group_of_one_process_changes_nothing() -> None:
    dit = DiT(
        DiTConfig(in_channels=2, out_channels=2, num_layers=1, dim=16, num_attention_heads=1, ffn_dim=8, text_dim=8)
    )
    way, attend = dit.run_blocks, dit.blocks[0].attn1.attend
    split_sequence(dit, Axis(0, 1, None))
    assert (dit.run_blocks, dit.blocks[0].attn1.attend) == (way, attend)
    assert dit(torch.zeros(1, 2, 1, 4, 4), torch.tensor([5.0]), torch.zeros(1, 3, 8)).shape == (1, 2, 1, 4, 4)
