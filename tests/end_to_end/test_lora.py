"""LoRA runs: the same at any stage and world size, taken up again exactly, on no other weights, and with files that say it all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from muybridge.models.lora import LoRALinear, lora_factors, merge_lora
from muybridge.models.lora_files import read_lora
from muybridge.models.text_to_video import TextToVideoModel
from muybridge.scripts.sample_sources import RunSource
from muybridge.tests.conftest import Command
from muybridge.train.checkpoint_folder import committed_checkpoints
from muybridge.train.config import read_config
from muybridge.train.fragments import read_run_state, read_weights
from muybridge.train.tasks import TextToVideoTask
from muybridge.train.trained_weights import load_trained

Runs = tuple[Path, dict[str, dict[str, Any]]]

STEPS = 10
SHARDED = [*(f"zero{zero}-w2" for zero in range(4)), "zero1-w1", "zero3-w1"]
LORA = ["lora.rank=4", "lora.alpha=6", "lora.layer_ranks=[*.to_k:3,*.attn2.to_v:0]", "optimizer.lr=2e-2"]
RANKS = {
    **dict.fromkeys((f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_out.0")), 4),
    "attn1.to_k": 3,
    "attn2.to_k": 3,
    "attn1.to_v": 4,
    "ffn.net.0.proj": 4,
    "ffn.net.2": 4,
}


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_run: list[str],
    toy_folder: Path,
    launch: Command,
) -> Runs:
    """A folder of finished runs, and what became of each: two processes first, then one."""
    root = tmp_path_factory.mktemp("lora")
    fp32, base = "deepspeed.precision=fp32", f"init_from={root / 'base'}"
    (root / "latents").mkdir()
    for split in ("train", "validation"):
        (root / "latents" / split).symlink_to(toy_folder / "latents" / "train")
    shared = [f"data.latents={root / 'latents'}", f"steps={STEPS}"]
    watched = ["validation.path=in-latents", f"validation.every_steps={STEPS}", "validation.clips=8"]
    lora = [base, *LORA, *watched]
    # A step so small that the weights are what the run started from.
    still = [*watched, "deepspeed=zero0", fp32, "steps=1"]
    resting = "optimizer.lr=1e-12"
    halves = ["deepspeed=zero2", fp32, *lora, f"run_dir={root / 'halves'}"]
    two = {
        "base": ["deepspeed=zero1", fp32, "optimizer.lr=1e-2"],
        **{f"zero{zero}-w2": [f"deepspeed=zero{zero}", fp32, *lora] for zero in range(4)},
        "first half": [*halves, "steps=4"],
        "second half": halves,
        "elastic": ["deepspeed=zero2", fp32, *lora, "steps=5"],
    }
    zero0 = f"run_dir={root / 'zero0-w1'}"
    one = {
        "zero0-w1": ["deepspeed=zero0", fp32, *lora],
        "zero1-w1": ["deepspeed=zero1", fp32, *lora, "activations.policy=block"],
        "bf16": ["deepspeed=zero1", *lora],
        "all weights from a LoRA run": [f"init_from={root / 'zero0-w1'}", *still, resting],
        "from its file": [*lora, *still, f"lora.init_from={root / 'zero0-w1/model/lora.safetensors'}", resting],
        "LoRA on a LoRA run": [*lora, *still, f"init_from={root / 'zero0-w1'}", resting],
        "other alpha": [zero0, *lora, fp32, "deepspeed=zero0", "lora.alpha=7"],
        "on other weights": [zero0, *lora, fp32, "deepspeed=zero0", f"init_from={root / 'zero0-w2'}"],
        "without LoRA": [zero0, fp32, "deepspeed=zero0"],
        "file of other ranks": [
            *(*lora, f"lora.init_from={root / 'zero0-w1/model/lora.safetensors'}", "lora.layer_ranks=[*.attn2.to_v:0]")
        ],
        "no such layer": [*lora, "lora.layer_ranks=[blocks.9.*:2]"],
        "no base": LORA,
        "elastic": ["deepspeed=zero3", fp32, *lora],
        "zero3-w1": ["deepspeed=zero3", fp32, *lora],
    }
    found: dict[str, dict[str, Any]] = {}
    for world, plan in ((2, two), (1, one)):
        (root / "plan.json").write_text(
            json.dumps({name: [*tiny_run, *shared, f"run_dir={root / name}", *own] for name, own in plan.items()})
        )
        program = Path(__file__).with_name("train_program.py")
        answer = launch(world, program, root / "plan.json", root / "found.json")
        assert answer.returncode == 0, answer.stdout + answer.stderr
        found |= {f"{name}@{world}": fate for name, fate in json.loads((root / "found.json").read_text()).items()}
    return root, found


def values(run_dir: Path, name: str) -> list[float]:
    """A figure in the order of its rows."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def newest(run_dir: Path) -> Path:
    return committed_checkpoints(run_dir / "checkpoints")[-1]


def build(run_dir: Path, kind: str = "ema") -> TextToVideoModel:
    """A run's model, as whoever samples builds it."""
    config = read_config(run_dir)
    model = TextToVideoTask(config, torch.device("cpu")).build_model()
    load_trained(model, config, newest(run_dir), kind)
    assert isinstance(model, TextToVideoModel)
    return model


def test_losses_are_the_same_at_every_stage_and_world_size(runs: Runs) -> None:
    root, _ = runs
    expected = values(root / "zero0-w1", "loss")
    assert len(set(expected)) == STEPS
    for run in [*SHARDED, "elastic"]:
        assert values(root / run, "loss") == pytest.approx(expected, rel=2e-5), run
        last = values(root / run, "validation_loss")[-1]
        assert last == pytest.approx(values(root / "zero0-w1", "validation_loss")[-1], rel=2e-5), run


