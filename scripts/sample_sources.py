"""What `muybridge sample` samples from: a training run or a pipeline folder, behind one small interface.

Opening one reads settings and checks; weights are read when they are needed.
"""

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.diffusion.conditioning import ConditioningForm, clean_count_rule
from ..models.diffusion.samplers import SamplerConfig, SamplerKind
from ..models.diffusion.scheduler_file import sampler_from_file
from ..models.dit import DiT, DiTConfig
from ..models.embeddings import Fp32Linear
from ..models.image_encoder import ClipImageEncoder, image_feature_dim
from ..models.lora import LoRAFactors
from ..models.lora_files import read_lora
from ..models.pipeline_folder import PipelineFiles, is_pipeline_folder
from ..models.prompt_cache import PromptCache, user_prompt_folder
from ..models.text import TextEncoderConfig, TextEncoderKind, Umt5TextEncoder
from ..models.vae import VAEConfig
from ..models.vae.folder import load_vae
from ..models.weight_files import read_header, read_json
from ..models.weights import load_config, load_weights_from
from ..train.checkpoint_folder import newest_checkpoint
from ..train.config import TaskKind, read_config
from ..train.engine_config import Precision
from ..train.experts import Expert
from ..train.fragments import weight_kind
from ..train.generate import VideoModels
from ..train.tasks import TextToVideoTask
from ..train.trained_weights import load_trained
from .export_plan import EXPORTED_SETTINGS
from .sample import ClipSize, SampleConfig

SCHEDULER_NAME = "scheduler_config.json"
UMT5_TOKENS = 512  # rows of text features that every public Wan model was trained with


@dataclass
class LoRAFiles:
    """LoRA files to add to a model's weights."""

    files: list[str] = field(default_factory=list)
    low_noise_files: list[str] = field(default_factory=list)  # for the expert of low noise
    scale: float = 1.0  # the changes are multiplied with this


class Source(ABC):
    """A model to sample from."""

    size: ClipSize  # what it makes unless told otherwise
    sampler: SamplerConfig  # likewise
    transformer: DiTConfig
    vae: VAEConfig
    form: ConditioningForm  # how it is given images
    batch: int  # videos sampled at once unless told otherwise
    description: str

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @abstractmethod
    def encode_text(self, prompts: list[str]) -> Tensor:
        """What the transformer takes as text, [B, ...]."""

    @abstractmethod
    def image_features(self, images: list[Tensor]) -> Tensor | None:
        """Of a first and perhaps a last image [1, 3, H, W] in [-1, 1], where the transformer reads such beside the text."""

    @abstractmethod
    def models(self) -> VideoModels:
        """The networks, ready to sample."""

    def size_faults(self, size: ClipSize) -> list[str]:
        """What of a size the model cannot make, as messages that name the field, the value and the rule."""
        patch, found = self.transformer.patch_size, []
        if size.frames < 1 or (size.frames - 1) % self.vae.temporal_stride:
            found.append(f"frames={size.frames} must be 1 + a multiple of {self.vae.temporal_stride}")
        elif self.vae.latent_shape(size.frames, size.height, size.width)[1] % patch[0]:
            found.append(f"frames={size.frames} must give a multiple of {patch[0]} latent frames")
        for name, side in (("height", patch[1]), ("width", patch[2])):
            value, step = getattr(size, name), self.vae.spatial_stride * side
            if value < 1 or value % step:
                found.append(f"{name}={value} must be a multiple of {step}")
        if size.fps <= 0:
            found.append(f"fps={size.fps} must be positive")
        return found

    def tile_faults(self, tile: int | None) -> list[str]:
        """What of the side of a tile, in pixels, the autoencoder cannot decode, in the same form."""
        step = self.vae.spatial_stride
        if tile is None or (tile >= 2 * step and tile % step == 0):
            return []
        return [f"tile={tile} must be a multiple of {step}, at least {2 * step} (neighbours share a part), or null"]

    def image_faults(self, image: str | None, last_image: str | None, frames: int) -> list[str]:
        """What of the files of a first and a last image does not suit the model or the number of frames, in the same form."""
        given = {name: value for name, value in (("image", image), ("last_image", last_image)) if value is not None}
        if self.form is ConditioningForm.none:
            words = f"must be left out: {self.description} makes videos of text alone"
            return [f"{name}={value} {words}" for name, value in given.items()]
        found = []
        if last_image is not None and self.form is not ConditioningForm.channels:
            found.append(f"last_image={last_image} must be left out: {self.description} takes a first image only")
        if image is None and (last_image is not None or self.form is ConditioningForm.channels):
            found.append(f"image=FILE must be given: {self.description} makes videos that begin with an image")
        if last_image is None and self.transformer.pos_embed_seq_len is not None:
            found.append(f"last_image=FILE must be given: {self.description} makes videos between two images")
        if given and frames <= len(given):
            found.append(f"frames={frames} must be more than the images given, {len(given)}")
        if given and self.form is ConditioningForm.clean_frames:
            rule = clean_count_rule(1, self.vae.temporal_stride, self.transformer.patch_size)
            found += [f"image={image} cannot be kept: {rule}"] if rule else []
        return found


