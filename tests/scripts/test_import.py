"""`muybridge import`: releases, pipeline folders and single files become a folder that diffusers opens with the same tensors."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import muybridge
from muybridge.models.dit import DiT, DiTConfig
from muybridge.models.pipeline_folder import PipelineFiles
from muybridge.models.vae.folder import load_vae
from muybridge.models.wan_keys import Component, Layout
from muybridge.models.weight_files import read_header
from muybridge.models.weights import load_config, load_weights_from
from muybridge.scripts import export
from muybridge.scripts.import_weights import STEPS, main
from muybridge.scripts.sample import SampleConfig
from muybridge.scripts.sample_sources import open_source
from muybridge.tests.scripts.wan_releases import (
    SIZES,
    STATE,
    build_transformer,
    build_vae,
    build_vae_2_2,
    diffusers,
    renamed,
    transformers,
    write_expert,
    write_release,
)
from muybridge.tests.stored_tensors import read_all
from muybridge.train.checkpoint_folder import committed_checkpoints
from muybridge.train.config import read_config
from muybridge.train.fragments import read_weights


def assert_same(found: STATE, expected: STATE) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def open_strictly(model_class: Any, folder: Path) -> Any:
    """diffusers and transformers fill what is missing with noise; here nothing may be missing."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def test_a_release_opens_in_diffusers_and_here(
    release: Path, tiny_umt5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "weights" / "t2v"
    assert main([str(release), str(out)]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["t2v"]
    assert_same(
        open_strictly(diffusers.WanTransformer3DModel, out / "transformer").state_dict(),
        build_transformer().state_dict(),
    )
    vae = open_strictly(diffusers.AutoencoderKLWan, out / "vae")
    assert_same(vae.state_dict(), build_vae().state_dict())
    assert dict(vae.config)["latents_mean"] == dict(diffusers.AutoencoderKLWan(base_dim=8).config)["latents_mean"]
    pipeline = diffusers.WanPipeline.from_pretrained(out)
    assert (pipeline.scheduler.config.flow_shift, pipeline.config.boundary_ratio) == (5.0, None)

    encoder = open_strictly(transformers.UMT5EncoderModel, out / "text_encoder")
    theirs = transformers.UMT5EncoderModel.from_pretrained(tiny_umt5 / "text_encoder")
    batch = pipeline.tokenizer("a red circle", return_tensors="pt")
    with torch.no_grad():
        features = [model.eval()(batch.input_ids).last_hidden_state for model in (encoder, theirs)]
    assert torch.equal(*features)

    config = DiTConfig.from_diffusers(load_config(out / "transformer"))
    load_weights_from(DiT(config), out / "transformer")
    load_vae(out / "vae")
    printed = capsys.readouterr().out
    assert "published shift 5" in printed
    assert f"init_from={out} vae.path={out}/vae text.path={out}" in printed
    assert "Missing" not in printed


@pytest.mark.parametrize(("channels", "shift", "boundary"), [(16, 12.0, 0.875), (36, 5.0, 0.9)])
def test_two_experts_become_one_folder(
    tmp_path: Path, tiny_umt5: Path, channels: int, shift: float, boundary: float
) -> None:
    high, low = (build_transformer(seed, in_channels=channels) for seed in (0, 1))
    source = tmp_path / "A14B"
    write_release(source, high, build_vae(), tiny_umt5)
    for path in [*source.glob("diffusion*"), source / "config.json"]:
        path.unlink()
    write_expert(source / "high_noise_model", high, in_dim=channels)
    write_expert(source / "low_noise_model", low, in_dim=channels)
    main([str(source), str(tmp_path / "out")])
    files = PipelineFiles.find(tmp_path / "out")
    assert files.boundary_ratio == boundary
    for folder, model in ((files.transformer, high), (files.transformer_2, low)):
        assert folder is not None
        assert_same(read_all(folder), model.state_dict())
    pipeline_class = diffusers.WanPipeline if channels == 16 else diffusers.WanImageToVideoPipeline
    pipeline = pipeline_class.from_pretrained(tmp_path / "out")
    assert (pipeline.scheduler.config.flow_shift, pipeline.config.boundary_ratio) == (shift, boundary)

    shutil.rmtree(source / "low_noise_model")
    with pytest.raises(ValueError, match="low_noise_model/ is missing"):
        main([str(source), str(tmp_path / "other")])


def test_the_5b_model_has_a_timestep_for_each_token(tmp_path: Path, tiny_umt5: Path) -> None:
    transformer, vae = build_transformer(in_channels=48, out_channels=48), build_vae_2_2()
    source = write_release(tmp_path / "TI2V", transformer, vae, tiny_umt5, in_dim=48, out_dim=48, model_type="ti2v")
    main([str(source), str(tmp_path / "out")])
    assert PipelineFiles.find(tmp_path / "out").expand_timesteps
    opened = open_strictly(diffusers.AutoencoderKLWan, tmp_path / "out" / "vae")
    assert_same(opened.state_dict(), vae.state_dict())
    assert {name: opened.config[name] for name in ("is_residual", "scale_factor_spatial", "latents_std")} == {
        name: vae.config[name] for name in ("is_residual", "scale_factor_spatial", "latents_std")
    }


def test_image_weights_of_wan_2_1_come_along(
    tmp_path: Path, tiny_umt5: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"in_channels": 36, "image_dim": 24, "added_kv_proj_dim": 128, "pos_embed_seq_len": 514}
    transformer = build_transformer(**sizes)
    source = write_release(tmp_path / "FLF2V", transformer, build_vae(), tiny_umt5, in_dim=36, model_type="flf2v")
    main([str(source), str(tmp_path / "out")])
    opened = open_strictly(diffusers.WanTransformer3DModel, tmp_path / "out" / "transformer")
    assert_same(opened.state_dict(), transformer.state_dict())
    assert {name: opened.config[name] for name in sizes} == sizes
    printed = capsys.readouterr().out
    assert "published shift 16" in printed
    assert "Missing: image_encoder/" in printed


@pytest.mark.parametrize("layout", Layout)
def test_a_single_file_of_any_layout_becomes_the_same_transformer(
    layout: Layout, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_transformer(num_attention_heads=1, attention_head_dim=128)
    save_file(renamed(model, Component.transformer, layout), tmp_path / "wan.safetensors")
    save_file(renamed(build_vae(), Component.vae, Layout.original), tmp_path / "wan_vae.safetensors")
    out = tmp_path / "out"
    main([str(tmp_path / "wan.safetensors"), str(out), "--vae", str(tmp_path / "wan_vae.safetensors")])
    opened = open_strictly(diffusers.WanTransformer3DModel, out / "transformer")
    assert_same(opened.state_dict(), model.state_dict())
    assert {name: opened.config[name] for name in SIZES} == SIZES | {
        "num_attention_heads": 1,
        "attention_head_dim": 128,
    }
    printed = capsys.readouterr().out
    assert "Missing: text_encoder/" in printed
    assert "Missing: tokenizer/" in printed
    assert f"Next: muybridge train +experiment=NAME init_from={out} vae.path={out}/vae\n" in printed


def test_heads_of_another_width_are_read_from_the_header_of_an_export(tmp_path: Path) -> None:
    state = renamed(build_transformer(), Component.transformer, Layout.original)
    header = {"muybridge.config": json.dumps({"model": {"num_attention_heads": 2, "eps": 1e-5}})}
    save_file(state, tmp_path / "ours.safetensors", metadata=header)
    main([str(tmp_path / "ours.safetensors"), str(tmp_path / "out")])
    config = DiTConfig.from_diffusers(load_config(tmp_path / "out" / "transformer"))
    assert (config.num_attention_heads, config.eps) == (2, 1e-5)


def test_two_single_files_are_two_experts(tmp_path: Path) -> None:
    for name, seed in (("high", 0), ("low", 1)):
        state = renamed(build_transformer(seed), Component.transformer, Layout.comfy)
        save_file(state, tmp_path / f"{name}.safetensors")
    high, low, out = tmp_path / "high.safetensors", tmp_path / "low.safetensors", tmp_path / "out"
    main([str(high), str(out), "--low-noise", str(low)])
    assert PipelineFiles.find(out).boundary_ratio == 0.875
    assert_same(read_all(out / "transformer_2"), build_transformer(1).state_dict())

    small = build_transformer(num_layers=1)
    save_file(renamed(small, Component.transformer, Layout.original), low)
    with pytest.raises(ValueError, match=r"low\.safetensors is no expert beside .*: num_layers=1 must be 2"):
        main([str(high), str(tmp_path / "other"), "--low-noise", str(low)])


def test_a_folder_of_diffusers_is_copied_bit_for_bit(tmp_path: Path, tiny_umt5: Path) -> None:
    bf16, source = torch.bfloat16, tmp_path / "theirs"
    pipeline = diffusers.WanPipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(tiny_umt5 / "tokenizer"),
        text_encoder=transformers.UMT5EncoderModel.from_pretrained(tiny_umt5 / "text_encoder", dtype=bf16),
        vae=build_vae(latents_mean=[0.5] * 16, latents_std=[2.0] * 16),
        transformer=build_transformer().to(bf16),
        transformer_2=build_transformer(1).to(bf16),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        boundary_ratio=0.7,
    )
    pipeline.save_pretrained(source, max_shard_size="500KB")
    out = tmp_path / "out"
    main([str(source), str(out)])
    assert PipelineFiles.find(out).boundary_ratio == 0.7
    for part in ("transformer", "transformer_2", "vae", "text_encoder"):
        assert_same(read_all(out / part), read_all(source / part))
    reopened = diffusers.WanPipeline.from_pretrained(out)
    assert reopened.scheduler.config.flow_shift == 3.0
    assert reopened.vae.config.latents_std == [2.0] * 16
    assert reopened.tokenizer("a red circle").input_ids == pipeline.tokenizer("a red circle").input_ids

    with pytest.raises(ValueError, match=r"--low-noise=.* is for a SRC of one expert"):
        main([str(source), str(tmp_path / "more"), "--low-noise", str(source / "transformer_2")])


def test_bf16_keeps_what_is_computed_in_float32(release: Path, tmp_path: Path) -> None:
    main([str(release), str(tmp_path / "out"), "--dtype", "bf16"])
    state = read_all(tmp_path / "out" / "transformer")
    kept = {name for name, value in state.items() if value.dtype == torch.float32}
    assert kept == {
        name for name in state if any(part in name for part in ("time_embedder", "scale_shift_table", "norm2."))
    }
    for name, value in build_transformer().state_dict().items():
        assert torch.equal(state[name], value.to(state[name].dtype)), name
    dtypes = {
        part: {value.dtype for value in read_all(tmp_path / "out" / part).values()} for part in ("vae", "text_encoder")
    }
    assert dtypes == {"vae": {torch.float32}, "text_encoder": {torch.bfloat16}}


@pytest.mark.parametrize(("dtype", "share"), [("keep", 1.0), ("bf16", 0.5)])
def test_a_disk_that_is_too_small_is_told_before_writing(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, share: float
) -> None:
    stored = {path: path.stat().st_size for path in [*release.glob("*.safetensors"), *release.glob("*.pth")]}
    vae = stored.pop(release / "Wan2.1_VAE.pth")
    (release / "google" / "umt5-xxl" / "spiece.model").write_bytes(bytes(2_000_000))
    copied = sum(path.stat().st_size for path in (release / "google" / "umt5-xxl").iterdir())
    needed = share * sum(stored.values()) + vae + copied
    asked = []

    def disk_usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=0.95 * needed)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    out = tmp_path / "weights" / "deep" / "out"
    with pytest.raises(ValueError, match=r"out takes .* GB, and the disk of .* has .* GB left"):
        main([str(release), str(out), "--dtype", dtype])
    assert asked == [tmp_path]
    assert not (tmp_path / "weights").exists()
    needed *= 1.2
    main([str(release), str(out), "--dtype", dtype])


