"""How many positions a model has, as its config says."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Gemma3Config, LlamaConfig, XLNetConfig

from convexlm.positions import positions_of


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (LlamaConfig(max_position_embeddings=32), 32),
        (LlamaConfig(max_position_embeddings=-1), None),
        (XLNetConfig(), None),
        (Gemma3Config(text_config={"max_position_embeddings": 64}), 64),
    ],
)
def test_positions(config: Any, positions: int | None) -> None:
    assert positions_of(config) == positions
