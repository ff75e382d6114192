"""Text encoders: a small one of our own that reads bytes and trains along with the DiT, and frozen umT5 from a local folder."""

import hashlib
import html
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from .embeddings import Fp32LayerNorm, compute_dtype
from .quiet import quiet

BYTES_PER_WORD = 16
PADDING = 0
# A word starts with this byte in no text, because UTF-8 never uses it.
START_BYTE = 0xFF
# Of how a caption becomes features (cleaning, tokens, number format): raise it when that changes, so that cached ones are refused.
UMT5_VERSION = 1
_HASHED_BYTES, _HASH_STRIDE = 1 << 20, 1 << 24


class TextEncoderKind(StrEnum):
    """Which text encoder reads the captions."""

    bytes = "bytes"
    umt5_small = "umt5_small"
    umt5 = "umt5"


@dataclass
class TextEncoderConfig:
    """The text encoder of a run."""

    # bytes and umt5_small are trained along with the model, and umt5_small opens in other tools; umt5 is frozen, from `path`.
    kind: TextEncoderKind = TextEncoderKind.bytes
    dim: int = 256  # width of the features; umt5-xxl has 4096
    max_tokens: int = 32  # rows a caption is padded or cut to; Wan trains umt5 with 512
    num_heads: int = 4  # not of umt5: attention heads of an encoder layer
    num_layers: int = 1  # umt5_small only: encoder layers
    vocabulary: int = 4096  # umt5_small only: pieces of words that its tokenizer has at most
    path: str | None = None  # umt5 only: folder with text_encoder/ and tokenizer/ as diffusers writes them

    @property
    def is_trained(self) -> bool:
        """Whether the encoder is a part of the model that is trained."""
        return self.kind is not TextEncoderKind.umt5

    def faults(self, field: str) -> list[str]:
        """All breaches of this config's own rules, as messages that name the field, the value and the rule."""
        found = []
        for name in ("dim", "max_tokens", "num_heads", "num_layers"):
            if getattr(self, name) < 1:
                found.append(f"{field}.{name}={getattr(self, name)} must be at least 1")
        if self.is_trained and self.num_heads >= 1 and self.dim % self.num_heads:
            found.append(f"{field}.dim={self.dim} must be divisible by {field}.num_heads={self.num_heads}")
        if self.kind is TextEncoderKind.umt5_small and self.vocabulary < 300:
            found.append(f"{field}.vocabulary={self.vocabulary} must be at least 300: 256 pieces are single bytes")
        if self.kind is TextEncoderKind.umt5 and not self.path:
            found.append(
                f"{field}.path={self.path} must name a folder with text_encoder/ and tokenizer/ when kind is umt5"
            )
        return found


