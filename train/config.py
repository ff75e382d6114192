"""The settings of a training run: the dataclasses put together, the rules between them, and Hydra's YAML turned into them.

Every fault of a configuration is found in one go and reported in one message, before anything slow starts.
"""

import dataclasses
import os
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ..data.buckets import Bucket, BucketConfig
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
from .checkpoint import CheckpointConfig
from .checkpoint_folder import resume_fault
from .compose import ConfigFaults, compose_config, fault_message
from .ema import EMAConfig
from .engine import EngineConfig
from .experts import Expert, expert_faults, expert_schedule
from .guards import GuardConfig, SpikePolicy
from .initial_weights import initial_faults, initial_kind_fault
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
    # none; a number is the step of the checkpoint to take, and newer ones are set aside.
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
        if self.guards.spike_policy is SpikePolicy.roll_back and self.data.access is Access.stream:
            found.append("guards.spike_policy=roll_back must be another with data.access=stream, which cannot go back")
        if self.checkpoint.keep_best and not (self.validation.every_steps and self.validation.path):
            kept = self.checkpoint.keep_best
            found.append(f"checkpoint.keep_best={kept} must be 0 without validation.path and validation.every_steps")
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
            if self.text.kind is TextEncoderKind.umt5:
                missing += _missing_parts("text.path", self.text.path or "", ("text_encoder", "tokenizer"))
            if encoder := self.conditioning.image_encoder:
                missing += _missing_parts("conditioning.image_encoder", encoder, ("image_encoder", "image_processor"))
        if self.init_from and not Path(self.init_from).is_dir():
            missing.append(f"init_from={self.init_from} must be a pipeline folder or the directory of a run")
        if self.lora.init_from and not Path(self.lora.init_from).is_file():
            missing.append(f"lora.init_from={self.lora.init_from} must be a LoRA file (.safetensors)")
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
        return found + (self._diffusion_faults() if diffusion else self._autoencoder_faults())

    def _autoencoder_faults(self) -> list[str]:
        """Settings that only a diffusion run can have."""
        found = []
        if self.data.access is Access.latents:
            found.append("data.access=latents must be raw with task=video_vae (it learns from pixels)")
        for name, value in (("conditioning.form", self.conditioning.form), ("expert", self.expert)):
            if value.name != "none":
                found.append(f"{name}={value.name} must be none with task=video_vae")
        if self.lora.is_on:
            found.append(f"lora.rank={self.lora.rank} must be 0 (off) with task=video_vae")
        return found

    def _diffusion_faults(self) -> list[str]:
        """The transformer against its autoencoder, text encoder, conditioning, noise levels and initial weights."""
        vae, model, data = self.vae.resolved(), self.model, self.data
        found = []
        if self.vae.path is None:
            found.append("vae.path must name a trained autoencoder's folder with task=text_to_video")
        with_image = self.conditioning.form is ConditioningForm.channels
        found += self._channel_faults(vae)
        if self.text.kind is TextEncoderKind.umt5_small and data.access is Access.stream:
            found.append(
                "text.kind=umt5_small must not go with data.access=stream: its tokenizer is made of an index's captions"
            )
        if model.text_dim != self.text.dim:
            found.append(f"model.text_dim={model.text_dim} must be text.dim={self.text.dim}")
        if with_image and data.access is Access.latents:
            found.append(
                "data.access=latents must be raw or stream with conditioning.form=channels (image latents are of masked pixels)"
            )
        found += self.conditioning.clip_faults(
            "conditioning",
            frames=max(data.frames, *(bucket.frames for bucket in data.buckets), 0),
            temporal_stride=vae.temporal_stride,
            patch_size=model.patch_size,
        )
        if model.image_dim is None and self.conditioning.image_encoder is not None:
            found.append(
                f"conditioning.image_encoder={self.conditioning.image_encoder} must be null where model.image_dim is null"
            )
        if model.image_dim is not None:
            if not with_image or self.conditioning.image_encoder is None:
                found.append(
                    f"model.image_dim={model.image_dim} must come with conditioning.form=channels and conditioning.image_encoder"
                )
            if model.pos_embed_seq_len is not None:
                found.append(
                    f"model.pos_embed_seq_len={model.pos_embed_seq_len} must be null: training gives features of one image"
                )
        found += expert_faults(self.objective, self.expert, self.boundary)
        if self.validation.prompts and (with_image or self.expert is not Expert.none):
            cause = f"expert={self.expert} (a video takes both)"
            if with_image:
                cause = "conditioning.form=channels (a video takes an image)"
            found.append(f"validation.prompts={list(self.validation.prompts)} must be empty with {cause}")
        if self.lora.is_on and not self.init_from:
            found.append(f"init_from must name the weights under the LoRA with lora.rank={self.lora.rank}")
        if self.init_from:
            found += initial_faults(self.init_from, model, self.text, expert=self.expert, boundary=self.boundary)
        if fault := initial_kind_fault(self.init_from, self.init_weights):
            found.append(fault)
        return found

    def _channel_faults(self, vae: VAEConfig) -> list[str]:
        """The transformer's channels against the autoencoder's and those of the conditioning."""
        model, wanted = self.model, self.input_channels()
        if model.in_channels == model.out_channels != vae.z_dim:
            return [
                f"model.in_channels and out_channels={model.out_channels} must be the autoencoder's z_dim={vae.z_dim}: they "
                "are of different models (Wan 2.2 TI2V-5B has 48 latent channels, the other Wan models 16)"
            ]
        found = []
        if model.out_channels != vae.z_dim:
            found.append(f"model.out_channels={model.out_channels} must be the autoencoder's z_dim={vae.z_dim}")
        if model.in_channels != wanted:
            rule = f"the autoencoder's z_dim={vae.z_dim}"
            if self.conditioning.form is ConditioningForm.channels:
                parts = f"{vae.z_dim} of noise, {vae.temporal_stride} of a mask, {vae.z_dim} of image latents"
                rule = f"{wanted} with conditioning.form=channels: {parts}"
            elif model.in_channels == 2 * vae.z_dim + vae.temporal_stride:
                rule += ", or conditioning.form must be channels (the model also takes a mask and image latents)"
            found.append(f"model.in_channels={model.in_channels} must be {rule}")
        return found


def _missing_parts(field: str, folder: str, parts: tuple[str, str]) -> list[str]:
    absent = [part for part in parts if not (Path(folder) / part).is_dir()]
    if not absent:
        return []
    found = f"{field}={folder} must be a folder with {parts[0]}/ and {parts[1]}/"
    return [found if len(absent) == len(parts) else f"{found}; {absent[0]}/ is missing"]


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
        faults += [fault] if (fault := link_fault(Path(config.run_dir))) else []
    if faults:
        raise ValueError(fault_message(faults))
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
        merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.load(path), {"run_dir": str(run_dir)})
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"{path} must hold the settings of a run: {str(error).splitlines()[0]}") from error
    return OmegaConf.to_object(merged)  # type: ignore[return-value]
