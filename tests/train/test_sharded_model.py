"""A model that is built parameter by parameter is the one that is built whole, and needs no more memory than its pieces; runs
sharded_program.py on two processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from muybridge.models.dit import DiT
from muybridge.models.dit_config import DiTConfig
from muybridge.models.text import ByteTextEncoder, TextEncoderConfig
from muybridge.train.drawn_weights import build_one_by_one

SaveRun = Callable[[Path, list[str]], Path]
TINY_DIT = DiTConfig(
    in_channels=4,
    out_channels=4,
    num_layers=2,
    dim=32,
    num_attention_heads=2,
    ffn_dim=64,
    text_dim=16,
    freq_dim=16,
    image_dim=24,
    pos_embed_seq_len=5,
)


@pytest.mark.parametrize(
    "construct", [lambda: DiT(TINY_DIT), lambda: ByteTextEncoder(TextEncoderConfig(dim=32))], ids=["dit", "bytes"]
)
def test_weights_are_those_that_the_whole_model_draws(construct: Callable[[], torch.nn.Module]) -> None:
    torch.manual_seed(3)
    whole, after = construct().state_dict(), torch.rand(4)
    torch.manual_seed(3)
    placed: list[torch.Size] = []
    model = build_one_by_one(construct, torch.device("cpu"), lambda parameter: placed.append(parameter.shape))
    assert torch.equal(torch.rand(4), after)
    assert list(model.state_dict()) == list(whole)
    assert all(torch.equal(weight, whole[name]) for name, weight in model.state_dict().items())
    assert sorted(placed) == sorted(weight.shape for weight in whole.values())


def test_a_parameter_that_two_modules_share_stays_one() -> None:
    def construct() -> torch.nn.Module:
        first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        second.weight = first.weight
        return torch.nn.Sequential(first, second)

    torch.manual_seed(0)
    whole = construct().state_dict()
    torch.manual_seed(0)
    model = build_one_by_one(construct, torch.device("cpu"), lambda parameter: None)
    assert model[0].weight is model[1].weight
    assert all(torch.equal(weight, whole[name]) for name, weight in model.state_dict().items())


def test_a_change_of_weights_that_cannot_be_made_again_is_refused() -> None:
    def construct() -> torch.nn.Module:
        linear = torch.nn.Linear(3, 3)
        linear.weight.data.exponential_()
        return linear

    with pytest.raises(AssertionError, match="can be made again"):
        build_one_by_one(construct, torch.device("cpu"), lambda parameter: None)


def run_program(root: Path, cases: dict[str, list[str]]) -> list[dict[str, Any]]:
    (root / "cases.json").write_text(json.dumps(cases))
    program = [sys.executable, str(Path(__file__).with_name("sharded_program.py")), str(root)]
    # What is freed goes back to the machine at once, so that what is held can be seen.
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    answer = subprocess.run(program, capture_output=True, text=True, check=False, env=env)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return json.loads((root / "found.json").read_text())


def test_models_are_the_same_and_take_no_more_memory_than_their_pieces(
    tiny_run: list[str], tmp_path: Path, save_random_run: SaveRun
) -> None:
    base = [*tiny_run, f"run_dir={tmp_path / 'none'}", "global_batch=8", "micro_batch=1"]
    save_random_run(tmp_path / "base", tiny_run)
    lora = ["lora.rank=4", "lora.alpha=6"]
    save_random_run(tmp_path / "lora", [*tiny_run, *lora, f"init_from={tmp_path / 'base'}"])
    bf16 = ["deepspeed=zero3", "deepspeed.precision=bf16"]
    cases = {
        "zero3 fp32": [*base, "deepspeed=zero3", "deepspeed.precision=fp32"],
        "zero2 bf16": [*base, "deepspeed=zero2"],
        "lora": [*base, *bf16, *lora, f"init_from={tmp_path / 'base'}"],
        "lora merged": [*base, "deepspeed=zero3", "deepspeed.precision=fp32", f"init_from={tmp_path / 'lora'}"],
    }
    for rank in run_program(tmp_path, cases):
        for name in cases:
            case = rank[name]
            assert case["values"], name
            assert case["generator"], name
            assert case["shapes"], name
            assert case["facts"], name
            assert case["dtypes"] == ["torch.float32" if "fp32" in name or "merged" in name else "torch.bfloat16"]
            # Nothing is whole at ZeRO 3.
            assert (case["elements"] == 0) == (name != "zero2 bf16"), name
        assert rank["lora"]["trained"] < rank["zero3 fp32"]["trained"]
        peak = rank["peak"]
        # A quarter of what the whole model has in float32, and a few parameters on their way.
        assert peak["pieces"] < 0.26 * peak["whole"]
        assert peak["peak"] < peak["pieces"] + 2 * peak["largest"]
