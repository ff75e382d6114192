"""The settings of a training run: the dataclasses put together, the rules between them, and Hydra's YAML turned into them.

Every fault of a configuration is found in one go and reported in one message, before anything slow starts.
"""

import dataclasses
import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..data.config import Access, DataConfig
from ..data.plan import micro_steps
from ..kernels.dispatch import KernelsConfig
from ..models.diffusion.noise_schedule import NoiseScheduleConfig
from ..models.diffusion.samplers import SamplerConfig
from ..models.dit import DiTConfig
from ..models.text import TextEncoderConfig, TextEncoderKind
from ..models.vae.config import VAEConfig
from ..models.vae.loss import VAELossConfig
from ..models.weights import load_config
from .checkpoint import CheckpointConfig
from .ema import EMAConfig
from .engine import EngineConfig
from .optimizer import OptimizerConfig
from .tracking import TrackingConfig
from .validate import ValidationConfig

SCHEMA_NAME = "train_schema"


class TaskKind(Enum):
    text_to_video = "text_to_video"
    video_vae = "video_vae"


@dataclass
class VAESettings:
    """The video autoencoder: one to read from a folder, or one to train."""

    # Folder with config.json and diffusion_pytorch_model.safetensors (a VAE run's `model/vae`); null trains one from scratch.
    path: str | None = None
    # Sizes of the autoencoder to train; where `path` exists, its config.json decides instead.
    architecture: VAEConfig = field(default_factory=VAEConfig)

    def faults(self, field: str) -> list[str]:
        return self.architecture.faults(f"{field}.architecture")

    def resolved(self) -> VAEConfig:
        """The sizes in force: those of the folder where it exists."""
        if self.path is not None and (Path(self.path) / "config.json").is_file():
            return VAEConfig.from_diffusers(load_config(self.path))
        return self.architecture


