"""Greedy search, beam search and sampling over a transformers model's forward pass, with the loops our own.

They find what `generate` finds, and leave out what it does for nothing: the shared head of all prompts is computed
once, a prompt once and not once a beam, and a finished sentence leaves the batch.
"""

from convexlm.decoding.generation.beam import beam_search
from convexlm.decoding.generation.greedy import greedy_search, sample
from convexlm.decoding.generation.probe import loops_differ, others_show, padding_shows
from convexlm.decoding.generation.rows import Prefix, Rows, angles_by_length, why_not

__all__ = [
    "Prefix",
    "Rows",
    "angles_by_length",
    "beam_search",
    "greedy_search",
    "loops_differ",
    "others_show",
    "padding_shows",
    "sample",
    "why_not",
]
