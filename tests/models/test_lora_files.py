"""LoRA files in all forms, against peft, which makes them, and diffusers, which loads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from muybridge.models.dit import DiT, DiTConfig
from muybridge.models.lora import LoRAConfig, LoRAFactors, LoRATarget, add_lora, load_lora, lora_factors
from muybridge.models.lora_files import METADATA_KEY, LoRAForm, read_lora, write_lora

SIZES = DiTConfig(num_layers=2, num_attention_heads=2, dim=32, ffn_dim=48, text_dim=16, freq_dim=32)
# The names in Wan's own release, written out.
ORIGINAL = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
LAYERS = [f"blocks.{i}.{name}" for i in range(2) for name in ORIGINAL]


def original(name: str) -> str:
    _, block, rest = name.split(".", 2)
    return f"blocks.{block}.{ORIGINAL[rest]}"


def sizes_of(name: str) -> tuple[int, int]:
    """Width in and out of a layer."""
    return {"ffn.net.0.proj": (32, 48), "ffn.net.2": (48, 32)}.get(name.split(".", 2)[2], (32, 32))


def draw_factors(rank: int = 3, scale: float = 2.0) -> dict[str, LoRAFactors]:
    """Of every layer; those of the keys have half the rank, which is no integer multiple of anything."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in LAYERS:
        own, (width_in, width_out) = (2 if name.endswith("to_k") else rank), sizes_of(name)
        down = torch.randn(own, width_in, generator=generator) * 0.2
        found[name] = LoRAFactors(down, torch.randn(width_out, own, generator=generator) * 0.2, scale)
    return found


def build_dit() -> DiT:
    torch.manual_seed(0)
    dit = DiT(SIZES)
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2)
    return dit


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, 3, 4, 4, generator=generator)
    return latents, torch.tensor([900.0, 17.5]), torch.randn(2, 5, 16, generator=generator)


def adapted(factors: dict[str, LoRAFactors], *, rank: int = 3, targets: list[LoRATarget] | None = None) -> DiT:
    dit = build_dit()
    add_lora(dit, LoRAConfig(rank=rank, targets=targets or list(LoRATarget), layer_ranks=["*.to_k:2"]))
    load_lora(dit, factors, where="here")
    return dit


