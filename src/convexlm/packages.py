"""The versions of installed packages, as scores and decode files note them."""

from __future__ import annotations

import functools
import importlib.metadata


@functools.cache  # asked anew for every score and file, and reading a package's metadata takes milliseconds
def package_version(name: str) -> str:
    """The version of an installed package.

    Raises:
        importlib.metadata.PackageNotFoundError: it is not installed.
    """
    return importlib.metadata.version(name)
