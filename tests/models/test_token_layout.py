"""Patterns of self-attention in the DiT, and clips of different shapes packed into one row."""

import pytest
import torch
from torch import Tensor

from muybridge.models.dit import DiT, DiTConfig
from muybridge.models.flops import attended_pairs
from muybridge.models.token_layout import AttentionPattern, SelfAttentionConfig, token_layout

FRAMES, ROWS, COLUMNS = 4, 3, 5  # tokens


def build(self_attention: SelfAttentionConfig | None = None, **overrides: object) -> DiT:
    """A DiT of random weights everywhere, the same for every pattern."""
    torch.manual_seed(0)
    sizes: dict = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_attention_heads": 2, "dim": 64}
    sizes |= {"ffn_dim": 96, "text_dim": 24, "freq_dim": 32} | overrides
    model = DiT(DiTConfig(**sizes, self_attention=self_attention or SelfAttentionConfig()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def draw(frames: int = FRAMES, rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    return torch.randn(2, 4, frames, 2 * rows, 2 * columns, generator=torch.Generator().manual_seed(seed))


TEXT = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
TIMESTEP = torch.tensor([900.0, 100.0])


def test_block_causal_frames_do_not_see_later_ones() -> None:
    model = build(SelfAttentionConfig(AttentionPattern.block_causal))
    latents = draw()
    changed = latents.clone()
    changed[:, :, 2:] += 1
    with torch.no_grad():
        before, after = model(latents, TIMESTEP, TEXT), model(changed, TIMESTEP, TEXT)
        assert (before[:, :, :2] - after[:, :, :2]).abs().max() < 1e-6
        assert (before[:, :, 2:] - after[:, :, 2:]).abs().min(-1).values.max() > 1e-3
        assert (before - build()(latents, TIMESTEP, TEXT)).abs().max() > 1e-3


def test_a_window_of_earlier_frames_ends() -> None:
    model = build(SelfAttentionConfig(AttentionPattern.block_causal, earlier_frames=1), num_layers=1)
    latents = draw()
    changed = latents.clone()
    changed[:, :, 0] += 1
    with torch.no_grad():
        difference = (model(latents, TIMESTEP, TEXT) - model(changed, TIMESTEP, TEXT)).abs().amax((0, 1, 3, 4))
    assert difference[:2].min() > 1e-3
    assert difference[2:].max() < 1e-6


@pytest.mark.parametrize("rows_of_timesteps", [1, FRAMES, FRAMES * ROWS * COLUMNS])
@pytest.mark.parametrize(
    "pattern",
    [
        SelfAttentionConfig(AttentionPattern.sliding_tile, tile=[2, 2, 2], window=[9, 9, 9]),
        SelfAttentionConfig(AttentionPattern.radial, radial_width=1e6),
        SelfAttentionConfig(AttentionPattern.block_causal, earlier_frames=None),
    ],
    ids=["sliding_tile", "radial", "block_causal"],
)
def test_a_pattern_that_leaves_nothing_out_is_full_attention(
    pattern: SelfAttentionConfig, rows_of_timesteps: int
) -> None:
    frames = 1 if pattern.pattern is AttentionPattern.block_causal else FRAMES
    if rows_of_timesteps > 1:
        rows_of_timesteps = rows_of_timesteps * frames // FRAMES
    timestep = torch.linspace(0, 1000, 2 * rows_of_timesteps).view(2, rows_of_timesteps)
    latents = draw(frames)
    sparse, full = build(pattern), build()
    outputs = [model(latents, timestep, TEXT) for model in (sparse, full)]
    torch.testing.assert_close(*outputs, atol=2e-6, rtol=1e-5)
    for output in outputs:
        output.square().mean().backward()
    for (name, parameter), other in zip(sparse.named_parameters(), full.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_a_frame_row_of_timesteps_is_that_of_all_its_tokens() -> None:
    model = build()
    per_frame = torch.rand(2, FRAMES) * 1000
    with torch.no_grad():
        expected = model(draw(), per_frame.repeat_interleave(ROWS * COLUMNS, 1), TEXT)
        torch.testing.assert_close(model(draw(), per_frame, TEXT), expected)


def test_timesteps_that_do_not_divide_the_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"timestep \[2, 7\] must be \[B\], or \[B, R\] with R a divisor of the 60"):
        build()(draw(), torch.ones(2, 7), TEXT)


def test_a_window_that_does_not_suit_the_grid_is_refused() -> None:
    model = build(SelfAttentionConfig(AttentionPattern.sliding_tile, tile=[1, 1, 1], window=[2, 3, 3]))
    with pytest.raises(ValueError, match=r"window=\(2, 3, 3\) must be odd"):
        model(draw(), TIMESTEP, TEXT)


def test_faults_name_field_value_and_rule() -> None:
    config = SelfAttentionConfig(earlier_frames=-1, tile=[1, 2], window=[0, 1, 1], radial_width=0.0)
    faults = DiTConfig(self_attention=config).faults("model")
    assert len(faults) == 4
    for name, value in (("earlier_frames", "-1"), ("tile", "[1, 2]"), ("window", "[0, 1, 1]"), ("radial_width", "0.0")):
        assert sum(f"model.self_attention.{name}={value} must be" in fault for fault in faults) == 1, name


def test_the_pattern_travels_in_the_model_folder_and_full_attention_leaves_no_trace() -> None:
    pattern = SelfAttentionConfig(AttentionPattern.sliding_tile, tile=[1, 2, 3])
    config = DiTConfig(self_attention=pattern)
    assert DiTConfig.from_diffusers(config.to_diffusers()) == config
    assert "self_attention" not in DiTConfig().to_diffusers()
    with pytest.raises(ValueError, match=r"self_attention\.pattern='wavy' must be one of full"):
        DiTConfig.from_diffusers(config.to_diffusers() | {"self_attention": {"pattern": "wavy"}})


def test_a_layout_is_made_once() -> None:
    arguments = (SelfAttentionConfig(AttentionPattern.radial), (2, 3, 4), 32, torch.device("cpu"))
    assert token_layout(*arguments) is token_layout(*arguments)


def test_packed_clips_are_computed_as_if_alone() -> None:
    model = build()
    grids = [(2, 3, 4), (1, 1, 1), (3, 5, 2)]
    clips = [draw(*grid, seed=i)[0] for i, grid in enumerate(grids)]
    text = [TEXT[0, :3], TEXT[1], TEXT[0, :1]]
    timestep = torch.tensor([10.0, 500.0, 990.0])
    alone = [
        model(clip[None], t[None], features[None])[0] for clip, t, features in zip(clips, timestep, text, strict=True)
    ]
    packed = model.forward_packed(clips, timestep, text)
    expected = torch.autograd.grad(sum(v.square().sum() for v in alone), list(model.parameters()))
    actual = torch.autograd.grad(sum(v.square().sum() for v in packed), list(model.parameters()))
    for ours, theirs in zip([*packed, *actual], [*alone, *expected], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.detach().abs().max().item(), rtol=1e-4)


def test_packing_refuses_what_it_cannot_do() -> None:
    clips = [draw()[0]]
    with pytest.raises(ValueError, match="pattern=radial must be full to pack"):
        build(SelfAttentionConfig(AttentionPattern.radial)).forward_packed(clips, TIMESTEP[:1], [TEXT[0]])
    with pytest.raises(ValueError, match="1 clips need as many timesteps and texts"):
        build().forward_packed(clips, TIMESTEP, [TEXT[0]])


def test_flops_count_the_pairs_that_are_computed() -> None:
    assert attended_pairs(DiTConfig(), (4, 6, 10)) == 60 * 60
    causal = DiTConfig(self_attention=SelfAttentionConfig(AttentionPattern.block_causal))
    tokens, tiles = 21 * 30 * 52, 256
    computed = attended_pairs(causal, (21, 60, 104)) / tokens**2
    assert 0.5 < computed < 0.5 + 1 / 21 + 1 / tiles


def test_a_block_compiles_in_one_graph() -> None:
    pattern = SelfAttentionConfig(AttentionPattern.block_causal)
    block = build(pattern).blocks[0]
    layout = token_layout(pattern, (2, 2, 4), 32, torch.device("cpu"))
    x = torch.randn(2, 16, 64, requires_grad=True)
    inputs = (x, torch.randn(2, 5, 64), torch.randn(2, 1, 6, 64), layout)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    outputs = [function(*inputs) for function in (block, compiled)]
    torch.testing.assert_close(*outputs)
    expected, actual = (torch.autograd.grad(out.square().mean(), [x, *block.parameters()]) for out in outputs)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("pattern", AttentionPattern)
def test_bf16_weights_fit_the_kernels_contracts(pattern: AttentionPattern) -> None:
    """On meta tensors every kernel's own checks run, as on a GPU, and nothing is computed: here at the size of the 1.3B model."""
    config = DiTConfig(num_layers=1, self_attention=SelfAttentionConfig(pattern))
    with torch.device("meta"):
        model = DiT(config).bfloat16()
        latents, timestep, text = torch.randn(1, 16, 21, 60, 104), torch.rand(1, 21), torch.randn(1, 512, 4096)
    velocity = model(latents, timestep, text)
    assert (velocity.shape, velocity.dtype) == (latents.shape, torch.float32)
    velocity.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.bfloat16, name
