"""How many positions a model's config says that it has."""

from __future__ import annotations

from typing import Any


def positions_of(config: Any) -> int | None:
    """`max_position_embeddings` of the text part; None where it is unset or no limit (XLNet's configs write -1)."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions >= 2 else None
