"""A small text encoder of umT5's architecture that is trained along with the DiT, and a tokenizer made of the captions.

Other tools read both as they read the text encoder of a public Wan model, so what was trained from nothing opens there as well.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from .text import PADDING, TextEncoderConfig, clean_caption, require_text_extra

PAD, END = "<pad>", "</s>"
MIN_FREQUENCY = 2  # of pieces of words that are joined


class SmallUmt5(nn.Module):
    """Captions as pieces of words, then a few layers of umT5."""

    def __init__(self, config: TextEncoderConfig, tokenizer_folder: Path) -> None:
        """Raises ValueError where the extra `text` or the tokenizer is missing."""
        super().__init__()
        transformers = require_text_extra("text.kind=umt5_small")
        if not (tokenizer_folder / "tokenizer.json").is_file():
            raise ValueError(f"{tokenizer_folder} must hold the tokenizer of this run (tokenizer.json)")
        self.config = config
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(
            tokenizer_folder, local_files_only=True, trust_remote_code=False
        )
        self.encoder = build_encoder(config, len(self.tokenizer))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights; every branch starts at zero, so that features are of single words at first (`ByteTextEncoder`)."""
        for name, parameter in self.encoder.named_parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
            elif name.startswith("embed_tokens.") or "relative_attention_bias" in name:
                nn.init.normal_(parameter, std=0.2)
            elif name.endswith((".o.weight", ".wo.weight")):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def tokenize(self, captions: list[str]) -> Tensor:
        """Captions to int64 [B, S], S always `max_tokens`: pieces of words, the end token, then zeros."""
        batch = self.tokenizer(
            [clean_caption(caption) for caption in captions],
            padding="max_length",
            padding_side="right",
            max_length=self.config.max_tokens,
            truncation=True,
            return_tensors="pt",
        )
        return batch.input_ids

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, S] of `tokenize` to float32 features [B, S, dim]; rows of padding are zero and never attended."""
        is_piece = tokens != PADDING
        features = self.encoder(tokens, is_piece.long()).last_hidden_state
        return features.float() * is_piece.unsqueeze(-1)

    def save(self, folder: Path) -> None:
        """Write text_encoder/ and tokenizer/ as a pipeline folder has them; the tokenizer's length is `max_tokens`."""
        model = require_text_extra("text.kind=umt5_small").UMT5EncoderModel(self.encoder.config)
        model.encoder, model.shared = self.encoder, self.encoder.embed_tokens
        model.save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")


def build_encoder(config: TextEncoderConfig, vocabulary: int) -> nn.Module:
    """The layers of umT5 alone, with the weights that transformers draws. Raises ValueError where the extra `text` is missing."""
    transformers = require_text_extra("text.kind=umt5_small")
    # Without the model around it, which has the embedding a second time under another name.
    return transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=vocabulary,
            d_model=config.dim,
            d_kv=config.dim // config.num_heads,
            d_ff=2 * config.dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=PADDING,
            eos_token_id=1,
        )
    ).encoder


def write_tokenizer(folder: Path, captions: Iterable[str], config: TextEncoderConfig) -> None:
    """Make a tokenizer of the captions' pieces of words (byte-level BPE, Sennrich et al. 2016) and write it to a new folder.

    The same captions make the same tokenizer. What no caption has falls into pieces, at last into bytes, so any text is read.
    """
    transformers = require_text_extra("text.kind=umt5_small")
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    # A word is the same piece wherever it stands.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        min_frequency=MIN_FREQUENCY,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((clean_caption(caption) for caption in captions), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, model_max_length=config.max_tokens
    )
    fast.save_pretrained(folder)
