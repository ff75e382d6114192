"""The weights under a run and those of its checkpoints: all of a model's, or a LoRA on what `init_from` names.

A checkpoint of a LoRA run holds the factors alone, with a fingerprint of the weights under them.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..models.lora import add_lora, load_lora
from ..models.lora_files import read_lora
from ..models.text_to_video import TextToVideoModel
from ..models.weight_files import check_shapes
from ..models.weights import load_weights
from .checkpoint_folder import refuse_damaged
from .compose import plain
from .fragments import read_run_state, read_weights
from .initial_weights import load_initial_weights, source_checkpoint

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
        _refuse_another_lora(resume_from, facts, config)
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
    _refuse_another_lora(checkpoint, _add_lora(model, config), config)
    check_shapes(
        {name: value.shape for name, value in weights.items()},
        {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad},
        where=str(checkpoint),
    )
    model.load_state_dict(weights, strict=False)


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Changes with the names, shapes and values of weights; sums of bits, since a hash of 14 B of them takes minutes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(weights.items()):
        bits = tensor.float().contiguous().view(torch.int32)
        rows: Tensor = bits.reshape(len(bits) if bits.ndim > 1 else 1, -1).sum(dim=1, dtype=torch.int64)
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(rows.cpu().numpy().tobytes())
    return digest.hexdigest()


def _add_lora(model: nn.Module, config: "TrainConfig") -> dict[str, Any]:
    """Load the weights under a LoRA, freeze all of them, and put the LoRA's layers in."""
    assert isinstance(model, TextToVideoModel), "the settings allow a LoRA for the diffusion transformer alone"
    load_initial_weights(model, config)
    base = _base_fingerprint(model, config)
    model.requires_grad_(False)
    add_lora(model.transformer, config.lora)
    settings = {name: value for name, value in plain(config.lora).items() if name != "init_from"}
    return {"settings": settings, "base": base}


def _base_fingerprint(model: nn.Module, config: "TrainConfig") -> str:
    """That of the weights that `init_from` names and the model has by now.

    Those of a LoRA run were computed, which rounds differently on another device: they are known by what they were computed of.
    """
    source = source_checkpoint(Path(config.init_from or ""))
    lora = read_run_state(source).get("lora") if source is not None else None
    if source is None or not lora:
        return weights_fingerprint(model.state_dict())
    trained = weights_fingerprint(read_weights(source, config.init_weights))
    parts = [lora["base"], json.dumps(lora["settings"], sort_keys=True), trained]
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=16).hexdigest()


def _refuse_another_lora(checkpoint: Path, facts: dict[str, Any], config: "TrainConfig") -> None:
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
