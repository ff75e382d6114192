"""The settings of a training run: the dataclasses put together, the rules between them, and Hydra's YAML turned into them.

Every fault of a configuration is found in one go and reported in one message, before anything slow starts.
"""

import dataclasses
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ..data.buckets import Bucket
from ..data.config import Access, DataConfig, build_buckets
from ..kernels.dispatch import KernelsConfig
from ..models.diffusion.conditioning import ConditioningForm
from ..models.diffusion.known_places import ConditioningConfig
from ..models.diffusion.noise_schedule import NoiseScheduleConfig
from ..models.diffusion.samplers import SamplerConfig
from ..models.dit import DiTConfig
from ..models.lora import LoRAConfig
from ..models.text import TextEncoderConfig, TextEncoderKind
from ..models.vae.config import VAEConfig
from ..models.vae.loss import VAELossConfig
from ..models.weights import load_config
from .activations import ActivationPolicy, ActivationsConfig
from .checkpoint import CheckpointConfig
from .checkpoint_folder import resume_fault
from .compile_blocks import CompileConfig
from .compose import ConfigFaults, compose_config
from .config_rules import engine_faults, parallel_faults, process_faults, reliability_faults, size_faults
from .ema import EMAConfig
from .engine_config import EngineConfig
from .experts import Expert, expert_schedule
from .fp8 import Fp8Config
from .guards import GuardConfig
from .mesh import ParallelConfig
from .optimizer import OptimizerConfig
from .outputs import link_fault
from .tracking import TrackingConfig
from .validate import ValidationConfig
from .watchdog import WatchdogConfig

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
    # Samples of one optimizer step over all ranks, for clips of data.frames x height x width; steps of other buckets have as many
    # as cost the same. Where micro_batch x processes does not divide it, places stay empty (ghosts).
    global_batch: int = 0
    # Samples of one forward on one rank, for the same clips; the accumulation steps follow from it.
    micro_batch: int = 0
    # CPU threads of one rank's matrix work; 0 leaves it to torch.
    threads: int = 0
    # What a fresh run starts from: a pipeline folder, of which the transformer, or a run directory; null starts from random
    # weights.
    init_from: str | None = None
    # Of a run directory: ema (its first average), raw (its last weights), or an average's name such as ema-0.999.
    init_weights: str = "ema"
    # The expert that is trained, on its part of the noise levels: high from `boundary` on, low below; none trains on all levels.
    expert: Expert = Expert.none
    # The noise level at which two experts change over, 0.875 in Wan 2.2 T2V and 0.9 in I2V.
    boundary: float = 0.875
    # Where to go on from: auto takes the newest valid checkpoint of run_dir, if there are any; must asks for one; never asks for
    # none; a number is the step of the checkpoint to take, and newer ones are set aside. never and a number are done once: when the
    # same command is repeated, it goes on as auto.
    resume: str = "auto"
    # Attempts in a row that may end without a new checkpoint before the next one refuses to begin (exit 93); 0 is without a limit.
    restart_limit: int = 3
    # Compose and check everything, print it, and stop.
    dry_run: bool = False
    model: DiTConfig = field(default_factory=DiTConfig)
    vae: VAESettings = field(default_factory=VAESettings)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: NoiseScheduleConfig = field(default_factory=NoiseScheduleConfig)
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    vae_loss: VAELossConfig = field(default_factory=VAELossConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    deepspeed: EngineConfig = field(default_factory=EngineConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    activations: ActivationsConfig = field(default_factory=ActivationsConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def buckets(self, world_size: int) -> list[Bucket]:
        """The clip shapes with their batches; a step of each costs about as many FLOPs."""
        return build_buckets(
            self.data,
            global_batch=self.global_batch,
            micro_batch=self.micro_batch,
            world_size=self.data_groups(world_size),
            cost=self.sample_cost,
        )

    def data_groups(self, world_size: int) -> int:
        """How many of so many processes, or groups of them, have clips of their own."""
        return max(1, world_size // self.parallel.sequence)

    def training_data(self) -> DataConfig:
        """The data settings with the paths at what is read: the clips or their latents."""
        if self.data.access is not Access.latents:
            return self.data
        folder = Path(self.data.latents or "") / "train"
        if not self.data.datasets:
            return replace(self.data, path=str(folder))
        caches = {name: replace(part, path=str(folder / name)) for name, part in self.data.datasets.items()}
        return replace(self.data, datasets=caches)

    def validation_data(self) -> DataConfig | None:
        """The same for the validation clips, with every caption kept; None where there are none."""
        if self.validation.path is None:
            return None
        path, access = self.validation.path, self.data.access
        if access is Access.latents:
            path = str(Path(self.data.latents or "") / "validation")
        if access is Access.stream:  # its clips are the same ones every time, which takes an index
            access = Access.raw
        return replace(self.data, path=path, access=access, datasets={}, image_share=None, caption_dropout=0.0)

    def tokenizer_folder(self) -> Path:
        """Where text.kind=umt5_small keeps the tokenizer that it makes of the captions."""
        return Path(self.run_dir) / "tokenizer"

    def latent_shape(self) -> tuple[int, int, int, int]:
        """Channels, frames, height and width of the latents of a clip of data.frames x height x width."""
        return self.vae.resolved().latent_shape(self.data.frames, self.data.height, self.data.width)

    def noise_schedule(self) -> NoiseScheduleConfig:
        """The noise levels that are trained on: those of the objective, or an expert's part of them."""
        return expert_schedule(self.objective, self.expert, self.boundary)

    def input_channels(self) -> int:
        """Channels that the transformer reads: the noisy latents', and those of the conditioning."""
        vae = self.vae.resolved()
        beside = vae.temporal_stride + vae.z_dim if self.conditioning.form is ConditioningForm.channels else 0
        return vae.z_dim + beside

    def sample_cost(self, frames: int, height: int, width: int) -> float:
        """FLOPs of training on one clip, up to a factor: those of the diffusion model; an autoencoder's grow with the pixels."""
        if self.task is TaskKind.video_vae:
            return frames * height * width
        from ..models.flops import training_flops

        latents = self.vae.resolved().latent_shape(frames, height, width)
        return training_flops(self.model, latents[1:], self.text.max_tokens)

    def faults(self, world_size: int | None = None) -> list[str]:
        """Every broken rule of the parts and between them, as messages that name the field, the value and the rule.

        Those about the number of processes only where it is given.
        """
        found = []
        if not self.run_dir:
            found.append("run_dir must be set (an experiment does it: +experiment=NAME)")
        sizes = ("steps", "global_batch", "micro_batch")
        for name in sizes:
            if getattr(self, name) < 1:
                found.append(
                    f"{name}={getattr(self, name)} must be at least 1 (an experiment sets it: +experiment=NAME)"
                )
        if fault := resume_fault("resume", self.resume):
            found.append(fault)
        if self.restart_limit < 0:
            found.append(f"restart_limit={self.restart_limit} must be 0 (no limit) or more")
        if self.threads < 0:
            found.append(f"threads={self.threads} must be 0 (torch decides) or more")
        part_faults = []
        for part in dataclasses.fields(self):
            if dataclasses.is_dataclass(getattr(self, part.name)):
                part_faults += getattr(self, part.name).faults(part.name)
        # Rules between parts need parts that make sense on their own.
        if world_size is not None and not part_faults:
            found += process_faults(self, world_size)
        return found + (
            part_faults or [*size_faults(self), *parallel_faults(self), *engine_faults(self), *reliability_faults(self)]
        )

    def missing_inputs(self) -> list[str]:
        """Files that the settings name and this machine does not have."""
        missing = []
        if self.task is TaskKind.text_to_video:
            if self.vae.path and not (Path(self.vae.path) / "config.json").is_file():
                missing.append(
                    f"vae.path={self.vae.path} must be a folder with config.json (train a VAE first, or set it)"
                )
            if self.text.kind is TextEncoderKind.umt5:
                missing += _missing_parts("text.path", self.text.path or "", ("text_encoder", "tokenizer"))
            if encoder := self.conditioning.image_encoder:
                missing += _missing_parts("conditioning.image_encoder", encoder, ("image_encoder", "image_processor"))
        if self.init_from and not Path(self.init_from).is_dir():
            missing.append(f"init_from={self.init_from} must be a pipeline folder or the directory of a run")
        if self.lora.init_from and not Path(self.lora.init_from).is_file():
            missing.append(f"lora.init_from={self.lora.init_from} must be a LoRA file (.safetensors)")
        return missing


def _missing_parts(field: str, folder: str, parts: tuple[str, str]) -> list[str]:
    absent = [part for part in parts if not (Path(folder) / part).is_dir()]
    if not absent:
        return []
    found = f"{field}={folder} must be a folder with {parts[0]}/ and {parts[1]}/"
    return [found if len(absent) == len(parts) else f"{found}; {absent[0]}/ is missing"]


def load_train_config(overrides: list[str], *, world_size: int | None = None) -> TrainConfig:
    """Compose and check the settings of a training run, for `world_size` processes where their number is known.

    Raises ValueError with all faults in one message: ConfigFaults, but for a choice that is not there and for secrets.
    """
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
        faults += [fault] if (fault := link_fault(Path(config.run_dir))) else []
    if faults:
        raise ConfigFaults(faults, config)
    return config


def read_config(run_dir: Path) -> TrainConfig:
    """The settings that a run wrote into its directory, which may have moved since. Raises ValueError where there are none."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run_dir} must be the directory of a training run (it has no config.yaml)")
    if "${" in path.read_text(
        encoding="utf-8"
    ):  # what a run wrote is data, nothing that this machine's variables go into
        raise ValueError(f"{path} must hold plain values, and no interpolation ${{...}}")
    try:
        written = _in_todays_words(OmegaConf.load(path))
        merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), written, {"run_dir": str(run_dir)})
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"{path} must hold the settings of a run: {str(error).splitlines()[0]}") from error
    return OmegaConf.to_object(merged)  # type: ignore[return-value]


def _in_todays_words(written: Any) -> Any:
    """Settings of a run of an earlier version under the names that they have now."""
    model = written.get("model") if isinstance(written, DictConfig) else None
    if isinstance(model, DictConfig) and model.pop("gradient_checkpointing", False):
        written.activations = {"policy": ActivationPolicy.block.name}
    return written