@pytest.mark.parametrize("form", ["diffusers", "original", "comfy"])
def test_what_export_writes_comes_back(
    form: str, tiny_run: list[str], save_random_run: Callable[[Path, list[str]], Path], tmp_path: Path
) -> None:
    """Also what the shapes do not show: narrow heads and a pattern of attention."""
    pattern = "model.self_attention.pattern=block_causal"
    run_dir = save_random_run(tmp_path / "run", [*tiny_run, pattern, "sampler.shift=4"])
    exported, out = tmp_path / "exported", tmp_path / "out"
    assert export.main([f"run={run_dir}", f"out={exported}", f"format={form}", "dtype=fp32"]) == 0
    source, extra = exported, []
    if form == "comfy":
        source, vae = (next((exported / name).iterdir()) for name in ("diffusion_models", "vae"))
        extra = ["--vae", str(vae)]
    main([str(source), str(out), *extra])
    load_vae(out / "vae")
    checkpoint = committed_checkpoints(run_dir / "checkpoints")[-1]
    prefix = "transformer."
    weights = {name: value for name, value in read_weights(checkpoint, "ema").items() if name.startswith(prefix)}
    assert_same(read_all(out / "transformer"), {name.removeprefix(prefix): value for name, value in weights.items()})
    assert DiTConfig.from_diffusers(load_config(out / "transformer")) == read_config(run_dir).model
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["flow_shift"] == 4.0

    def ours(header: dict[str, str]) -> dict[str, str]:
        return {name: value for name, value in header.items() if name.startswith("muybridge.")}

    assert ours(read_header(out / "transformer")) == ours(
        read_header(source / "transformer" if form == "diffusers" else source)
    )
    assert ours(read_header(out / "transformer"))["muybridge.step"] == "4"


