"""Model folders in the form of diffusers: `config.json` beside safetensors, in one file or in shards with an index."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

CONFIG_NAME = "config.json"
WEIGHTS_STEM = "diffusion_pytorch_model"
MAX_SHARD_BYTES = 5 * 10**9


def save_model(
    folder: Path | str,
    config: dict[str, Any],
    state_dict: dict[str, Tensor],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model folder; `config` must hold `_class_name`. Weights of an earlier save in the folder are removed.

    Raises ValueError without `_class_name`, by which other tools choose the class.
    """
    folder = Path(folder)
    if not config.get("_class_name"):
        raise ValueError(f"{folder / CONFIG_NAME}: _class_name is missing; other tools choose the model class by it")
    folder.mkdir(parents=True, exist_ok=True)
    # The config goes first and comes back last, so that a folder with a config is a folder with whole weights. Tools that
    # read every *.safetensors in a folder would mix the shards of two saves.
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    for stale in folder.glob(f"{WEIGHTS_STEM}*.safetensors*"):
        stale.unlink()

    shards = _split(state_dict, max_shard_bytes)
    if len(shards) == 1:
        names = [f"{WEIGHTS_STEM}.safetensors"]
    else:
        names = [f"{WEIGHTS_STEM}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        tensors = {key: value.detach().cpu().contiguous() for key, value in shard.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(value.nbytes for value in state_dict.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        _write_json(folder / f"{WEIGHTS_STEM}.safetensors.index.json", index)
    _write_json(folder / CONFIG_NAME, config)


def load_config(folder: Path | str) -> dict[str, Any]:
    """Read `config.json`. Raises ValueError when it is missing or no JSON object."""
    return _read_json(Path(folder) / CONFIG_NAME)


def load_state_dict(folder: Path | str) -> dict[str, Tensor]:
    """Read all weights of a model folder to the CPU. Raises ValueError naming the files or tensors that are missing."""
    folder = Path(folder)
    single, index = folder / f"{WEIGHTS_STEM}.safetensors", folder / f"{WEIGHTS_STEM}.safetensors.index.json"
    if index.is_file():
        weight_map: dict[str, str] = _read_json(index).get("weight_map", {})
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder}: {_some(missing)} missing, though {index.name} lists it")
        state_dict: dict[str, Tensor] = {}
        for name in names:
            state_dict |= _read_safetensors(folder / name)
        check_keys(state_dict, set(weight_map), where=str(index))
        return state_dict
    if single.is_file():
        return _read_safetensors(single)
    raise ValueError(f"{folder}: must hold {single.name} or {index.name}")


def load_weights(module: nn.Module, state_dict: dict[str, Tensor], *, where: str) -> None:
    """Copy a state dict into a module; nothing missing, nothing left over, every shape equal, else ValueError naming them.

    `where` names the source in the message.
    """
    own = module.state_dict()
    check_keys(state_dict, set(own), where=where)
    misshapen = [
        f"{key} {list(value.shape)} instead of {list(own[key].shape)}"
        for key, value in state_dict.items()
        if value.shape != own[key].shape
    ]
    if misshapen:
        raise ValueError(f"{where}: tensors of another shape than the model's: {_some(misshapen)}")
    module.load_state_dict(state_dict, strict=True)


def check_keys(state_dict: dict[str, Tensor], expected: set[str], *, where: str) -> None:
    """Raise ValueError naming the keys that are missing and those that are not expected."""
    found = set(state_dict)
    problems = []
    if missing := sorted(expected - found):
        problems.append(f"missing tensors: {_some(missing)}")
    if unexpected := sorted(found - expected):
        problems.append(f"unexpected tensors: {_some(unexpected)}")
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}")


def _split(state_dict: dict[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    """Tensors in order, packed into shards of at most `max_bytes` (a single tensor above that gets its own)."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, value in state_dict.items():
        if shards[-1] and size + value.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = value
        size += value.nbytes
    return shards


def _some(names: list[str], limit: int = 8) -> str:
    """The first names of a list, and how many there are beyond."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
