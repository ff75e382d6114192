"""`muybridge index` says what it did, what it left out and what to do next."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muybridge.data.index import ClipIndex
from muybridge.scripts import cli


def write_images(path: Path, count: int, *, broken: int = 0) -> Path:
    """A tar of `count` captioned pictures, the first `broken` of which are none."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            file = io.BytesIO()
            Image.fromarray(np.full((8, 12, 3), number, np.uint8)).save(file, "PNG")
            data = b"\xff\xd8\xff no jpeg" if number < broken else file.getvalue()
            for extension, content in (("png", data), ("txt", f"number {number}".encode())):
                info = tarfile.TarInfo(f"k{number}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def run(*arguments: object) -> int:
    return cli.main(["index", *map(str, arguments), "--workers", "1"])


def test_a_folder_is_indexed_in_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "tars"
    write_images(folder / "a.tar", 5, broken=2)
    assert run(folder, "--quality") == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "damaged image",
        f"Wrote the index of 3 clips (0.0 minutes of video, 3 images) to {folder}; read 1 of 1 shards.",
        f"Left out 2; the reasons are in {folder / 'index' / 'rejected.jsonl'}.",
        f"Next: muybridge train +experiment=NAME data.path={folder}",
    ):
        assert part in said
    index = ClipIndex.open(folder)
    assert index.column("luma").tolist() == [2.0, 3.0, 4.0]
    assert run(folder, "--quality") == 0
    assert "nothing changed" in capsys.readouterr().out
    write_images(folder / "b.tar", 1)
    assert run(folder, "--quality") == 0
    assert "read 1 of 2 shards, the others had not changed." in " ".join(capsys.readouterr().out.split())
    assert run(folder) == 0  # without --quality: other settings, so all are read
    assert np.isnan(ClipIndex.open(folder).column("luma")).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone/*.tar", "out"], "SRC=gone/*.tar holds no shards"),
        (["tars/a.tar"], "SRC=tars/a.tar is no local folder, so OUT must say where the index shall be written"),
        (["tars", "out", "--max-rejected", "0.1"], "1 of 2 samples cannot be used: damaged image (1)"),
        (["tars", "out", "--max-rejected", "3"], "3 must be in 0..1"),
        (["tars", "out", "more"], "unrecognized arguments: more; quote a pattern"),
        (["tars", "out", "--workers", "0"], "0 must be positive"),
        (["tars", "tars/a.tar"], "OUT=tars/a.tar must be a folder"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_64(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "tars" / "a.tar", 2, broken=1)
    assert cli.main(["index", *arguments]) == 64
    said = capfd.readouterr().err
    assert message in said
    assert "Traceback" not in said