def test_sampling_takes_the_settings_that_an_import_finds(release: Path, tmp_path: Path) -> None:
    """Rows of text by the release's config, and what a run's export says where one of two experts is such a run's."""
    config = release / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"text_len": 40}))
    main([str(release), str(tmp_path / "public")])
    source = open_source(SampleConfig(model=str(tmp_path / "public")))
    assert source.encode_text(["a red circle"]).shape == (1, 40, 32)
    assert (source.size.frames, source.sampler.shift) == (81, 5.0)

    settings = {
        "sampler": {"kind": "euler", "steps": 7, "shift": 3.0, "guidance_scale": 2.0, "guidance_scale_low": None},
        "data": {"frames": 9, "height": 32, "width": 48, "fps": 8.0},
        "text": {"max_tokens": 12},
        "model": {"num_attention_heads": 2, "eps": 1e-6},
    }
    state = renamed(build_transformer(1), Component.transformer, Layout.original)
    save_file(state, tmp_path / "low.safetensors", metadata={"muybridge.config": json.dumps(settings)})
    main([str(release), str(tmp_path / "both"), "--low-noise", str(tmp_path / "low.safetensors")])
    source = open_source(SampleConfig(model=str(tmp_path / "both")))
    assert (source.size.frames, source.sampler.steps, source.sampler.shift) == (9, 7, 3.0)
    assert source.encode_text(["a red circle"]).shape == (1, 40, 32), "the expert of high noise goes before"


def test_the_steps_of_the_help_name_experiments_and_folders_that_fit() -> None:
    experiments = Path(muybridge.__file__).parent / "configs" / "experiment"
    named = set(re.findall(r"\+experiment=(\w+)", STEPS)) | set(
        re.findall(r"\bwan\w*(?=[,.])", STEPS.split("\n\n")[-1])
    )
    assert len(named) == 5
    settings = {name: (experiments / f"{name}.yaml").read_text() for name in named}
    assert "init_from: weights/wan_1_3b\n" in settings["wan_1_3b_lora"]
    assert "run_dir: runs/wan_1_3b_lora\n" in settings["wan_1_3b_lora"]
