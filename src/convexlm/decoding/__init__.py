"""Decoding: checkpoints and sources to hypotheses, every sentence exactly once."""

from convexlm.decoding.checkpoint import check_checkpoint, checkpoint_sha256, find_checkpoint
from convexlm.decoding.job import DecodeJob, DecodeResult
from convexlm.decoding.run import CheckpointJobs, DecodeProgress, decode_jobs, decode_sweep
from convexlm.decoding.search import Search

__all__ = [
    "CheckpointJobs",
    "DecodeJob",
    "DecodeProgress",
    "DecodeResult",
    "Search",
    "check_checkpoint",
    "checkpoint_sha256",
    "decode_jobs",
    "decode_sweep",
    "find_checkpoint",
]
