"""Files of named tensors, opened without reading them: tensors come one at a time, so models larger than memory can be moved."""

import json
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# The names, up to the suffix, of weights in a model folder: diffusers' and transformers'.
WEIGHTS_STEM = "diffusion_pytorch_model"
TRANSFORMERS_STEM = "model"
PICKLE_SUFFIXES = (".pth", ".pt", ".bin")


@dataclass(frozen=True)
class Tensors:
    """Named tensors that need not fit into memory together: each is made when it is read."""

    shapes: dict[str, torch.Size]
    read: Callable[[str], Tensor]

    @classmethod
    def of(cls, state_dict: Mapping[str, Tensor]) -> "Tensors":
        """Tensors that are in memory."""
        return cls({name: tensor.shape for name, tensor in state_dict.items()}, lambda name: state_dict[name])

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.read(name)) for name in self.shapes)

    def renamed(self, new_names: Mapping[str, str]) -> "Tensors":
        """The tensors that are keys of `new_names`, in its order, under their new names."""
        old_names = {new: old for old, new in new_names.items()}
        shapes = {new: self.shapes[old] for new, old in old_names.items()}
        return Tensors(shapes, lambda name: self.read(old_names[name]))

    def as_type(self, dtype_of: Callable[[str], torch.dtype]) -> "Tensors":
        """The same tensors, each in the dtype that its name has."""
        return Tensors(self.shapes, lambda name: self.read(name).to(dtype_of(name)))


@contextmanager
def open_weights(source: Path | str) -> Iterator[Tensors]:
    """The tensors of a weight file or a model folder (safetensors, whole or in shards), on the CPU, readable until the end.

    A .pth, .pt or .bin file is opened in the way that runs no code from it. Raises ValueError naming the files that are
    missing or cannot be read, and tensors that an index promises and no shard has.
    """
    source = Path(source)
    weight_map: dict[str, str] | None = None
    files = [source]
    if source.is_dir():
        files, weight_map = _files_of_folder(source)
    elif not source.is_file():
        raise ValueError(f"{source}: no such file or folder")
    shapes: dict[str, torch.Size] = {}
    readers: dict[str, Callable[[], Tensor]] = {}
    with ExitStack() as stack:
        for path in files:
            for name, shape, read in _open_file(path, stack):
                shapes[name], readers[name] = shape, read
        if weight_map is not None:
            check_keys(shapes, weight_map, where=str(source))
        yield Tensors(shapes, lambda name: readers[name]())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; one of the same name is replaced, and the folder made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{uuid4().hex[:8]}.part")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode & 0o777
        contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contents, unfinished, metadata={"format": "pt", **(header or {})})
        unfinished.chmod(mode)  # safetensors makes files that only their owner may read
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def check_written(source: Path | str, tensors: Tensors) -> None:
    """Read what was written from `tensors`: the same names and, bit for bit, the same tensors, else ValueError naming them."""
    with open_weights(source) as written:
        check_shapes(written.shapes, tensors.shapes, where=str(source))
        for name, tensor in tensors:
            stored = written.read(name)
            if stored.dtype != tensor.dtype or not _same_bits(stored, tensor):
                raise ValueError(f"{source}: {name} is not what was written (is the disk sound?)")


def check_keys(found: Iterable[str], expected: Iterable[str], *, where: str) -> None:
    """Raise ValueError naming the keys that are missing and those that are not expected."""
    found, expected = set(found), set(expected)
    problems = []
    if missing := sorted(expected - found):
        problems.append(f"missing tensors: {some(missing)}")
    if unexpected := sorted(found - expected):
        problems.append(f"unexpected tensors: {some(unexpected)}")
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}")


def check_shapes(found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size], *, where: str) -> None:
    """Raise ValueError naming the tensors that are missing, not expected or of another shape."""
    check_keys(found, expected, where=where)
    misshapen = [
        f"{key} {list(shape)} instead of {list(expected[key])}"
        + (" (transposed?)" if len(shape) == 2 and shape == expected[key][::-1] else "")
        for key, shape in found.items()
        if shape != expected[key]
    ]
    if misshapen:
        raise ValueError(f"{where}: tensors of another shape than the model's: {some(misshapen)}")


def copy_files(source: Path, target: Path) -> None:
    """The files of a folder, byte for byte, to a new one, without hidden ones and without weights in pickles beside others.

    Raises ValueError where a pickle has the only weights.
    """
    files = [path for path in sorted(source.iterdir()) if path.is_file() and not path.name.startswith(".")]
    kept = [path for path in files if path.suffix not in PICKLE_SUFFIXES]
    if len(kept) < len(files) and not any(path.suffix == ".safetensors" for path in kept):
        raise ValueError(
            f"{source} has its weights in a pickle alone, which can run code and is not copied; it must have them in "
            "safetensors (`muybridge import --text-encoder` makes those of a text encoder)"
        )
    target.mkdir(parents=True)
    for path in kept:
        shutil.copyfile(path, target / path.name)


def _same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal also where both are NaN."""
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def some(names: list[str], limit: int = 8) -> str:
    """The first names of a list, and how many there are beyond."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError where there is none."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, indented and in the order of its keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_header(source: Path | str) -> dict[str, str]:
    """The entries beside the tensors of a safetensors file or of a model folder's first one; {} for a pickle, which has none.

    Raises ValueError as `open_weights` does.
    """
    source = Path(source)
    path = _files_of_folder(source)[0][0] if source.is_dir() else source
    if path.suffix in PICKLE_SUFFIXES:
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error


def _files_of_folder(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files of a folder, and the index over them where there is one."""
    for stem in (WEIGHTS_STEM, TRANSFORMERS_STEM):
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise ValueError(f"{index}: weight_map must be an object that has the file of each tensor")
            names = sorted(set(weight_map.values()))
            if missing := [name for name in names if not (folder / name).is_file()]:
                raise ValueError(f"{folder}: {some(missing)} missing, though {index.name} lists it")
            return [folder / name for name in names], weight_map
        if single.is_file():
            return [single], None
    either = f"{WEIGHTS_STEM}.safetensors or {TRANSFORMERS_STEM}.safetensors"
    raise ValueError(f"{folder}: must hold {either}, or one of these followed by .index.json and the shards it lists")


def _open_file(path: Path, stack: ExitStack) -> list[tuple[str, torch.Size, Callable[[], Tensor]]]:
    """(name, shape, function that reads it) of each tensor."""
    if path.suffix in PICKLE_SUFFIXES:
        state_dict = _load_pickle(path)
        return [(name, value.shape, partial(state_dict.__getitem__, name)) for name, value in state_dict.items()]
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: must be a .safetensors file, or one of {', '.join(PICKLE_SUFFIXES)}")
    try:
        file = stack.enter_context(safe_open(path, framework="pt"))
        names = list(file.keys())
        shapes = [torch.Size(file.get_slice(name).get_shape()) for name in names]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    return [(name, shape, partial(file.get_tensor, name)) for name, shape in zip(names, shapes, strict=True)]


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch.save file, mapped into memory instead of read; files of torch before 1.6 cannot be mapped."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # bytes that are no pickle raise nearly anything
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        if "Weights only load failed" in first_line:
            raise ValueError(
                f"{path}: holds more than tensors, or is damaged; opening it could run code from it: refused. Take a file "
                f"of safetensors instead"
            ) from error
        raise ValueError(f"{path}: not a readable file of torch.save ({first_line})") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise ValueError(f"{path}: must hold a flat dictionary of tensors")
    return {name: value.detach() for name, value in content.items()}