class RunSource(Source):
    """The newest checkpoint of a text-to-video run."""

    def __init__(self, run_dir: str, kind: str) -> None:
        """Raises ValueError where there is no such run, no checkpoint that is whole, or none of these weights in it."""
        super().__init__()
        run = read_config(Path(run_dir))
        if run.task is not TaskKind.text_to_video:
            raise ValueError(f"run={run_dir} has task={run.task.name}; sampling needs a text_to_video run")
        if run.expert is not Expert.none:
            raise ValueError(
                f"run={run_dir} has expert={run.expert.name}, which makes no video alone; export both experts "
                "(muybridge export run=HIGH low_run=LOW out=FOLDER) and sample with model=FOLDER"
            )
        checkpoint = newest_checkpoint(Path(run_dir) / "checkpoints")
        if checkpoint is None:
            raise ValueError(f"run={run_dir} has no checkpoint yet")
        self._run, self._checkpoint, self._kind = run, checkpoint, weight_kind(checkpoint, kind)
        self.description = str(checkpoint)
        self.size = ClipSize(run.data.frames, run.data.height, run.data.width, run.data.fps)
        self.sampler, self.transformer, self.vae = run.sampler, run.model, run.vae.resolved()
        self.form, self.batch = run.conditioning.form, 8
        self._image_encoder = run.conditioning.image_encoder

    @cached_property
    def _task(self) -> TextToVideoTask:
        return TextToVideoTask(self._run, self.device)

    def encode_text(self, prompts: list[str]) -> Tensor:
        return self._task.encode_prompts(prompts)

    def image_features(self, images: list[Tensor]) -> Tensor | None:
        return _image_features(self.transformer, self._image_encoder, images)

    def models(self) -> VideoModels:
        model = self._task.build_model()
        load_trained(model, self._run, self._checkpoint, self._kind)
        model.eval().requires_grad_(False)
        if self._run.deepspeed.precision is Precision.bf16:
            model.bfloat16()  # as in training
        return VideoModels(model, self._task.vae)


