"""Mixed precision where the user names none: bf16 where the device has it, fp16 with loss scaling where not."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Precision:
    """What to compute in, and why; `bf16` and `fp16` are transformers' options."""

    bf16: bool
    fp16: bool
    why: str

    def __str__(self) -> str:
        name = "bf16" if self.bf16 else "fp16 with loss scaling" if self.fp16 else "float32"
        if self.why == FP8:
            name = "fp8"
        return f"{name} ({self.why})"


ASKED, FP8 = "as asked for", "as the accelerate file says"


def choose_precision(values: Mapping[str, Any]) -> Precision:
    """The precision of a training's options.

    What the options `bf16` and `fp16` say comes first, then the `mixed_precision` of an accelerate file, then what the
    device has. float32 is chosen on the CPU (where bf16 is mostly slower) and on Apple's GPUs; elsewhere on a GPU only
    where it is asked for, with `--bf16 false`.

    Raises:
        UserError: fp16 with loss scaling of weights that are float16 themselves.
    """
    found = _choose(values)
    trains_all = not values.get("use_peft") and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true"
    if found.fp16 and trains_all and values.get("dtype") == "float16":
        raise UserError(
            "--dtype float16 with fp16: weights in float16 cannot be trained with loss scaling; leave --dtype out "
            "(float32 weights, computed with in float16), or take --use_peft"
        )
    return found


def _choose(values: Mapping[str, Any]) -> Precision:
    if values.get("bf16") is not None or values.get("fp16"):
        return Precision(bool(values.get("bf16")), bool(values.get("fp16")), ASKED)
    in_file = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if in_file in ("bf16", "fp16", "fp8"):
        return Precision(in_file == "bf16", in_file == "fp16", FP8 if in_file == "fp8" else "the accelerate file's")
    device = device_type(bool(values.get("use_cpu")))
    if device == "cpu":
        return Precision(False, False, "the default on the CPU")
    if device == "mps":
        return Precision(False, False, "the default on Apple's GPUs")
    if _has_bf16(device):
        return Precision(True, False, "the device has it")
    return Precision(False, True, "the device has no bf16")


def device_type(use_cpu: bool = False) -> str:
    """What a training of this process computes on: `cpu`, `cuda`, `mps`, `xpu`, ..."""
    import torch

    if use_cpu or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    current = torch.accelerator.current_accelerator(True) if hasattr(torch, "accelerator") else None
    return "cpu" if current is None else str(current.type)


def _has_bf16(device: str) -> bool:
    import torch
    from transformers.utils import is_torch_bf16_gpu_available

    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(is_torch_bf16_gpu_available())
