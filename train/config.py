"""The settings of a training run: the dataclasses put together, the rules between them, and Hydra's YAML turned into them.

Every fault of a configuration is found in one go and reported in one message, before anything slow starts.
"""

import dataclasses
import os
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

from omegaconf import OmegaConf

from ..data.buckets import Bucket, BucketConfig
from ..data.config import Access, DataConfig, build_buckets
from ..kernels.dispatch import KernelsConfig
from ..models.diffusion.noise_schedule import NoiseScheduleConfig
from ..models.diffusion.samplers import SamplerConfig
from ..models.dit import DiTConfig
from ..models.text import TextEncoderConfig, TextEncoderKind
from ..models.vae.config import VAEConfig
from ..models.vae.loss import VAELossConfig
from ..models.weights import load_config
from .checkpoint import CheckpointConfig
from .compose import ConfigFaults, compose_config, fault_message
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
    # Samples of one optimizer step over all ranks, for clips of data.frames x height x width; steps of other buckets have as many
    # as cost the same. Where micro_batch x processes does not divide it, places stay empty (ghosts).
    global_batch: int = 0
    # Samples of one forward on one rank, for the same clips; the accumulation steps follow from it.
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

    def buckets(self, world_size: int) -> list[Bucket]:
        """The clip shapes with their batches; a step of each costs about as many FLOPs."""
        return build_buckets(
            self.data,
            global_batch=self.global_batch,
            micro_batch=self.micro_batch,
            world_size=world_size,
            cost=self.sample_cost,
        )

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

    def latent_shape(self) -> tuple[int, int, int, int]:
        """Channels, frames, height and width of the latents of a clip of data.frames x height x width."""
        return self.vae.resolved().latent_shape(self.data.frames, self.data.height, self.data.width)

    def sample_cost(self, frames: int, height: int, width: int) -> float:
        """FLOPs of training on one clip, up to a factor: those of the diffusion model; an autoencoder's grow with the pixels."""
        if self.task is TaskKind.video_vae:
            return frames * height * width
        from ..models.flops import training_flops

        latents = self.vae.resolved().latent_shape(frames, height, width)
        return training_flops(self.model, latents[1:], self.text.max_tokens)

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
        vae, data = self.vae.resolved(), self.data
        diffusion = self.task is TaskKind.text_to_video
        patch = self.model.patch_size if diffusion else [1, 1, 1]
        shapes: dict[str, DataConfig | BucketConfig] = {
            "data": data,
            **{f"data.buckets[{i}]": bucket for i, bucket in enumerate(data.buckets)},
        }
        found = []
        for field_name, shape in shapes.items():
            if (shape.frames - 1) % vae.temporal_stride:
                found.append(
                    f"{field_name}.frames={shape.frames} must be 1 + a multiple of {vae.temporal_stride} (the autoencoder's stride)"
                )
            for name, patch_side in (("height", patch[1]), ("width", patch[2])):
                value, stride = getattr(shape, name), vae.spatial_stride * patch_side
                if value % stride:
                    found.append(
                        f"{field_name}.{name}={value} must be a multiple of {stride} "
                        f"(the autoencoder's stride {vae.spatial_stride} x the model's patch {patch_side})"
                    )
            if (1 + (shape.frames - 1) // vae.temporal_stride) % patch[0]:
                found.append(
                    f"{field_name}.frames={shape.frames} must give a multiple of model.patch_size[0]={patch[0]} latent frames"
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
        return found


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


def read_config(run_dir: Path) -> TrainConfig:
    """The settings that a run wrote into its directory. Raises ValueError where there are none."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run_dir} must be the directory of a training run (it has no config.yaml)")
    merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.load(path))
    return OmegaConf.to_object(merged)  # type: ignore[return-value]
