import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from muybridge.data.batch import VideoBatch
from muybridge.data.loader import VideoLoader
from muybridge.models.dit import DiT, DiTConfig
from muybridge.models.lora import LoRAConfig, add_lora
from muybridge.models.text_to_video import TextToVideoModel
from muybridge.tests.conftest import Command
from muybridge.train import fp8
from muybridge.train.activations import ActivationPolicy, ActivationsConfig, set_activation_policy
from muybridge.train.config import TrainConfig, load_train_config
from muybridge.train.fp8 import Fp8Config, Fp8Recipe, use_fp8
from muybridge.train.optimizer import build_optimizer, learning_rate
from muybridge.train.tasks import build_task

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao (the extra `fp8`) is not installed"
)
RECIPES = [Fp8Recipe.tensorwise, Fp8Recipe.rowwise]
LAYERS = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0"]
LAYERS += ["ffn.net.0.proj", "ffn.net.2"]


def build_dit(*, dim: int = 64, ffn_dim: int = 128, layers: int = 1) -> DiT:
    torch.manual_seed(0)
    dit = DiT(
        DiTConfig(
            in_channels=4,
            out_channels=4,
            num_layers=layers,
            num_attention_heads=2,
            dim=dim,
            ffn_dim=ffn_dim,
            freq_dim=32,
            text_dim=32,
            patch_size=[1, 2, 2],
        )
    )
    torch.nn.init.normal_(dit.proj_out.weight, std=0.02)  # a fresh head says 0
    return dit


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Latents of 45 tokens, which 16 does not divide, timesteps and text."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 3, 6, 10, generator=generator)
    return latents, torch.tensor([200.0, 700.0]), torch.randn(2, 5, 32, generator=generator)


def rounded(x: Tensor, dtype: torch.dtype, dim: int | None) -> Tensor:
    """x through float8 and back, scaled so that the largest element, of all or along a dim, is the largest of the dtype."""
    largest = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = torch.finfo(dtype).max / largest
    if dim is not None:
        scale = 2 ** scale.log2().floor()
    return (x * scale).to(dtype).float() / scale


@needs_torchao
@pytest.mark.parametrize("recipe", RECIPES)
def test_each_matmul_has_the_error_of_its_8_bits(recipe: Fp8Recipe) -> None:
    dit = build_dit()
    layer = dit.blocks[0].ffn.net[2]
    weight = layer.weight.detach().clone()
    x, gradient = torch.randn(48, 128), torch.randn(48, 64)
    exact = x @ weight.t()
    use_fp8(dit, Fp8Config(recipe, min_width=64))
    layer = dit.blocks[0].ffn.net[2]
    assert layer.config.pad_inner_dim  # which emulated matmuls do not need, but 32760 rows on a GPU do
    torch.nn.init.zeros_(layer.bias)
    rows_in = x.clone().requires_grad_()
    out = layer(rows_in)
    out.backward(gradient)

    rows, columns = (None, None) if recipe is Fp8Recipe.tensorwise else (1, 0)
    e4m3 = torch.float8_e4m3fn
    of_gradient = torch.float8_e5m2 if recipe is Fp8Recipe.tensorwise else e4m3
    torch.testing.assert_close(out, rounded(x, e4m3, rows) @ rounded(weight, e4m3, rows).t())
    torch.testing.assert_close(rows_in.grad, rounded(gradient, of_gradient, rows) @ rounded(weight, e4m3, columns))
    torch.testing.assert_close(
        layer.weight.grad, rounded(gradient, of_gradient, columns).t() @ rounded(x, e4m3, columns)
    )
    # Three bits of mantissa round by 2^-4 of an element at most and 2.6 % rms, in each of two operands.
    error = float((out.detach() - exact).norm() / exact.norm())
    assert 0.02 < error < 0.05


@needs_torchao
@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_and_their_names_stay_as_they_are(recipe: Fp8Recipe) -> None:
    dit = build_dit(layers=2)
    before = dict(dit.named_parameters())
    converted = use_fp8(dit, Fp8Config(recipe, min_width=64))
    assert converted == [f"blocks.{number}.{layer}" for number in range(2) for layer in LAYERS]
    after = dict(dit.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, parameter in before.items())
    fresh = build_dit(layers=2)
    fresh.load_state_dict(dit.state_dict())  # of a model without float8, strictly
    with torch.no_grad():
        exact = fresh(*inputs())
        difference = float((dit(*inputs()) - exact).norm() / exact.norm())
    assert 1e-3 < difference < 0.05


@pytest.mark.parametrize(
    ("dim", "ffn_dim", "kept"), [(64, 128, LAYERS), (64, 136, LAYERS[:-2]), (24, 1024, []), (64, 48, LAYERS[:-2])]
)
def test_only_what_is_wide_enough_and_aligned_is_converted(dim: int, ffn_dim: int, kept: list[str]) -> None:
    on = Fp8Config(Fp8Recipe.tensorwise, min_width=64)
    assert fp8.fp8_layers(build_dit(dim=dim, ffn_dim=ffn_dim), on) == [f"blocks.0.{name}" for name in kept]


