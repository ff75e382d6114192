"""The weights under a run: undamaged, and those that a LoRA was trained on, on whatever device they were put together."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from muybridge.models.lora import LoRAFactors
from muybridge.train.checkpoint_folder import committed_checkpoints
from muybridge.train.config import load_train_config, read_config
from muybridge.train.tasks import TextToVideoTask
from muybridge.train.trained_weights import load_trained, prepare_weights

CPU = torch.device("cpu")
SaveRun = Callable[[Path, list[str]], Path]


def load(run: Path) -> None:
    config = read_config(run)
    load_trained(TextToVideoTask(config, CPU).build_model(), config, committed_checkpoints(run / "checkpoints")[-1])


def test_a_lora_on_a_lora_run_is_known_by_what_is_under_it_and_not_by_its_rounding(
    tiny_run: list[str], tmp_path: Path, save_random_run: SaveRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_random_run(tmp_path / "base", tiny_run)
    first = [*tiny_run, "lora.rank=4", "lora.alpha=6", f"init_from={tmp_path / 'base'}"]
    save_random_run(tmp_path / "first", first)
    second = [*tiny_run, "lora.rank=2", f"init_from={tmp_path / 'first'}"]
    save_random_run(tmp_path / "second", second)
    save_random_run(tmp_path / "third", [*tiny_run, "lora.rank=2", f"init_from={tmp_path / 'second'}"])
    delta = LoRAFactors.delta

    def rounded_elsewhere(layer: LoRAFactors) -> Tensor:
        return delta(layer) * (1 + 2**-22)

    monkeypatch.setattr(LoRAFactors, "delta", rounded_elsewhere)
    for run in ("second", "third"):
        load(tmp_path / run)

    for changes in (["seed=1"], ["lora.alpha=5"]):  # of the factors, and of their scale
        shutil.rmtree(tmp_path / "first")
        save_random_run(tmp_path / "first", [*first, *changes])
        for run in ("second", "third"):
            with pytest.raises(ValueError, match=r"holds a LoRA on other weights than init_from=.*first has now"):
                load(tmp_path / run)


def test_a_run_does_not_start_from_a_damaged_checkpoint(
    tiny_run: list[str], tmp_path: Path, save_random_run: SaveRun
) -> None:
    source = save_random_run(tmp_path / "source", tiny_run)
    config = load_train_config([*tiny_run, "run_dir=runs/none", f"init_from={source}"])
    prepare_weights(TextToVideoTask(config, CPU).build_model(), config, None)
    [shard] = source.glob("checkpoints/*/shard-*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00000-of-00001.safetensors does not match its size and checksum"):
        prepare_weights(TextToVideoTask(config, CPU).build_model(), config, None)
