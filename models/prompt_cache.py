"""Text features of prompts, kept on disk: a prompt that was read once needs no text encoder of gigabytes again."""

import contextlib
import hashlib
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .text import TextEncoderConfig, Umt5TextEncoder, clean_caption, pad_features, text_fingerprint

FOLDER_VARIABLE = "MUYBRIDGE_CACHE"


class PromptCache:
    """Features of a frozen umT5, one file for each prompt.

    A file is named by all that its features depend on: weights, tokenizer, `max_tokens`, dtype and the cleaned prompt. Files may
    be removed at any time, and processes may share a folder. Where it cannot be written, nothing is kept.
    """

    def __init__(
        self,
        folder: Path,
        config: TextEncoderConfig,
        *,
        build: Callable[[], Umt5TextEncoder],
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """`build` makes the encoder of `config` in `dtype`, on any device; it is called when a prompt is new."""
        self._folder, self._config, self._build, self._dtype = folder, config, build, dtype

    def encode(self, prompts: list[str]) -> Tensor:
        """Features [B, max_tokens, dim] of the prompts on the CPU, with zero rows after the end-of-text token.

        Raises ValueError where the encoder's folder or the extra `text` is missing.
        """
        texts = [clean_caption(prompt) for prompt in prompts]
        found = {text: features for text in set(texts) if (features := self._read(text)) is not None}
        if len(found) < len(set(texts)):
            encoder, new = self._build(), dict[str, Tensor]()
            for prompt, text in zip(prompts, texts, strict=True):
                if text not in found:
                    # One by one: in a batch, the last bits of a prompt's features would depend on the other prompts.
                    found[text] = new[text] = encoder.encode_unpadded([prompt])[0].cpu()
            # Weights that took the place of others after the fingerprint was made must not be kept under it.
            if text_fingerprint(self._config) == self._fingerprint:
                for text, features in new.items():
                    self._write(text, features)
        return pad_features([found[text] for text in texts], self._config.max_tokens)

    @cached_property
    def _fingerprint(self) -> str:
        fingerprint = text_fingerprint(self._config)
        assert fingerprint is not None, "features of an encoder that is trained change with every step"
        return fingerprint

    def _path(self, text: str) -> Path:
        key = f"{self._fingerprint} {self._dtype} {text}"
        return self._folder / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.safetensors"

    def _header(self, text: str, features: Tensor) -> dict[str, str]:
        """What a sound file says beside its features; the prompt is there for people who look at the folder, too."""
        data = features.contiguous().view(torch.uint8).numpy().tobytes()
        return {
            "prompt": text,
            "text_fingerprint": self._fingerprint,
            "checksum": hashlib.blake2b(data, digest_size=16).hexdigest(),
        }

    def _read(self, text: str) -> Tensor | None:
        """Features [S, dim], or None where there is no sound file of them."""
        try:
            with safe_open(self._path(text), framework="pt") as file:
                features, header = file.get_tensor("features"), file.metadata()
        # RuntimeError: safetensors has torch open the file once more by its name, and it may be gone by then.
        except (OSError, RuntimeError, SafetensorError):
            return None
        is_sound = (
            features.dtype == self._dtype
            and features.ndim == 2
            and features.shape[0] <= self._config.max_tokens
            and features.shape[1] == self._config.dim
            and header == self._header(text, features)
        )
        return features if is_sound else None

    def _write(self, text: str, features: Tensor) -> None:
        path = self._path(text)
        partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
        data = save({"features": features.contiguous()}, metadata=self._header(text, features))
        # A full disk or a folder of others costs time at the next prompt, and must not cost this one's video.
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_bytes(data)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)


def user_prompt_folder() -> Path:
    """Where features of this user's prompts are kept: in $MUYBRIDGE_CACHE, else among the other caches of the home folder."""
    if own := os.environ.get(FOLDER_VARIABLE):
        return Path(own) / "prompts"
    caches = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(caches):  # a relative one is to be ignored, as the XDG specification has it
        caches = os.path.expanduser("~/.cache")
    # An account without a home leaves "~": then nothing is kept.
    return Path(caches if os.path.isabs(caches) else os.devnull) / "muybridge" / "prompts"