def assert_same_deltas(got: dict[str, LoRAFactors], expected: dict[str, LoRAFactors], **tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, layer in got.items():
        torch.testing.assert_close(layer.delta(), expected[name].delta(), **(tolerance or {"rtol": 1e-5, "atol": 1e-6}))


# --- the forms in which files come, key by key ------------------------------------------------------------------------------

AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
# Of each form: what a layer is called, and what follows for down, up and (where the form has one) alpha.
FORMS: dict[str, tuple[Callable[[str], str], tuple[str, ...]]] = {
    "diffusers": (lambda n: f"transformer.{n}", AB),
    "comfy": (lambda n: f"diffusion_model.{original(n)}", (*AB, "alpha")),
    "comfy, kohya's words": (lambda n: f"diffusion_model.{original(n)}", (*DOWN_UP, "alpha")),
    "FastVideo": (lambda n: n, (*AB, "lora_alpha")),
    "kohya": (lambda n: f"lora_unet_{original(n).replace('.', '_')}", (*DOWN_UP, "alpha")),
    "DiffSynth": (original, ("lora_A.default.weight", "lora_B.default.weight")),
    "peft": (lambda n: f"base_model.model.{n}", AB),
    "peft of the original": (lambda n: f"base_model.model.{original(n)}", AB),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_with_its_alpha(form: str, tmp_path: Path) -> None:
    call, endings = FORMS[form]
    factors = draw_factors()
    tensors = {
        f"{call(name)}.{ending}": value
        for name, layer in factors.items()
        for ending, value in zip(endings, (layer.down, layer.up, torch.tensor(2.0 * layer.rank)), strict=False)
    }
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    scale = 2.0 if len(endings) == 3 else 1.0  # without an alpha
    expected = {name: LoRAFactors(layer.down, layer.up, scale) for name, layer in factors.items()}
    assert_same_deltas(read_lora(path), expected)


@pytest.mark.parametrize("form", list(LoRAForm))
def test_what_is_written_comes_back_with_its_scale(form: LoRAForm, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "lora.safetensors"
    write_lora(path, draw_factors(), form, metadata={"muybridge": "1"})
    assert_same_deltas(read_lora(path), draw_factors())
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["muybridge"] == "1"
    assert [p.name for p in path.parent.iterdir()] == ["lora.safetensors"]


def test_written_names_are_those_of_the_other_tools(tmp_path: Path) -> None:
    keys = {}
    for form in LoRAForm:
        write_lora(tmp_path / form, {LAYERS[0]: draw_factors()[LAYERS[0]]}, form, dtype=torch.bfloat16)
        tensors = load_file(tmp_path / form)
        keys[form] = sorted(tensors)
        assert {value.dtype for name, value in tensors.items() if "alpha" not in name} == {torch.bfloat16}
    kohya = "lora_unet_blocks_0_self_attn_q"
    assert keys == {
        "comfy": [f"diffusion_model.blocks.0.self_attn.q.lora_{x}.weight" for x in "AB"],
        "diffusers": [f"transformer.blocks.0.attn1.to_q.lora_{x}.weight" for x in "AB"],
        "kohya": [f"{kohya}.alpha", f"{kohya}.lora_down.weight", f"{kohya}.lora_up.weight"],
    }


# --- faults -------------------------------------------------------------------------------------------------------------------

DOWN, UP = "diffusion_model.blocks.0.self_attn.q.lora_A.weight", "diffusion_model.blocks.0.self_attn.q.lora_B.weight"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "it holds no tensors"),
        ({"blocks.0.self_attn.q.weight": (4, 4)}, "not a LoRA .*: blocks.0.self_attn.q.weight"),
        ({DOWN: (2, 4), UP: (4, 2), "lora_te_text_model.lora_up.weight": (4, 2)}, "not a LoRA .*: lora_te_text_model"),
        ({DOWN: (2, 4), UP: (4, 2), UP.replace("lora_B.weight", "diff_b"): (4,)}, r"not a LoRA .*: \S+\.q\.diff_b$"),
        ({DOWN: (2, 4)}, r"blocks.0.attn1.to_q \(down \[2, 4\]\)"),
        ({DOWN: (2, 4), UP: (4, 3)}, r"blocks.0.attn1.to_q \(down \[2, 4\], up \[4, 3\]\)"),
        (
            {DOWN: (2, 4), UP: (4, 2), "diffusion_model.blocks.1.ffn.0.alpha": ()},
            r"blocks.1.ffn.net.0.proj \(an alpha alone\)",
        ),
    ],
)
def test_a_file_that_is_no_lora_is_refused_by_its_keys(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], words: str
) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in tensors.items()}, path)
    with pytest.raises(ValueError, match=words) as caught:
        read_lora(path)
    assert str(path) in str(caught.value)