def test_bf16_has_nearly_the_losses_of_fp32(runs: Runs) -> None:
    root, _ = runs
    assert values(root / "bf16", "loss") == pytest.approx(values(root / "zero1-w1", "loss"), rel=0.02)


def test_a_checkpoint_holds_the_factors_alone(runs: Runs) -> None:
    root, _ = runs
    for run in ("zero0-w1", "zero3-w2"):
        names = {
            f"transformer.blocks.0.{layer}.lora_{part}": rank for layer, rank in RANKS.items() for part in ("A", "B")
        }
        for kind in ("master", "ema"):
            weights = read_weights(newest(root / run), kind)
            assert {name: min(value.shape) for name, value in weights.items()} == names
        assert all(value.abs().max() > 0 for value in weights.values())


def test_a_run_in_two_halves_ends_with_the_bytes_of_a_whole_one(runs: Runs) -> None:
    root, found = runs
    assert (found["first half@2"]["code"], found["second half@2"]["code"]) == (0, 0)
    for name in ("shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors", "run.json"):
        assert (newest(root / "halves") / name).read_bytes() == (newest(root / "zero2-w2") / name).read_bytes()
    assert values(root / "halves", "loss") == values(root / "zero2-w2", "loss")


def test_the_file_of_a_finished_run_holds_the_average(runs: Runs) -> None:
    root, _ = runs
    run_dir = root / "zero3-w2"
    expected = lora_factors(read_weights(newest(run_dir), "ema"), read_config(run_dir).lora)
    got = read_lora(run_dir / "model/lora.safetensors")
    assert {name.removeprefix("blocks.0."): layer.rank for name, layer in got.items()} == RANKS
    for name, layer in got.items():
        torch.testing.assert_close(layer.delta(), expected[name].delta(), atol=1e-7, rtol=1e-5)
    assert [path.name for path in (run_dir / "model").iterdir()] == ["lora.safetensors"]


@pytest.mark.parametrize("kind", ["ema", "master"])
def test_a_fresh_model_gets_the_base_and_the_trained_factors(runs: Runs, kind: str) -> None:
    root, _ = runs
    model = build(root / "zero1-w2", kind)
    state = model.state_dict()
    base, factors = (read_weights(newest(root / run), which) for run, which in (("base", "ema"), ("zero1-w2", kind)))
    assert state.keys() == base.keys() | factors.keys()
    for name, value in (base | factors).items():
        assert torch.equal(state[name], value), name
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    assert {layer.scale for layer in layers} == {1.5, 2.0}


def test_sampling_has_the_model_of_the_checkpoint(runs: Runs) -> None:
    root, _ = runs
    model = RunSource(str(root / "zero1-w2"), "ema").models().transformer
    assert isinstance(model, TextToVideoModel)
    expected = build(root / "zero1-w2").state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_all_weights_of_an_ordinary_run_load_too(runs: Runs) -> None:
    root, _ = runs
    state = build(root / "base").state_dict()
    for name, value in read_weights(newest(root / "base"), "ema").items():
        assert torch.equal(state[name], value), name


def test_later_runs_start_from_what_a_lora_run_made(runs: Runs) -> None:
    root, found = runs
    expected = values(root / "zero0-w1", "validation_loss")[-1]
    assert expected != pytest.approx(values(root / "base", "loss")[-1], rel=1e-3)
    untouched = values(root / "LoRA on a LoRA run", "validation_loss")[-1]
    for run in ("all weights from a LoRA run", "from its file", "LoRA on a LoRA run"):
        assert found[f"{run}@1"]["code"] == 0
        assert values(root / run, "validation_loss")[-1] == pytest.approx(expected, rel=1e-5), run
    assert untouched == pytest.approx(expected, rel=1e-5)
    # All of the model is trained, and the LoRA is in its weights.
    merged = build(root / "zero0-w1")
    merge_lora(merged)
    got = read_weights(newest(root / "all weights from a LoRA run"), "ema")
    assert got.keys() == merged.state_dict().keys() == read_weights(newest(root / "base")).keys()
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(got[name], value, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("other alpha", "lora.alpha: 6.0 saved, 7.0 now"),
        ("on other weights", "holds a LoRA on other weights than init_from="),
        ("without LoRA", "lora.rank: 4 saved, 0 now"),
        (
            "file of other ranks",
            "of other sizes: blocks.0.attn1.to_k (in, rank, out (32, 3, 32) instead of (32, 4, 32))",
        ),
        ("no such layer", "lora.layer_ranks: blocks.9.*:2 matches no layer"),
        ("no base", "init_from must name the weights under the LoRA with lora.rank=4"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(runs: Runs, run: str, words: str) -> None:
    assert words in runs[1][f"{run}@1"]["ValueError"]


@pytest.mark.parametrize("run", [*SHARDED, "bf16"])
def test_the_memory_estimate_is_what_a_run_holds(runs: Runs, run: str) -> None:
    fate = runs[1][f"{run}@2" if run.endswith("w2") else f"{run}@1"]
    for part, held in fate["held"].items():
        # Padding and what is not divided evenly weigh more in factors as small as these.
        assert held == pytest.approx(fate["estimated"][part], rel=0.02), part


def test_a_checkpoint_tells_the_lora_and_what_it_lies_on(runs: Runs) -> None:
    root, _ = runs
    facts = {run: read_run_state(newest(root / run))["lora"] for run in ("zero0-w1", "zero3-w2", "LoRA on a LoRA run")}
    assert facts["zero0-w1"] == facts["zero3-w2"]
    assert facts["zero0-w1"]["settings"]["alpha"] == 6
    assert facts["LoRA on a LoRA run"]["base"] != facts["zero0-w1"]["base"]
    assert "lora" not in read_run_state(newest(root / "base"))
