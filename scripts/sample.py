"""`muybridge sample`: videos from prompts, with a training run or a pipeline folder, as mp4s and one contact sheet."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..models.diffusion.samplers import SamplerConfig, SamplerKind
from ..train.compose import compose_config

if TYPE_CHECKING:
    from torch import Tensor

    from .sample_sources import Source

USAGE = """\
usage: muybridge sample run=RUN_DIR | model=FOLDER prompts=FILE [KEY=VALUE ...]

Generate one video for each line of FILE.

  run=RUN_DIR           newest checkpoint of a text-to-video training run
  model=FOLDER          pipeline folder: public Wan weights (muybridge import) or a run's (muybridge export)
  prompts=FILE          text file with one prompt a line
  negative_prompt=TEXT  what guidance leads away from (default: nothing)
  image=FILE            first frame of every video, for models that continue images
  last_image=FILE       last frame of every video, for models that take images as channels
  out=FOLDER            where the mp4s and contact_sheet.png go (default RUN_DIR/samples, or ./samples)
  weights=ema|raw|ema-0.999
                        of a run: its first average (default), its last weights, or another of its ema.decays
  lora=[FILE,...] lora_low=[FILE,...] lora_scale=X
                        LoRA files for the transformer of a folder, and for its low-noise expert
  frames=N height=N width=N fps=X
                        size of the videos (default: the run's, or what the public model was trained for)
  seed=N                seed of the noise (default 0)
  batch=N               videos sampled at once (default 8 of a run, 1 of a folder)
  tile=N                decode frames in squares of N pixels a side, where whole ones do not fit into memory (default: whole)
  sampler=euler|unipc|unipc_wan|dpmpp steps=N shift=X guidance_scale=X guidance_scale_low=X
                        sampler settings (default: the run's, or the folder's scheduler with 50 steps and guidance 5);
                        guidance_scale_low is for the low-noise expert (default: as guidance_scale)"""


@dataclass
class SampleConfig:
    """What to sample, from what and how; null takes the model's own."""

    run: str = ""
    model: str = ""
    prompts: str = ""
    negative_prompt: str = ""
    image: str | None = None
    last_image: str | None = None
    out: str | None = None
    # Of a run: ema (its first average), raw, or an average's name.
    weights: str = "ema"
    lora: list[str] = field(default_factory=list)
    lora_low: list[str] = field(default_factory=list)
    lora_scale: float = 1.0
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    seed: int = 0
    batch: int | None = None
    tile: int | None = None
    sampler: SamplerKind | None = None
    steps: int | None = None
    shift: float | None = None
    guidance_scale: float | None = None
    guidance_scale_low: float | None = None
    # Check everything and stop.
    dry_run: bool = False

    def faults(self) -> list[str]:
        """What cannot be right whatever the model is."""
        found = []
        if bool(self.run) == bool(self.model) or not self.prompts:
            found.append(
                "run=RUN_DIR or model=FOLDER, and prompts=FILE must both be given (see muybridge sample --help)"
            )
        if not self.model and (self.lora or self.lora_low):
            found.append(f"lora={self.lora or self.lora_low} needs model=FOLDER: a run has its own weights")
        if self.model and self.weights != "ema":
            found.append(f"weights={self.weights} needs run=RUN_DIR: a folder has one set of weights")
        if self.batch is not None and self.batch < 1:
            found.append(f"batch={self.batch} must be at least 1")
        return found


@dataclass(frozen=True)
class ClipSize:
    """Of the videos: frames, height and width in pixels, frames a second."""

    frames: int
    height: int
    width: int
    fps: float


def main(argv: list[str]) -> int:
    """Sample; returns the exit code. Raises ValueError for a model, prompts or an image that cannot be used."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    config: SampleConfig = compose_config(
        argv, config_class=SampleConfig, config_name="sample", schema_name="sample_schema"
    )
    if faults := config.faults():
        raise ValueError("; ".join(faults))
    prompts = read_prompts(Path(config.prompts))
    # Imported late: what is wrong so far is said at once.
    from ..train.generate import write_clips
    from .pictures import contact_sheet
    from .sample_sources import open_source

    source = open_source(config)
    size = dataclasses.replace(source.size, **_given(config, source.size))
    sampler = dataclasses.replace(source.sampler, **_given(config, source.sampler))
    if config.sampler is not None:
        sampler.kind = config.sampler
    faults = source.size_faults(size) + source.tile_faults(config.tile)
    faults += source.image_faults(config.image, config.last_image, size.frames)
    if faults := faults + sampler.faults("sampler"):
        raise ValueError("; ".join(faults))
    images = [
        None if path is None else read_pixels(Path(path), size, field=field)
        for field, path in (("image", config.image), ("last_image", config.last_image))
    ]
    if config.dry_run:
        print(f"muybridge: would sample {len(prompts)} prompts from {source.description}; nothing was started")
        return 0

    out = Path(config.out or Path(config.run) / "samples")
    clips: list[np.ndarray] = []
    columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("sampling", total=len(prompts) * sampler.steps)

        def show(steps_done: int) -> None:
            progress.update(bar, completed=steps_done)

        for frames in generate_clips(
            source, prompts, config, size=size, sampler=sampler, image=images[0], last_image=images[1], progress=show
        ):
            numbers = list(range(len(clips), len(clips) + len(frames)))
            write_clips(out, frames, [prompts[number] for number in numbers], numbers, fps=size.fps)
            clips += list(frames)
    contact_sheet(clips, prompts, out / "contact_sheet.png")
    print(f"muybridge: wrote {len(clips)} mp4s and contact_sheet.png to {out}")
    return 0


def generate_clips(
    source: "Source",
    prompts: list[str],
    config: SampleConfig,
    *,
    size: ClipSize,
    sampler: SamplerConfig,
    image: "Tensor | None" = None,
    last_image: "Tensor | None" = None,
    progress: Callable[[int], None],
) -> Iterator[np.ndarray]:
    """Frames uint8 [B, T, H, W, 3] of the prompts, some at a time; images [1, 3, 1, H, W] are the first and last frame of all.

    `progress` is told how many sampler steps of single clips are done.
    """
    from ..models.diffusion.conditioning import known_frames_condition
    from ..train.generate import decode_frames, generate_latents, prompt_noise

    # Text first: a large text encoder is gone again before the transformer is read.
    text = source.encode_text([*prompts, config.negative_prompt])
    images = [picture.to(source.device) for picture in (image, last_image) if picture is not None]
    features = source.image_features([picture.squeeze(2) for picture in images]) if images else None
    models = source.models()
    latent_shape = source.vae.latent_shape(size.frames, size.height, size.width)
    batch = config.batch or source.batch
    for start in range(0, len(prompts), batch):
        numbers = range(start, min(start + batch, len(prompts)))
        condition = None
        if images:
            known = [picture.expand(len(numbers), -1, -1, -1, -1) for picture in images]
            condition = known_frames_condition(
                source.form,
                lambda pixels: models.vae.normalise(models.vae.encode_chunked(pixels).mode()),
                first=known[0],
                last=known[1] if len(known) > 1 else None,
                frames=size.frames,
                temporal_stride=source.vae.temporal_stride,
                patch_size=source.transformer.patch_size,
            )
        latents = generate_latents(
            models,
            prompt_noise(config.seed, numbers, latent_shape, source.device),
            text[start : numbers.stop],
            text[-1:].expand(len(numbers), *text.shape[1:]),
            sampler=sampler,
            condition=condition,
            image_features=None if features is None else features.expand(len(numbers), -1, -1),
            progress=partial(_report, progress, start, len(numbers)),
        )
        tile = None if config.tile is None else config.tile // source.vae.spatial_stride
        yield decode_frames(models.vae, latents, tile=tile)


def _report(progress: Callable[[int], None], start: int, count: int, done: int, steps: int) -> None:
    progress(start * steps + count * done)


def read_prompts(path: Path) -> list[str]:
    """The non-empty lines of a file. Raises ValueError where there are none."""
    if not path.is_file():
        raise ValueError(f"prompts={path} must be a text file with one prompt a line")
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"prompts={path} holds no prompt")
    return prompts


def read_pixels(path: Path, size: ClipSize, *, field: str = "image") -> "Tensor":
    """A jpg, png or webp, its middle cut to the shape of the clip, as [1, 3, 1, H, W] in [-1, 1].

    Raises ValueError, naming the setting `field`, for a file that is none.
    """
    import torch

    from ..data.decode import DecodeError
    from ..data.images import read_image
    from ..data.pixels import to_pixels
    from ..data.resize import cover_crop

    try:
        picture = read_image(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise ValueError(f"{field}={path} cannot be read: {error}") from error
    frames = cover_crop(picture[None], height=size.height, width=size.width, crop_x=0.5, crop_y=0.5)  # [1, H, W, 3]
    return to_pixels(torch.tensor(frames)[None])


def _given(config: SampleConfig, defaults: Any) -> dict[str, Any]:
    """The settings of the same names that are not null."""
    names = [field.name for field in dataclasses.fields(defaults) if hasattr(config, field.name)]
    return {name: getattr(config, name) for name in names if getattr(config, name) is not None}
