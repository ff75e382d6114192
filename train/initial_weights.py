"""What a fresh run starts from instead of random weights: those of an earlier run, or a part of a pipeline folder."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..models.dit import DiTConfig
from ..models.lora import lora_factors
from ..models.pipeline_folder import PipelineFiles, is_pipeline_folder
from ..models.text import TextEncoderConfig, TextEncoderKind
from ..models.weight_files import Tensors, check_shapes, open_weights
from ..models.weights import load_config
from .checkpoint_folder import committed_checkpoints
from .compose import plain
from .experts import Expert
from .flat_shards import fill, full_shape
from .fragments import open_checkpoint, read_run_state, read_weights, weight_kind
from .weights_fingerprint import WeightsFingerprint, merged_fingerprint

if TYPE_CHECKING:
    from .config import TrainConfig

# What of the model is a choice of this run and no size of the weights: which tokens attend to each other, so that a run can go from
# full attention to a sparse pattern.
FREE_FIELDS = ("self_attention",)
# Fields of a text encoder that its weights depend on. A run's tokenizer is taken over with them, so it is of that vocabulary.
_TEXT_SIZES = {
    TextEncoderKind.bytes: ("dim", "max_tokens", "num_heads"),
    TextEncoderKind.umt5_small: ("dim", "num_heads", "num_layers", "vocabulary"),
    TextEncoderKind.umt5: ("dim",),
}


def load_initial_weights(model: nn.Module, config: "TrainConfig") -> None:
    """Copy the weights that `config.init_from` names into a fresh model, one after the other.

    Raises ValueError naming the folder, or the tensors that do not fit.
    """
    for _ in fill_initial_weights(model, config):
        pass


def fill_initial_weights(model: nn.Module, config: "TrainConfig") -> Iterator[tuple[str, Tensor]]:
    """Do so, and give each weight with its name once it is in the model. ValueError as `load_initial_weights`."""
    own = model.state_dict(keep_vars=True)
    with open_initial_weights(config) as (where, tensors):
        check_shapes(tensors.shapes, {name: full_shape(weight) for name, weight in own.items()}, where=where)
        for name, tensor in tensors:
            fill(own[name], tensor)
            yield name, tensor


@contextmanager
def open_initial_weights(config: "TrainConfig") -> Iterator[tuple[str, Tensors]]:
    """The weights that `config.init_from` names, as the model of the run's task calls them, and where they are, for messages.

    Raises ValueError naming the folder, and where a LoRA that is among them lay on other weights.
    """
    source = Path(config.init_from or "")
    if is_pipeline_folder(source):
        part, prefix = source / "vae", ""
        if config.task.name == "text_to_video":
            part, prefix = transformer_folder(source, config.expert), "transformer."
        with open_weights(part) as tensors:
            yield f"init_from={part}", tensors.renamed({name: prefix + name for name in tensors.shapes})
        return
    checkpoint = source_checkpoint(source)
    assert checkpoint is not None, "no pipeline folder, so a run"
    if read_run_state(checkpoint).get("lora"):
        # A run's settings know this module.
        from .config import read_config

        with open_merged_lora(checkpoint, read_config(source), config.init_weights) as tensors:
            yield f"init_from={source}", tensors
        return
    with open_checkpoint(checkpoint, config.init_weights) as tensors:
        yield f"init_from={source}", tensors


@contextmanager
def open_merged_lora(checkpoint: Path, run: "TrainConfig", kind: str) -> Iterator[Tensors]:
    """All weights of a LoRA run, with its LoRA of a checkpoint merged in; a LoRA may lie on a run that has one itself."""
    with open_initial_weights(run) as (_, base):
        refuse_another_lora(checkpoint, lora_facts(run, WeightsFingerprint.of(base)), run)
        factors = lora_factors(read_weights(checkpoint, kind), run.lora)

        def read(name: str) -> Tensor:
            layer = factors.get(name.removeprefix("transformer.").removesuffix(".weight"))
            weight = base.read(name)
            return weight if layer is None or not name.endswith(".weight") else layer.delta().add_(weight)

        yield Tensors(base.shapes, read)


def lora_facts(config: "TrainConfig", base: str) -> dict[str, Any]:
    """What checkpoints keep of a run's LoRA, given the fingerprint of the weights of `open_initial_weights`."""
    source = source_checkpoint(Path(config.init_from or ""))
    lora = read_run_state(source).get("lora") if source is not None else None
    if source is not None and lora:
        with open_checkpoint(source, config.init_weights) as factors:
            base = merged_fingerprint(lora, WeightsFingerprint.of(factors))
    settings = {name: value for name, value in plain(config.lora).items() if name != "init_from"}
    return {"settings": settings, "base": base}


