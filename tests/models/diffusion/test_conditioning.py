"""Image and video conditioning: equal to diffusers' image-to-video pipelines, and exact about what is known."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from muybridge.models.diffusion.conditioning import (
    CleanFrames,
    Condition,
    ConditioningForm,
    ImageChannels,
    image_channels,
    known_frames_condition,
)
from muybridge.models.diffusion.guidance import guided_velocity
from muybridge.models.dit import DiT, DiTConfig
from muybridge.models.vae import VideoVAE
from muybridge.models.vae.config import VAEConfig

FRAMES, SIDE, TEXT, STRIDE = 9, 32, 48, 4
PATCH = [1, 2, 2]


@pytest.fixture(scope="module")
def diffusers_vae() -> Any:
    """A Wan 2.1 autoencoder of random weights, with Wan's latent statistics."""
    diffusers = pytest.importorskip("diffusers", reason="the extra `test` is not installed")
    torch.manual_seed(0)
    return diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


@pytest.fixture(scope="module")
def vae(diffusers_vae: Any) -> VideoVAE:
    """The same in our code."""
    vae = VideoVAE(VAEConfig.from_diffusers(dict(diffusers_vae.config))).eval()
    vae.load_state_dict(diffusers_vae.state_dict())
    return vae


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.rand((1, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1)) * 2 - 1


def build_pipeline(vae: Any, *, in_channels: int, expand_timesteps: bool) -> Any:
    """A WanImageToVideoPipeline with a random transformer; text comes as features."""
    import diffusers

    torch.manual_seed(2)
    build: Any = diffusers.WanTransformer3DModel
    transformer = build(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=16,
        text_dim=TEXT,
        ffn_dim=48,
        num_layers=2,
        freq_dim=32,
    ).eval()
    for parameter in transformer.parameters():  # fresh ones are zero where it would hide a mistake
        torch.nn.init.normal_(parameter, std=0.15)
    return diffusers.WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=transformer,
        expand_timesteps=expand_timesteps,
    )


def encoder(vae: VideoVAE) -> Any:
    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        return vae.normalise(vae.encode(pixels).mode())

    return encode


def condition_on(form: ConditioningForm, vae: VideoVAE, first: Tensor, last: Tensor | None = None) -> Condition:
    return known_frames_condition(
        form,
        encoder(vae),
        first=first.unsqueeze(2) if first.ndim == 4 else first,
        last=None if last is None else last.unsqueeze(2),
        frames=FRAMES,
        temporal_stride=STRIDE,
        patch_size=PATCH,
    )


@pytest.mark.parametrize("with_last", [False, True])
def test_mask_and_image_channels_are_those_of_diffusers(
    with_last: bool, diffusers_vae: Any, vae: VideoVAE, image: Tensor
) -> None:
    pipeline = build_pipeline(diffusers_vae, in_channels=36, expand_timesteps=False)
    last = image.flip(-1) if with_last else None
    with torch.no_grad():
        _, expected = pipeline.prepare_latents(
            image,
            1,
            height=SIDE,
            width=SIDE,
            num_frames=FRAMES,
            dtype=torch.float32,
            device=torch.device("cpu"),
            last_image=last,
        )
    found = condition_on(ConditioningForm.channels, vae, image, last)
    assert isinstance(found, ImageChannels)
    assert torch.equal(found.channels[:, :STRIDE], expected[:, :STRIDE])
    torch.testing.assert_close(found.channels, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("form", "in_channels"), [("clean_frames", 16), ("channels", 36)])
