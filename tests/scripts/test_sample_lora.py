"""LoRA files over the transformers of a pipeline folder: the same weights as merged by hand, each rounded once."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from muybridge.models.dit import DiT
from muybridge.models.lora import LoRAFactors
from muybridge.models.lora_files import LoRAForm, write_lora
from muybridge.scripts import cli
from muybridge.scripts.sample import SampleConfig
from muybridge.scripts.sample_sources import FolderSource, open_source
from muybridge.tests.scripts.pipeline_folders import write_folder
from muybridge.tests.stored_tensors import read_all

LAYERS = {"blocks.0.attn1.to_q": (32, 32), "blocks.1.ffn.net.0.proj": (64, 32)}  # out, in
SCALE = 0.7


def write_file(path: Path, seed: int, *, layers: dict[str, tuple[int, int]] = LAYERS) -> dict[str, LoRAFactors]:
    """A LoRA file in the form of kohya, whose alphas are not its rank, and what it must do."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: LoRAFactors(
            torch.randn(4, sides[1], generator=generator), torch.randn(sides[0], 4, generator=generator), scale=0.5
        )
        for name, sides in layers.items()
    }
    write_lora(path, factors, LoRAForm.kohya)
    return factors


def changed(state: dict[str, Tensor], files: list[dict[str, LoRAFactors]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights in `dtype` with the changes of the files, computed in float64 and rounded at the end."""
    expected = {name: value.to(dtype).double() for name, value in state.items()}
    for factors in files:
        for name, layer in factors.items():
            expected[f"{name}.weight"] += SCALE * layer.scale * (layer.up.double() @ layer.down.double())
    return expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_changes_of_several_files_are_summed_and_rounded_once(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FolderSource, "_dtype", dtype)
    folder = tmp_path / "model"
    write_folder(folder, kind="experts")
    written = [write_file(tmp_path / f"{seed}.safetensors", seed) for seed in range(3)]
    files = [str(tmp_path / f"{seed}.safetensors") for seed in range(3)]
    config = SampleConfig(model=str(folder), lora=files[:2], lora_low=[files[2]], lora_scale=SCALE)
    models = open_source(config).models()
    for part, model, mine in (
        ("transformer", models.transformer, written[:2]),
        ("transformer_2", models.transformer_2, written[2:]),
    ):
        assert isinstance(model, DiT)
        stored = read_all(folder / part)
        expected = changed(stored, mine, dtype)
        for name in (f"{layer}.weight" for layer in LAYERS):
            found = model.state_dict()[name]
            assert found.dtype == dtype
            assert (found.double() - stored[name].double()).abs().max() > 0.1
            # Half a step between neighbouring numbers, and what float32 sums are off.
            error = (found.double() - expected[name]).abs()
            assert (error <= expected[name].abs() * torch.finfo(dtype).eps / 2 + 1e-5).all(), name


@pytest.mark.parametrize("field", ["lora", "lora_low"])
def test_a_file_of_another_size_is_refused_by_the_setting_that_names_it(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red circle\n")
    write_folder(Path("model"), kind="experts")
    write_file(Path("wide.safetensors"), 0, layers={"blocks.0.attn1.to_q": (64, 64)})
    sampled = ["sample", "model=model", "prompts=prompts.txt", "frames=9", "height=32", "width=48"]
    assert cli.main([*sampled, f"{field}=[wide.safetensors]"]) == 64
    assert f"{field}=wide.safetensors: its layer blocks.0.attn1.to_q has no match" in capsys.readouterr().err
    assert not Path("samples").exists()


def test_a_second_expert_is_needed_for_lora_low(tmp_path: Path) -> None:
    write_folder(tmp_path, kind="text")
    with pytest.raises(ValueError, match=r"lora_low needs two experts, and .* has one transformer"):
        open_source(SampleConfig(model=str(tmp_path), lora_low=["low.safetensors"]))