class FolderSource(Source):
    """A pipeline folder: public Wan weights, or what `muybridge export` wrote."""

    def __init__(self, folder: str, loras: LoRAFiles) -> None:
        """Raises ValueError where parts are missing or do not fit each other."""
        super().__init__()
        if not is_pipeline_folder(folder):
            raise ValueError(
                f"model={folder} must be a pipeline folder, with model_index.json (muybridge import makes one)"
            )
        files = PipelineFiles.find(folder)
        self._files, self._loras, root = files, loras, files.root
        self._transformer, self._vae, self._text_encoder = root / "transformer", root / "vae", root / "text_encoder"
        needed = ["transformer", "vae", "text_encoder", "tokenizer"]
        if files.transformer is not None:
            self.transformer = DiTConfig.from_diffusers(load_config(self._transformer))
            needed += ["image_encoder", "image_processor"] if self.transformer.image_dim is not None else []
        if absent := [f"{part}/" for part in needed if getattr(files, part) is None]:
            raise ValueError(f"model={folder} lacks {', '.join(absent)} (muybridge import --help says how to add it)")
        self.description = folder
        self.vae = VAEConfig.from_diffusers(load_config(self._vae))
        text_dim = load_config(self._text_encoder).get("d_model")
        if not isinstance(text_dim, int):
            raise ValueError(
                f"{self._text_encoder}/config.json: d_model={text_dim} must be the width of the text features"
            )
        trained = _training_settings([self._transformer, files.transformer_2])
        rows = trained.get("text", {}).get("max_tokens") or _text_rows(root / "tokenizer")
        self._text = TextEncoderConfig(TextEncoderKind.umt5, dim=text_dim, max_tokens=rows, path=folder)
        self.form, self.batch = _form(files, self.transformer), 1
        if faults := self._part_faults():
            raise ValueError("; ".join(faults))
        self.sampler = SamplerConfig()
        if "sampler" in trained:
            self.sampler = SamplerConfig(**{**trained["sampler"], "kind": SamplerKind(trained["sampler"]["kind"])})
        elif files.scheduler is not None:
            self.sampler = sampler_from_file(read_json(files.scheduler / SCHEDULER_NAME), self.sampler)
        is_wan_2_2_vae = self.vae.spatial_stride == 16
        self.size = ClipSize(121, 704, 1280, 24) if is_wan_2_2_vae else ClipSize(81, 480, 832, 16)
        if "data" in trained:
            self.size = ClipSize(**trained["data"])

    def encode_text(self, prompts: list[str]) -> Tensor:
        # Read for this call only, if at all: umT5-XXL takes as much memory as a transformer of 5 B parameters.
        cache = PromptCache(user_prompt_folder(), self._text, build=self._read_umt5, dtype=self._dtype)
        return cache.encode(prompts).to(self.device)

    def _read_umt5(self) -> Umt5TextEncoder:
        return Umt5TextEncoder(self._text, dtype=self._dtype).to(self.device)

    def image_features(self, images: list[Tensor]) -> Tensor | None:
        return _image_features(self.transformer, self._files.root, images)

    def models(self) -> VideoModels:
        vae = load_vae(self._vae).to(self.device).eval().requires_grad_(False)
        high = self._load(self._transformer, self._loras.files, field="lora")
        if self._files.transformer_2 is None:
            return VideoModels(high, vae)
        low = self._load(self._files.transformer_2, self._loras.low_noise_files, field="lora_low")
        assert self._files.boundary_ratio is not None
        return VideoModels(high, vae, low, self._files.boundary_ratio)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def _load(self, folder: Path, loras: list[str], *, field: str) -> DiT:
        with torch.device("meta"):
            dit = DiT(self.transformer)
        dit = _in_matmul_dtype(dit.to_empty(device=self.device), self._dtype).eval().requires_grad_(False)
        load_weights_from(dit, folder)
        _add_loras(dit, loras, self._loras.scale, field=field)
        return dit

    def _part_faults(self) -> list[str]:
        """Parts that were not made for each other."""
        files, dit, found = self._files, self.transformer, []
        if dit.out_channels != self.vae.z_dim:
            found.append(
                f"{self._transformer} makes latents of {dit.out_channels} channels and {self._vae} has {self.vae.z_dim}: "
                "a Wan 2.1 autoencoder has 16, that of Wan 2.2 TI2V has 48"
            )
        if dit.text_dim != self._text.dim:
            found.append(
                f"{self._transformer} takes text features of width {dit.text_dim}, and those of {self._text_encoder} have "
                f"{self._text.dim}"
            )
        if dit.image_dim is not None and (width := image_feature_dim(files.root)) != dit.image_dim:
            found.append(
                f"{self._transformer} takes image features of width {dit.image_dim}, and {files.root}/image_encoder makes {width}"
            )
        if files.transformer_2 is not None:
            if DiTConfig.from_diffusers(load_config(files.transformer_2)) != dit:
                found.append(f"{files.transformer_2}/config.json must have the sizes of {self._transformer}")
        elif self._loras.low_noise_files:
            found.append(f"lora_low needs two experts, and {files.root} has one transformer")
        return found


