"""Whether an objective falls to 0 at m = 0, with `weight` as its slope. Only torch is needed here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from convexlm.objectives import Objective

_POINTS = (-20.0, -7.0, -3.0, -1.0, -0.3, -0.05)
_LENGTH = 20.0  # of sequences, for objectives that depend on it


def check_slope(objective: Objective) -> None:
    """See that the two of a user's own objective agree: training goes by `value`, what is said of it by `weight`.

    Raises:
        ValueError: `weight` is not minus the slope of `value` or is negative, one of them is not elementwise, or
            `value` is not 0 at 0.
    """
    m = torch.tensor(_POINTS, dtype=torch.float64, requires_grad=True)
    function = objective.for_lengths(torch.full_like(m, _LENGTH, requires_grad=False))
    with torch.enable_grad():
        value: Any = function.value(m)
        weight: Any = function.weight(m.detach())
        zero: Any = function.value(torch.zeros_like(m))
    for one in (value, weight):
        if not isinstance(one, torch.Tensor) or one.shape != m.shape:
            raise ValueError(f"objective `{objective.name}`: value(m) and weight(m) must be elementwise in m")
    if not value.requires_grad:
        raise ValueError(f"objective `{objective.name}`: value(m) has no slope that autograd knows")
    (slope,) = torch.autograd.grad(value.sum(), m)
    if not torch.allclose(-slope, weight.detach().double(), rtol=1e-6, atol=1e-9):
        raise ValueError(f"objective `{objective.name}`: weight(m) is not minus the slope of value(m)")
    if bool((bad := ~(weight >= 0)).any()):
        at = m[bad.nonzero()[0, 0]].item()
        raise ValueError(
            f"objective `{objective.name}`: weight(m) is negative or no number at m = {at:.4g}; value(m) must not "
            "rise with m"
        )
    if not bool((zero.abs() <= 1e-9).all()):
        raise ValueError(f"objective `{objective.name}`: value(0) must be 0, not {zero.flatten()[0].item():.4g}")
