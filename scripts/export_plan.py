"""What `muybridge export` writes: one run's transformer or two experts, and the settings that say what belongs to them."""

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..models.diffusion.conditioning import ConditioningForm
from ..models.dit import DiT, DiTConfig
from ..models.pipeline_folder import PipelineFiles, is_pipeline_folder
from ..models.text import text_fingerprint
from ..models.vae import VAEConfig, VideoVAE
from ..models.weight_files import Tensors, open_weights
from ..models.weights import load_config
from ..train.checkpoint_folder import newest_checkpoint
from ..train.compose import plain
from ..train.config import TaskKind, TrainConfig, read_config
from ..train.experts import Expert
from ..train.fragments import read_run_state, weight_kind
from .export_weights import trained_part

# Entry of a weight file's header with the run's settings as JSON.
EXPORTED_SETTINGS = "muybridge.config"


@dataclass(frozen=True)
class RunWeights:
    """A run's transformer: its newest checkpoint, and which of its weights."""

    run_dir: Path
    config: TrainConfig
    checkpoint: Path
    kind: str  # as the checkpoint names them, master or ema-DECAY

    @property
    def model(self) -> DiTConfig:
        return self.config.model

    def open(self, part: str = "transformer") -> AbstractContextManager[Tensors]:
        """The whole weights of a part in float32, a LoRA merged into them; `text_encoder` is there where the run trained one."""
        return trained_part(self.config, self.checkpoint, self.kind, part)

    def settings(self) -> str:
        """The settings that the model depends on, as JSON."""
        settings = plain(self.config)
        kept: dict[str, Any] = {name: settings[name] for name in ("seed", "model", "objective", "sampler", "lora")}
        kept["text"] = {name: value for name, value in settings["text"].items() if name != "path"}
        kept["data"] = {name: settings["data"][name] for name in ("frames", "height", "width", "fps")}
        return json.dumps(kept)

    def header(self) -> dict[str, str]:
        """What a weight file says of its origin: the settings, the step, the code's commit and the data."""
        provenance = self.run_dir / "provenance.json"
        facts = json.loads(provenance.read_text()) if provenance.is_file() else {}
        return {
            "muybridge.version": __version__,
            "muybridge.git_commit": facts.get("git_commit") or "unknown",
            "muybridge.data_fingerprint": facts.get("data_fingerprint") or "unknown",
            "muybridge.step": str(read_run_state(self.checkpoint)["step"]),
            "muybridge.weights": self.kind,
            EXPORTED_SETTINGS: self.settings(),
        }


@dataclass(frozen=True)
class FolderWeights:
    """A transformer of a pipeline folder, which goes along as the other expert of one that was trained."""

    files: PipelineFiles
    part: str  # transformer or transformer_2

    @property
    def folder(self) -> Path:
        return self.files.root / self.part

    @property
    def model(self) -> DiTConfig:
        return DiTConfig.from_diffusers(load_config(self.folder))

    def open(self) -> AbstractContextManager[Tensors]:
        return open_weights(self.folder)


@dataclass(frozen=True)
class ExportPlan:
    """The transformers of an export, that of high noise first, and the run whose autoencoder, text encoder and sampler it has."""

    transformers: list[RunWeights | FolderWeights]
    run: RunWeights
    is_lora: bool = False  # only what the run trained: a LoRA, without the weights under it

    @property
    def config(self) -> TrainConfig:
        return self.run.config

    @property
    def boundary(self) -> float | None:
        """Where two experts change over; None with one transformer."""
        return self.config.boundary if len(self.transformers) == 2 else None

    def header(self, source: RunWeights | FolderWeights) -> dict[str, str]:
        """Of a transformer's weight file; one of a folder is sampled with the settings of the run that it goes along with."""
        return source.header() if isinstance(source, RunWeights) else {EXPORTED_SETTINGS: self.run.settings()}

    def count_numbers(self) -> int:
        """Numbers in the transformers and the autoencoder."""
        with torch.device("meta"):
            parts = [DiT(source.model) for source in self.transformers] + [VideoVAE(self.config.vae.resolved())]
        return sum(tensor.numel() for part in parts for tensor in part.state_dict().values())


def plan_export(run: str, low_run: str | None, kind: str, *, lora: bool) -> ExportPlan:
    """What belongs together. `run` and `low_run` are run directories; one of the two may be a pipeline folder.

    With `lora` a LoRA run gives its LoRA alone, else the whole model. Raises ValueError naming the setting for runs that cannot be
    exported, or not together.
    """
    if low_run is None:
        found = find_run(Path(run), kind, field="run")
        if lora and found.config.lora.is_on:
            return ExportPlan([], found, is_lora=True)
        if found.config.expert is not Expert.none:
            other = "low_run" if found.config.expert is Expert.high else "run"
            mine = "run" if other == "low_run" else "low_run"
            raise ValueError(
                f"run={run} trained the expert of {found.config.expert} noise alone: a model needs both, give {mine}={run} and "
                f"{other}=the other expert's run, or the pipeline folder that has it"
            )
        return ExportPlan([found], found)
    experts: list[RunWeights | FolderWeights] = []
    for field, value, part in (("run", run, "transformer"), ("low_run", low_run, "transformer_2")):
        experts.append(
            _expert_of_folder(Path(value), part, field)
            if is_pipeline_folder(value)
            else find_run(Path(value), kind, field=field)
        )
    runs = [expert for expert in experts if isinstance(expert, RunWeights)]
    if lora and any(run.config.lora.is_on for run in runs):
        raise ValueError(
            f"low_run={low_run} must be null for a LoRA: each expert's is a file of its own (or merge=true)"
        )
    if not runs:
        raise ValueError(f"run={run} and low_run={low_run} are pipeline folders; at least one must be a run")
    if faults := _expert_faults(experts, runs):
        raise ValueError("; ".join(faults))
    return ExportPlan(experts, runs[0])


