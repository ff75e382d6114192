"""The table of faults names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_test_in_the_table_exists() -> None:
    rows = [line for line in (HERE / "README.md").read_text().splitlines() if line.startswith("| ")]
    named = re.findall(r"`((?:tests/)?[\w/]+\.py)(?:::(\w+))?`", "\n".join(rows))
    assert len(named) > 40
    for file, function in named:
        path = HERE.parents[1] / file if file.startswith("tests/") else HERE / file
        if not path.exists():  # beside the one that the cell names first
            (path,) = HERE.parent.rglob(file)
        assert f"def {function}(" in path.read_text() or not function, (file, function)
