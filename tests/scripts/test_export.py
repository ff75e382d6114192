import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from muybridge.models.dit import DiT, DiTConfig
from muybridge.models.pipeline_folder import PipelineFiles
from muybridge.models.text import ByteTextEncoder, TextEncoderConfig, TextEncoderKind
from muybridge.models.text_small import SmallUmt5, write_tokenizer
from muybridge.models.token_layout import AttentionPattern, SelfAttentionConfig
from muybridge.models.vae import VideoVAE
from muybridge.models.vae.config import WAN_2_1_LATENTS_MEAN, WAN_2_1_LATENTS_STD, VAEConfig
from muybridge.models.vae.folder import load_vae
from muybridge.models.wan_keys import Component, Layout, to_diffusers_keys, transformer_dtype
from muybridge.models.weights import save_model
from muybridge.scripts import export, export_checks, export_files, export_pipeline, export_report, import_weights
from muybridge.scripts.export_loaders import lost_loaders
from muybridge.train.checkpoint_folder import committed_checkpoints
from muybridge.train.fragments import read_weights

SaveRun = Callable[[Path, list[str]], Path]
PROMPTS = ["a red circle moving left", "a blue square"]


@pytest.fixture
def run_dir(tiny_run: list[str], save_random_run: SaveRun, tmp_path: Path) -> Path:
    run_dir = save_random_run(tmp_path / "run", [*tiny_run, "sampler.shift=4"])
    (run_dir / "provenance.json").write_text(json.dumps({"git_commit": "0123abc", "data_fingerprint": "77"}))
    return run_dir