class ByteTextEncoder(nn.Module):
    """Captions as words, each word the sum of learned (place in the word, byte) vectors, then one encoder layer.

    A whole word is one token, so what "red" means is learned from its own vector within a few hundred steps; a model of
    single bytes would have to learn spelling first. Any script works, because words are their UTF-8 bytes.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.byte_embedding = nn.EmbeddingBag(1 + 256 * BYTES_PER_WORD, dim, mode="sum", padding_idx=PADDING)
        self.word_mlp = FeedForward(dim, 2 * dim)
        self.word_positions = nn.Parameter(torch.empty(config.max_tokens, dim))
        self.attention = MaskedSelfAttention(dim, config.num_heads)
        self.ffn = FeedForward(dim, 2 * dim)
        self.norm_out = Fp32LayerNorm(dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights; every branch beside the stream starts at zero, so that at first a word's features are its own.

        Against byte vectors of 0.02 and active branches, a linear read-out of colour and direction words has a quarter of
        the loss after 20 steps, and is right in combinations that it never saw.
        """
        nn.init.normal_(self.byte_embedding.weight, std=0.2)
        self.byte_embedding.weight[PADDING].zero_()
        nn.init.normal_(self.word_positions, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for output in (self.word_mlp.down, self.attention.out, self.ffn.down):
            nn.init.zeros_(output.weight)

    def tokenize(self, captions: list[str]) -> Tensor:
        """Captions to int64 [B, S, W], S always `max_tokens`: a start token, then one row for each word, then zeros.

        S is fixed, because the DiT attends to the padding rows too: with a length that followed the longest caption of a
        micro-batch, a caption's features would depend on its neighbours and on the number of ranks.
        """
        tokens = torch.zeros(len(captions), self.config.max_tokens, BYTES_PER_WORD, dtype=torch.int64)
        for row, caption in enumerate(captions):
            words = [bytes([START_BYTE]), *split_words(caption)][: self.config.max_tokens]
            ids = [[1 + 256 * place + byte for place, byte in enumerate(word)] for word in words]
            for position, word_ids in enumerate(ids):
                tokens[row, position, : len(word_ids)] = torch.tensor(word_ids)
        return tokens

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, S, W] of `tokenize` to float32 features [B, S, dim]; rows of padding are zero and never attended."""
        is_word = tokens[..., 0] != PADDING  # [B, S]
        words = self.byte_embedding(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2]).float()  # [B, S, dim]
        x = self.word_mlp(words) + self.word_positions.float()
        x = self.attention(x, is_word)
        x = self.ffn(x)
        return self.norm_out(x) * is_word.unsqueeze(-1)


class FeedForward(nn.Module):
    """x + Linear(GELU(Linear(LayerNorm(x)))), with a float32 stream."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = Fp32LayerNorm(dim)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x).to(compute_dtype(self.up.weight))
        return x + self.down(F.gelu(self.up(normed), approximate="tanh"))


class MaskedSelfAttention(nn.Module):
    """x + attention(LayerNorm(x)) over the rows that hold words, in both directions, with a float32 stream."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = Fp32LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, is_word: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x).to(compute_dtype(self.qkv.weight)))
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, N, S, K] each
        mask = is_word[:, None, None, :]  # [B, 1, 1, S]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return x + self.out(out.transpose(1, 2).flatten(2))


class Umt5TextEncoder(nn.Module):
    """The umT5 encoder of public Wan models, frozen, read from a local folder with the `text` extra installed."""

    def __init__(self, config: TextEncoderConfig, dtype: torch.dtype = torch.bfloat16) -> None:
        """Raises ValueError where the extra, the folder or a tensor in it is missing, or the width is another."""
        super().__init__()
        transformers = require_text_extra("text.kind=umt5")
        root = Path(config.path or "")
        for name in ("text_encoder", "tokenizer"):
            if not config.path or not (root / name).is_dir():
                raise ValueError(
                    f"text.path={config.path} must be a folder with text_encoder/ and tokenizer/; {name}/ is missing"
                )
        self.config = config
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                root / "tokenizer", local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"{root / 'tokenizer'}: not a readable tokenizer ({error})") from error
        self.model = load_frozen(transformers.UMT5EncoderModel, root / "text_encoder", dtype)
        if self.model.config.d_model != config.dim:
            raise ValueError(
                f"text.dim={config.dim} must be the width of {root / 'text_encoder'}, {self.model.config.d_model}"
            )
        self.train(False)

    def train(self, mode: bool = True) -> "Umt5TextEncoder":
        """Stay in evaluation mode whatever is asked: a frozen T5 would otherwise apply its dropout."""
        return super().train(False)

    def encode(self, captions: list[str]) -> Tensor:
        """Features [B, max_tokens, dim] of the captions; rows after the end-of-text token are zero, as Wan was trained."""
        return pad_features(self.encode_unpadded(captions), self.config.max_tokens)

    @torch.no_grad()
    def encode_unpadded(self, captions: list[str]) -> list[Tensor]:
        """Features [S, dim] of each caption, whose own tokens, up to the end-of-text token, are S <= max_tokens."""
        batch = self.tokenizer(
            [clean_caption(caption) for caption in captions],
            padding="max_length",  # whatever else is in the batch: a caption's features do not depend on its neighbours
            padding_side="right",
            max_length=self.config.max_tokens,
            truncation=True,
            return_tensors="pt",
        )
        lengths = batch.attention_mask.sum(1).tolist()  # counted before the copy to a GPU, which nothing then waits for
        device = self.model.device
        features = self.model(batch.input_ids.to(device), batch.attention_mask.to(device)).last_hidden_state
        return [rows[:length] for rows, length in zip(features, lengths, strict=True)]


def require_text_extra(what: str) -> Any:
    """The package transformers, typed as anything because it is optional.

    Raises ValueError saying that `what` needs the extra `text` where transformers, or ftfy, which cleans captions, is missing.
    """
    try:
        import ftfy  # noqa: F401
        import transformers

        # With its models it imports torchao where that is installed, which tells of kernels for other GPUs that it cannot load.
        with quiet("torchao", "torch.utils._pytree"):
            import transformers.modeling_utils
    except ImportError as error:
        raise ValueError(f"{what} needs transformers and ftfy: pip install 'muybridge[text]' ({error})") from error
    return transformers


def load_frozen(model_class: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A model of a class of transformers from its folder, without gradients.

    Raises ValueError where it cannot be read or tensors are missing: transformers fills those with random numbers, and says so
    in a warning only.
    """
    try:
        with without_progress_bars():
            model, info = model_class.from_pretrained(
                folder, local_files_only=True, dtype=dtype, output_loading_info=True
            )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder}: not a readable {model_class.__name__} ({error})") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{folder}: {len(missing)} tensors missing, among them {missing[0]}")
    return model.requires_grad_(False)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hides the progress bars of transformers, whatever the user's setting, which is kept: a command of ours has its own."""
    from transformers.utils.logging import set_tqdm_hook

    former = set_tqdm_hook(lambda build, args, options: build(*args, **{**options, "disable": True}))
    try:
        yield
    finally:
        set_tqdm_hook(former)


