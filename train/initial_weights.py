"""What a fresh run starts from instead of random weights: the average of an earlier run, or a part of a pipeline folder."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ..models.dit import DiTConfig
from ..models.lora import merge_lora
from ..models.pipeline_folder import PipelineFiles, is_pipeline_folder
from ..models.text import TextEncoderConfig
from ..models.text_to_video import TextToVideoModel
from ..models.weights import load_config, load_weights, load_weights_from
from .checkpoint import committed_checkpoints, read_run_state, read_weights
from .experts import Expert

if TYPE_CHECKING:
    from .config import TrainConfig

# Fields of the model that are a choice of this run and no size of the weights.
FREE_FIELDS = ("gradient_checkpointing", "self_attention")


def load_initial_weights(model: nn.Module, config: "TrainConfig") -> None:
    """Copy the weights that `config.init_from` names into a fresh model.

    Raises ValueError naming the folder, or the tensors that do not fit.
    """
    source = Path(config.init_from or "")
    if is_pipeline_folder(source):
        module, part = model, source / "vae"
        if isinstance(model, TextToVideoModel):
            module, part = model.transformer, transformer_folder(source, config.expert)
        load_weights_from(module, part, where=f"init_from={part}")
        return
    found = committed_checkpoints(source / "checkpoints")
    if not found:
        raise ValueError(
            f"init_from={source} must be a pipeline folder (with model_index.json) or the directory of a run with a checkpoint"
        )
    if "lora" in read_run_state(found[-1]):
        # A run's settings know this module, and a LoRA may lie on a run that has one itself.
        from .config import read_config
        from .trained_weights import load_trained

        load_trained(model, read_config(source), found[-1])
        merge_lora(model)
        model.requires_grad_(True)  # what was frozen under the LoRA
        return
    load_weights(model, read_weights(found[-1]), where=f"init_from={source}")


def transformer_folder(source: Path, expert: Expert) -> Path:
    """The transformer in a pipeline folder that an expert starts from: both may start from a pipeline's only one.

    Raises ValueError where the folder has none.
    """
    files = PipelineFiles.find(source)
    chosen = files.transformer_2 if expert is Expert.low and files.transformer_2 else files.transformer
    if chosen is None:
        raise ValueError(f"init_from={source} must hold transformer/, and its model_index.json name it")
    return chosen


def initial_faults(
    init_from: str, model: DiTConfig, text: TextEncoderConfig, *, expert: Expert, boundary: float
) -> list[str]:
    """What of the settings contradicts the pipeline folder `init_from`, as messages naming field, value and rule.

    Nothing where it is no pipeline folder: a run's weights say themselves what does not fit.
    """
    source = Path(init_from)
    if not is_pipeline_folder(source):
        return []
    try:
        files, folder = PipelineFiles.find(source), transformer_folder(source, expert)
        weights = DiTConfig.from_diffusers(load_config(folder))
    except ValueError as error:
        return [f"init_from={source} must be the pipeline folder of a Wan model: {error}"]
    found = []
    for name in (field.name for field in dataclasses.fields(DiTConfig) if field.name not in FREE_FIELDS):
        wanted, given = getattr(weights, name), getattr(model, name)
        if wanted != given:
            found.append(f"model.{name}={given} must be {wanted}, as init_from={folder} has it")
    if text.is_trained:
        found.append(
            f"text.kind={text.kind} must be umt5, frozen, where init_from={source} is a pipeline folder: it has no weights of "
            "this encoder (a run does, and text.path may be a pipeline folder that has one)"
        )
    if files.transformer_2 is not None:
        if expert is Expert.none:
            found.append(f"expert=none must be high or low: init_from={source} has two experts, and a run trains one")
        elif boundary != files.boundary_ratio:
            found.append(f"boundary={boundary} must be {files.boundary_ratio}, as init_from={source} has it")
    return found
