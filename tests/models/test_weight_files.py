"""Weight files opened tensor by tensor: every form gives the same, code in a pickle never runs, faults name file and tensor."""

import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from muybridge.models import weight_files
from muybridge.models.weight_files import (
    TRANSFORMERS_STEM,
    Tensors,
    check_written,
    copy_files,
    open_weights,
    write_tensors,
)
from muybridge.models.weights import load_weights_from, save_model
from muybridge.tests.stored_tensors import read_all

CONFIG = {"_class_name": "Toy"}


def draw_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "weight": torch.randn(2, 3),
        "bias": torch.randn(2).bfloat16(),
        "table": torch.tensor([float("nan"), 1.0]),
        "scale": torch.tensor(2.0),
    }


def assert_same(found: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name].nan_to_num(7), value.nan_to_num(7)), name


def test_every_form_of_a_file_gives_the_same_tensors(tmp_path: Path) -> None:
    state = draw_state()
    save_file(state, tmp_path / "whole.safetensors")
    torch.save(state, tmp_path / "saved.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_model(tmp_path / "folder", CONFIG, state)
    save_model(tmp_path / "shards", CONFIG, state, max_shard_bytes=16)
    save_model(tmp_path / "text", {"architectures": ["Toy"]}, state, stem=TRANSFORMERS_STEM, max_shard_bytes=16)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) == 2
    assert (tmp_path / "text" / "model.safetensors.index.json").is_file()
    for name in ("whole.safetensors", "saved.pth", "old.pth", "folder", "shards", "text"):
        assert_same(read_all(tmp_path / name), state)
        check_written(tmp_path / name, Tensors.of(state))


def test_tensors_are_renamed_and_cast_when_they_are_read(tmp_path: Path) -> None:
    save_file(draw_state(), tmp_path / "a.safetensors")
    with open_weights(tmp_path / "a.safetensors") as tensors:
        half = tensors.renamed({"table": "new", "weight": "other"}).as_type(
            lambda name: torch.float64 if name == "new" else torch.bfloat16
        )
        assert {name: (tensor.dtype, tensor.shape) for name, tensor in half} == {
            "new": (torch.float64, (2,)),
            "other": (torch.bfloat16, (2, 3)),
        }
        assert half.shapes == {"new": (2,), "other": (2, 3)}


def test_a_model_is_saved_from_an_iterator_holding_one_shard_at_a_time(tmp_path: Path) -> None:
    written = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for i in range(4):
            written.append(len(list(tmp_path.glob("m/*.part"))))
            yield f"layer{i}", torch.full((4,), float(i))

    save_model(tmp_path / "m", CONFIG, tensors(), max_shard_bytes=32, metadata={"made_by": "a test"})
    assert written == [0, 0, 0, 1], "the first shard must be on disk before the fourth tensor is made"
    assert_same(read_all(tmp_path / "m"), {f"layer{i}": torch.full((4,), float(i)) for i in range(4)})
    with safe_open(tmp_path / "m" / "diffusion_pytorch_model-00002-of-00002.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "made_by": "a test"}


def test_an_interrupted_save_leaves_the_earlier_model_as_it_was(tmp_path: Path) -> None:
    save_model(tmp_path, CONFIG, draw_state(), max_shard_bytes=16)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield "first", torch.zeros(4)
        yield "second", torch.zeros(4)
        yield "third", torch.zeros(4)
        raise RuntimeError("the source is gone")

    with pytest.raises(RuntimeError, match="the source is gone"):
        save_model(tmp_path, CONFIG, broken(), max_shard_bytes=16)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "shard-7.part").write_bytes(b"of a save that was killed")
    save_model(tmp_path, CONFIG, draw_state())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


class Malice:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    for is_new in (True, False):
        state = {"weight": torch.zeros(2), "code": Malice(trap)}
        torch.save(state, tmp_path / "bad.pth", _use_new_zipfile_serialization=is_new)
        with pytest.raises(ValueError, match=r"bad\.pth: holds more than tensors, .* refused"):
            read_all(tmp_path / "bad.pth")
        assert not trap.exists()
    with open(tmp_path / "bare.pt", "wb") as file:
        pickle.dump(Malice(trap), file)
    with pytest.raises(ValueError, match=r"bare\.pt: "):
        read_all(tmp_path / "bare.pt")
    assert not trap.exists()