def test_a_clip_made_from_an_image_is_that_of_diffusers(
    form: str, in_channels: int, diffusers_vae: Any, vae: VideoVAE, image: Tensor
) -> None:
    pipeline = build_pipeline(diffusers_vae, in_channels=in_channels, expand_timesteps=form == "clean_frames")
    generator = torch.Generator().manual_seed(3)
    text, negative = torch.randn((2, 1, 8, TEXT), generator=generator)
    noise = torch.randn((1, 16, 3, SIDE // 8, SIDE // 8), generator=generator)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        image=(image + 1) / 2,
        prompt_embeds=text,
        negative_prompt_embeds=negative,
        latents=noise,
        height=SIDE,
        width=SIDE,
        num_frames=FRAMES,
        num_inference_steps=4,
        guidance_scale=5.0,
        output_type="latent",
    ).frames

    dit = DiT(DiTConfig.from_diffusers(dict(pipeline.transformer.config) | {"_class_name": "WanTransformer3DModel"}))
    dit.load_state_dict(pipeline.transformer.state_dict())
    condition = condition_on(ConditioningForm[form], vae, image)
    velocity = condition.wrap(guided_velocity(dit, text, negative, 5.0))
    latents, levels = noise, pipeline.scheduler.sigmas.tolist()
    with torch.no_grad():
        for level, below in pairwise(levels):
            latents = latents + (below - level) * velocity(latents, torch.tensor([1000 * level]))
    latents = condition.finish(latents)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    if form == "clean_frames":
        torch.testing.assert_close(latents[:, :, :1], encoder(vae)(image.unsqueeze(2)), rtol=0, atol=0)


def test_clean_frames_have_timestep_0_and_the_others_the_samples_own(vae: VideoVAE) -> None:
    first = torch.zeros((2, 3, 5, SIDE, SIDE))
    condition = condition_on(ConditioningForm.clean_frames, vae, first)
    latents, timestep = condition.model_inputs(torch.ones((2, 16, 3, 4, 4)), torch.tensor([250.0, 999.0]))
    assert timestep.tolist() == [[0.0, 0.0, 250.0], [0.0, 0.0, 999.0]]  # five frames are two latent frames
    assert torch.equal(latents[:, :, :2], encoder(vae)(first))
    assert torch.equal(latents[:, :, 2], torch.ones((2, 16, 4, 4)))


def test_a_known_box_gives_each_token_its_timestep() -> None:
    unknown = torch.ones((1, 1, 2, 4, 4))
    unknown[..., 2:] = 0  # the right half
    condition = CleanFrames(torch.zeros((1, 16, 2, 4, 4)), unknown, PATCH)
    latents, timestep = condition.model_inputs(torch.ones((1, 16, 2, 4, 4)), torch.tensor([500.0]))
    assert timestep.tolist() == [[500.0, 0.0] * 4]
    assert torch.equal(latents, unknown.expand_as(latents))


def test_a_known_box_is_encoded_with_the_rest_grey() -> None:
    known = torch.zeros((1, 1, 5, 2, 2))
    known[..., 0] = 1
    pixels = torch.rand((1, 3, 5, 16, 16)) + 1
    seen: list[Tensor] = []

    def encode(shown: Tensor) -> Tensor:
        seen.append(shown)
        return shown.new_zeros((1, 16, 2, 2, 2))

    condition = image_channels(encode, pixels, known, temporal_stride=4)
    assert torch.equal(seen[0][..., :8], pixels[..., :8])
    assert torch.equal(seen[0][..., 8:], torch.zeros((1, 3, 5, 16, 8)))
    assert torch.equal(condition.channels[:, :4], known[:, :, :1].expand(1, 4, 2, 2, 2))
    _, timestep = condition.model_inputs(torch.zeros((1, 16, 2, 2, 2)), torch.tensor([500.0]))
    assert timestep.tolist() == [500.0]


def test_the_mean_is_over_the_unknown_places_only() -> None:
    unknown = torch.tensor([0.0, 1.0, 1.0]).view(1, 1, 3, 1, 1)
    condition = CleanFrames(torch.zeros((1, 2, 3, 2, 2)), unknown, PATCH)
    error = torch.tensor([100.0, 1.0, 3.0]).view(1, 1, 3, 1, 1).expand(1, 2, 3, 2, 2)
    assert condition.mean_over_unknown(error).tolist() == [2.0]
    assert Condition().mean_over_unknown(error).tolist() == pytest.approx([104 / 3])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a model of text alone": ({"form": ConditioningForm.none}, "conditioning.form=none must be clean_frames or chan"),
    "all frames": ({"first": torch.zeros((1, 3, 9, 8, 8))}, "9 known frames must be fewer than the clip's 9"),
    "part of a latent frame": (
        {"first": torch.zeros((1, 3, 3, 8, 8))},
        "3 known frames must be 1 \\+ a multiple of 4",
    ),
    "part of a token": ({"patch_size": [3, 2, 2]}, "1 known frames must be a multiple of 12, less 3"),
    "a last frame": ({"last": torch.zeros((1, 3, 1, 8, 8))}, "clean_frames takes first frames only"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_the_form_cannot_take_is_refused(case: str) -> None:
    change, words = WRONG[case]
    arguments: dict[str, Any] = {
        "form": ConditioningForm.clean_frames,
        "first": torch.zeros((1, 3, 1, 8, 8)),
        "frames": 9,
        "temporal_stride": 4,
        "patch_size": PATCH,
    }
    arguments |= change
    with pytest.raises(ValueError, match=words):
        known_frames_condition(arguments.pop("form"), lambda pixels: pixels, **arguments)