def open_source(config: SampleConfig) -> Source:
    """What the settings name. Raises ValueError where it cannot be sampled from."""
    if config.run:
        return RunSource(config.run, config.weights)
    return FolderSource(config.model, LoRAFiles(config.lora, config.lora_low, config.lora_scale))


def _image_features(transformer: DiTConfig, folder: Path | str | None, images: list[Tensor]) -> Tensor | None:
    """Features [1, I, D]: of both images where rows have places that tell them apart, else of the first, as in training."""
    if transformer.image_dim is None:
        return None
    assert folder is not None
    encoder = ClipImageEncoder(folder).to(images[0].device)
    shown = images if transformer.pos_embed_seq_len is not None else images[:1]
    return torch.cat([encoder.encode(image) for image in shown], dim=1)


def _text_rows(tokenizer: Path) -> int:
    """Rows of text features: those of public models, or fewer where a tokenizer of our own was made for fewer."""
    path = tokenizer / "tokenizer_config.json"
    limit = read_json(path).get("model_max_length") if path.is_file() else None
    return int(min(UMT5_TOKENS, limit or UMT5_TOKENS))


def _training_settings(transformers: list[Path | None]) -> dict[str, Any]:
    """What `muybridge export` or `import` wrote into the headers of the experts' weights; {} for weights from elsewhere."""
    headers = [read_header(folder) for folder in transformers if folder is not None]
    settings: dict[str, Any] = {}
    for header in headers:
        settings = json.loads(header.get(EXPORTED_SETTINGS, "{}")) | settings  # those of the first expert that has them
    return settings


def _form(files: PipelineFiles, transformer: DiTConfig) -> ConditioningForm:
    if files.expand_timesteps:
        return ConditioningForm.clean_frames
    if transformer.in_channels != transformer.out_channels:
        return ConditioningForm.channels
    return ConditioningForm.none


def _in_matmul_dtype(dit: DiT, dtype: torch.dtype) -> DiT:
    """The layers whose products the original runs in bf16; what it keeps in float32 stays so."""
    for module in dit.modules():
        if isinstance(module, nn.Linear | nn.Conv3d) and not isinstance(module, Fp32Linear):
            module.to(dtype)
    return dit


@torch.no_grad()
def _add_loras(dit: DiT, files: list[str], scale: float, *, field: str) -> None:
    """Add `scale` times the changes of all files, summed in float32, so that each weight is rounded once.

    Raises ValueError, naming the setting `field`, for a file whose layers are not the transformer's.
    """
    layers = dict(dit.named_modules())
    changes: dict[str, list[LoRAFactors]] = {}
    for file in files:
        for name, factors in read_lora(file).items():
            layer = layers.get(name)
            if not isinstance(layer, nn.Linear) or layer.weight.shape != (len(factors.up), factors.down.shape[1]):
                raise ValueError(f"{field}={file}: its layer {name} has no match of its size in this transformer")
            changes.setdefault(name, []).append(factors)
    for name, of_files in changes.items():
        weight = layers[name].weight
        assert isinstance(weight, Tensor)
        changed = weight.float()
        for factors in of_files:
            there = LoRAFactors(factors.down.to(weight.device), factors.up.to(weight.device), factors.scale)
            changed = changed + scale * there.delta()
        weight.copy_(changed)