@needs_torchao
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_kept_for_the_backward_changes_no_gradient(recipe: Fp8Recipe) -> None:
    gradients = {}
    for policy in (ActivationPolicy.none, ActivationPolicy.selective, ActivationPolicy.every_k, ActivationPolicy.block):
        dit = build_dit(layers=3)
        use_fp8(dit, Fp8Config(recipe, min_width=64))
        set_activation_policy(dit, ActivationsConfig(policy))
        dit(*inputs()).square().mean().backward()
        gradients[policy] = [parameter.grad for parameter in dit.parameters()]
    first, *others = gradients.values()
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.fixture(scope="module")
def toy(tiny_run: list[str]) -> tuple[TrainConfig, list[VideoBatch]]:
    """A run of a small model, and the batches that it goes round."""
    sizes = ["model.num_layers=2", "model.dim=64", "model.ffn_dim=128", "steps=40", "run_dir=none"]
    config = load_train_config([*tiny_run, *sizes])
    torch.set_num_threads(1)
    loader = VideoLoader(config.training_data(), buckets=config.buckets(1), rank=0, world_size=1, seed=config.seed)
    steps = loader.steps(0)
    return config, [next(steps)[0] for _ in range(4)]


def losses_of(recipe: Fp8Recipe, config: TrainConfig, batches: list[VideoBatch]) -> Tensor:
    task = build_task(config, torch.device("cpu"))
    torch.manual_seed(config.seed)
    model = task.build_model()
    assert isinstance(model, TextToVideoModel)
    use_fp8(model.transformer, Fp8Config(recipe, min_width=64))
    optimizer = build_optimizer(model, config.optimizer)
    losses = []
    for step in range(config.steps):
        loss = task.losses(model, replace(batches[step % len(batches)], step=step)).total.mean()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, step, config.steps) * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.fixture(scope="module")
def exact_losses(toy: tuple[TrainConfig, list[VideoBatch]]) -> Tensor:
    return losses_of(Fp8Recipe.off, *toy)


@needs_torchao
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_loss_curve_is_that_of_full_precision(
    recipe: Fp8Recipe, toy: tuple[TrainConfig, list[VideoBatch]], exact_losses: Tensor
) -> None:
    losses = losses_of(recipe, *toy)
    difference = (losses / exact_losses - 1).abs()
    # Noise, clips and weights are the same, so nothing but float8 tells them apart. It moves a velocity by about 1 %, most of it
    # across what the loss measures; and the curve falls by a third, so that a wrong gradient is far outside.
    assert 0 < difference.max() < 0.01
    assert exact_losses[-8:].mean() < 0.75 * exact_losses[:8].mean()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, launch: Command) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("fp8")
    answer = launch(0, Path(__file__).with_name("fp8_program.py"), root)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return json.loads((root / "ranks" / "found.json").read_text())


@needs_torchao
def test_every_zero_stage_trains_the_same_with_float8(found: dict[str, Any]) -> None:
    exact, first = found["off fp32 1"], found["tensorwise fp32 1"]
    assert found["tensorwise fp32 2"] == pytest.approx(first, rel=1e-5)
    assert found["tensorwise fp32 3"] == pytest.approx(first, rel=1e-5)
    assert found["rowwise bf16 3"] == pytest.approx(found["rowwise bf16 2"], rel=1e-5)
    assert first != exact
    for name in ("tensorwise fp32 1", "rowwise bf16 2"):
        assert found[name] == pytest.approx(exact, rel=1e-2)


@needs_torchao
def test_a_checkpoint_with_float8_goes_on_without(found: dict[str, Any]) -> None:
    assert found["is taken up"]
    assert found["goes on with"] == found["tensorwise fp32 2"][2:]
    assert found["goes on without"] != found["goes on with"]
    assert found["goes on without"] == pytest.approx(found["goes on with"], rel=1e-2)


def test_what_cannot_work_is_refused_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    on = Fp8Config(Fp8Recipe.tensorwise)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert on.faults("fp8") == ["fp8.recipe=tensorwise needs torchao: pip install 'muybridge[fp8]'"]
    assert Fp8Config().faults("fp8") == []
    with pytest.raises(ValueError, match="needs torchao"):
        use_fp8(build_dit(), on)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert Fp8Config(Fp8Recipe.rowwise, min_width=0).faults("fp8") == ["fp8.min_width=0 must be at least 1"]
    for dit in (build_dit(), build_dit(dim=24, ffn_dim=1024)):
        with pytest.raises(ValueError, match="no Linear of the blocks has both sides a multiple of 16 and at least"):
            use_fp8(dit, on)
    with_lora = build_dit()
    add_lora(with_lora, LoRAConfig(rank=4))
    with pytest.raises(ValueError, match=r"fp8.recipe=tensorwise must be off with LoRA"):
        use_fp8(with_lora, Fp8Config(Fp8Recipe.tensorwise, min_width=16))


def test_a_gpu_without_float8_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    dit = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda"))]))
    with pytest.raises(ValueError, match=r"fp8.recipe=rowwise must be off on NVIDIA A100.* 8.9, it has 8.0"):
        use_fp8(dit, Fp8Config(Fp8Recipe.rowwise))
    assert fp8.SMALLEST_CAPABILITY < (9, 0)
