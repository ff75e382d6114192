"""What tests of several commands share."""

from pathlib import Path

import pytest


@pytest.fixture
def release(tmp_path: Path, tiny_umt5: Path) -> Path:
    """A folder of Wan 2.1's release with tiny models."""
    from muybridge.tests.scripts.wan_releases import build_transformer, build_vae, write_release

    return write_release(tmp_path / "Wan2.1-T2V", build_transformer(), build_vae(), tiny_umt5)
