"""ZeRO 3 in all its ways trains as ZeRO 2 does; runs zero3_program.py on four processes, as two nodes of two.

Of the ways to keep a copy of the weights inside each node, DeepSpeed 0.19.8 has one: hpZ, on which `deepspeed.node_shards` is
built. MiCS it has no more: "MiCS ZeRO-3 sharding has been removed".
"""

import json
from pathlib import Path
from typing import Any

import pytest

from muybridge.tests.conftest import Command
from muybridge.train.config import load_train_config
from muybridge.train.engine_config import PERSISTENT_ELEMENTS, EngineConfig, stage3_settings

WAYS = ["zero3", "leaves", "leaves, recomputed", "nodes", "nodes, recomputed"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, launch: Command) -> list[dict[str, Any]]:
    """What zero3_program.py found on each rank."""
    root = tmp_path_factory.mktemp("zero3")
    answer = launch(0, Path(__file__).with_name("zero3_program.py"), root)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return json.loads((root / "found.json").read_text())


@pytest.mark.parametrize("way", WAYS)
def test_every_way_trains_as_zero_2_does(found: list[dict[str, Any]], way: str) -> None:
    for rank in found:
        for kind in ("losses", "norms", "validation"):
            assert rank[way][kind] == pytest.approx(rank["zero2"][kind], rel=2e-6), kind
        assert rank[way]["weights"] == pytest.approx(rank["zero2"]["weights"], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_a_validation_sees_the_average_also_where_a_copy_of_the_weights_is_left(
    found: list[dict[str, Any]], way: str
) -> None:
    for rank in found:
        first, second = rank[way]["validation"]
        assert first == second


def test_a_node_keeps_a_copy_of_the_weights_only_where_that_is_asked_for(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert [rank[way]["second copies"] > 0 for way in WAYS] == [False, False, False, True, True]


def test_groups_that_deepspeed_makes_have_the_run_s_time_limit(found: list[dict[str, Any]]) -> None:
    assert all(rank["limits"] == [4321.0, 4321.0] for rank in found)


def test_nodes_are_of_zero_3() -> None:
    assert EngineConfig(zero=3, node_shards=8).faults("deepspeed") == []
    for config in (EngineConfig(zero=2, node_shards=8), EngineConfig(zero=3, node_shards=1)):
        assert "must be 2 or more, with deepspeed.zero=3, or null" in config.faults("deepspeed")[-1]


def test_nodes_must_be_full(tiny_run: list[str], tmp_path: Path) -> None:
    settings = [*tiny_run, f"run_dir={tmp_path}", "deepspeed=zero3", "deepspeed.node_shards=2"]
    assert load_train_config(settings, world_size=4).deepspeed.node_shards == 2
    with pytest.raises(ValueError, match=r"deepspeed.node_shards=2 must divide the number of processes, 1"):
        load_train_config(settings, world_size=1)


def test_a_model_of_14_billion_holds_three_blocks_at_most() -> None:
    block, all_elements = 351_000_000, 14_288_000_000
    settings = stage3_settings(block, all_elements)
    assert settings["stage3_prefetch_bucket_size"] == settings["stage3_max_reuse_distance"] == block
    assert settings["stage3_max_live_parameters"] == 3 * block
    # Its biases and modulation tables stay, its smallest matrix does not.
    assert 6 * 5120 <= settings["stage3_param_persistence_threshold"] == PERSISTENT_ELEMENTS < 256 * 5120
