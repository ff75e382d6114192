"""The small umT5 that is trained along: what it reads, and that other tools read it alike."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from muybridge.models.text import PADDING, TextEncoderConfig, TextEncoderKind
from muybridge.models.text_small import SmallUmt5, write_tokenizer

pytest.importorskip("transformers", reason="the extra `text` is not installed")
pytest.importorskip("ftfy", reason="the extra `text` is not installed")

CAPTIONS = ["a red circle moving left", "the green square slides downwards", "a blue triangle moves up"] * 3
CONFIG = TextEncoderConfig(TextEncoderKind.umt5_small, dim=32, max_tokens=8, num_heads=2, num_layers=2, vocabulary=400)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of the captions above."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, CAPTIONS, CONFIG)
    return folder


@pytest.fixture
def encoder(tokenizer: Path) -> SmallUmt5:
    """Weights of which none is zero."""
    torch.manual_seed(0)
    encoder = SmallUmt5(CONFIG, tokenizer)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


def test_known_words_are_one_piece_wherever_they_stand(encoder: SmallUmt5) -> None:
    first, last, large = encoder.tokenize(["red circle", "circle red", "  RED   Circle "])
    assert (first != PADDING).sum() == 3  # two words and the end
    assert first[0] == last[1]
    assert torch.equal(first, large)


def test_any_text_is_read_and_cut_to_the_limit(encoder: SmallUmt5) -> None:
    tokens = encoder.tokenize(["", "красный круг", "赤い丸", "a \x00 \ud800 b", "left " * 50])
    assert tokens.shape == (5, 8)
    assert (tokens[0] != PADDING).sum() == 1  # the end alone
    assert all((row != PADDING).sum() > 2 for row in tokens[1:])
    assert torch.isfinite(encoder(tokens)).all()


def test_the_same_captions_make_the_same_tokenizer(tokenizer: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, CAPTIONS, CONFIG)
    assert (tmp_path / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()


def test_features_depend_on_the_words_and_not_on_neighbours(encoder: SmallUmt5) -> None:
    together = encoder(encoder.tokenize(CAPTIONS[:3]))
    alone = encoder(encoder.tokenize(CAPTIONS[1:2]))
    torch.testing.assert_close(together[1:2], alone, atol=1e-6, rtol=1e-5)
    assert (together[0] - together[2]).abs().max() > 0.1
    rows = (together.abs().amax(-1) > 0).sum(1)
    assert rows.tolist() == [6, 6, 6]  # five words and the end; padding is zero


def test_fresh_features_are_of_single_words(tokenizer: Path) -> None:
    encoder = SmallUmt5(CONFIG, tokenizer)
    both = encoder(encoder.tokenize(["red circle", "circle red"]))
    torch.testing.assert_close(both[0, 0], both[1, 1])
    assert (both[0, 0] - both[0, 1]).abs().max() > 0.1


def test_the_diffusers_pipeline_makes_the_same_features_of_what_is_saved(encoder: SmallUmt5, tmp_path: Path) -> None:
    pipelines = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan", reason="diffusers is not installed")
    from transformers import AutoTokenizer, UMT5EncoderModel

    encoder.save(tmp_path)
    parts = SimpleNamespace(
        tokenizer=AutoTokenizer.from_pretrained(tmp_path / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(tmp_path / "text_encoder"),
    )
    assert parts.tokenizer.model_max_length == CONFIG.max_tokens
    captions = [*CAPTIONS[:3], "", "a &amp;lt;  Red\n circle 赤"]
    wanted = pipelines.WanPipeline._get_t5_prompt_embeds(
        parts, captions, max_sequence_length=CONFIG.max_tokens, device=torch.device("cpu"), dtype=torch.float32
    )
    torch.testing.assert_close(encoder(encoder.tokenize(captions)), wanted, atol=2e-6, rtol=0)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere must hold the tokenizer of this run \(tokenizer\.json\)"):
        SmallUmt5(CONFIG, tmp_path / "nowhere")
