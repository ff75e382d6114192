"""Features of prompts are those of the encoder, and it is read again only where something that they depend on is new."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from muybridge.models import prompt_cache
from muybridge.models.prompt_cache import PromptCache, user_prompt_folder
from muybridge.models.text import TextEncoderConfig, TextEncoderKind, Umt5TextEncoder, text_fingerprint

pytest.importorskip("transformers", reason="the extra `text` is not installed")
pytest.importorskip("ftfy", reason="the extra `text` is not installed")

PROMPTS = ["a red circle moves", "", "left " * 40]


@pytest.fixture
def encoder_folder(tiny_umt5: Path, tmp_path: Path) -> Path:
    """A text encoder and its tokenizer that a test may change."""
    return shutil.copytree(tiny_umt5, tmp_path / "model")


class Cache:
    """A new cache of the folder, as another process would open it, and how often it read the encoder."""

    def __init__(
        self, folder: Path, encoder: Path, *, max_tokens: int = 12, dtype: torch.dtype = torch.float32
    ) -> None:
        self.builds = 0
        self.config = TextEncoderConfig(TextEncoderKind.umt5, dim=32, max_tokens=max_tokens, path=str(encoder))
        self.dtype = dtype
        self.encode = PromptCache(folder, self.config, build=self.build, dtype=dtype).encode

    def build(self) -> Umt5TextEncoder:
        self.builds += 1
        return Umt5TextEncoder(self.config, dtype=self.dtype)


def no_encoder() -> Umt5TextEncoder:
    raise AssertionError("the encoder was read")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_use_reads_files_and_finds_the_same_bits(
    dtype: torch.dtype, encoder_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cache" / "prompts"
    first = Cache(folder, encoder_folder, dtype=dtype)
    features = first.encode(PROMPTS)
    assert first.builds == 1
    alone = torch.cat([first.build().encode([prompt]) for prompt in PROMPTS])
    assert features.dtype == dtype
    assert torch.equal(features, alone)
    second = PromptCache(folder, first.config, build=no_encoder, dtype=dtype)
    assert torch.equal(second.encode(PROMPTS[::-1]), features.flip(0))
    assert torch.equal(second.encode([" a red\n circle   moves"] * 2), features[:1].expand(2, -1, -1))


def test_only_new_prompts_are_encoded(encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Cache(tmp_path / "cache", encoder_folder).encode(PROMPTS)
    encoded: list[str] = []
    encode = Umt5TextEncoder.encode_unpadded

    def record(encoder: Umt5TextEncoder, captions: list[str]) -> list[torch.Tensor]:
        encoded.extend(captions)
        return encode(encoder, captions)

    monkeypatch.setattr(Umt5TextEncoder, "encode_unpadded", record)
    cache = Cache(tmp_path / "cache", encoder_folder)
    found = cache.encode(["green", *PROMPTS, "green", " green"])
    assert encoded == ["green"]
    assert cache.builds == 1
    assert torch.equal(found[-1], found[0])
    assert not torch.equal(found[0], found[1])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


CHANGES: dict[str, Callable[[Path], object]] = {
    "weights": lambda folder: flip_a_bit(folder / "text_encoder" / "model.safetensors"),
    "tokenizer": lambda folder: (folder / "tokenizer" / "special_tokens_map.json").write_text("{}\n"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_features_of_other_files_are_not_used(change: str, encoder_folder: Path, tmp_path: Path) -> None:
    Cache(tmp_path / "cache", encoder_folder).encode(PROMPTS)
    CHANGES[change](encoder_folder)
    cache = Cache(tmp_path / "cache", encoder_folder)
    cache.encode(PROMPTS)
    assert cache.builds == 1


def test_features_of_other_settings_are_not_used(encoder_folder: Path, tmp_path: Path) -> None:
    Cache(tmp_path / "cache", encoder_folder).encode(PROMPTS)
    longer = Cache(tmp_path / "cache", encoder_folder, max_tokens=13)
    assert longer.encode(PROMPTS).shape == (3, 13, 32)
    half = Cache(tmp_path / "cache", encoder_folder, dtype=torch.bfloat16)
    assert half.encode(PROMPTS).dtype == torch.bfloat16
    assert longer.builds == half.builds == 1
    again = Cache(tmp_path / "cache", encoder_folder)
    again.encode(PROMPTS)
    assert again.builds == 0  # each has files of its own


def test_a_missing_extra_is_named(encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ValueError, match=r"pip install 'muybridge\[text\]'"):
        Cache(tmp_path / "cache", encoder_folder).encode(PROMPTS)


def test_weights_exchanged_while_in_use_are_not_kept_under_the_old_ones(encoder_folder: Path, tmp_path: Path) -> None:
    before = shutil.copytree(encoder_folder, tmp_path / "before")
    cache = Cache(tmp_path / "cache", encoder_folder)
    old = cache.encode(["a"])
    for path in (encoder_folder / "text_encoder").glob("*.safetensors"):
        flip_a_bit(path)
    cache.encode(["red"])
    afresh = Cache(tmp_path / "cache", before)
    assert torch.equal(afresh.encode(["a"]), old)
    assert afresh.builds == 0
    afresh.encode(["red"])
    assert afresh.builds == 1


def test_a_file_that_is_damaged_anywhere_is_written_anew(
    encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    cache = Cache(folder, encoder_folder)
    features, encoder = cache.encode(["a red"]), cache.build()
    [path] = folder.iterdir()
    sound = path.read_bytes()
    damaged = [b"", sound[:-1], sound + b"x", sound[: len(sound) // 2], b"a letter to a friend"]
    damaged += [sound[:at] + bytes([sound[at] ^ 4]) + sound[at + 1 :] for at in range(0, len(sound), 7)]
    fingerprint = text_fingerprint(cache.config)
    monkeypatch.setattr(prompt_cache, "text_fingerprint", lambda config: fingerprint)  # once, not for each file
    for data in damaged:
        path.write_bytes(data)
        assert torch.equal(
            PromptCache(folder, cache.config, build=lambda: encoder, dtype=cache.dtype).encode(["a red"]), features
        )
        assert torch.equal(
            PromptCache(folder, cache.config, build=no_encoder, dtype=cache.dtype).encode(["a red"]), features
        )
    assert list(folder.iterdir()) == [path]


def test_a_file_under_the_name_of_another_prompt_is_not_used(encoder_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    features = Cache(folder, encoder_folder).encode(["a red"])
    [red] = folder.iterdir()
    Cache(folder, encoder_folder).encode(["a green"])
    [green] = set(folder.iterdir()) - {red}
    shutil.copy(green, red)
    cache = Cache(folder, encoder_folder)
    assert torch.equal(cache.encode(["a red"]), features)
    assert cache.builds == 1


def test_where_nothing_can_be_written_prompts_are_encoded_each_time(encoder_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = Cache(tmp_path / "file" / "prompts", encoder_folder)
    assert torch.equal(cache.encode(PROMPTS), cache.encode(PROMPTS))
    assert cache.builds == 2


def test_a_full_disk_leaves_no_part_of_a_file(
    encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def write_half(path: Path, data: bytes) -> int:
        write(path, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    assert Cache(tmp_path / "cache", encoder_folder).encode(PROMPTS).shape == (3, 12, 32)
    assert not list((tmp_path / "cache").iterdir())


WRITE_AND_READ = """
import sys, torch
from pathlib import Path
from muybridge.models.prompt_cache import PromptCache
from muybridge.models.text import TextEncoderConfig, TextEncoderKind

