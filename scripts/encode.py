"""`muybridge encode`: the latents of every clip of a run's datasets, computed once and cached as shards."""

from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..data.config import Access, DataConfig, single_clips
from ..data.latent_cache import LatentWriter, has_latents
from ..data.loader import VideoLoader
from ..models.vae import VideoVAE
from ..models.vae.folder import load_vae, vae_fingerprint
from ..train.config import TaskKind, load_train_config

USAGE = """\
usage: muybridge encode +experiment=NAME [KEY=VALUE ...]

Encode data.path (and validation.path, where it is set) with the autoencoder vae.path into data.latents, from which a run with
data.access=latents trains: the same clips in the same order, without decoding and encoding them at every step. Takes the settings
of `muybridge train`. Latents that are there already and fit are kept."""

BATCH = 16


def main(argv: list[str]) -> int:
    """Encode; returns the exit code. Raises ValueError for settings or a dataset that cannot be used."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    config = load_train_config(argv)
    if config.task is not TaskKind.text_to_video:
        raise ValueError(f"task={config.task.name} must be text_to_video: a VAE learns from pixels")
    if not config.data.latents:
        raise ValueError("data.latents must name the folder for the latents")
    sources = {"train": config.data.path, "validation": config.validation.path}
    if config.dry_run:
        print(f"muybridge: would encode {sources} into {config.data.latents}; nothing was started")
        return 0
    assert config.vae.path is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = load_vae(config.vae.path).to(device).eval()
    fingerprint = vae_fingerprint(config.vae.path)
    for split, source in sources.items():
        if source is None:
            continue
        data = replace(config.data, path=source, access=Access.raw, caption_dropout=0.0)
        folder = Path(config.data.latents) / split
        encode_dataset(data, folder, vae, fingerprint=fingerprint, device=device)
    print(f"next: muybridge train {' '.join(argv)} (with data.access=latents)")
    return 0


@torch.no_grad()
def encode_dataset(data: DataConfig, folder: Path, vae: VideoVAE, *, fingerprint: str, device: torch.device) -> None:
    """Write the normalised latent means of a dataset's clips into `folder`, unless they are there."""
    loader = VideoLoader(data, buckets=single_clips(data), rank=0, world_size=1, seed=0)
    if has_latents(folder, loader.indexes[0], data, vae_fingerprint=fingerprint):
        print(f"muybridge: {folder} is complete and fits; kept")
        return
    writer = LatentWriter(folder, loader.indexes[0], data, vae_fingerprint=fingerprint)
    columns = (TextColumn("encoding {task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task(folder.name, total=len(loader))
        for batch in loader.every_row(BATCH):
            latents = vae.normalise(vae.encode(batch.pixels.to(device)).mode())
            for row, clip in zip(batch.rows.tolist(), latents, strict=True):
                writer.add(row, clip)
            progress.advance(bar, len(batch))
    index = writer.close()
    loader.close()
    print(f"muybridge: wrote the latents of {len(index)} clips to {folder}")
