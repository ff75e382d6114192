"""Reading checkpoints: as every piece of a tensor carries its address, they load at any world size and ZeRO stage, or without."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..models.weight_files import Tensors
from .ema import EMA
from .engine import Engine

FORMAT_VERSION = 2


def load_checkpoint(folder: Path, *, engine: Engine, ema: EMA) -> dict[str, Any]:
    """Fill this rank's shards from any world size's fragments; returns the contents of run.json. Collective."""
    facts = read_run_state(folder)
    _check_shapes(folder, facts["shapes"], {name: list(shape) for name, shape in engine.parameter_shapes.items()})
    averages = ema.averages
    if missing := [name for name in averages if name not in facts["averages"]]:
        raise ValueError(
            f"{folder} holds the averages {', '.join(facts['averages'])} and not {', '.join(missing)}: ema.decays must be among "
            "those that the run began with"
        )
    with FragmentReader(folder) as reader:
        for index, shard in enumerate(engine.shards):
            shard.optimizer_state.clear()  # where a run goes back, it has one
            if facts["optimizer_step"] > 0:
                # The optimizer fills its state lazily: padding between fragments stays zero, as it would there.
                shard.optimizer_state["step"] = torch.tensor(facts["optimizer_step"], device=shard.parameter.device)
                for kind in shard.state_names:
                    shard.optimizer_state[kind] = torch.zeros_like(shard.parameter)
            for fragment in shard.fragments:
                here = slice(fragment.offset, fragment.offset + fragment.numel)
                shard.master[here] = reader.read("master", fragment.name, fragment.start, fragment.numel)
                for kind, tensors in averages.items():
                    tensors[index][here] = reader.read(kind, fragment.name, fragment.start, fragment.numel)
                if facts["optimizer_step"] > 0:
                    for kind in shard.state_names:
                        piece = reader.read(kind, fragment.name, fragment.start, fragment.numel)
                        shard.optimizer_state[kind].view(-1)[here] = piece
    engine.refresh_weights()
    return facts


def read_run_state(folder: Path) -> dict[str, Any]:
    """The contents of a checkpoint's run.json. Raises ValueError where another version of the format is meant."""
    with _told_where_removed(folder):
        facts: dict[str, Any] = json.loads((folder / "run.json").read_text())
    if facts["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{folder}/run.json format_version={facts['format_version']} must be {FORMAT_VERSION}: another version of muybridge "
            "wrote it (go on with that one, or begin a run in another run_dir)"
        )
    return facts


def read_weights(folder: Path, kind: str = "ema") -> dict[str, Tensor]:
    """Whole fp32 weights from a checkpoint, without an engine; `kind` as for `weight_kind`."""
    with open_checkpoint(folder, kind) as tensors:
        return dict(tensors)


@contextmanager
def open_checkpoint(folder: Path, kind: str = "ema") -> Iterator[Tensors]:
    """The weights of `read_weights`, each put together when it is read; readable until the end."""
    shapes, kind = read_run_state(folder)["shapes"], weight_kind(folder, kind)
    with FragmentReader(folder) as reader:
        sizes = {name: torch.Size(shape) for name, shape in shapes.items()}
        yield Tensors(sizes, lambda name: reader.read(kind, name, 0, sizes[name].numel()).view(sizes[name]))


def weight_kind(folder: Path, kind: str, *, field: str = "weights") -> str:
    """The name under which a checkpoint holds weights: `ema` is its first average and `raw` the weights themselves (`master`).

    Raises ValueError that names the setting `field` and lists what is there.
    """
    averages = read_run_state(folder)["averages"]
    stored = {"ema": averages[0], "raw": "master", "master": "master", **{name: name for name in averages}}
    if kind not in stored:
        raise ValueError(
            f"{field}={kind} must be raw, ema ({averages[0]}) or one of {', '.join(averages)}, which {folder} has"
        )
    return str(stored[kind])


class FragmentReader:
    """Reads any range of any tensor of a checkpoint from whichever files hold its pieces."""

    def __init__(self, folder: Path) -> None:
        self._files: list[Any] = []
        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}
        with _told_where_removed(folder):  # what is open can be read to its end
            for table in sorted(path for path in folder.iterdir() if path.match("shard-*.json")):
                file = safe_open(table.with_suffix(".safetensors"), framework="pt")
                self._files.append(file)
                for name, (start, numel) in json.loads(table.read_text()).items():
                    self._pieces.setdefault(name, []).append((start, numel, file))

    def __enter__(self) -> "FragmentReader":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.__exit__(None, None, None)

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flattened tensor `kind/name`, fp32."""
        out, found = torch.empty(numel), 0
        for piece_start, piece_numel, file in self._pieces.get(name, []):
            begin, end = max(start, piece_start), min(start + numel, piece_start + piece_numel)
            if begin < end:
                piece = file.get_slice(f"{kind}/{name}")[begin - piece_start : end - piece_start]
                out[begin - start : end - start] = piece
                found += end - begin
        if found != numel:
            raise ValueError(f"the checkpoint holds {found} of {numel} elements of {kind}/{name}")
        return out


@contextmanager
def _told_where_removed(folder: Path) -> Iterator[None]:
    # RuntimeError: safetensors has torch open a file once more by its name.
    try:
        yield
    except (OSError, RuntimeError, SafetensorError):
        if folder.is_dir():
            raise
        raise ValueError(
            f"{folder} is not there any more: its run goes on and keeps its newest checkpoints only (repeat the command)"
        ) from None


def _check_shapes(folder: Path, saved: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    differing = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    if differing:
        shown = ", ".join(f"{name}: {saved.get(name)} saved, {wanted.get(name)} configured" for name in differing[:5])
        raise ValueError(f"{folder} does not fit the configured model: {len(differing)} parameters differ ({shown})")
