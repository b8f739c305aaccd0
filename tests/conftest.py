"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data, beside the project's; tests that need it skip where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("CONVEXLM_SHARED_DATA", default))
    if not path.is_dir():
        pytest.skip(f"real data not at hand ({path}); set CONVEXLM_SHARED_DATA to its folder")
    return path
