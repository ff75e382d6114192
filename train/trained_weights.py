"""The weights under a run and those of its checkpoints: all of a model's, or a LoRA on what `init_from` names.

A checkpoint of a LoRA run holds the factors alone, with a fingerprint of the weights under them.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..models.lora import add_lora, load_lora
from ..models.lora_files import read_lora
from ..models.text_to_video import TextToVideoModel
from ..models.weight_files import check_shapes
from ..models.weights import load_weights
from .checkpoint_folder import refuse_damaged
from .fragments import read_weights
from .initial_weights import (
    fill_initial_weights,
    load_initial_weights,
    lora_facts,
    refuse_another_lora,
    source_checkpoint,
)
from .weights_fingerprint import WeightsFingerprint

if TYPE_CHECKING:
    from .config import TrainConfig


def prepare_weights(model: nn.Module, config: "TrainConfig", resume_from: Path | None) -> dict[str, Any]:
    """Give a fresh model all that the engine needs before it shards it; a checkpoint to resume from is loaded after that.

    Returns what checkpoints keep of a LoRA, {} where all weights are trained. Raises ValueError where weights cannot be read or do
    not fit, where the checkpoint to start from is damaged, and where the checkpoint's LoRA is another one or lay on other weights.
    """
    facts: dict[str, Any] = {}
    # A LoRA that is resumed knows the weights under it by their fingerprint.
    if config.init_from and resume_from is None and (source := source_checkpoint(Path(config.init_from))):
        refuse_damaged(source)
    if config.lora.is_on:
        facts = _add_lora(model, config)
    elif config.init_from and resume_from is None:
        load_initial_weights(model, config)
    if resume_from is not None:
        refuse_another_lora(resume_from, facts, config)
    elif config.lora.init_from:
        assert isinstance(model, TextToVideoModel)
        load_lora(model.transformer, read_lora(config.lora.init_from), where=f"lora.init_from={config.lora.init_from}")
    return facts


def load_trained(model: nn.Module, config: "TrainConfig", checkpoint: Path, kind: str = "ema") -> None:
    """Give a fresh model of a run's task the weights of its checkpoint, of a kind as for `weight_kind`.

    Of a LoRA run it gets the layers that were trained; `merge_lora` makes it plain. Raises ValueError as `prepare_weights` does.
    """
    weights = read_weights(checkpoint, kind)
    if not config.lora.is_on:
        load_weights(model, weights, where=str(checkpoint))
        return
    refuse_another_lora(checkpoint, _add_lora(model, config), config)
    check_shapes(
        {name: value.shape for name, value in weights.items()},
        {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad},
        where=str(checkpoint),
    )
    model.load_state_dict(weights, strict=False)


def _add_lora(model: nn.Module, config: "TrainConfig") -> dict[str, Any]:
    """Load the weights under a LoRA, freeze all of them, and put the LoRA's layers in."""
    assert isinstance(model, TextToVideoModel), "the settings allow a LoRA for the diffusion transformer alone"
    fingerprint = WeightsFingerprint()
    for name, weight in fill_initial_weights(model, config):
        fingerprint.add(name, weight)
    model.requires_grad_(False)
    add_lora(model.transformer, config.lora)
    return lora_facts(config, fingerprint.hexdigest())
