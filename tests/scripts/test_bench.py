import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from muybridge.models.diffusion.objective import rectified_flow_loss
from muybridge.scripts import bench_step, cli
from muybridge.scripts.bench_step import Peer, StepOptimizer, build_model, time_steps
from muybridge.tests.train.checkpoint_parts import fake_one_rank
from muybridge.train import engine
from muybridge.train.activations import ActivationPolicy, ActivationsConfig
from muybridge.train.config import TrainConfig, load_train_config

CPU = torch.device("cpu")


def test_overhead_is_measured_in_paired_runs(
    muybridge: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    out = tmp_path / "figures" / "overhead.json"
    answer = muybridge("bench", "overhead", "--pairs", "1", "--steps", "3", "--json", out)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    figures = json.loads(out.read_text())
    assert (figures["pairs"], figures["steps"]) == (1, 3)
    assert len(figures["overhead_percent_of_each_pair"]) == 1
    assert isinstance(figures["overhead_percent"], float)
    assert "overhead percent" in answer.stdout


@pytest.mark.parametrize(
    "more", [[], ["conditioning.form=channels", "model.in_channels=36", "data.access=raw"]], ids=["text", "image"]
)
def test_steps_of_a_model_are_timed(
    more: list[str], muybridge: Callable[..., subprocess.CompletedProcess[str]], tiny_run: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "step.json"
    answer = muybridge("bench", "step", "--steps", "3", "--json", out, *tiny_run, "run_dir=runs/none", *more)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    figures = json.loads(out.read_text())
    # 9 frames of 64 x 64 are 3 x 8 x 8 latents, in patches of 1 x 2 x 2.
    assert figures["tokens_per_step"] == 4 * 3 * 4 * 4
    assert figures["tokens_per_second"] == pytest.approx(figures["tokens_per_step"] / figures["seconds_per_step"])
    assert len(figures["seconds_of_each_step"]) == 3
    assert len(figures["losses"]) == 6
    assert figures["seconds_of_update"] < figures["seconds_per_step"]
    assert figures["mfu"] is None  # the peak of this machine is not known


@pytest.fixture
def tiny_config(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """The settings of a small model, for one process that is not in a group."""
    fake_one_rank(monkeypatch)
    monkeypatch.setattr(engine, "initialise_distributed", lambda config: CPU)
    return load_train_config([*tiny_run, "model.num_layers=2", "run_dir=none", "dry_run=true"])


def first_loss(config: TrainConfig, peer: Peer | None) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of random clips, and the gradients by name."""
    random = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, 4, *config.latent_shape(), generator=random)
    text = torch.randn(4, 6, config.model.text_dim, generator=random)
    model = build_model(config, CPU, peer)
    loss = rectified_flow_loss(model, latents, text, noise, torch.rand(4, generator=random)).mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss.item(), gradients


@pytest.mark.parametrize("policy", [ActivationPolicy.none, ActivationPolicy.block])
def test_diffusers_transformer_does_the_same_step(policy: ActivationPolicy, tiny_config: TrainConfig) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    config = replace(tiny_config, activations=ActivationsConfig(policy))
    (ours, our_gradients), (theirs, their_gradients) = (first_loss(config, peer) for peer in (None, Peer.default))
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-3, atol=1e-6, msg=name)


def test_what_diffusers_transformer_has_not_is_refused(tiny_config: TrainConfig) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    tiny_config.activations.policy = ActivationPolicy.selective
    with pytest.raises(ValueError, match=r"activations.policy=selective must be none or block with --diffusers"):
        build_model(tiny_config, CPU, Peer.cudnn)
    tiny_config.lora.rank = 4
    with pytest.raises(ValueError, match="bench step times the training of all weights"):
        time_steps(tiny_config, steps=1)


def test_a_step_that_does_not_fit_is_an_answer(tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB. And so on.")

    monkeypatch.setattr(bench_step, "_run", run_out)
    figures = time_steps(tiny_config, steps=1)
    assert (figures["ok"], figures["summary"], figures["said"]) == (False, "out of memory", "CUDA out of memory")
    assert figures["activations"] == "none"
    assert "seconds_per_step" not in figures


@pytest.mark.parametrize("kind", [StepOptimizer.torch_fused, StepOptimizer.torch_foreach])
def test_torch_updates_the_same_groups(kind: StepOptimizer, tiny_config: TrainConfig) -> None:
    tiny_config.optimizer.weight_decay = 0.3
    built = bench_step._build_optimizer(build_model(tiny_config, CPU, None), tiny_config, kind)
    assert type(built) is torch.optim.AdamW
    assert {group["weight_decay"] for group in built.param_groups} == {0.3, 0.0}
    assert {group["fused"] for group in built.param_groups} == {kind is StepOptimizer.torch_fused}
    assert all(group["lr_scale"] == 1 for group in built.param_groups)


def test_a_misspelt_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "overhed"]) == 64
    assert "invalid choice" in capsys.readouterr().err
