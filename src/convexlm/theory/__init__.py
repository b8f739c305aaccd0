"""What each objective wants: the distribution over answers at which the expected loss is least.

    from convexlm.theory import optimum

    optimum([0.4, 0.3, 0.2, 0.1], 10, "convex", k=5.0).probabilities     # 0.533, 0.300, 0.133, 0.033
    optimum([0.5, 0.5], [5, 20], get_objective("convex", k=2.0))         # lengths that differ

The derivations are in `docs/theory.md`. A model is taken to be able to represent any distribution and to be trained to
the end; a real one is neither, and at the lengths of language models the optimum of `convex` hardly differs from the
data: at T = 100 and k = 1 the exponent is 1.01.
"""

from __future__ import annotations

from convexlm.theory.failure import Climb, climb_plain_power, local_optima_plain_power, log_gradient_factor
from convexlm.theory.optimum import CLOSED_FORM, SOLVED, Optimum, entropy, expected_loss, optimum
from convexlm.theory.page import render_page
from convexlm.theory.problem import SUM_TOLERANCE, check_lengths, check_probabilities

__all__ = [
    "CLOSED_FORM",
    "SOLVED",
    "SUM_TOLERANCE",
    "Climb",
    "Optimum",
    "check_lengths",
    "check_probabilities",
    "climb_plain_power",
    "entropy",
    "expected_loss",
    "local_optima_plain_power",
    "log_gradient_factor",
    "optimum",
    "render_page",
]
