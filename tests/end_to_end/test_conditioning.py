"""Runs under conditions and of one expert: the same losses on any number of processes, and the same after an interruption."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from muybridge.models.dit import DiT
from muybridge.models.pipeline_folder import write_model_index
from muybridge.models.weights import save_model
from muybridge.tests.conftest import Command
from muybridge.train.config import load_train_config

Runs = tuple[Path, dict[str, dict[str, Any]]]
CLEAN = ["conditioning.form=clean_frames", "conditioning.t2v=0.25", "conditioning.i2v=0.25"]
CLEAN += ["conditioning.continuation=0.25", "conditioning.inpainting=0.25"]
CHANNELS = ["conditioning.form=channels", "conditioning.i2v=0.5", "conditioning.inpainting=0.5", "model.in_channels=36"]
CHANNELS += ["data.access=raw", "data.frames=5"]


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_run: list[str],
    tiny_umt5: Path,
    launch: Command,
) -> Runs:
    """A folder of finished runs, and what became of each: two processes first, then one."""
    root = tmp_path_factory.mktemp("conditioned")
    frozen_text = ["text=umt5_xxl", f"text.path={tiny_umt5}", "text.dim=32", "text.max_tokens=8"]
    sizes = load_train_config([*tiny_run, "run_dir=none"]).model
    for number, part in enumerate(("transformer", "transformer_2")):
        torch.manual_seed(number)
        save_model(root / "pipeline" / part, sizes.to_diffusers(), DiT(sizes).state_dict())
    write_model_index(root / "pipeline", boundary_ratio=0.875)
    # Of a rate so small that the weights are what the run started from.
    resting = ["optimizer.lr=1e-12", "steps=1", "data.access=raw", *frozen_text, f"init_from={root / 'pipeline'}"]
    short = ["deepspeed=zero1", "deepspeed.precision=fp32", "global_batch=4", "micro_batch=2", "data.workers=0"]
    two = {
        "clean-w2": [*CLEAN, "steps=8"],
        "channels-w2": [*CHANNELS, "steps=4"],
        "first half": [*CLEAN, "steps=4", "deepspeed=zero2", f"run_dir={root / 'halves'}"],
    }
    one = {
        "clean-w1": [*CLEAN, "steps=8"],
        "channels-w1": [*CHANNELS, "steps=4"],
        "second half": [*CLEAN, "steps=8", "deepspeed=zero2", f"run_dir={root / 'halves'}"],
        "high": [*resting, "expert=high"],
        "low": [*resting, "expert=low"],
        "no expert": [*resting, "steps=1"],
        "other expert": [*resting, "expert=low", f"run_dir={root / 'high'}"],
        "other boundary": [*resting, "expert=low", "boundary=0.9", f"run_dir={root / 'low'}", "init_from=null"],
        "other form": ["steps=9", f"run_dir={root / 'clean-w1'}"],
    }
    found: dict[str, dict[str, Any]] = {}
    program = Path(__file__).with_name("train_program.py")
    for processes, plan in ((2, two), (1, one)):
        overrides = {name: [*tiny_run, *short, f"run_dir={root / name}", *more] for name, more in plan.items()}
        (root / "plan.json").write_text(json.dumps(overrides))
        done = launch(processes, program, root / "plan.json", root / "found.json")
        assert done.returncode == 0, done.stdout + done.stderr
        found |= json.loads((root / "found.json").read_text())
    return root, found


def losses(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("form", ["clean", "channels"])
def test_losses_under_a_condition_do_not_depend_on_the_number_of_processes(form: str, runs: Runs) -> None:
    root, found = runs
    assert found[f"{form}-w1"]["code"] == found[f"{form}-w2"]["code"] == 0
    one, two = losses(root / f"{form}-w1"), losses(root / f"{form}-w2")
    assert len(one) == (8 if form == "clean" else 4)
    assert one == pytest.approx(two, rel=2e-4)


def test_a_run_under_a_condition_goes_on_as_if_it_had_not_stopped(runs: Runs) -> None:
    root, found = runs
    assert found["second half"]["code"] == 0
    assert losses(root / "halves") == pytest.approx(losses(root / "clean-w1"), rel=2e-4)


def test_each_expert_starts_from_its_transformer_of_the_pipeline(runs: Runs) -> None:
    root, found = runs
    for expert, part in (("high", "transformer"), ("low", "transformer_2")):
        assert found[expert]["code"] == 0
        trained = load_file(root / expert / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
        start = load_file(root / "pipeline" / part / "diffusion_pytorch_model.safetensors")
        assert trained.keys() == start.keys()
        for name, weight in start.items():
            torch.testing.assert_close(trained[name], weight, rtol=0, atol=1e-6)


def test_a_pipeline_of_two_experts_is_not_trained_as_one(runs: Runs) -> None:
    assert "expert=none must be high or low" in runs[1]["no expert"]["ValueError"]


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("other expert", "expert: high saved, low now"),
        ("other boundary", "boundary: 0.875 saved, 0.9 now"),
        ("other form", "conditioning.form: clean_frames saved, none now"),
    ],
)
def test_a_run_goes_on_as_the_expert_and_in_the_form_that_it_began(run: str, words: str, runs: Runs) -> None:
    assert words in runs[1][run]["ValueError"]
