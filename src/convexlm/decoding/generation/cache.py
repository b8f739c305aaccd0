"""A key-value cache whose rows can be dropped, and that grows without being copied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

GROWTH = 64
"""Positions that a buffer grows by: copied every so many tokens instead of at each."""


class _Buffer:
    """A tensor (rows, heads, positions, size) with room at the end of its positions."""

    def __init__(self, first: torch.Tensor) -> None:
        self.length = 0
        self._data = first.new_empty((*first.shape[:2], 0, first.shape[3]))

    def append(self, new: torch.Tensor) -> torch.Tensor:
        end = self.length + new.shape[2]
        if end > self._data.shape[2]:
            rows, heads, _, size = self._data.shape
            data = self._data.new_empty((rows, heads, end + GROWTH, size))
            data[:, :, : self.length] = self._data[:, :, : self.length]
            self._data = data
        self._data[:, :, self.length : end] = new
        self.length = end
        return self.used

    @property
    def used(self) -> torch.Tensor:
        return self._data[:, :, : self.length]

    def take(self, rows: torch.Tensor) -> None:
        data = self._data.new_empty((len(rows), *self._data.shape[1:]))
        data[:, :, : self.length] = self._data[rows, :, : self.length]
        self._data = data


class RowLayer(DynamicLayer):
    """One layer's keys and values, in buffers."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the buffers once the first keys and values say their shapes."""
        super().lazy_initialization(key_states, value_states)
        self._buffers = (_Buffer(key_states), _Buffer(value_states))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values (rows, heads, new, size); returns all so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._buffers[0].append(key_states)
        self.values = self._buffers[1].append(value_states)
        return self.keys, self.values

    def change(self, do: Callable[[_Buffer], None]) -> None:
        """Apply a change to both buffers."""
        for buffer in self._buffers:
            do(buffer)
        self.keys, self.values = (buffer.used for buffer in self._buffers)


class RowCache(DynamicCache):
    """The cache of a batch, one `RowLayer` a layer of the model."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = [RowLayer() for _ in range(num_layers)]

    def fill(self, other: RowCache, rows: int) -> None:
        """Begin with another cache's content, which has one row, in `rows` rows."""
        for own, layer in zip(self.layers, other.layers, strict=True):
            own.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1))

    def take(self, rows: torch.Tensor) -> None:
        """Keep the rows `rows` (indices) only."""
        for layer in self.layers:
            layer.change(lambda buffer: buffer.take(rows))
