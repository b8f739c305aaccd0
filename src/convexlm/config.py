"""`ConvexConfig`: TRL's `SFTConfig` with an objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from trl import SFTConfig

from convexlm.objective_slope import check_slope
from convexlm.objectives import Objective, get_objective


@dataclass
class ConvexConfig(SFTConfig):
    """Every option of TRL's `SFTConfig` (and so of `TrainingArguments`), and which objective to minimise.

    Where no precision is asked for, bf16 is used on devices that have it and float32 elsewhere (TRL asks for bf16
    everywhere, which on many CPUs is slower than float32).

    Raises:
        ValueError: an unknown objective, a setting that it does not have, or a value outside its range.
    """

    if TYPE_CHECKING:
        bf16: bool | None
        greater_is_better: bool | None

    # Options that may come as a JSON string from the command line.
    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "objective_kwargs"]

    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Replace a loss that is not finite by the mean of the others in logs, as transformers does."
        },
    )
    objective: str = field(
        default="convex",
        metadata={"help": "Objective to minimise: `mle`, `convex`, `power`, `dft`, or one that you registered."},
    )
    k: float | None = field(
        default=None,
        metadata={"help": "Exponent k of `convex` (> 0) and `power` (0 < k <= 1); the objective's default if unset."},
    )
    level: str | None = field(
        default=None,
        metadata={"help": "`sequence`: a function of a sequence's mean log-probability; `token`: of each token's."},
    )
    length_weighting: str | None = field(
        default=None,
        metadata={"help": "`token`: a sequence counts by its target tokens; `sequence`: all count the same."},
    )
    mle_mix: float | None = field(
        default=None,
        metadata={"help": "Share a of maximum likelihood in the objective, from 0 to 1: (1-a) value(m) + a (-m)."},
    )
    k_warmup: float = field(
        default=0.0,
        metadata={"help": "Share of the training steps over which k goes from its maximum-likelihood limit to k."},
    )
    objective_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Further settings of a registered objective, as JSON: '{\"temperature\": 2.0}'."},
    )
    head: str = field(
        default="fused",
        metadata={
            "help": "`fused`: gradients formed while a chunk's logits are at hand; `recompute`: in a second pass over "
            "the logits, slower. The result is the same up to rounding."
        },
    )
    head_chunk_tokens: int | None = field(
        default=None,
        metadata={"help": "Target tokens whose logits may exist at a time; by default from vocabulary and memory."},
    )
    padding_side: str = field(
        default="right",
        metadata={"help": "Side on which rows of a batch are padded, `right` or `left`; the loss is the same."},
    )

    return_freed_memory: bool = field(
        default=False,
        metadata={
            "help": "On a CPU with glibc, give freed memory of 1 MiB and more back to the system at once: the peak is "
            "then what the dry run estimates, but a step takes longer (docs/training.md)."
        },
    )
    skip_nonfinite_steps: bool = field(
        default=False,
        metadata={
            "help": "Make no update at a step whose loss or gradient is not finite, and count it in `skipped_steps`, "
            "in place of stopping with a report."
        },
    )
    min_effective_sample_size: float = field(
        default=0.05,
        metadata={
            "help": "Warn once when the effective sample size (a share, from 0 to 1) is below this in three logs "
            "running; 0 turns the warning off."
        },
    )

    def __post_init__(self) -> None:
        """Fill in what depends on the device, and refuse what no objective could honour."""
        if self.bf16 is None and not self.fp16:
            self.bf16 = _device_has_bf16(self.use_cpu)
        for name in ("save_strategy", "eval_strategy", "logging_strategy"):
            if getattr(self, name) is False:  # what YAML makes of an unquoted `no`
                setattr(self, name, "no")
        metric = self.metric_for_best_model
        if self.greater_is_better is None and metric is not None and metric.endswith(("nll", "entropy", "loss")):
            self.greater_is_better = False
        super().__post_init__()
        objective = self.build_objective()
        check_slope(objective)  # training goes by the value, what is logged by the weight
        if not 0.0 <= self.k_warmup <= 1.0:
            raise ValueError(f"`k_warmup` is a share of the training steps, from 0 to 1, not {self.k_warmup}")
        if self.k_warmup and objective.name != "mle" and type(objective).at_warmup is Objective.at_warmup:
            raise ValueError(
                f"`k_warmup` would change nothing, for objective `{objective.name}` has no `at_warmup`; leave it out"
            )
        if self.head not in ("fused", "recompute"):
            raise ValueError(f"`head` is `fused` or `recompute`, not `{self.head}`")
        if self.head_chunk_tokens is not None and self.head_chunk_tokens < 1:
            raise ValueError(f"`head_chunk_tokens` must be at least 1, not {self.head_chunk_tokens}")
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"`padding_side` is `left` or `right`, not `{self.padding_side}`")
        if not 0.0 <= self.label_smoothing_factor < 1.0:
            raise ValueError(
                f"`label_smoothing_factor` is a number from 0 to below 1, not {self.label_smoothing_factor}"
            )
        if not 0.0 <= self.min_effective_sample_size < 1.0:
            raise ValueError(
                f"`min_effective_sample_size` is a share from 0 (off) to below 1, not {self.min_effective_sample_size}"
            )

    def build_objective(self) -> Objective:
        """The objective that these options describe, at its full k."""
        settings = {
            name: getattr(self, name)
            for name in ("k", "level", "length_weighting", "mle_mix")
            if getattr(self, name) is not None
        }
        extra = self.objective_kwargs or {}
        if not isinstance(extra, dict):
            raise ValueError(f"`objective_kwargs` must be a JSON object, not {extra!r}")
        if twice := set(settings) & set(extra):
            raise ValueError(f"`{min(twice)}` is given both as an option and in `objective_kwargs`")
        return get_objective(self.objective, **settings, **extra)


def _device_has_bf16(use_cpu: bool) -> bool:
    if use_cpu or not torch.cuda.is_available():
        return False
    return torch.cuda.is_bf16_supported(including_emulation=False)
