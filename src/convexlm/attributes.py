"""An object's attributes, otherwise for a while."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def changed(thing: Any, **values: Any) -> Iterator[None]:
    """Set attributes that are there, and set them back at the end, whatever happens.

    Args:
        thing: whose.
        **values: by name.
    """
    before = {name: getattr(thing, name) for name in values}
    try:
        for name, value in values.items():
            setattr(thing, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(thing, name, value)
