"""The tokenizer of text.kind=umt5_small: made of the captions of a run's data once, and then the same for the whole run."""

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from ..data.index import ClipIndex
from ..data.loader import VideoLoader
from ..data.stream import StreamLoader
from ..models.text import TextEncoderKind
from ..models.text_small import write_tokenizer
from .config import TaskKind, TrainConfig

MAX_CLIPS = 1_000_000  # of each dataset, whose captions are read; more would change rare words only


def prepare_tokenizer(config: TrainConfig, loader: VideoLoader | StreamLoader) -> None:
    """Make or copy the tokenizer on rank 0 where the run needs one and has none yet; collective.

    A run that starts from another one takes over its tokenizer, to which the weights of the text encoder belong.
    """
    if config.task is not TaskKind.text_to_video or config.text.kind is not TextEncoderKind.umt5_small:
        return
    folder = config.tokenizer_folder()
    if dist.get_rank() == 0 and not folder.is_dir():
        staging = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
        inherited = Path(config.init_from or "") / folder.name
        if config.init_from and inherited.is_dir():
            shutil.copytree(inherited, staging)
        else:
            staging.mkdir(parents=True)
            assert isinstance(loader, VideoLoader), "the settings allow no stream here"
            write_tokenizer(staging, _captions(loader.indexes), config.text)
        staging.rename(folder)
    dist.barrier()


def _captions(indexes: list[ClipIndex]) -> Iterator[str]:
    for index in indexes:
        for row in range(min(len(index), MAX_CLIPS)):
            yield from index.captions(row)
