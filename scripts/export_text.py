"""The text side of an export: a frozen encoder's files, or ready prompt embeddings where other tools have no such encoder."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..models.text import ByteTextEncoder, TextEncoderConfig
from ..models.weights import load_weights
from ..train.generate import NEGATIVE_PROMPT

PROMPT_EMBEDS_NAME = "prompt_embeds.safetensors"
# Weights that are read by running what is in them; nothing that is exported may hold such files.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


def copy_text_parts(source: Path, folder: Path) -> None:
    """text_encoder/ and tokenizer/ of `source`, byte for byte, without weights in pickles.

    Raises ValueError where the encoder has no safetensors.
    """
    if not list((source / "text_encoder").glob("*.safetensors")):
        raise ValueError(f"text.path={source} has no safetensors in text_encoder/; `muybridge import` makes them")
    for part in ("text_encoder", "tokenizer"):
        for path in sorted((source / part).iterdir()):
            if path.is_file() and path.suffix not in PICKLES:
                (folder / part).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / part / path.name)


@torch.no_grad()
def write_prompt_embeds(
    folder: Path, config: TextEncoderConfig, weights: dict[str, torch.Tensor], prompts: list[str]
) -> None:
    """`prompt_embeds` [prompts, max_tokens, dim] and `negative_prompt_embeds` [1, max_tokens, dim], float32, in one file.

    The header lists the prompts in their order.
    """
    encoder = ByteTextEncoder(config).eval()
    load_weights(encoder, weights, where="the checkpoint's text encoder")
    features = encoder(encoder.tokenize([*prompts, NEGATIVE_PROMPT]))
    tensors = {"prompt_embeds": features[:-1].clone(), "negative_prompt_embeds": features[-1:].clone()}
    header = {"format": "pt", "prompts": json.dumps(prompts), "negative_prompt": NEGATIVE_PROMPT}
    save_file(tensors, folder / PROMPT_EMBEDS_NAME, metadata=header)
