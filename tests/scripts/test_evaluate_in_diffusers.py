"""An export measured in diffusers: the clips are those of `muybridge sample`, and the table is that of `muybridge evaluate`."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from muybridge.data.synthetic import HELD_OUT
from muybridge.models.text import TextEncoderConfig
from muybridge.models.text_small import write_tokenizer
from muybridge.scripts import export, sample
from muybridge.scripts.evaluate import read_all_frames
from muybridge.scripts.evaluate_in_diffusers import main
from muybridge.train.generate import clip_name

pytest.importorskip("diffusers", reason="diffusers makes the clips")
pytest.importorskip("transformers", reason="the extra `text` is not installed")
PROMPTS = ["a red circle moving left", "a blue square moving up"]


@pytest.fixture
def exported(
    tiny_run: list[str], save_random_run: Callable[[Path, list[str]], Path], tmp_path: Path
) -> tuple[Path, list[str]]:
    """A tiny run's export, and the arguments for its prompts and labels."""
    text = TextEncoderConfig(dim=32, num_heads=2, max_tokens=12, vocabulary=300)
    write_tokenizer(tmp_path / "run" / "tokenizer", PROMPTS, text)
    settings = ["text.kind=umt5_small", "text.vocabulary=300", "sampler.kind=unipc", "sampler.steps=3"]
    run_dir = save_random_run(tmp_path / "run", [*tiny_run, *settings])
    assert export.main([f"run={run_dir}", f"out={tmp_path / 'pipeline'}", "dtype=fp32"]) == 0
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    labels = {clip_name(number, prompt): vars(HELD_OUT[number]) for number, prompt in enumerate(PROMPTS)}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    inputs = ["--prompts", str(tmp_path / "prompts.txt"), "--labels", str(tmp_path / "labels.json")]
    return tmp_path / "pipeline", inputs


def test_it_judges_the_clips_that_diffusers_makes_of_the_export(
    exported: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, inputs = exported
    out, figures = tmp_path / "clips", tmp_path / "figures.json"
    assert main(["--model", str(model), *inputs, "--out", str(out), "--json", str(figures)]) == 0
    said = capsys.readouterr().out
    assert "Clips that show what they should" in said
    assert json.loads(figures.read_text())["all"]["n"] == 2

    prompts = f"prompts={tmp_path / 'prompts.txt'}"
    assert sample.main([f"model={model}", prompts, f"out={tmp_path / 'here'}"]) == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "here").glob("*.mp4"))
    for name in names:
        there, here = (read_all_frames((folder / name).read_bytes()) for folder in (out, tmp_path / "here"))
        assert there.std() > 1
        # Frames differ by one in places, and an encoder makes a little more of it.
        assert np.abs(there.astype(int) - here.astype(int)).mean() < 0.5


def test_what_cannot_be_measured_is_named_before_a_clip_is_made(
    exported: tuple[Path, list[str]], tmp_path: Path
) -> None:
    model, inputs = exported
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there exists already"):
        main(["--model", str(model), *inputs, "--out", str(tmp_path / "there")])
    (tmp_path / "prompts.txt").write_text("another prompt")
    with pytest.raises(ValueError, match="must name the clips of the prompts; not in both: 0000-a-red-circle"):
        main(["--model", str(model), *inputs, "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
