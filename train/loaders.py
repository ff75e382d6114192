"""The loaders of a run: its training clips, from an index, a latent cache or a stream, and its validation clips."""

from dataclasses import replace

from ..data.buckets import Bucket
from ..data.config import Access, DataConfig
from ..data.loader import VideoLoader
from ..data.stream import StreamLoader
from ..models.text import text_fingerprint
from ..models.vae.folder import vae_fingerprint
from .config import TrainConfig
from .mesh import Mesh
from .preemption import gather_over_gloo


def build_loaders(
    config: TrainConfig, buckets: list[Bucket], mesh: Mesh
) -> tuple[VideoLoader | StreamLoader, VideoLoader | None]:
    """The training loader and, where the run looks at validation clips, theirs. Collective.

    Raises ValueError for data that are not there, or do not fit the settings.
    """
    fingerprints = _cached_with(config)
    training = config.training_data()
    if training.access is Access.stream:
        stream = StreamLoader(
            training,
            buckets=buckets,
            rank=mesh.data.rank,
            world_size=mesh.data.size,
            seed=config.seed,
            gather=gather_over_gloo(config.deepspeed.timeout_seconds),
        )
        return stream, _validation_loader(config, buckets, fingerprints, mesh)
    videos = {name: dataset.path for name, dataset in config.data.sources().items()}
    loader = _video_loader(config, training, buckets, videos, fingerprints, mesh)
    loader.refuse_empty_buckets()
    return loader, _validation_loader(config, buckets, fingerprints, mesh)


def _validation_loader(
    config: TrainConfig, buckets: list[Bucket], fingerprints: dict[str, str | None], mesh: Mesh
) -> VideoLoader | None:
    data = config.validation_data()
    if data is None or not config.validation.every_steps:
        return None
    return _video_loader(config, data, buckets, {"": config.validation.path or ""}, fingerprints, mesh)


def _video_loader(
    config: TrainConfig,
    data: DataConfig,
    buckets: list[Bucket],
    videos: dict[str, str],
    fingerprints: dict[str, str | None],
    mesh: Mesh,
) -> VideoLoader:
    if not mesh.sequence.is_first:  # who gets its clips from another rank decodes none
        data = replace(data, workers=0)
    return VideoLoader(
        data,
        buckets=buckets,
        rank=mesh.data.rank,
        world_size=mesh.data.size,
        seed=config.seed,
        videos=videos,
        **fingerprints,
    )


def _cached_with(config: TrainConfig) -> dict[str, str | None]:
    """What latents must have been made with: another autoencoder's have the same shape and would train without a complaint."""
    if config.data.access is not Access.latents:
        return {}
    assert config.vae.path is not None
    return {"vae_fingerprint": vae_fingerprint(config.vae.path), "text_fingerprint": text_fingerprint(config.text)}