@dataclass
class TrainConfig:
    """Everything a training run depends on."""

    # Folder of this run; calling `train` again with the same one resumes.
    run_dir: str = ""
    # What is trained: the diffusion transformer or the video autoencoder.
    task: TaskKind = TaskKind.text_to_video
    # Seed of weights, data order, crops, noise and timesteps.
    seed: int = 0
    # Optimizer steps of the whole run.
    steps: int = 0
    # Samples of one optimizer step over all ranks. Where micro_batch x processes does not divide it, places stay empty (ghosts).
    global_batch: int = 0
    # Samples of one forward on one rank; the accumulation steps follow from it.
    micro_batch: int = 0
    # CPU threads of one rank's matrix work; 0 leaves it to torch.
    threads: int = 0
    # Run directory whose EMA weights a fresh run starts from; null starts from random weights.
    init_from: str | None = None
    # Compose and check everything, print it, and stop.
    dry_run: bool = False
    model: DiTConfig = field(default_factory=DiTConfig)
    vae: VAESettings = field(default_factory=VAESettings)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: NoiseScheduleConfig = field(default_factory=NoiseScheduleConfig)
    vae_loss: VAELossConfig = field(default_factory=VAELossConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    deepspeed: EngineConfig = field(default_factory=EngineConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def accumulation(self, world_size: int) -> int:
        """Micro-batches of one rank in one step."""
        return micro_steps(self.global_batch, world_size=world_size, micro_batch=self.micro_batch)

    def ghost_share(self, world_size: int) -> float:
        """The share of a step's places that hold no sample, and are computed for nothing."""
        return 1 - self.global_batch / (self.accumulation(world_size) * self.micro_batch * world_size)

    def training_data(self) -> DataConfig:
        """The data settings with `path` at what is read: the clips or their latents."""
        if self.data.access is Access.raw:
            return self.data
        return replace(self.data, path=str(Path(self.data.latents or "") / "train"))

    def validation_data(self) -> DataConfig | None:
        """The same for the validation clips, with every caption kept; None where there are none."""
        if self.validation.path is None:
            return None
        path = self.validation.path
        if self.data.access is Access.latents:
            path = str(Path(self.data.latents or "") / "validation")
        return replace(self.data, path=path, caption_dropout=0.0)

    def latent_shape(self) -> tuple[int, int, int, int]:
        """Channels, frames, height and width of one clip's latents."""
        return self.vae.resolved().latent_shape(self.data.frames, self.data.height, self.data.width)

    def faults(self, world_size: int) -> list[str]:
        """Every broken rule of the parts and between them, as messages that name the field, the value and the rule."""
        found = []
        if not self.run_dir:
            found.append("run_dir must be set (an experiment does it: +experiment=NAME)")
        sizes = ("steps", "global_batch", "micro_batch")
        for name in sizes:
            if getattr(self, name) < 1:
                found.append(
                    f"{name}={getattr(self, name)} must be at least 1 (an experiment sets it: +experiment=NAME)"
                )
        if self.threads < 0:
            found.append(f"threads={self.threads} must be 0 (torch decides) or more")
        part_faults = []
        for part in dataclasses.fields(self):
            if dataclasses.is_dataclass(getattr(self, part.name)):
                part_faults += getattr(self, part.name).faults(part.name)
        # Rules between parts need parts that make sense on their own.
        return found + (part_faults or self._size_faults())

    def missing_inputs(self) -> list[str]:
        """Files that the settings name and this machine does not have."""
        missing = []
        if self.task is TaskKind.text_to_video:
            if self.vae.path and not (Path(self.vae.path) / "config.json").is_file():
                missing.append(
                    f"vae.path={self.vae.path} must be a folder with config.json (train a VAE first, or set it)"
                )
            if self.text.kind is TextEncoderKind.umt5 and not (Path(self.text.path or "") / "text_encoder").is_dir():
                missing.append(f"text.path={self.text.path} must be a folder with text_encoder/ and tokenizer/")
        if self.init_from and not Path(self.init_from).is_dir():
            missing.append(f"init_from={self.init_from} must be the directory of a run")
        return missing

    def _size_faults(self) -> list[str]:
        """Clip sizes and widths that do not fit each other."""
        found = []
        vae, data = self.vae.resolved(), self.data
        if (data.frames - 1) % vae.temporal_stride:
            found.append(
                f"data.frames={data.frames} must be 1 + a multiple of {vae.temporal_stride} (the autoencoder's stride)"
            )
        diffusion = self.task is TaskKind.text_to_video
        patch = self.model.patch_size if diffusion else [1, 1, 1]
        for name, patch_side in (("height", patch[1]), ("width", patch[2])):
            value, stride = getattr(data, name), vae.spatial_stride * patch_side
            if value % stride:
                found.append(
                    f"data.{name}={value} must be a multiple of {stride} "
                    f"(the autoencoder's stride {vae.spatial_stride} x the model's patch {patch_side})"
                )
        if not diffusion:
            if data.access is Access.latents:
                found.append("data.access=latents must be raw with task=video_vae (it learns from pixels)")
            return found
        if self.vae.path is None:
            found.append("vae.path must name a trained autoencoder's folder with task=text_to_video")
        for name in ("in_channels", "out_channels"):
            if getattr(self.model, name) != vae.z_dim:
                found.append(f"model.{name}={getattr(self.model, name)} must be the autoencoder's z_dim={vae.z_dim}")
        if self.model.text_dim != self.text.dim:
            found.append(f"model.text_dim={self.model.text_dim} must be text.dim={self.text.dim}")
        if (1 + (data.frames - 1) // vae.temporal_stride) % patch[0]:
            found.append(
                f"data.frames={data.frames} must give a multiple of model.patch_size[0]={patch[0]} latent frames"
            )
        return found


def compose_config(overrides: list[str], *, config_class: type, config_name: str, schema_name: str) -> Any:
    """Compose the YAML files with command-line overrides into `config_class`, whose own `faults` are left to the caller.

    Raises ValueError with every unknown key, wrong type and unreadable override in one message.
    """
    config, faults = _compose_untyped(overrides, config_name=config_name, schema_name=schema_name)
    typed = OmegaConf.structured(config_class)
    for path, value in _leaves(config):
        faults += _set_typed(typed, path, value, config_class)
    result = OmegaConf.to_object(typed)
    if faults:
        # What could be set is set, so rules between fields can already speak; fields in doubt keep their defaults.
        raise ConfigFaults(faults, result)
    return result


class ConfigFaults(ValueError):
    """Faults found while composing, with the settings as far as they are known."""

    def __init__(self, faults: list[str], partial: Any) -> None:
        self.faults, self.partial = faults, partial
        super().__init__(fault_message(faults))


def fault_message(faults: list[str]) -> str:
    """One message for all faults."""
    lines = "\n".join(f"  - {fault}" for fault in faults)
    return f"the configuration has {len(faults)} fault{'s' if len(faults) > 1 else ''}:\n{lines}"


def load_train_config(overrides: list[str]) -> TrainConfig:
    """Compose and check a training run's settings. Raises ValueError with all faults in one message."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        config = compose_config(overrides, config_class=TrainConfig, config_name="train", schema_name=SCHEMA_NAME)
        faults: list[str] = []
    except ConfigFaults as error:
        config, faults = error.partial, error.faults
    in_doubt = [fault.split("=")[0].split(" ")[0] for fault in faults]
    for fault in config.faults(world_size):
        field_name = fault.split("=")[0].split(" ")[0]
        # A field that could not be set has its default: what a rule says of it would mislead.
        if not any(path == field_name or path.startswith(f"{field_name}.") for path in in_doubt):
            faults.append(fault)
    if not config.dry_run:  # settings can be checked where the weights are not
        faults += config.missing_inputs()
    if faults:
        raise ValueError(fault_message(faults))
    return config


def plain(config: Any) -> dict[str, Any]:
    """Settings as plain numbers, strings, lists and dicts, enums by name; what YAML, JSON and W&B take."""
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)  # type: ignore[return-value]


def read_config(run_dir: Path) -> TrainConfig:
    """The settings that a run wrote into its directory. Raises ValueError where there are none."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run_dir} must be the directory of a training run (it has no config.yaml)")
    merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.load(path))
    return OmegaConf.to_object(merged)  # type: ignore[return-value]


def register_schema(name: str, config_class: type) -> None:
    """Make the dataclass known to Hydra, which then shows every field and its default in `--cfg job`."""
    ConfigStore.instance().store(name=name, node=config_class)


def _compose_untyped(overrides: list[str], *, config_name: str, schema_name: str) -> tuple[DictConfig, list[str]]:
    """The YAML files and overrides merged without a schema, so that one wrong key does not hide the next."""
    faults: list[str] = []
    groups, values = [], []
    known_groups = _config_groups()
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except Exception as error:  # Hydra's parser raises its own and antlr's classes
            faults.append(f"{text!r} is not KEY=VALUE ({str(error).splitlines()[0]})")
            continue
        if override.key_or_group in known_groups:
            groups.append(text)
        else:
            values.append(override)
    store = ConfigStore.instance()
    store.store(name=schema_name, node={})
    with initialize_config_module("muybridge.configs", version_base="1.3"):
        try:
            config = compose(config_name, overrides=groups)
        except Exception as error:  # a missing group member, a YAML error: Hydra's message names file and choices
            raise ValueError(f"the configuration cannot be composed: {error}") from error
    OmegaConf.set_struct(config, False)
    for override in values:
        _apply(config, override, faults)
    return config, faults


def _apply(config: DictConfig, override: Override, faults: list[str]) -> None:
    if override.is_delete():
        faults.append(f"{override.input_line!r}: deleting a key is not supported, set it instead")
    elif override.is_sweep_override():
        faults.append(f"{override.input_line!r}: a sweep needs --multirun")
    else:
        OmegaConf.update(config, override.key_or_group, override.value(), merge=True, force_add=True)


def _config_groups() -> set[str]:
    root = Path(__file__).parents[1] / "configs"
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_dir() and path.name != "__pycache__"}


def _leaves(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in map(str, node):
        path = f"{prefix}{key}"
        value = node._get_node(key)
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_interpolation():
            yield from _leaves(value, f"{path}.")
        elif not OmegaConf.is_missing(node, key):
            yield path, node[key]


def _set_typed(typed: DictConfig, path: str, value: Any, config_class: type) -> list[str]:
    """Set one leaf in the typed settings; returns the faults."""
    parent, known = typed, config_class.__name__
    *sections, leaf = path.split(".")
    for depth, name in enumerate([*sections, leaf]):
        here = ".".join([*sections, leaf][: depth + 1])
        if not isinstance(parent, DictConfig) or name not in parent:
            options = list(parent) if isinstance(parent, DictConfig) else []
            close = difflib.get_close_matches(name, [str(option) for option in options], n=1)
            hint = f", did you mean {'.'.join([*sections[:depth], close[0]])}?" if close else ""
            return [f"{here} is not a setting of {known}{hint}"]
        if depth < len(sections):
            parent = parent._get_node(name)  # type: ignore[assignment]
            known = here
    try:
        parent[leaf] = value
    except OmegaConfBaseException as error:
        rule = str(error).splitlines()[0]
        return [f"{path}={value}: {rule}"]
    return []