def test_files_that_are_no_weights_are_named(tmp_path: Path) -> None:
    torch.save({"step": 3, "weight": torch.zeros(2)}, tmp_path / "state.pt")
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "nested.pt")
    (tmp_path / "text.pth").write_text("not a pickle")
    (tmp_path / "text.safetensors").write_text("no safetensors")
    (tmp_path / "model.gguf").write_text("")
    torch.save({"weight": torch.zeros(99)}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-200])
    for name, message in {
        "cut.pth": "",
        "state.pt": "must hold a flat dictionary of tensors",
        "nested.pt": "must hold a flat dictionary of tensors",
        "text.pth": "holds more than tensors, or is damaged",
        "text.safetensors": "not a readable safetensors file",
        "model.gguf": r"must be a \.safetensors file",
        "absent.pth": "no such file",
    }.items():
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            read_all(tmp_path / name)


def test_loading_from_a_file_is_strict_and_changes_nothing_when_it_fails(tmp_path: Path) -> None:
    module = nn.Linear(3, 2).bfloat16()
    before = module.weight.clone()
    for state, message in [
        ({"weight": torch.zeros(2, 3)}, "missing tensors: bias"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "more": torch.zeros(1)}, "unexpected tensors: more"),
        (
            {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)},
            r"weight \[3, 2\] instead of \[2, 3\] \(transposed\?\)",
        ),
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, r"weight \[2, 4\] instead of \[2, 3\]$"),
    ]:
        save_model(tmp_path, CONFIG, state)
        with pytest.raises(ValueError, match=f"init_from=X: .*{message}"):
            load_weights_from(module, tmp_path, where="init_from=X")
        assert torch.equal(module.weight, before)
    state = {"weight": torch.ones(2, 3), "bias": torch.full((2,), 0.5)}
    save_model(tmp_path, CONFIG, state)
    load_weights_from(module, tmp_path)
    assert module.weight.dtype == torch.bfloat16
    assert torch.equal(module.weight.float(), state["weight"])
    assert torch.equal(module.bias.float(), state["bias"])


def test_a_file_of_tensors_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "a.safetensors"
    write_tensors(path, {"transposed": torch.arange(6.0).view(2, 3).T}, {"made_by": "a test"})
    assert torch.equal(load_file(path)["transposed"], torch.arange(6.0).view(2, 3).T)
    (path.parent / "other").touch()
    assert path.stat().st_mode == (path.parent / "other").stat().st_mode
    before = path.read_bytes()

    def save_half(tensors: dict[str, Tensor], filename: Path, metadata: dict[str, str]) -> None:
        filename.write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(weight_files, "save_file", save_half)
        with pytest.raises(OSError, match="no space left"):
            write_tensors(path, {"a": torch.zeros(2)})
    assert sorted(found.name for found in path.parent.iterdir()) == ["a.safetensors", "other"]
    assert path.read_bytes() == before


def test_a_changed_bit_is_found_after_writing(tmp_path: Path) -> None:
    state = draw_state()
    save_model(tmp_path, CONFIG, state)
    check_written(tmp_path, Tensors.of(state))
    with pytest.raises(ValueError, match="table is not what was written"):
        check_written(tmp_path, Tensors.of(state | {"table": torch.tensor([0.0, 1.0])}))
    with pytest.raises(ValueError, match="weight is not what was written"):
        check_written(tmp_path, Tensors.of(state | {"weight": state["weight"].double()}))
    with pytest.raises(ValueError, match="missing tensors: more"):
        check_written(tmp_path, Tensors.of(state | {"more": torch.zeros(1)}))


def test_files_are_copied_without_pickles_unless_those_have_the_only_weights(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "new" / "target"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / ".cache").write_text("hidden")
    (source / "pytorch_model.bin").write_bytes(b"runs code when it is read")
    with pytest.raises(ValueError, match="source has its weights in a pickle alone"):
        copy_files(source, target)
    assert not target.exists()
    save_file(draw_state(), source / "model.safetensors")
    copy_files(source, target)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
    assert (target / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
