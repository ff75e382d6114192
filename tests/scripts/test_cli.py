import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest

from muybridge.scripts import cli


def install_verb(monkeypatch: pytest.MonkeyPatch, main: object) -> None:
    """Make `muybridge sample` call `main`."""
    monkeypatch.setattr(cli.importlib, "import_module", lambda name, package: SimpleNamespace(main=main))


def test_help_lists_every_verb_on_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(sum(line.split()[:1] == [verb] for line in lines) == 1 for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_a_module(verb: str) -> None:
    assert importlib.util.find_spec(cli.VERBS[verb].module, package="muybridge.scripts")


def test_help_does_not_load_torch() -> None:
    code = "import sys; from muybridge.scripts.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_a_misspelt_verb_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["smaple"]) == 64
    assert "did you mean `sample`" in capsys.readouterr().err


def test_the_verb_gets_the_arguments_and_gives_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def main(argv: list[str]) -> int:
        seen.append(argv)
        return 75

    install_verb(monkeypatch, main)
    assert cli.main(["sample", "run=here", "--fast"]) == 75
    assert seen == [["run=here", "--fast"]]


def test_a_value_error_becomes_one_line_and_exit_64(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: list[str]) -> int:
        raise ValueError("data.frames=50 must be 1 + a multiple of 4")

    install_verb(monkeypatch, main)
    monkeypatch.delenv("MUYBRIDGE_TRACEBACK", raising=False)
    assert cli.main(["sample"]) == 64
    assert capsys.readouterr().err == "muybridge: data.frames=50 must be 1 + a multiple of 4\n"
    monkeypatch.setenv("MUYBRIDGE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="multiple of 4"):
        cli.main(["sample"])


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(argv: list[str]) -> int:
        raise KeyError("latents")

    install_verb(monkeypatch, main)
    with pytest.raises(KeyError):
        cli.main(["sample"])


def test_a_wrong_option_exits_with_64(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(argv: list[str]) -> int:
        raise SystemExit(2)

    install_verb(monkeypatch, main)
    assert cli.main(["sample", "--no-such-option"]) == 64
