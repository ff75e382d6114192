"""Model folders: round trips, shards, and faults that name the file or tensor."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from muybridge.models.weights import load_config, load_weights, save_model
from muybridge.tests.stored_tensors import read_all

CONFIG = {"_class_name": "Toy", "width": 4}


def draw_state(count: int = 5) -> dict[str, Tensor]:
    state = {f"layer{i}.weight": torch.randn(10, 10) for i in range(count)}
    state["layer0.weight"] = state["layer0.weight"].T  # not contiguous
    state["half"] = torch.randn(3).bfloat16()
    return state


@pytest.mark.parametrize("max_shard_bytes", [10**9, 900, 100])
def test_a_folder_round_trips_bit_for_bit(tmp_path: Path, max_shard_bytes: int) -> None:
    state = draw_state()
    save_model(tmp_path, CONFIG, state, max_shard_bytes=max_shard_bytes)
    found = read_all(tmp_path)
    assert load_config(tmp_path) == CONFIG
    assert found.keys() == state.keys()
    for key, value in state.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


def test_shards_respect_the_limit_and_the_index_lists_them(tmp_path: Path) -> None:
    save_model(tmp_path, CONFIG, draw_state(4), max_shard_bytes=900)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * 400 + 6
    assert index["weight_map"]["layer0.weight"] == files[0]
    assert index["weight_map"]["layer3.weight"] == files[1]


def test_saving_again_leaves_no_file_of_the_earlier_save(tmp_path: Path) -> None:
    save_model(tmp_path, CONFIG, draw_state(), max_shard_bytes=500)
    save_model(tmp_path, CONFIG, {"only": torch.ones(2)})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_weights_are_as_readable_to_others_as_the_config(tmp_path: Path) -> None:
    save_model(tmp_path, CONFIG, draw_state(), max_shard_bytes=900)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes == {(tmp_path / "config.json").stat().st_mode}


def test_a_config_without_a_class_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="_class_name is missing"):
        save_model(tmp_path, {"width": 4}, draw_state())


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        load_config(tmp_path)
    with pytest.raises(ValueError, match=r"must hold diffusion_pytorch_model\.safetensors or model\.safetensors"):
        read_all(tmp_path)
    save_model(tmp_path, CONFIG, draw_state(), max_shard_bytes=500)
    (tmp_path / "diffusion_pytorch_model-00002-of-00005.safetensors").unlink()
    with pytest.raises(ValueError, match=r"00002-of-00005\.safetensors missing"):
        read_all(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": ["a.safetensors"]}, {"weight_map": {"layer0.weight": 1}}])
def test_an_index_that_names_no_files_is_refused(tmp_path: Path, index: dict[str, object]) -> None:
    path = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json: weight_map must be"):
        read_all(tmp_path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    save_model(tmp_path, CONFIG, draw_state())
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors: not a readable"):
        read_all(tmp_path)


def test_weights_that_do_not_fit_the_module_are_named_and_change_nothing() -> None:
    module = nn.Linear(3, 2)
    before = module.weight.clone()
    fitting = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"here: missing tensors: bias; unexpected tensors: extra"):
        load_weights(module, {"weight": fitting["weight"], "extra": torch.zeros(1)}, where="here")
    with pytest.raises(ValueError, match=r"weight \[3, 2\] instead of \[2, 3\]"):
        load_weights(module, fitting | {"weight": torch.zeros(3, 2)}, where="here")
    assert torch.equal(module.weight, before)
    load_weights(module, fitting, where="here")
    assert module.weight.abs().max() == 0
