"""Model folders in the form of diffusers: `config.json` beside safetensors, in one file or in shards with an index."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn, no_grad

from .weight_files import WEIGHTS_STEM, check_shapes, open_weights, read_json, write_json, write_tensors

CONFIG_NAME = "config.json"
MAX_SHARD_BYTES = 5 * 10**9


def save_model(
    folder: Path | str,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: dict[str, str] | None = None,
    stem: str = WEIGHTS_STEM,
) -> None:
    """Write a model folder. What an earlier save left in it is replaced once the new weights are on disk, and stays if they fail.

    `tensors` may be (name, tensor) pairs made one by one, of which no more than a shard is held at a time. `metadata` goes
    into the header of every file. `stem` is the files' name up to the suffix: `TRANSFORMERS_STEM` for a text encoder.
    Raises ValueError without `_class_name` or `architectures` in `config`, by which other tools choose the class.
    """
    folder = Path(folder)
    if not (config.get("_class_name") or config.get("architectures")):
        raise ValueError(f"{folder / CONFIG_NAME}: _class_name is missing; other tools choose the model class by it")
    folder.mkdir(parents=True, exist_ok=True)
    _remove_parts(folder)  # of a save that was killed
    shards = _Shards(folder, max_shard_bytes, metadata or {})
    try:
        for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
            shards.add(name, tensor)
        shards.finish()
    except BaseException:
        _remove_parts(folder)
        raise
    # The config goes first and comes back last, so that a folder with a config is a folder with whole weights. Tools that
    # read every *.safetensors in a folder would mix the shards of two saves.
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    for stale in folder.glob(f"{stem}*.safetensors*"):
        stale.unlink()
    shards.give_names(stem)
    write_json(folder / CONFIG_NAME, config)


def _remove_parts(folder: Path) -> None:
    for path in folder.glob("shard-*.part"):
        path.unlink()


class _Shards:
    """Packs tensors in order into files of at most `max_bytes` (a single tensor above that gets its own)."""

    def __init__(self, folder: Path, max_bytes: int, metadata: dict[str, str]) -> None:
        self._folder, self._max_bytes, self._metadata = folder, max_bytes, metadata
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = self._total_bytes = 0
        self._written: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        if self._waiting and self._waiting_bytes + tensor.nbytes > self._max_bytes:
            self._write()
        self._waiting[name] = tensor.detach().cpu()
        self._waiting_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write what waits; without any tensor, a file that holds none."""
        if self._waiting or not self._written:
            self._write()

    def give_names(self, stem: str) -> None:
        """Give all files the names that tell how many there are, and write the index where there is more than one."""
        count = len(self._written)
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._written, start=1):
            shard = f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors"
            path.rename(self._folder / shard)
            weight_map |= dict.fromkeys(names, shard)
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            write_json(self._folder / f"{stem}.safetensors.index.json", index)

    def _write(self) -> None:
        path = self._folder / f"shard-{len(self._written) + 1}.part"
        write_tensors(path, self._waiting, self._metadata)
        self._written.append((path, list(self._waiting)))
        self._waiting, self._waiting_bytes = {}, 0


def load_config(folder: Path | str) -> dict[str, Any]:
    """Read `config.json`. Raises ValueError when it is missing or no JSON object."""
    return read_json(Path(folder) / CONFIG_NAME)


def load_weights(module: nn.Module, state_dict: dict[str, Tensor], *, where: str) -> None:
    """Copy a state dict into a module; nothing missing, nothing left over, every shape equal, else ValueError naming them.

    `where` names the source in the message.
    """
    shapes = {name: value.shape for name, value in state_dict.items()}
    check_shapes(shapes, {name: value.shape for name, value in module.state_dict().items()}, where=where)
    module.load_state_dict(state_dict, strict=True)


@no_grad()
def load_weights_from(module: nn.Module, source: Path | str, *, where: str | None = None) -> None:
    """Copy the weights of a file or model folder into a module in the module's dtype, holding one tensor at a time.

    Strict as `load_weights` is, and checked before anything is copied. `where` names the source in messages (null: its path).
    """
    own = module.state_dict()
    with open_weights(source) as tensors:
        shapes = {name: value.shape for name, value in own.items()}
        check_shapes(tensors.shapes, shapes, where=str(source) if where is None else where)
        for name, tensor in tensors:
            own[name].copy_(tensor)