def find_run(run_dir: Path, kind: str, *, field: str) -> RunWeights:
    """The newest checkpoint of a run. Raises ValueError, naming the setting `field`, where there is nothing to export."""
    config = read_config(run_dir)
    if config.task is not TaskKind.text_to_video:
        raise ValueError(
            f"{field}={run_dir} has task={config.task.name}, and its model is in diffusers' form already: {run_dir}/model"
        )
    checkpoint = newest_checkpoint(run_dir / "checkpoints")
    if checkpoint is None:
        raise ValueError(f"{field}={run_dir} has no checkpoint yet")
    if missing := config.missing_inputs():
        raise ValueError(f"{field}={run_dir}: {'; '.join(missing)}")
    return RunWeights(run_dir, config, checkpoint, weight_kind(checkpoint, kind))


def _expert_of_folder(folder: Path, part: str, field: str) -> FolderWeights:
    files = PipelineFiles.find(folder)
    if files.transformer_2 is None:
        raise ValueError(f"{field}={folder} must be a pipeline folder of two experts (it has no transformer_2/)")
    return FolderWeights(files, part)


def _expert_faults(experts: list[RunWeights | FolderWeights], runs: list[RunWeights]) -> list[str]:
    """What keeps two experts from being one model."""
    found = []
    for field, expert, wanted in zip(("run", "low_run"), experts, (Expert.high, Expert.low), strict=True):
        if isinstance(expert, RunWeights) and expert.config.expert is not wanted:
            found.append(f"{field}={expert.run_dir} has expert={expert.config.expert} and must have expert={wanted}")
    high, low = (expert.model.to_diffusers() for expert in experts)
    found += [
        f"model.{name}: {high[name]} of high noise, {low[name]} of low noise"
        for name in high
        if high[name] != low.get(name)
    ]
    trained = sorted({run.config.text.kind for run in runs if run.config.text.is_trained})
    if trained:
        found.append(
            f"text.kind={', '.join(trained)} must be umt5, frozen, for two experts: a text encoder that one of them has trained "
            "is not the other's, and a model has one"
        )
    high_boundary, low_boundary = (_boundary(expert) for expert in experts)
    if high_boundary != low_boundary:
        found.append(f"boundary={high_boundary} of high noise, {low_boundary} of low noise")
    high_form, low_form = (_form(expert) for expert in experts)
    if high_form is not low_form:
        found.append(f"conditioning.form={high_form} of high noise, {low_form} of low noise")
    high_vae, low_vae = (_vae(expert) for expert in experts)
    if high_vae and low_vae and not _is_same_vae(high_vae, low_vae):
        found.append(f"vae.path: {high_vae} and {low_vae} are different autoencoders")
    if len(runs) == 2 and not trained:
        first, second = (run.config.text for run in runs)
        if text_fingerprint(first) != text_fingerprint(second):
            found.append(
                f"text: text.path={first.path} with text.max_tokens={first.max_tokens} and text.path={second.path} with "
                f"{second.max_tokens} make different features"
            )
    return found


def _boundary(expert: RunWeights | FolderWeights) -> float | None:
    return expert.config.boundary if isinstance(expert, RunWeights) else expert.files.boundary_ratio


def _form(expert: RunWeights | FolderWeights) -> ConditioningForm:
    if isinstance(expert, RunWeights):
        return expert.config.conditioning.form
    if expert.files.expand_timesteps:
        return ConditioningForm.clean_frames
    takes_channels = expert.model.in_channels != expert.model.out_channels
    return ConditioningForm.channels if takes_channels else ConditioningForm.none


def _vae(expert: RunWeights | FolderWeights) -> Path | None:
    """The folder of the autoencoder that made the expert's latents; None where a pipeline folder has none."""
    return Path(expert.config.vae.path or "") if isinstance(expert, RunWeights) else expert.files.vae


def _is_same_vae(first: Path, second: Path) -> bool:
    """By sizes, latent statistics and weights: an export writes files of its own of the autoencoder that it is given."""
    if VAEConfig.from_diffusers(load_config(first)) != VAEConfig.from_diffusers(load_config(second)):
        return False
    with open_weights(first) as ours, open_weights(second) as theirs:
        return ours.shapes == theirs.shapes and all(
            torch.equal(t.float(), theirs.read(name).float()) for name, t in ours
        )
