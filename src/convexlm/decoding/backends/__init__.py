"""Decoding backends: one module each, found by name through `get_backend`."""

from convexlm.decoding.backends.base import BACKENDS, Backend, Hypothesis, get_backend, register_backend

__all__ = ["BACKENDS", "Backend", "Hypothesis", "get_backend", "register_backend"]
