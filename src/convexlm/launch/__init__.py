"""Starting a training on several processes or machines, and ending it."""

from __future__ import annotations

from convexlm.launch.ending import leave

__all__ = ["leave"]
