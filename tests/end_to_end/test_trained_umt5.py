"""A model trained from nothing with its own umT5: resumed, sampled, exported, and opened by diffusers with plain prompts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch

from muybridge.scripts.evaluate import read_all_frames
from muybridge.train.generate import prompt_noise

pytest.importorskip("transformers", reason="the extra `text` is not installed")
PROMPTS = ["a red circle moving left", "the green square slides downwards"]
TEXT = ["text=umt5_small", "text.dim=32", "text.num_heads=2", "text.max_tokens=12", "deepspeed=zero0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained_umt5")


@pytest.fixture(scope="module")
def trained(folder: Path, tiny_run: list[str], muybridge: Callable[..., CompletedProcess[str]]) -> Path:
    """A run of ten steps, stopped after five and resumed; its prompts lie beside it."""
    run_dir = folder / "run"
    settings = [*tiny_run, *TEXT, f"run_dir={run_dir}", "optimizer.lr=1e-2", "ema.decay=0.5"]
    for steps in (5, 10):
        done = muybridge("train", *settings, f"steps={steps}")
        assert done.returncode == 0, done.stderr
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return run_dir


def test_a_resumed_run_keeps_its_tokenizer(
    folder: Path, trained: Path, tiny_run: list[str], muybridge: Callable[..., CompletedProcess[str]]
) -> None:
    straight = folder / "straight"
    done = muybridge("train", *tiny_run, *TEXT, f"run_dir={straight}", "optimizer.lr=1e-2", "ema.decay=0.5", "steps=10")
    assert done.returncode == 0, done.stderr
    rows = [(path / "metrics.jsonl").read_text().splitlines() for path in (trained, straight)]
    losses = [[json.loads(row)["loss"] for row in of if "loss" in row] for of in rows]
    assert losses[0] == losses[1]
    assert (trained / "tokenizer/tokenizer.json").read_bytes() == (straight / "tokenizer/tokenizer.json").read_bytes()


def test_the_export_makes_the_run_s_videos_here_and_in_diffusers(
    folder: Path, trained: Path, muybridge: Callable[..., CompletedProcess[str]]
) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle")
    sampling = [f"prompts={folder / 'prompts.txt'}", "steps=4", "sampler=unipc", "guidance_scale=3"]
    size = ["frames=9", "height=64", "width=64", "fps=8"]
    shutil.rmtree(folder / "export", ignore_errors=True)
    for command in (
        ["sample", f"run={trained}", f"out={folder / 'of_run'}", *sampling],
        ["export", f"run={trained}", f"out={folder / 'export'}", "dtype=fp32"],
        ["sample", f"model={folder / 'export'}", f"out={folder / 'of_export'}", *sampling, *size],
    ):
        done = muybridge(*command)
        assert done.returncode == 0, done.stderr
    of_run, of_export = (
        np.stack([read_all_frames(path.read_bytes()) for path in sorted((folder / name).glob("*.mp4"))]).astype(int)
        for name in ("of_run", "of_export")
    )
    # The run computes in bf16 or fp32 as it was trained (fp32 at zero0), so that only rounding lies between them.
    assert np.abs(of_run - of_export).mean() < 0.5
    assert np.abs(of_run[0] - of_run[1]).mean() > 1  # the prompt is heard

    pipeline = diffusers.WanPipeline.from_pretrained(folder / "export")
    pipeline.set_progress_bar_config(disable=True)
    wanted = pipeline(
        PROMPTS, negative_prompt=["", ""], height=64, width=64, num_frames=9, num_inference_steps=4, guidance_scale=3.0,
        max_sequence_length=12, latents=prompt_noise(0, [0, 1], tuple(_latent_shape(folder))), output_type="np",
    ).frames  # fmt: skip
    assert np.abs(of_export - 255 * wanted).mean() < 3  # the mp4's own loss


def _latent_shape(folder: Path) -> torch.Size:
    from muybridge.models.vae import VAEConfig
    from muybridge.models.weights import load_config

    vae = VAEConfig.from_diffusers(load_config(folder / "export" / "vae"))
    return torch.Size(vae.latent_shape(9, 64, 64))