@pytest.fixture
def umt5_run(tiny_run: list[str], tiny_umt5: Path) -> list[str]:
    """Settings of a run with a frozen text encoder."""
    return [*tiny_run, "text.kind=umt5", f"text.path={tiny_umt5}"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def trained(run_dir: Path, kind: str = "ema") -> dict[str, torch.Tensor]:
    return read_weights(committed_checkpoints(run_dir / "checkpoints")[-1], kind)


def test_a_run_becomes_a_pipeline_folder(
    run_dir: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "exports" / "first"
    assert export.main([f"run={run_dir}", f"out={out}", f"prompts={prompts}"]) == 0
    files = PipelineFiles.find(out)
    assert files.class_name == "WanPipeline"
    assert (files.text_encoder, files.tokenizer, files.transformer_2) == (None, None, None)
    assert [path.name for path in out.parent.iterdir()] == ["first"]

    stored = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    weights = trained(run_dir)
    assert {f"transformer.{name}" for name in stored} == {name for name in weights if name.startswith("transformer.")}
    for name, tensor in stored.items():
        keeps = any(part in name for part in ("time_embedder", "scale_shift_table", "norm2"))
        assert tensor.dtype == (torch.float32 if keeps else torch.bfloat16), name
        assert torch.equal(tensor, weights[f"transformer.{name}"].to(tensor.dtype)), name
    with safe_open(out / "transformer" / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        header = file.metadata()
    assert (header["muybridge.git_commit"], header["muybridge.step"]) == ("0123abc", "4")
    assert header["muybridge.data_fingerprint"] == "77"
    assert json.loads(header["muybridge.config"])["text"]["max_tokens"] == 12
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["flow_shift"], scheduler["shift"]) == (4.0, 4.0)
    said = capsys.readouterr().out
    assert "muybridge: wrote" in said
    assert "BF16, F32" in said


def test_prompt_features_are_those_of_the_trained_encoder(run_dir: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export.main([f"run={run_dir}", f"out={out}", f"prompts={prompts}"]) == 0
    encoder = ByteTextEncoder(TextEncoderConfig(dim=32, num_heads=2, max_tokens=12)).eval()
    prefix = "text_encoder."
    encoder.load_state_dict({k.removeprefix(prefix): v for k, v in trained(run_dir).items() if k.startswith(prefix)})
    embeds = load_file(out / "prompt_embeds.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(embeds["prompt_embeds"], encoder(encoder.tokenize(PROMPTS)))
        torch.testing.assert_close(embeds["negative_prompt_embeds"], encoder(encoder.tokenize([""])))
    assert "1. a blue square" in (out / "README.md").read_text()


def test_weights_and_dtype_are_those_asked_for(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export.main([f"run={run_dir}", f"out={out}", "weights=raw", "dtype=fp32"]) == 0
    stored = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    weights = trained(run_dir, "master")
    assert all(torch.equal(tensor, weights[f"transformer.{name}"]) for name, tensor in stored.items())
    assert not (out / "prompt_embeds.safetensors").exists()


def test_any_average_can_be_exported_afterwards(tiny_run: list[str], save_random_run: SaveRun, tmp_path: Path) -> None:
    run_dir = save_random_run(tmp_path / "run", [*tiny_run, "ema.decays=[0.99,0.9]"])
    headers, sums = [], []
    for kind in ("ema", "ema-0.9"):
        out = tmp_path / kind
        assert export.main([f"run={run_dir}", f"out={out}", f"weights={kind}", "dtype=fp32"]) == 0
        with safe_open(out / "transformer" / "diffusion_pytorch_model.safetensors", framework="pt") as file:
            headers.append(file.metadata()["muybridge.weights"])
            sums.append(file.get_tensor("proj_out.weight").abs().sum().item())
    assert headers == ["ema-0.99", "ema-0.9"]
    assert sums[1] == pytest.approx(sums[0] / 2)
    words = r"weights=ema-0.5 must be raw, ema \(ema-0.99\) or one of ema-0.99, ema-0.9, which .*step-00000004 has"
    with pytest.raises(ValueError, match=words):
        export.main([f"run={run_dir}", f"out={tmp_path / 'none'}", "weights=ema-0.5"])


def test_a_frozen_encoder_goes_along_without_pickles(
    umt5_run: list[str], tiny_umt5: Path, save_random_run: SaveRun, tmp_path: Path
) -> None:
    text = shutil.copytree(tiny_umt5, tmp_path / "text")
    (text / "text_encoder" / "pytorch_model.bin").write_bytes(b"runs code when it is read")
    run_dir, out = save_random_run(tmp_path / "run", [*umt5_run, f"text.path={text}"]), tmp_path / "out"
    assert export.main([f"run={run_dir}", f"out={out}"]) == 0
    for path in (path for path in tiny_umt5.rglob("*") if path.is_file()):
        assert (out / path.relative_to(tiny_umt5)).read_bytes() == path.read_bytes()
    assert not list(out.rglob("*.bin"))
    index = json.loads((out / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "UMT5EncoderModel"]


def test_an_encoder_in_a_pickle_alone_is_imported_as_little_as_exported(
    umt5_run: list[str], tiny_umt5: Path, save_random_run: SaveRun, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert export.main([f"run={save_random_run(tmp_path / 'run', umt5_run)}", f"out={out}"]) == 0
    (out / "image_encoder").mkdir()
    (out / "image_encoder" / "pytorch_model.bin").write_bytes(b"runs code when it is read")
    index = json.loads((out / "model_index.json").read_text())
    index["image_encoder"] = ["transformers", "CLIPVisionModel"]
    (out / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="image_encoder has its weights in a pickle alone"):
        import_weights.main([str(out), str(tmp_path / "imported")])
    assert not (tmp_path / "imported").exists()

    text = shutil.copytree(tiny_umt5, tmp_path / "text")
    (text / "text_encoder" / "model.safetensors").rename(text / "text_encoder" / "pytorch_model.bin")
    run_dir = save_random_run(tmp_path / "other", [*umt5_run, f"text.path={text}"])
    with pytest.raises(ValueError, match="text_encoder has its weights in a pickle alone"):
        export.main([f"run={run_dir}", f"out={tmp_path / 'exported'}"])
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("module", "function"), [(export_pipeline, "write_model_index"), (export_report, "parts_table")]
)
def test_an_export_that_fails_leaves_nothing(
    module: ModuleType, function: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(module, function, full)
    with pytest.raises(OSError, match="no space"):
        export.main([f"run={run_dir}", f"out={tmp_path / 'exports' / 'first'}"])
    assert list((tmp_path / "exports").iterdir()) == []


def test_a_dry_run_writes_nothing(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([f"run={run_dir}", f"out={tmp_path / 'out'}", "dry_run=true"]) == 0
    assert "would export" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: shutil.rmtree(run / "checkpoints"), "has no checkpoint yet"),
        (lambda run: (run / "config.yaml").unlink(), "must be the directory of a training run"),
        (
            lambda run: (run / "config.yaml").write_text(
                (run / "config.yaml").read_text().replace("task: text_to_video", "task: video_vae")
            ),
            "has task=video_vae",
        ),
        (lambda run: next(run.rglob("shard-*.safetensors")).write_bytes(b""), "does not match its size and checksum"),
        (lambda run: (run.parent / "out").mkdir(), "exists already"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    damage: Callable[[Path], object], words: str, run_dir: Path, tmp_path: Path
) -> None:
    damage(run_dir)
    with pytest.raises(ValueError, match=words):
        export.main([f"run={run_dir}", f"out={tmp_path / 'out'}"])


def test_a_part_that_diffusers_reads_otherwise_is_refused(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    out = tmp_path / "out"
    assert export.main([f"run={run_dir}", f"out={out}"]) == 0
    assert all(comparison.difference is not None for comparison in export_checks.compare_with_diffusers(out))
    with monkeypatch.context() as patch:
        patch.setattr(export_checks, "TOLERANCE", -1.0)
        with pytest.raises(ValueError, match="computes something else in diffusers"):
            export_checks.compare_with_diffusers(out)
    path = out / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"encoder.stray": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"encoder\.stray"):
        export_checks.compare_with_diffusers(out)


def test_files_for_comfyui_compute_the_same(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_folder: Path
) -> None:
    monkeypatch.setattr(export_files, "has_wan_form", lambda vae: True)  # a small one takes its place
    out = tmp_path / "out"
    assert export.main([f"run={run_dir}", f"out={out}", "format=comfy", "dtype=fp32"]) == 0
    path = out / "diffusion_models" / "run.safetensors"
    stored, weights = load_file(path), trained(run_dir)
    assert "model.diffusion_model.head.modulation" in stored
    for name, ours in to_diffusers_keys(stored, Component.transformer, Layout.comfy).items():
        assert torch.equal(stored[name], weights[f"transformer.{ours}"]), name
    with safe_open(path, framework="pt") as file:
        sizes = json.loads(file.metadata()["config"])["transformer"]
    assert (sizes["num_heads"], sizes["freq_dim"], sizes["text_dim"]) == (2, 32, 32)

    # Latents scaled by Wan's statistics, as ComfyUI does it, are those that the transformer was trained on.
    own = load_vae(toy_folder / "vae").eval()
    renamed = load_file(out / "vae" / "run_vae.safetensors")
    folded = VideoVAE(replace(own.config, latents_mean=WAN_2_1_LATENTS_MEAN, latents_std=WAN_2_1_LATENTS_STD)).eval()
    names = to_diffusers_keys(renamed, Component.vae, Layout.original)
    folded.load_state_dict({ours: renamed[name] for name, ours in names.items()})
    pixels = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = own.normalise(own.encode(pixels).mode())
        torch.testing.assert_close(folded.normalise(folded.encode(pixels).mode()), latents, atol=1e-5, rtol=1e-4)
        decoded = own.decode(own.denormalise(latents))
        torch.testing.assert_close(folded.decode(folded.denormalise(latents)), decoded, atol=1e-5, rtol=1e-4)


def test_the_layout_of_the_release_has_all_parts(
    umt5_run: list[str], tiny_umt5: Path, save_random_run: SaveRun, tmp_path: Path
) -> None:
    run_dir, out = save_random_run(tmp_path / "run", umt5_run), tmp_path / "out"
    assert export.main([f"run={run_dir}", f"out={out}", "format=original"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["_class_name"], config["model_type"], config["dim"], config["num_heads"]) == (
        "WanModel",
        "t2v",
        32,
        2,
    )
    assert "head.modulation" in load_file(out / "diffusion_pytorch_model.safetensors")
    assert "encoder.conv1.weight" in load_file(out / "Wan2.2_VAE.safetensors")  # folds pixels, as that of 2.2 does
    encoder = load_file(out / "models_t5_umt5-xxl-enc-bf16.safetensors")
    here = load_file(tiny_umt5 / "text_encoder" / "model.safetensors")
    for name, ours in to_diffusers_keys(encoder, Component.text_encoder, Layout.original).items():
        assert torch.equal(encoder[name], here[ours]), name
    assert (out / "google" / "umt5-xxl" / "tokenizer.json").is_file()


def test_what_only_a_lora_can_have_is_named(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"format=kohya must be .*; merge=true is for LoRA runs"):
        export.main([f"run={run_dir}", f"out={tmp_path / 'out'}", "format=kohya", "merge=true"])


@pytest.fixture
def umt5_small_run(tiny_run: list[str], save_random_run: SaveRun, tmp_path: Path) -> Path:
    """A run that trained a text encoder of umT5's form, in the folder where it made the tokenizer."""
    pytest.importorskip("transformers", reason="the extra `text` is not installed")
    text = TextEncoderConfig(dim=32, num_heads=2, max_tokens=12, vocabulary=300)
    write_tokenizer(tmp_path / "small" / "tokenizer", PROMPTS, text)
    return save_random_run(tmp_path / "small", [*tiny_run, "text.kind=umt5_small", "text.vocabulary=300"])


@pytest.mark.parametrize("form", ["comfy", "original"])
def test_files_for_tools_without_the_trained_encoder_have_its_prompt_features(
    form: str, umt5_small_run: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert export.main([f"run={umt5_small_run}", f"out={out}", f"format={form}", f"prompts={prompts}"]) == 0
    text = TextEncoderConfig(TextEncoderKind.umt5_small, dim=32, num_heads=2, max_tokens=12, vocabulary=300)
    encoder, prefix = SmallUmt5(text, umt5_small_run / "tokenizer").eval(), "text_encoder."
    weights = {k.removeprefix(prefix): v for k, v in trained(umt5_small_run).items() if k.startswith(prefix)}
    encoder.load_state_dict(weights)
    embeds = load_file(out / "prompt_embeds.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(embeds["prompt_embeds"], encoder(encoder.tokenize(PROMPTS)))
    assert "1. a blue square" in (out / "README.md").read_text()


def test_prompts_for_an_encoder_that_goes_along_are_refused(
    umt5_small_run: Path, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"with format=diffusers, text\.kind=umt5_small is one that they do"):
        export.main([f"run={umt5_small_run}", f"out={tmp_path / 'out'}", f"prompts={prompts}"])


@pytest.mark.parametrize("places", [None, 514])
def test_a_transformer_that_reads_image_features_is_compared_too(places: int | None, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    config = DiTConfig(num_layers=2, dim=32, num_attention_heads=2, ffn_dim=64, text_dim=32, in_channels=36)
    dit = DiT(replace(config, image_dim=24, pos_embed_seq_len=places))
    torch.manual_seed(0)
    weights = {name: 0.1 * torch.randn_like(tensor) for name, tensor in dit.state_dict().items()}
    save_model(tmp_path / "transformer", dit.config.to_diffusers(), weights)
    (comparison,) = export_checks.compare_with_diffusers(tmp_path)
    assert comparison.difference is not None
    assert comparison.difference < 1e-5


def test_what_other_tools_take_for_granted_is_named() -> None:
    wan, wan_vae = DiTConfig(), VAEConfig()
    umt5 = TextEncoderConfig(kind=TextEncoderKind.umt5, dim=4096, path="x")
    assert lost_loaders(wan, wan_vae, umt5) == []
    own = DiTConfig(dim=192, num_attention_heads=6, text_dim=192, patch_size=[3, 2, 2])
    own.self_attention = SelfAttentionConfig(pattern=AttentionPattern.radial)
    said = lost_loaders(own, VAEConfig(base_dim=16), TextEncoderConfig(dim=192))
    for words in ("=32 is not Wan's 128", "text_dim=192", "[3, 2, 2]", "pattern=radial", "base_dim=16", "kind=bytes"):
        assert sum(words in line for line in said) == 1, words
    small = TextEncoderConfig(kind=TextEncoderKind.umt5_small, dim=4096)
    (line,) = lost_loaders(wan, wan_vae, small)
    assert "umt5_small" in line
    (line,) = lost_loaders(DiTConfig(image_dim=1280), wan_vae, replace(umt5, max_tokens=32))
    assert "text.max_tokens=32 is not Wan's 512: lost are diffusers" in line


def test_every_weight_that_diffusers_keeps_in_float32_is_kept() -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    kept = diffusers.WanTransformer3DModel._keep_in_fp32_modules
    with torch.device("meta"):
        names = DiT(DiTConfig(num_layers=1)).state_dict()
    for name in names:
        expected = torch.float32 if set(kept) & set(name.split(".")) else torch.bfloat16
        assert transformer_dtype(name, torch.bfloat16) == expected, name