def refuse_another_lora(checkpoint: Path, facts: dict[str, Any], config: "TrainConfig") -> None:
    """Raises ValueError where a checkpoint's LoRA has other settings than `facts`, or lay on other weights."""
    saved = read_run_state(checkpoint).get("lora", {})
    settings, now = (part.get("settings", {"rank": 0}) for part in (saved, facts))
    changed = [
        f"lora.{name}: {settings.get(name)} saved, {now.get(name)} now"
        for name in settings | now
        if settings.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(f"{checkpoint} cannot be continued, these changed: {'; '.join(changed)}")
    if saved.get("base") != facts.get("base"):
        raise ValueError(
            f"{checkpoint} holds a LoRA on other weights than init_from={config.init_from} has now "
            f"(fingerprint {saved.get('base')} then, {facts.get('base')} now): set it to those that the LoRA was trained on"
        )


def source_checkpoint(source: Path) -> Path | None:
    """The newest checkpoint of the run that a start is from; None for a pipeline folder. Raises ValueError for anything else."""
    if is_pipeline_folder(source):
        return None
    found = committed_checkpoints(source / "checkpoints")
    if not found:
        raise ValueError(
            f"init_from={source} must be a pipeline folder (with model_index.json) or the directory of a run with a checkpoint"
        )
    return found[-1]


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
    """What of the settings contradicts the pipeline folder or the run `init_from`, as messages naming field, value and rule.

    Shapes do not show all sizes: with other heads or another eps the weights load, and make another model. The pattern of
    self-attention may differ. Nothing where `init_from` is neither a pipeline folder nor a run with a checkpoint.
    """
    source = Path(init_from)
    if not is_pipeline_folder(source):
        return _run_faults(source, model, text) if committed_checkpoints(source / "checkpoints") else []
    try:
        files, folder = PipelineFiles.find(source), transformer_folder(source, expert)
        weights = DiTConfig.from_diffusers(load_config(folder))
    except ValueError as error:
        return [f"init_from={source} must be the pipeline folder of a Wan model: {error}"]
    found = _model_faults(model, weights, folder)
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


def initial_kind_fault(init_from: str | None, kind: str) -> str:
    """What is wrong with `init_weights`, or an empty string; a folder without a checkpoint is not this function's to name."""
    found = committed_checkpoints(Path(init_from) / "checkpoints") if init_from else []
    if not found:
        return "" if kind == "ema" else f"init_weights={kind} must be ema where init_from={init_from} is not a run"
    try:
        weight_kind(found[-1], kind, field="init_weights")
    except (OSError, ValueError) as error:  # also a damaged checkpoint
        return str(error)
    return ""


def _run_faults(source: Path, model: DiTConfig, text: TextEncoderConfig) -> list[str]:
    from .config import TaskKind, read_config

    try:
        run = read_config(source)
    except ValueError as error:
        return [f"init_from={source}: {error}"]
    if run.task is not TaskKind.text_to_video:
        return [f"init_from={source} must be a run of task=text_to_video, and its task is {run.task.name}"]
    # Where the kinds differ, no other field can be compared.
    names = _TEXT_SIZES[text.kind] if run.text.kind is text.kind else ("kind",)
    differing = [(name, getattr(text, name), getattr(run.text, name)) for name in names]
    return _model_faults(model, run.model, source) + [
        f"text.{name}={given} must be {wanted}, as init_from={source} has it"
        for name, given, wanted in differing
        if given != wanted
    ]


def _model_faults(model: DiTConfig, weights: DiTConfig, source: Path) -> list[str]:
    names = [field.name for field in dataclasses.fields(DiTConfig) if field.name not in FREE_FIELDS]
    differing = [(name, getattr(model, name), getattr(weights, name)) for name in names]
    return [
        f"model.{name}={given} must be {wanted}, as init_from={source} has it"
        for name, given, wanted in differing
        if given != wanted
    ]
