"""What `muybridge import` refuses, and that nothing is written or lost then."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from muybridge.models.wan_keys import Component, Layout
from muybridge.scripts.import_weights import main
from muybridge.tests.scripts.wan_releases import RELEASE_CONFIG, STATE, build_vae_2_2, renamed


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def shard_with(release: Path, end: str) -> tuple[Path, str, STATE]:
    """The shard that has the first tensor whose name ends so, that name, and the shard's tensors."""
    for path in sorted(release.glob("*.safetensors")):
        state = load_file(path)
        if names := sorted(name for name in state if name.endswith(end)):
            return path, names[0], state
    raise AssertionError(f"no tensor ends with {end}")


def drop_a_key(release: Path) -> str:
    path, name, state = shard_with(release, "1.cross_attn.norm_k.weight")
    save_file({other: value for other, value in state.items() if other != name}, path)
    index = release / "diffusion_pytorch_model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map[name]
    index.write_text(json.dumps({"weight_map": weight_map}))
    return r"missing tensors: blocks\.1\.attn2\.norm_k\.weight$"


def drop_a_promised_key(release: Path) -> str:
    path, name, state = shard_with(release, "1.cross_attn.norm_k.weight")
    save_file({other: value for other, value in state.items() if other != name}, path)
    return f"missing tensors: {name}$"


def transpose_a_tensor(release: Path) -> str:
    path, name, state = shard_with(release, "ffn.2.weight")
    save_file(state | {name: state[name].T.contiguous()}, path)
    return r"net\.2\.weight \[48, 128\] instead of \[128, 48\] \(transposed\?\)"


def claim_another_depth(release: Path) -> str:
    (release / "config.json").write_text(json.dumps(RELEASE_CONFIG | {"num_layers": 3, "in_dim": 36}))
    return "config.json contradicts the weights: in_dim=36 must be 16, num_layers=3 must be 2"


def claim_heads_that_do_not_divide(release: Path) -> str:
    (release / "config.json").write_text(json.dumps(RELEASE_CONFIG | {"num_heads": 5}))
    return "width 128"


def claim_another_class(release: Path) -> str:
    (release / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    return "_class_name=FluxTransformer2DModel must be one of WanModel"


def remove_the_tokenizer(release: Path) -> str:
    shutil.rmtree(release / "google")
    return "models_t5_umt5-xxl-enc-bf16.pth has no tokenizer beside it"


def empty_the_tokenizer(release: Path) -> str:
    for path in (release / "google" / "umt5-xxl").iterdir():
        path.unlink()
    return r"umt5-xxl is no tokenizer: it must hold tokenizer\.json"


def put_code_into_the_vae(release: Path) -> str:
    torch.save({"conv1.weight": Malice(release / "trap")}, release / "Wan2.1_VAE.pth")
    return r"Wan2\.1_VAE\.pth: holds more than tensors, .* refused"


def add_a_second_vae(release: Path) -> str:
    shutil.copyfile(release / "Wan2.1_VAE.pth", release / "Wan2.2_VAE.pth")
    return "has Wan2.1_VAE.pth, Wan2.2_VAE.pth: choose one with --vae"


def put_in_the_vae_of_the_5b_model(release: Path) -> str:
    torch.save(renamed(build_vae_2_2(), Component.vae, Layout.original), release / "Wan2.1_VAE.pth")
    return "has latents of 48 channels and .* makes 16: give Wan 2.1's autoencoder"


def claim_no_text(release: Path) -> str:
    (release / "config.json").write_text(json.dumps(RELEASE_CONFIG | {"text_len": 0}))
    return "text_len=0 must be the rows of the text features"


def quantise_a_tensor(release: Path) -> str:
    path, name, state = shard_with(release, "ffn.0.weight")
    save_file(state | {name: state[name].to(torch.float8_e4m3fn)}, path)
    return r"ffn\.net\.0\.proj\.weight is float8_e4m3fn; take the file of bf16"


@pytest.mark.parametrize(
    "damage",
    [
        drop_a_key, drop_a_promised_key, transpose_a_tensor, claim_another_depth, claim_heads_that_do_not_divide,
        claim_another_class, remove_the_tokenizer, empty_the_tokenizer, put_code_into_the_vae, add_a_second_vae,
        put_in_the_vae_of_the_5b_model, claim_no_text, quantise_a_tensor,
    ],
)  # fmt: skip
def test_a_source_that_is_not_whole_is_refused_and_nothing_is_written(
    release: Path, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    message = damage(release)
    with pytest.raises(ValueError, match=message):
        main([str(release), str(tmp_path / "weights" / "out")])
    assert not list((tmp_path / "weights").glob("*"))
    assert not list((tmp_path / "weights").glob(".*"))
    assert not (release / "trap").exists()


def test_what_is_not_wan_is_refused(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2)}, tmp_path / "flux.safetensors")
    with pytest.raises(ValueError, match=r"flux\.safetensors: not a Wan transformer: it holds double_blocks"):
        main([str(tmp_path / "flux.safetensors"), out])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"run is not a Wan model: .*it holds config\.yaml"):
        main([str(tmp_path / "run"), out])
    with pytest.raises(ValueError, match=r"SRC=.*nowhere: no such file or folder"):
        main([str(tmp_path / "nowhere"), out])
    with pytest.raises(ValueError, match=r"--tokenizer=.*nowhere: no such file or folder"):
        main([str(tmp_path / "run"), out, "--tokenizer", str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="see muybridge import --help"):
        main([out])


def test_an_output_is_replaced_only_when_asked_and_only_by_a_whole_one(release: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main([str(release), str(out)])
    (out / "note.txt").write_text("of the first import")
    with pytest.raises(ValueError, match="exists already: choose another OUT, or replace it with --overwrite"):
        main([str(release), str(out)])
    quantise_a_tensor(release)
    with pytest.raises(ValueError, match="float8"):
        main([str(release), str(out), "--overwrite"])
    assert (out / "note.txt").is_file(), "a failed import must leave the former one"
    with pytest.raises(ValueError, match=r"would be replaced while .* is read"):
        main([str(out), str(out), "--overwrite"])
    shutil.copytree(out, tmp_path / "copy")
    main([str(tmp_path / "copy"), str(out), "--overwrite"])
    assert not (out / "note.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Wan2.1-T2V", "copy", "out"]

    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="mine is no pipeline folder"):
        main([str(release), str(tmp_path / "mine"), "--overwrite"])


def test_the_former_output_comes_back_where_the_new_one_cannot_take_its_place(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    main([str(release), str(out)])
    (out / "note.txt").write_text("of the first import")
    rename = Path.rename

    def fail_for_the_new_one(path: Path, target: Path) -> Path:
        if path.suffix == ".partial":
            raise OSError("the disk is gone")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(OSError, match="the disk is gone"):
        main([str(release), str(out), "--overwrite"])
    assert (out / "note.txt").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Wan2.1-T2V", "out"]


def test_weights_in_a_pickle_alone_are_not_left_behind_silently(release: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    main([str(release), str(source)])
    (source / "image_encoder").mkdir()
    (source / "image_encoder" / "config.json").write_text(json.dumps({"architectures": ["CLIPVisionModel"]}))
    torch.save({}, source / "image_encoder" / "pytorch_model.bin")
    index = json.loads((source / "model_index.json").read_text())
    index["image_encoder"] = ["transformers", "CLIPVisionModel"]
    (source / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="image_encoder has its weights in a pickle"):
        main([str(source), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
