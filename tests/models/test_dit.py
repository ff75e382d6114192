"""The DiT on its own: rules of its config, initialisation, dtypes, checkpointing, shapes."""

import re

import pytest
import torch
from torch import Tensor, nn

from muybridge.kernels.norm_rope import build_rope, rope_table
from muybridge.models.blocks import DiTBlock
from muybridge.models.dit import DiT, DiTConfig
from muybridge.models.embeddings import Fp32Linear
from muybridge.models.token_layout import _layout


def tiny_config(**overrides: object) -> DiTConfig:
    sizes: dict = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "dim": 64,
        "ffn_dim": 128,
        "text_dim": 24,
        "freq_dim": 32,
    }
    return DiTConfig(**sizes | overrides)


def build_random(config: DiTConfig) -> DiT:
    """A DiT whose head and biases are not zero."""
    torch.manual_seed(0)
    model = DiT(config)
    for parameter in model.parameters():
        if parameter.ndim == 1 or parameter is model.proj_out.weight:
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def draw_inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, 3, 4, 6, generator=generator)
    timestep = torch.linspace(990, 10, batch)
    return latents, timestep, torch.randn(batch, 5, 24, generator=generator)


def draw_image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 6, 12, generator=torch.Generator().manual_seed(2))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


def test_a_sound_config_has_no_faults() -> None:
    assert tiny_config().faults("model") == []
    assert DiTConfig().faults("model") == []


def test_every_fault_of_a_config_is_named_with_field_value_and_rule() -> None:
    broken = tiny_config(num_layers=0, dim=65, freq_dim=31, patch_size=[1, 2], eps=0.0)
    messages = broken.faults("model.dit")
    assert len(messages) == 5
    for name, value in [
        ("num_layers", "0"),
        ("num_attention_heads", "2"),
        ("freq_dim", "31"),
        ("patch_size", "[1, 2]"),
        ("eps", "0.0"),
    ]:
        assert sum(f"model.dit.{name}={value} must" in message for message in messages) == 1, name


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (
            {"image_dim": 1280},
            "added_kv_proj_dim=None must be 64",
        ),  # theirs would attend to image and text in one softmax
        ({"added_kv_proj_dim": 64}, "added_kv_proj_dim=64 must be None"),
        ({"image_dim": 1280, "added_kv_proj_dim": 1280}, "added_kv_proj_dim=1280 must be 64"),
        ({"qk_norm": None}, "qk_norm=None must be 'rms_norm_across_heads'"),
        ({"_class_name": "WanVACETransformer3DModel"}, "_class_name='WanVACETransformer3DModel' must be"),
    ],
)
def test_from_diffusers_refuses_a_model_of_another_kind(change: dict[str, object], rule: str) -> None:
    with pytest.raises(ValueError, match=re.escape(rule)):
        DiTConfig.from_diffusers(tiny_config().to_diffusers() | change)


def test_from_diffusers_refuses_sizes_that_break_the_rules() -> None:
    broken = {"num_layers": 0, "attention_head_dim": 24, "patch_size": [1, 2]}
    with pytest.raises(
        ValueError, match=r"config\.json: .*num_layers=0 must be .*heads of 24.*patch_size=\[1, 2\] must"
    ):
        DiTConfig.from_diffusers(tiny_config().to_diffusers() | broken)


def test_image_settings_have_rules_of_their_own() -> None:
    assert tiny_config(image_dim=12, pos_embed_seq_len=6).faults("model") == []
    (fault,) = tiny_config(pos_embed_seq_len=6).faults("model")
    assert "model.pos_embed_seq_len=6 must be null" in fault
    messages = tiny_config(image_dim=0, pos_embed_seq_len=-1).faults("model")
    assert [message.split("=")[0] for message in messages] == ["model.image_dim", "model.pos_embed_seq_len"]


def test_from_diffusers_names_what_is_missing() -> None:
    content = tiny_config().to_diffusers()
    del content["ffn_dim"]
    with pytest.raises(ValueError, match="ffn_dim missing"):
        DiTConfig.from_diffusers(content)


def test_a_fresh_model_follows_the_initialisation_of_wan() -> None:
    torch.manual_seed(0)
    model = DiT(tiny_config(dim=256, num_attention_heads=8))
    dim = 256
    assert model.proj_out.weight.abs().max() == 0
    assert model(*draw_inputs()).abs().max() == 0
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0, name
    query = model.blocks[0].attn1.to_q.weight
    assert query.std().item() == pytest.approx((2 / (dim + dim)) ** 0.5, rel=0.05)
    patch = model.patch_embedding.weight
    assert patch.std().item() == pytest.approx((2 / (dim + 16)) ** 0.5, rel=0.05)
    for embedder in (model.condition_embedder.time_embedder, model.condition_embedder.text_embedder):
        assert embedder.linear_1.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert embedder.linear_2.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.condition_embedder.time_proj.weight.std().item() == pytest.approx((2 / (7 * dim)) ** 0.5, rel=0.05)
    assert model.blocks[1].scale_shift_table.std().item() == pytest.approx(dim**-0.5, rel=0.1)


