"""What a run trains: the diffusion transformer or the video autoencoder, each as a model, a loss and an export.

The trainer knows neither; a task knows nothing of ranks, optimizers or checkpoints.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batch import VideoBatch
from ..kernels.dispatch import configure
from ..models.diffusion.conditioning import ConditioningForm
from ..models.diffusion.objective import keyed_noise, keyed_noise_levels, rectified_flow_loss
from ..models.dit import DiT
from ..models.lora import lora_factors
from ..models.lora_files import write_lora
from ..models.prompt_cache import PromptCache
from ..models.text import ByteTextEncoder, TextEncoderKind, Umt5TextEncoder, pad_features
from ..models.text_small import SmallUmt5
from ..models.text_to_video import TextToVideoModel
from ..models.vae import VideoVAE
from ..models.vae.folder import load_vae
from ..models.vae.loss import psnr_db, vae_loss
from ..models.vae.statistics import LatentStatistics
from ..models.weights import save_model
from .conditions import ClipConditions
from .config import TaskKind, TrainConfig
from .drawn_weights import Build, at_once
from .experts import Expert
from .mesh import Mesh
from .step_clock import Part, StepClock
from .vae_parallel import encode_in_parallel

# Training clips over which the latent statistics of a new autoencoder are measured.
STATISTICS_CLIPS = 512


@dataclass
class SampleLosses:
    """The loss of each sample [B], and named parts of it or measures beside it, also [B]."""

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    noise_levels: Tensor | None = None  # [B], of a diffusion loss


class Task(ABC):
    """A model to train and its loss."""

    def __init__(
        self, config: TrainConfig, device: torch.device, *, mesh: Mesh | None = None, clock: StepClock | None = None
    ) -> None:
        """`mesh` is that of the processes that work together, if there are any; `clock` hears how long the frozen models take."""
        self.config = config
        self.device = device
        self.mesh = mesh
        self.clock = clock or StepClock(device)

    @abstractmethod
    def build_model(self, build: Build = at_once) -> nn.Module:
        """The trainable module with fresh weights, on the device; `build` makes its large parts."""

    @abstractmethod
    def losses(self, model: Callable[..., Any], batch: VideoBatch, *, purpose: str = "") -> SampleLosses:
        """Losses of a micro-batch; all randomness is keyed by (seed, purpose, step, slot)."""

    @abstractmethod
    def export(self, folder: Path, weights: dict[str, Tensor], clips: Iterator[VideoBatch]) -> Path:
        """Write full fp32 weights in the diffusers folder form; `clips` are training clips to measure on."""


class TextToVideoTask(Task):
    """Rectified flow on latents, given captions."""

    def __init__(
        self, config: TrainConfig, device: torch.device, *, mesh: Mesh | None = None, clock: StepClock | None = None
    ) -> None:
        super().__init__(config, device, mesh=mesh, clock=clock)
        self._tokenizer = self._trained_text_encoder()  # only its tokens are asked for
        self._umt5: Umt5TextEncoder | None = None
        self._vae: VideoVAE | None = None
        self.conditions = ClipConditions(config, self.encode_video, device)

    @property
    def umt5(self) -> Umt5TextEncoder:
        """The frozen text encoder, read when a caption needs it: a latent cache has the captions' features."""
        if self._umt5 is None:
            self._umt5 = self._read_umt5()
        return self._umt5

    def _read_umt5(self) -> Umt5TextEncoder:
        return Umt5TextEncoder(self.config.text).to(self.device)

    @cached_property
    def _prompt_cache(self) -> PromptCache:
        return PromptCache(Path(self.config.run_dir) / "prompt_features", self.config.text, build=self._read_umt5)

    @property
    def vae(self) -> VideoVAE:
        """The frozen autoencoder, read when it is first needed: a run on cached latents may never need it."""
        if self._vae is None:
            assert self.config.vae.path is not None
            # fp32: encoding in bf16 moves latents by about 2 %.
            self._vae = load_vae(self.config.vae.path).to(self.device).eval().requires_grad_(False)
        return self._vae

    def build_model(self, build: Build = at_once) -> nn.Module:
        configure(self.config.kernels)
        with self.device:
            return TextToVideoModel(build(lambda: DiT(self.config.model)), self._trained_text_encoder())

    def encode_text(self, captions: list[str]) -> Tensor:
        """What the model takes as text: tokens for an encoder trained along, features of a frozen one."""
        with self.clock.running(Part.text):
            if self._tokenizer is not None:
                return self._tokenizer.tokenize(captions).to(self.device)
            return self.umt5.encode(captions)

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """As `encode_text`, but a frozen encoder that captions do not keep in memory is read for new prompts only."""
        if self._tokenizer is None and self._umt5 is None:
            return self._prompt_cache.encode(prompts).to(self.device)
        return self.encode_text(prompts)

    def _trained_text_encoder(self) -> ByteTextEncoder | SmallUmt5 | None:
        config = self.config.text
        if config.kind is TextEncoderKind.umt5_small:
            return SmallUmt5(config, self.config.tokenizer_folder())
        return ByteTextEncoder(config) if config.kind is TextEncoderKind.bytes else None

    def losses(self, model: Callable[..., Any], batch: VideoBatch, *, purpose: str = "") -> SampleLosses:
        if batch.latents is not None:
            latents = batch.latents.float()  # [B, z, T', H', W']
        else:
            latents = self.encode_video(batch.pixels)  # [B, z, T', H', W']
        slots, seed = batch.slots.tolist(), self.config.seed
        noise = keyed_noise(seed, batch.step, slots, latents.shape[1:], self.device, purpose=f"{purpose}noise")
        noise_levels = keyed_noise_levels(
            seed, batch.step, slots, self.config.noise_schedule(), self.device, purpose=f"{purpose}noise_level"
        )
        if batch.text is None:
            text = self.encode_text(batch.captions)
        else:
            text = pad_features(batch.text, self.config.text.max_tokens)
        model, condition = self.conditions.apply(model, batch, latents, purpose=purpose)
        losses = rectified_flow_loss(model, latents, text, noise, noise_levels, condition=condition)
        return SampleLosses(losses, noise_levels=noise_levels)

    @torch.no_grad()
    def encode_video(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, T, H, W] in [-1, 1] -> normalised latents [B, z, T', H', W'], as the model is trained on."""
        with self.clock.running(Part.vae):
            if self.mesh is not None:  # all of them have the same clips
                return self.vae.normalise(encode_in_parallel(self.vae, pixels, self.mesh.sequence))
            return self.vae.normalise(self.vae.encode_chunked(pixels).mode())

    def export(self, folder: Path, weights: dict[str, Tensor], clips: Iterator[VideoBatch]) -> Path:
        if self.config.lora.is_on:
            path = folder / "lora.safetensors"
            write_lora(path, lora_factors(weights, self.config.lora))
            return path
        save_model(folder / "transformer", self.config.model.to_diffusers(), _part(weights, "transformer."))
        if isinstance(self._tokenizer, SmallUmt5):
            self._tokenizer.load_state_dict(_part(weights, "text_encoder."))
            self._tokenizer.save(folder)
        return folder / "transformer"


def _part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


class VideoVAETask(Task):
    """Reconstruction of clips through a narrow Gaussian latent."""

    def build_model(self, build: Build = at_once) -> nn.Module:
        with self.device:
            return build(lambda: VideoVAE(self.config.vae.resolved()))

    def losses(self, model: Callable[..., Any], batch: VideoBatch, *, purpose: str = "") -> SampleLosses:
        pixels = batch.pixels
        noise = keyed_noise(
            self.config.seed,
            batch.step,
            batch.slots.tolist(),
            self.config.vae.resolved().latent_shape(*pixels.shape[2:]),
            self.device,
            purpose=f"{purpose}noise",
        )
        reconstruction, distribution = model(pixels, noise)
        loss = vae_loss(reconstruction, pixels, distribution, self.config.vae_loss)
        terms = {"l1": loss.l1, "l2": loss.l2, "gradient": loss.gradient, "temporal": loss.temporal, "kl": loss.kl}
        terms["psnr_db"] = psnr_db(reconstruction.detach(), pixels)
        return SampleLosses(loss.total, {name: value.detach() for name, value in terms.items()})

    @torch.no_grad()
    def export(self, folder: Path, weights: dict[str, Tensor], clips: Iterator[VideoBatch]) -> Path:
        """Also measures the latent statistics, by which a diffusion model's latents are scaled, and stores them."""
        vae = VideoVAE(self.config.vae.resolved()).to(self.device).eval()
        vae.load_state_dict(weights)
        statistics, seen = LatentStatistics(), 0
        for batch in clips:
            statistics.update(vae.encode(batch.pixels.to(self.device)).mode())
            seen += len(batch)
            if seen >= STATISTICS_CLIPS:
                break
        measured = replace(self.config.vae.resolved(), latents_mean=statistics.mean, latents_std=statistics.std)
        save_model(folder / "vae", measured.to_diffusers(), weights)
        return folder / "vae"


def build_task(
    config: TrainConfig, device: torch.device, *, mesh: Mesh | None = None, clock: StepClock | None = None
) -> Task:
    """The task that `config.task` names."""
    tasks = {TaskKind.text_to_video: TextToVideoTask, TaskKind.video_vae: VideoVAETask}
    return tasks[config.task](config, device, mesh=mesh, clock=clock)


def next_command(config: TrainConfig) -> str:
    """What makes videos of a finished run's model, or puts its two experts together; words in capitals are the user's to fill."""
    if config.expert is not Expert.none:
        high, low = (config.run_dir, "LOW_RUN") if config.expert is Expert.high else ("HIGH_RUN", config.run_dir)
        return f"muybridge export run={high} low_run={low} out=FOLDER{' merge=true' if config.lora.is_on else ''}"
    image = " image=FILE" if config.conditioning.form is ConditioningForm.channels else ""
    return f"muybridge sample run={config.run_dir} prompts=prompts.txt{image}"
