"""convexlm: fine-tune language models for the best answer instead of every answer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from convexlm.version import __version__

if TYPE_CHECKING:
    from convexlm.config import ConvexConfig
    from convexlm.objectives import Objective, get_objective, register_objective
    from convexlm.trainer import ConvexTrainer

__all__ = ["ConvexConfig", "ConvexTrainer", "Objective", "__version__", "get_objective", "register_objective"]

_HOMES = {
    "ConvexConfig": "convexlm.config",
    "ConvexTrainer": "convexlm.trainer",
    "Objective": "convexlm.objectives",
    "get_objective": "convexlm.objectives",
    "register_objective": "convexlm.objectives",
}


def __getattr__(name: str) -> Any:
    # Looked up on first use: importing torch and transformers takes seconds, and `convexlm --help` needs neither.
    if name not in _HOMES:
        raise AttributeError(f"module 'convexlm' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
