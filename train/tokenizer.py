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
from .checkpoint_folder import committed_checkpoints
from .config import TaskKind, TrainConfig
from .ranks import from_rank_0

MAX_CLIPS = 1_000_000  # of each dataset, whose captions are read; more would change rare words only


def prepare_tokenizer(config: TrainConfig, loader: VideoLoader | StreamLoader) -> None:
    """Make or copy the tokenizer of a run that has no checkpoint yet, on rank 0; collective.

    A run that starts from another one takes over its tokenizer, to which the weights of the text encoder belong. Once there is a
    checkpoint, the tokenizer belongs to that and stays. Raises ValueError on every rank where it is missing then, or cannot be
    made.
    """
    if config.task is not TaskKind.text_to_video or config.text.kind is not TextEncoderKind.umt5_small:
        return
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            _prepare(config, loader)
        except Exception as error:  # whatever it is: the others wait for an answer
            failure = error
    answer = from_rank_0("" if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None and not isinstance(failure, OSError):
        raise failure
    if answer:
        raise ValueError(f"{config.tokenizer_folder()} could not be prepared: {answer}") from failure


def _prepare(config: TrainConfig, loader: VideoLoader | StreamLoader) -> None:
    folder = config.tokenizer_folder()
    if checkpoints := committed_checkpoints(Path(config.run_dir) / "checkpoints"):
        if not folder.is_dir():
            raise ValueError(f"{folder} is missing, and the weights in {checkpoints[-1]} belong to it: put it back")
        return
    for leftover in folder.parent.glob(f"{folder.name}.tmp-{'[0-9a-f]' * 8}"):
        shutil.rmtree(leftover)
    staging = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    inherited = Path(config.init_from or "") / folder.name
    if config.init_from and inherited.is_dir():
        shutil.copytree(inherited, staging)
    else:
        staging.mkdir(parents=True)
        assert isinstance(loader, VideoLoader), "the settings allow no stream here"
        write_tokenizer(staging, _captions(loader.indexes), config.text)
    # That of a launch that came to no checkpoint may be of other data, another size or another start.
    if folder.is_dir():
        shutil.rmtree(folder)
    staging.rename(folder)


def _captions(indexes: list[ClipIndex]) -> Iterator[str]:
    for index in indexes:
        for row in range(min(len(index), MAX_CLIPS)):
            yield from index.captions(row)
