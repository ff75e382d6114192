"""A model trained from nothing with its own umT5: resumed, exported, and opened by diffusers with plain prompts."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest

from muybridge.scripts.sample import SampleConfig, generate_clips
from muybridge.scripts.sample_sources import open_source
from muybridge.train.generate import prompt_noise

pytest.importorskip("transformers", reason="the extra `text` is not installed")
PROMPTS = ["a red circle moving left", "the green square slides downwards"]
TEXT = ["text=umt5_small", "text.dim=32", "text.num_heads=2", "text.max_tokens=12", "deepspeed=zero0"]
SAMPLER = ["sampler.kind=unipc", "sampler.steps=4", "sampler.shift=4", "sampler.guidance_scale=3"]

Train = Callable[[Path, int], list[float]]


@pytest.fixture
def train(tiny_run: list[str], muybridge: Callable[..., CompletedProcess[str]]) -> Train:
    """Trains or continues a run up to a step; the losses of all its steps."""

    def train(run_dir: Path, steps: int) -> list[float]:
        learning = ["optimizer.lr=1e-2", "ema.decays=[0.5]", f"steps={steps}"]
        done = muybridge("train", *tiny_run, *TEXT, *SAMPLER, *learning, f"run_dir={run_dir}")
        assert done.returncode == 0, done.stderr
        rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        return [row["loss"] for row in rows if "loss" in row]

    return train


def test_a_resumed_run_goes_on_with_its_tokenizer(train: Train, tmp_path: Path) -> None:
    train(tmp_path / "resumed", 5)
    assert train(tmp_path / "resumed", 10) == train(tmp_path / "straight", 10)
    first, second = ((tmp_path / name / "tokenizer/tokenizer.json").read_bytes() for name in ("resumed", "straight"))
    assert first == second


def test_the_export_makes_the_run_s_videos_here_and_in_diffusers(
    train: Train, tmp_path: Path, muybridge: Callable[..., CompletedProcess[str]]
) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle")
    train(tmp_path / "run", 10)
    done = muybridge("export", f"run={tmp_path / 'run'}", f"out={tmp_path / 'export'}", "dtype=fp32")
    assert done.returncode == 0, done.stderr
    frames = []
    for config in (SampleConfig(run=str(tmp_path / "run")), SampleConfig(model=str(tmp_path / "export"), batch=2)):
        source = open_source(config)
        [found] = generate_clips(
            source,
            PROMPTS,
            config,
            size=source.size,
            sampler=source.sampler,
            image=None,
            progress=lambda done: None,
        )
        frames.append(found.astype(int))
    of_run, of_export = frames
    assert np.abs(of_run - of_export).max() <= 1
    assert np.abs(of_run[0] - of_run[1]).mean() > 1  # the prompt is heard

    pipeline = diffusers.WanPipeline.from_pretrained(tmp_path / "export")
    pipeline.set_progress_bar_config(disable=True)
    noise = prompt_noise(0, [0, 1], source.vae.latent_shape(9, 64, 64))
    wanted = pipeline(
        PROMPTS, negative_prompt=["", ""], height=64, width=64, num_frames=9, num_inference_steps=4, guidance_scale=3.0,
        max_sequence_length=12, latents=noise, output_type="np",
    ).frames  # fmt: skip
    assert np.abs(of_export - 255 * wanted).max() < 1
