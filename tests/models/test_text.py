"""The built-in text encoder: what a caption becomes, what it must not depend on, and how fast it learns words."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muybridge.models.text import ByteTextEncoder, TextEncoderConfig, TextEncoderKind, split_words


@pytest.fixture
def encoder() -> ByteTextEncoder:
    torch.manual_seed(0)
    encoder = ByteTextEncoder(TextEncoderConfig(dim=32, max_tokens=8, num_heads=2))
    for parameter in encoder.parameters():  # a fresh one has silent branches
        if parameter.ndim == 2 and parameter.abs().max() == 0:
            nn.init.xavier_uniform_(parameter)
    return encoder


def encode(encoder: ByteTextEncoder, *captions: str) -> Tensor:
    return encoder(encoder.tokenize(list(captions)))


def test_words_are_lower_case_and_long_ones_are_cut() -> None:
    assert split_words("A  red\tCircle\n") == [b"a", b"red", b"circle"]
    assert split_words("x" * 20) == [b"x" * 16, b"x" * 4]
    assert split_words("") == []


def test_tokens_are_a_start_row_then_one_row_for_each_word(encoder: ByteTextEncoder) -> None:
    tokens = encoder.tokenize(["red circle", ""])
    assert tokens.shape == (2, 8, 16)
    assert tokens.dtype == torch.int64
    used = (tokens != 0).sum(-1)
    assert used.tolist() == [[1, 3, 6, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    assert tokens[0, 1, :3].tolist() == [1 + ord("r"), 1 + 256 + ord("e"), 1 + 512 + ord("d")]


def test_a_long_caption_is_cut_to_max_tokens(encoder: ByteTextEncoder) -> None:
    tokens = encoder.tokenize([" ".join("abcdefghijkl")])
    assert (tokens[0, :, 0] != 0).all()
    assert tokens[0, 7, 0] == 1 + ord("g")


def test_padding_rows_are_zero_and_the_empty_caption_has_one_row(encoder: ByteTextEncoder) -> None:
    features = encode(encoder, "a red circle", "")
    assert features.shape == (2, 8, 32)
    assert features.dtype == torch.float32
    assert (features.abs().amax(-1) > 0).tolist() == [[True] * 4 + [False] * 4, [True] + [False] * 7]


def test_features_depend_on_the_caption_and_not_on_its_neighbours(encoder: ByteTextEncoder) -> None:
    together = encode(encoder, "a red circle", "a much longer caption than the other one")
    alone = encode(encoder, "a red circle")
    assert together.shape[1] == alone.shape[1]
    torch.testing.assert_close(together[:1], alone)


def test_padding_is_not_attended(encoder: ByteTextEncoder) -> None:
    wider = ByteTextEncoder(TextEncoderConfig(dim=32, max_tokens=20, num_heads=2))
    state = encoder.state_dict()
    state["word_positions"] = torch.cat((state["word_positions"], torch.randn(12, 32)))
    wider.load_state_dict(state)
    torch.testing.assert_close(encode(wider, "a red circle")[:, :8], encode(encoder, "a red circle"))


def test_words_see_each_other_in_both_directions(encoder: ByteTextEncoder) -> None:
    first, second = encode(encoder, "red circle left", "red circle right")
    assert (first[1] - second[1]).abs().max() > 1e-4  # "red" has seen the last word
    first, second = encode(encoder, "red circle", "blue circle")
    assert (first[2] - second[2]).abs().max() > 1e-4


def test_word_order_and_case(encoder: ByteTextEncoder) -> None:
    straight, swapped, upper = encode(encoder, "red circle", "circle red", "RED Circle")
    assert (straight - swapped).abs().max() > 1e-3
    assert torch.equal(straight, upper)


def test_other_scripts_and_broken_unicode_are_valid(encoder: ByteTextEncoder) -> None:
    features = encode(encoder, "красный круг", "赤い円", "\ud800 lone surrogate", "🟥 square")
    assert features.isfinite().all()
    distinct = features[:, 1].unsqueeze(0) - features[:, 1].unsqueeze(1)
    assert (distinct.abs().amax(-1) + torch.eye(4) > 1e-3).all()


def test_every_parameter_learns_and_padding_does_not(encoder: ByteTextEncoder) -> None:
    encode(encoder, "a red circle", "").square().sum(-1).sin().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
    assert encoder.byte_embedding.weight.grad[0].abs().max() == 0


def test_bf16_weights_stay_near_float32(encoder: ByteTextEncoder) -> None:
    expected = encode(encoder, "a red circle moving left")
    encoder.bfloat16()
    found = encode(encoder, "a red circle moving left")
    found.sum().backward()
    assert found.dtype == torch.float32
    assert ((found - expected).norm() / expected.norm()).item() < 0.02


def test_word_identity_is_learned_within_thirty_steps() -> None:
    """A pooled linear read-out must tell colour and direction, and mostly so in combinations never trained on."""
    torch.manual_seed(0)
    colours, directions = ["red", "green", "blue", "yellow", "magenta", "cyan"], ["left", "right", "up", "down"]
    pairs = [(c, d) for c in range(6) for d in range(4)]
    held_out = [pair for pair in pairs if sum(pair) % 4 == 0]
    encoder = ByteTextEncoder(TextEncoderConfig(dim=64, max_tokens=8))
    readout = nn.Linear(64, 10)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *readout.parameters()], lr=2e-3)

    def logits(chosen: list[tuple[int, int]]) -> Tensor:
        captions = [f"a {colours[c]} square moving {directions[d]}" for c, d in chosen]
        return readout(encode(encoder, *captions).mean(1) * 8)

    def correct(chosen: list[tuple[int, int]]) -> int:
        found, (colour, direction) = logits(chosen), torch.tensor(chosen).T
        return int((found[:, :6].argmax(1) == colour).sum() + (found[:, 6:].argmax(1) == direction).sum())

    seen = [pair for pair in pairs if pair not in held_out]
    colour, direction = torch.tensor(seen).T
    for _ in range(30):
        optimizer.zero_grad()
        found = logits(seen)
        (F.cross_entropy(found[:, :6], colour) + F.cross_entropy(found[:, 6:], direction)).backward()
        optimizer.step()
    assert correct(seen) == 2 * len(seen)
    assert correct(held_out) >= 2 * len(held_out) - 1  # chance is 2.5 of 12


def test_faults_name_field_value_and_rule() -> None:
    config = TextEncoderConfig(dim=30, num_heads=4, max_tokens=0)
    assert config.faults("text") == [
        "text.max_tokens=0 must be at least 1",
        "text.dim=30 must be divisible by text.num_heads=4",
    ]
    assert TextEncoderConfig().faults("text") == []
    assert "text.path=None must name a folder" in TextEncoderConfig(kind=TextEncoderKind.umt5).faults("text")[0]
