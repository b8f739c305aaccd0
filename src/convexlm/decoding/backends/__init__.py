"""Decoding backends: one module each, found by name through `get_backend`."""

from convexlm.decoding.backends.base import BACKENDS, Backend, Hypothesis, get_backend, register_backend, with_nbest

__all__ = ["BACKENDS", "Backend", "Hypothesis", "get_backend", "register_backend", "with_nbest"]