def test_a_file_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"lora.safetensors: not a readable safetensors file"):
        read_lora(path)
    with pytest.raises(ValueError, match=r"nowhere: not a readable"):
        read_lora(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"lora_alpha": 3, "use_dora": true}', "use_dora=true: DoRA is not supported"),
        ('{"lora_alpha": 3, "lora_bias": true}', "lora_bias=true: a LoRA with biases is not supported"),
    ],
)
def test_settings_of_peft_that_cannot_be_used_are_named(tmp_path: Path, settings: str, words: str) -> None:
    down, up = (f"base_model.model.{name}" for name in (DOWN, UP))
    halves = {down.replace("diffusion_model.", ""): (2, 4), up.replace("diffusion_model.", ""): (4, 2)}
    save_file({name: torch.zeros(shape) for name, shape in halves.items()}, tmp_path / "lora.safetensors")
    (tmp_path / "adapter_config.json").write_text(settings)
    with pytest.raises(ValueError, match=words):
        read_lora(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("form", list(LoRAForm))
def test_peft_settings_are_not_those_of_another_file_beside_them(form: LoRAForm, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 50}')
    write_lora(tmp_path / "lora.safetensors", draw_factors(), form)
    assert_same_deltas(read_lora(tmp_path / "lora.safetensors"), draw_factors())


def test_a_lora_without_layers_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        write_lora(tmp_path / "lora.safetensors", {})


# --- peft and diffusers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def theirs() -> nn.Module:
    """The base weights in diffusers' class."""
    pytest.importorskip("peft", reason="peft, with which diffusers loads LoRA, is not installed")
    diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")
    model = diffusers.WanTransformer3DModel.from_config(SIZES.to_diffusers())
    model.load_state_dict(build_dit().state_dict(), strict=True)
    return model.eval()


def velocity(model: nn.Module) -> Tensor:
    with torch.no_grad():
        latents, timestep, text = inputs()
        found = model(latents, timestep, text)
    return found if isinstance(found, Tensor) else found.sample


@pytest.mark.parametrize("form", list(LoRAForm))
def test_diffusers_computes_the_same_from_our_file(form: LoRAForm, theirs: Any, tmp_path: Path) -> None:
    from diffusers import WanPipeline

    factors = draw_factors()
    path = tmp_path / "pytorch_lora_weights.safetensors"
    write_lora(path, factors, form)
    before = velocity(theirs)
    state_dict, metadata = WanPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    WanPipeline.load_lora_into_transformer(state_dict, transformer=theirs, metadata=metadata)
    assert (metadata is not None) == (form is LoRAForm.diffusers)
    after = velocity(theirs)
    torch.testing.assert_close(after, velocity(adapted(factors)), atol=1e-5, rtol=1e-4)
    assert (after - before).abs().max() > 0.1


def test_some_layers_of_some_blocks_load_in_diffusers(theirs: Any, tmp_path: Path) -> None:
    from diffusers import WanPipeline

    factors = {name: layer for name, layer in draw_factors().items() if name == "blocks.1.attn2.to_v"}
    write_lora(tmp_path / "pytorch_lora_weights.safetensors", factors)
    WanPipeline.load_lora_into_transformer(WanPipeline.lora_state_dict(tmp_path), transformer=theirs)
    dit = build_dit()
    config = LoRAConfig(rank=3, targets=[LoRATarget.v], layer_ranks=["*:0", "blocks.1.attn2.to_v:3"])
    add_lora(dit, config)
    load_lora(dit, factors, where="here")
    torch.testing.assert_close(velocity(theirs), velocity(dit), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("form", ["saved by diffusers", "saved by peft"])
def test_a_lora_of_peft_computes_the_same_here(form: str, rslora: bool, theirs: Any, tmp_path: Path) -> None:
    """With alpha unlike the rank, and other ranks and alphas for some layers."""
    import peft

    settings = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=LAYERS,
        rank_pattern={"to_k": 2},
        alpha_pattern={"to_k": 7, r"blocks\.1\.ffn\.net\.2": 1},
        init_lora_weights=False,
        use_rslora=rslora,
    )
    if form == "saved by diffusers":
        from diffusers import WanPipeline

        theirs.add_adapter(settings)
        WanPipeline.save_lora_weights(
            tmp_path,
            transformer_lora_layers=peft.get_peft_model_state_dict(theirs),
            transformer_lora_adapter_metadata=theirs.peft_config["default"].to_dict(),
        )
        path = tmp_path / "pytorch_lora_weights.safetensors"
    else:
        wrapped = peft.get_peft_model(theirs, settings)
        wrapped.save_pretrained(tmp_path)
        theirs = wrapped
        path = tmp_path / "adapter_model.safetensors"
    before = velocity(build_dit())
    ours = velocity(adapted(read_lora(path)))
    torch.testing.assert_close(ours, velocity(theirs), atol=1e-5, rtol=1e-4)
    assert (ours - before).abs().max() > 0.1


def test_our_header_holds_what_peft_needs(theirs: Any, tmp_path: Path) -> None:
    import peft

    write_lora(tmp_path / "lora.safetensors", draw_factors(), LoRAForm.diffusers)
    with safe_open(tmp_path / "lora.safetensors", framework="pt") as file:
        held = json.loads(file.metadata()[METADATA_KEY])
    settings = peft.LoraConfig(**{name.removeprefix("transformer."): value for name, value in held.items()})
    model = peft.inject_adapter_in_model(settings, theirs)
    found = {name: tuple(p.shape) for name, p in model.named_parameters() if ".lora_A." in name}
    assert found == {f"{n}.lora_A.default.weight": tuple(f.down.shape) for n, f in draw_factors().items()}


def test_a_trained_model_written_and_read_is_itself(tmp_path: Path) -> None:
    config = LoRAConfig(rank=3, alpha=5.0, layer_ranks=["*.to_k:2"])
    dit = adapted(draw_factors())
    factors = lora_factors(dit.state_dict(), config)  # as if it had been trained with this alpha
    write_lora(tmp_path / "lora.safetensors", factors)
    assert_same_deltas(read_lora(tmp_path / "lora.safetensors"), factors)
