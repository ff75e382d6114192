"""The trained weights of a run for `muybridge export`, opened without reading what is not asked for."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..models.lora import lora_factors, merge_lora
from ..models.lora_files import LoRAForm, read_lora, write_lora
from ..models.text import ByteTextEncoder, TextEncoderKind
from ..models.text_small import SmallUmt5
from ..models.weight_files import Tensors
from ..models.weights import load_weights
from ..train.config import TrainConfig
from ..train.fragments import FragmentReader, read_run_state, read_weights
from ..train.generate import NEGATIVE_PROMPT
from ..train.tasks import TextToVideoTask
from ..train.trained_weights import load_trained
from .export_readme import PROMPT_EMBEDS_NAME

if TYPE_CHECKING:
    from .export_plan import RunWeights


@contextmanager
def trained_part(config: TrainConfig, checkpoint: Path, kind: str, part: str) -> Iterator[Tensors]:
    """The weights of a part of a run's model, `transformer` or `text_encoder`, float32.

    Of a LoRA run, whose checkpoints have its factors alone, the whole model is built in memory and the LoRA merged into it.
    Raises ValueError where the weights under it are no longer those that it was trained on.
    """
    prefix = f"{part}."
    if config.lora.is_on:
        model = TextToVideoTask(config, torch.device("cpu")).build_model()
        load_trained(model, config, checkpoint, kind)
        merge_lora(model)
        yield Tensors.of(model.get_submodule(part).state_dict())
        return
    shapes = {
        name.removeprefix(prefix): torch.Size(shape)
        for name, shape in read_run_state(checkpoint)["shapes"].items()
        if name.startswith(prefix)
    }
    with FragmentReader(checkpoint) as reader:

        def read(name: str) -> Tensor:
            return reader.read(kind, prefix + name, 0, shapes[name].numel()).view(shapes[name])

        yield Tensors(shapes, read)


def write_lora_file(path: Path, run: "RunWeights", form: str, dtype: torch.dtype) -> int:
    """One file with the LoRA of a run, read again; returns the number of layers. Raises ValueError as `write_lora` does."""
    factors = lora_factors(read_weights(run.checkpoint, run.kind), run.config.lora)
    write_lora(path, factors, LoRAForm(form), dtype=dtype, metadata=run.header())
    found = read_lora(path)
    for name, layer in factors.items():
        # The scale is in B there, which is then rounded.
        up = (layer.up.float() * layer.scale).to(dtype)
        read = found.get(name)
        if (
            read is None
            or read.scale != 1
            or not torch.equal(read.down, layer.down.to(dtype))
            or not torch.equal(read.up, up)
        ):
            path.unlink()
            raise ValueError(f"{path}: {name} is not what was written (is the disk sound?)")
    return len(factors)


def write_trained_umt5(folder: Path, run: "RunWeights") -> None:
    """text_encoder/ and tokenizer/ that the run trained along, float32."""
    encoder = _trained_encoder(run)
    assert isinstance(encoder, SmallUmt5)
    encoder.save(folder)


@torch.no_grad()
def write_prompt_embeds(folder: Path, run: "RunWeights", prompts: list[str]) -> None:
    """`prompt_embeds` [prompts, max_tokens, dim] and `negative_prompt_embeds` [1, max_tokens, dim], float32, in one file.

    By the text encoder that the run trained. The header lists the prompts in their order.
    """
    encoder = _trained_encoder(run)
    features = encoder(encoder.tokenize([*prompts, NEGATIVE_PROMPT]))
    stored = {"prompt_embeds": features[:-1].clone(), "negative_prompt_embeds": features[-1:].clone()}
    header = {"format": "pt", "prompts": json.dumps(prompts), "negative_prompt": NEGATIVE_PROMPT}
    save_file(stored, folder / PROMPT_EMBEDS_NAME, metadata=header)


def _trained_encoder(run: "RunWeights") -> ByteTextEncoder | SmallUmt5:
    text = run.config.text
    is_umt5 = text.kind is TextEncoderKind.umt5_small
    encoder = SmallUmt5(text, run.config.tokenizer_folder()) if is_umt5 else ByteTextEncoder(text)
    with run.open("text_encoder") as tensors:
        load_weights(encoder, dict(tensors), where=str(run.checkpoint))
    return encoder.eval()
