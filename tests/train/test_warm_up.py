"""The warm-up of a run's shapes: nothing compiles after it, and training goes on as if it had not been; runs warm_up_program.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from muybridge.tests.conftest import Command


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, launch: Command) -> dict[str, Any]:
    """What rank 0 found in each case, and under "said" what it said."""
    folder = tmp_path_factory.mktemp("warm_up") / "ranks"
    answer = launch(0, Path(__file__).with_name("warm_up_program.py"), folder)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    facts = json.loads(answer.stdout)
    assert facts["codes"] == [0, 0], facts["said"]
    return {**json.loads((folder / "found-0.json").read_text()), "said": facts["said"][0]}


@pytest.mark.parametrize("zero", range(4))
def test_training_goes_on_as_if_there_had_been_no_warm_up(found: dict[str, Any], zero: int) -> None:
    eager, warm = found[f"{zero}-eager"], found[f"{zero}-warm"]
    assert warm["losses"] == eager["losses"]
    assert warm["norms"] == eager["norms"]
    assert not warm["drew"]
    assert eager["losses"][0] != eager["losses"][2]


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_compiled_blocks_train_as_eager_ones_and_nothing_compiles_after_the_warm_up(
    found: dict[str, Any], zero: int
) -> None:
    eager, compiled = found[f"{zero}-eager"], found[f"{zero}-compiled"]
    assert compiled["losses"] == pytest.approx(eager["losses"], rel=1e-5)
    assert compiled["norms"] == pytest.approx(eager["norms"], rel=1e-4)
    assert compiled["late"] == 0


def test_it_names_each_shape_and_says_what_it_did(found: dict[str, Any]) -> None:
    assert found["1-compiled"]["shapes"] == ["5x16x16", "5x16x32", "sample videos"]
    assert "muybridge: compiling 5x16x32 (2 of 3)" in found["said"]
    # Each shape forward and backward, and forward alone; sample videos forward alone, in a batch of their own.
    assert "compiled 5 graphs for 3 shapes" in found["said"]
