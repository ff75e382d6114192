"""The trained weights of a run for `muybridge export`, opened without reading what is not asked for."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..models.lora import lora_factors, merge_lora
from ..models.lora_files import LoRAForm, read_lora, write_lora
from ..models.text import ByteTextEncoder, TextEncoderConfig
from ..models.text_small import SmallUmt5
from ..models.text_to_video import TextToVideoModel
from ..models.weight_files import Tensors
from ..models.weights import load_weights
from ..train.checkpoint import FragmentReader, read_run_state, read_weights
from ..train.config import TrainConfig
from ..train.generate import NEGATIVE_PROMPT
from ..train.tasks import TextToVideoTask
from ..train.trained_weights import load_trained
from .export_readme import PROMPT_EMBEDS_NAME

if TYPE_CHECKING:
    from .export_plan import RunWeights


@contextmanager
def trained_tensors(checkpoint: Path, kind: str, prefix: str) -> Iterator[Tensors]:
    """Those weights of a checkpoint that have the prefix, float32, without it."""
    shapes = {
        name.removeprefix(prefix): torch.Size(shape)
        for name, shape in read_run_state(checkpoint)["shapes"].items()
        if name.startswith(prefix)
    }
    with FragmentReader(checkpoint) as reader:

        def read(name: str) -> Tensor:
            return reader.read(kind, prefix + name, 0, shapes[name].numel()).view(shapes[name])

        yield Tensors(shapes, read)


@contextmanager
def merged_transformer(config: TrainConfig, checkpoint: Path, kind: str) -> Iterator[Tensors]:
    """The transformer of a LoRA run, its change added to the weights under it; float32, whole in memory.

    Raises ValueError where the weights under it are no longer those that it was trained on.
    """
    model = TextToVideoTask(config, torch.device("cpu")).build_model()
    assert isinstance(model, TextToVideoModel)
    load_trained(model, config, checkpoint, kind)
    merge_lora(model)
    yield as_tensors(model.transformer.state_dict())


def as_tensors(state_dict: Mapping[str, Tensor]) -> Tensors:
    """Tensors that are in memory already."""
    return Tensors({name: tensor.shape for name, tensor in state_dict.items()}, state_dict.__getitem__)


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


def write_trained_umt5(folder: Path, checkpoint: Path, kind: str, config: TrainConfig) -> None:
    """text_encoder/ and tokenizer/ that the run trained along, float32."""
    encoder = SmallUmt5(config.text, config.tokenizer_folder())
    with trained_tensors(checkpoint, kind, "text_encoder.") as tensors:
        load_weights(encoder, dict(tensors), where=str(checkpoint))
    encoder.save(folder)


@torch.no_grad()
def write_prompt_embeds(
    folder: Path, checkpoint: Path, kind: str, config: TextEncoderConfig, prompts: list[str]
) -> None:
    """`prompt_embeds` [prompts, max_tokens, dim] and `negative_prompt_embeds` [1, max_tokens, dim], float32, in one file.

    By the text encoder that the run trained. The header lists the prompts in their order.
    """
    encoder = ByteTextEncoder(config).eval()
    with trained_tensors(checkpoint, kind, "text_encoder.") as tensors:
        load_weights(encoder, dict(tensors), where=str(checkpoint))
    features = encoder(encoder.tokenize([*prompts, NEGATIVE_PROMPT]))
    stored = {"prompt_embeds": features[:-1].clone(), "negative_prompt_embeds": features[-1:].clone()}
    header = {"format": "pt", "prompts": json.dumps(prompts), "negative_prompt": NEGATIVE_PROMPT}
    save_file(stored, folder / PROMPT_EMBEDS_NAME, metadata=header)