def test_reset_draws_every_weight_also_after_a_build_on_meta() -> None:
    config = tiny_config(image_dim=12, pos_embed_seq_len=6)
    direct = DiT(config)
    torch.manual_seed(3)
    direct.reset_parameters()
    with torch.device("meta"):
        late = DiT(config)
    late.to_empty(device="cpu")
    for parameter in late.parameters():
        nn.init.constant_(parameter, float("nan"))
    torch.manual_seed(3)
    late.reset_parameters()
    for (name, expected), found in zip(direct.state_dict().items(), late.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name
    assert direct(*draw_inputs(), draw_image()).isfinite().all()


def test_one_timestep_and_the_same_for_each_token_agree() -> None:
    model = build_random(tiny_config())
    latents, timestep, text = draw_inputs()
    per_token = timestep.unsqueeze(1).expand(2, 3 * 2 * 3)
    torch.testing.assert_close(model(latents, per_token, text), model(latents, timestep, text), atol=1e-5, rtol=1e-5)


def test_samples_of_a_batch_do_not_influence_each_other() -> None:
    model = build_random(tiny_config())
    latents, timestep, text = draw_inputs(3)
    together = model(latents, timestep, text)
    alone = model(latents[1:2], timestep[1:2], text[1:2])
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_bf16_stays_within_a_hundredth_of_float32(autocast: bool) -> None:
    model = build_random(tiny_config(num_layers=4))
    inputs = draw_inputs()
    expected = model(*inputs)
    expected.square().mean().backward()
    expected_gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    if not autocast:
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = model(*inputs)
    found.square().mean().backward()
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < 0.01
    gradients = torch.cat([parameter.grad.float().flatten() for parameter in model.parameters()])
    assert relative_error(gradients, expected_gradients) < 0.02


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_only_the_matmuls_of_the_blocks_run_in_bf16(autocast: bool) -> None:
    model = build_random(tiny_config())
    if not autocast:
        model.bfloat16()
    outputs: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda module, inputs, output, name=name: outputs.update(
                {name: output.dtype} if isinstance(output, Tensor) else {}
            )
        )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(*draw_inputs())
    for name, module in model.named_modules():
        if isinstance(module, Fp32Linear | DiTBlock):
            assert outputs[name] == torch.float32, name
        elif isinstance(module, nn.Linear | nn.Conv3d):
            assert outputs[name] == torch.bfloat16, name


def test_training_works_after_sampling_in_inference_mode() -> None:
    """Rotary positions are cached; those made under inference mode could not take part in a backward."""
    for cached in (_layout, build_rope, rope_table):
        cached.cache_clear()
    model = build_random(tiny_config())
    with torch.inference_mode():
        model(*draw_inputs())
    model(*draw_inputs()).sum().backward()


def test_neighbouring_timesteps_at_the_noisy_end_differ_under_bf16_weights() -> None:
    model = build_random(tiny_config()).bfloat16()
    embed = model.condition_embedder.time_embedder
    near, far = embed(torch.tensor([998.0, 999.0]))
    assert (near - far).abs().max() > 1e-3


def test_latents_that_patches_do_not_tile_are_refused() -> None:
    model = DiT(tiny_config())
    _, timestep, text = draw_inputs()
    with pytest.raises(ValueError, match=r"\(3, 5, 6\).*patch size \(1, 2, 2\)"):
        model(torch.zeros(2, 4, 3, 5, 6), timestep, text)


def test_a_grid_beyond_the_rotary_table_is_refused() -> None:
    model = DiT(tiny_config(rope_max_seq_len=2))
    with pytest.raises(ValueError, match="rope_max_seq_len=2"):
        model(*draw_inputs())


def test_latents_of_other_channels_are_refused() -> None:
    _, timestep, text = draw_inputs()
    with pytest.raises(ValueError, match="latents of 4 channels must have the model's in_channels=9"):
        DiT(tiny_config(in_channels=9))(torch.zeros(2, 4, 3, 4, 6), timestep, text)


def test_image_features_go_with_models_that_take_them() -> None:
    text_model, image_model = DiT(tiny_config()), DiT(tiny_config(image_dim=12))
    both_ends = DiT(tiny_config(image_dim=12, pos_embed_seq_len=6))
    inputs, image = draw_inputs(), draw_image()
    with pytest.raises(ValueError, match=r"image features: \[2, 6, 12\] given, .*image_dim=None"):
        text_model(*inputs, image)
    with pytest.raises(ValueError, match=r"image features: none given, .*image_dim=12"):
        image_model(*inputs)
    for wrong in (image[:1], image[..., :11], image[0]):
        with pytest.raises(ValueError, match=re.escape(f"image features {list(wrong.shape)} must be [2, I, 12]")):
            image_model(*inputs, wrong)
    with pytest.raises(ValueError, match=re.escape("image features [2, 3, 12] must be [2, 6, 12]")):
        both_ends(*inputs, image[:, :3])
    with pytest.raises(ValueError, match="image_dim=12 must be null to pack"):
        image_model.forward_packed([inputs[0][0]], inputs[1][:1], [inputs[2][0]])


def test_text_keeps_its_weight_beside_an_image() -> None:
    """Image and text are two softmaxes: with values of zero for the image, the answer is that of the model without one."""
    model = build_random(tiny_config(image_dim=12))
    plain = DiT(tiny_config())
    plain.load_state_dict(model.state_dict(), strict=False)
    for block in model.blocks:
        nn.init.zeros_(block.attn2.add_v_proj.weight)
        nn.init.zeros_(block.attn2.add_v_proj.bias)
    torch.testing.assert_close(model(*draw_inputs(), draw_image()), plain(*draw_inputs()))


def test_a_half_precision_timestep_is_refused() -> None:
    latents, timestep, text = draw_inputs()
    with pytest.raises(ValueError, match="must be float32"):
        DiT(tiny_config())(latents, timestep.bfloat16(), text)


def test_heads_must_divide_the_width_into_widths_the_kernel_takes() -> None:
    assert tiny_config(dim=64, num_attention_heads=4).faults("model") == []
    (odd,) = tiny_config(dim=48, num_attention_heads=2).faults("model")
    assert "heads of 24" in odd
