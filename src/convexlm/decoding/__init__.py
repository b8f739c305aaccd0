"""Decoding: checkpoints and sources to hypotheses, every sentence exactly once."""

from convexlm.decoding.checkpoint import check_checkpoint, checkpoint_sha256, find_checkpoint
from convexlm.decoding.job import DecodeJob, DecodeResult
from convexlm.decoding.run import DecodeProgress, decode_jobs
from convexlm.decoding.search import Search

__all__ = [
    "DecodeJob",
    "DecodeProgress",
    "DecodeResult",
    "Search",
    "check_checkpoint",
    "checkpoint_sha256",
    "decode_jobs",
    "find_checkpoint",
]