def pad_features(features: list[Tensor], max_tokens: int) -> Tensor:
    """Features [S, dim] of each of B captions as [B, max_tokens, dim], with zeros behind."""
    padded = features[0].new_zeros(len(features), max_tokens, features[0].shape[-1])
    for row, rows in zip(padded, features, strict=True):
        row[: len(rows)] = rows
    return padded


def text_fingerprint(config: TextEncoderConfig) -> str | None:
    """Changes with the features of a frozen encoder: its weights, tokenizer, `max_tokens` and the cleaning of captions.

    None for an encoder that trains along. Of a file of gigabytes a part of every 16 MiB is read: that touches each of a large
    model's matrices, in a second instead of ten. Raises ValueError where the folder is not there.
    """
    if config.is_trained:
        return None
    digest = hashlib.blake2b(f"{UMT5_VERSION} {config.max_tokens}".encode(), digest_size=16)
    for name in ("text_encoder", "tokenizer"):
        folder = Path(config.path or "") / name
        if not folder.is_dir():
            raise ValueError(f"text.path={config.path} must be a folder with {name}/")
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            size = path.stat().st_size
            digest.update(f"{name}/{path.relative_to(folder)} {size}".encode())
            with open(path, "rb") as file:
                for start in range(0, size, _HASH_STRIDE):
                    file.seek(start)
                    digest.update(file.read(_HASHED_BYTES if size > 4 * _HASH_STRIDE else _HASH_STRIDE))
    return digest.hexdigest()


def clean_caption(caption: str) -> str:
    """Mend broken Unicode, resolve HTML entities (twice: scraped captions hold `&amp;lt;`), collapse white space."""
    require_text_extra("cleaning captions")
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(caption)))).strip()


def split_words(caption: str) -> list[bytes]:
    """Lower-case words between white space as UTF-8, cut into pieces of at most `BYTES_PER_WORD` bytes."""
    pieces = []
    for word in caption.lower().split():
        encoded = word.encode("utf-8", errors="replace")
        pieces += [encoded[start : start + BYTES_PER_WORD] for start in range(0, len(encoded), BYTES_PER_WORD)]
    return pieces
