"""What `muybridge export` writes: the trained transformers of one run or of two experts, and what belongs to them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..models.text import TextEncoderKind
from ..train.checkpoint import check_checkpoint, committed_checkpoints, read_run_state
from ..train.compose import plain
from ..train.config import TaskKind, TrainConfig, read_config


@dataclass(frozen=True)
class RunWeights:
    """A trained transformer: a run, the checkpoint to read and which of its weights."""

    run_dir: Path
    config: TrainConfig
    checkpoint: Path
    weights: str  # ema or master

    def header(self) -> dict[str, str]:
        """What a weight file says of its origin: the settings that the model depends on, the step and the code's commit."""
        settings = plain(self.config)
        kept: dict[str, Any] = {name: settings[name] for name in ("seed", "model", "objective", "sampler")}
        kept["text"] = {name: value for name, value in settings["text"].items() if name != "path"}
        kept["data"] = {name: settings["data"][name] for name in ("frames", "height", "width", "fps")}
        provenance = self.run_dir / "provenance.json"
        commit = json.loads(provenance.read_text()).get("git_commit") if provenance.is_file() else None
        return {
            "muybridge.version": __version__,
            "muybridge.git_commit": commit or "unknown",
            "muybridge.step": str(read_run_state(self.checkpoint)["step"]),
            "muybridge.weights": self.weights,
            "muybridge.config": json.dumps(kept),
        }


def find_run_weights(run_dir: Path, weights: str, *, field: str) -> RunWeights:
    """The newest checkpoint of a run. Raises ValueError, naming the setting `field`, for a run that cannot be exported."""
    config = read_config(run_dir)
    if config.task is not TaskKind.text_to_video:
        raise ValueError(
            f"{field}={run_dir} has task={config.task.name}, and its model is in diffusers' form already: {run_dir}/model"
        )
    checkpoints = committed_checkpoints(run_dir / "checkpoints")
    if not checkpoints:
        raise ValueError(f"{field}={run_dir} has no checkpoint yet")
    if fault := check_checkpoint(checkpoints[-1]):
        raise ValueError(fault)
    if missing := config.missing_inputs():
        raise ValueError(f"{field}={run_dir}: {'; '.join(missing)}")
    return RunWeights(run_dir, config, checkpoints[-1], weights)


def check_prompts(prompts: str | None, expert: RunWeights) -> None:
    """Raises ValueError where prompt features are asked for of a text encoder that is exported itself."""
    kind = expert.config.text.kind
    if prompts and kind is not TextEncoderKind.bytes:
        raise ValueError(
            f"prompts={prompts} is for runs with text.kind=bytes; this run has {kind}, whose text encoder is exported"
        )