class Encoder:
    def encode_unpadded(self, captions):
        return [torch.full((9, 32), float(caption)) for caption in captions]

folder, encoder = map(Path, sys.argv[1:])
config = TextEncoderConfig(TextEncoderKind.umt5, dim=32, max_tokens=12, path=str(encoder))
print("ready", flush=True)
sys.stdin.readline()
for turn in range(20):
    cache = PromptCache(folder, config, build=Encoder, dtype=torch.float32)
    found = cache.encode([str(number) for number in range(5)])
    assert found[:, 0, 0].tolist() == [0, 1, 2, 3, 4], found[:, 0, 0]
    assert (found[:, :9] == found[:, :1, :1]).all() and not found[:, 9:].any()
    for path in folder.glob("*.safetensors"):
        path.unlink(missing_ok=True)
cache.encode([str(number) for number in range(5)])
"""


def test_two_processes_may_write_the_same_prompts(encoder_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITE_AND_READ, str(tmp_path / "cache"), str(encoder_folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".safetensors"] * 5


def test_a_file_that_goes_while_it_is_opened_is_a_missing_one(
    encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    first = Cache(folder, encoder_folder)
    features = first.encode(PROMPTS)
    map_file, gone = torch.UntypedStorage.from_file, []

    def removed_before_it_is_mapped(path: str, *args: Any, **kwargs: Any) -> Any:
        if Path(path).parent == folder:
            gone.append(path)
            Path(path).unlink()
        return map_file(path, *args, **kwargs)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", removed_before_it_is_mapped)
    second = Cache(folder, encoder_folder)
    assert torch.equal(second.encode(PROMPTS), features)
    assert len(gone) == len(PROMPTS)
    assert second.builds == 1


def test_the_folder_is_that_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    for name in ("MUYBRIDGE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert user_prompt_folder() == Path("/home/somebody/.cache/muybridge/prompts")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert user_prompt_folder() == Path("/home/somebody/.cache/muybridge/prompts")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_prompt_folder() == tmp_path / "muybridge" / "prompts"
    monkeypatch.setenv("MUYBRIDGE_CACHE", str(tmp_path / "own"))
    assert user_prompt_folder() == tmp_path / "own" / "prompts"
