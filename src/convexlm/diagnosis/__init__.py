"""What an objective would do to your data and model, before you train.

An objective weighs a record by a function of its mean log-probability m, so one forward pass over a sample of the data
says where each objective's gradient would go. `sample` reads and samples the data, `measure` makes the pass, `analyse`
computes statistics for any number of objectives at once, `judged` says what p̄ makes of
records that somebody has judged, `rules` and `advice` say what to do about it, `page` writes the page.
"""

from __future__ import annotations

from convexlm.diagnosis.advice import Advice, advise
from convexlm.diagnosis.analyse import Sample, analyse, analyse_objective, compare
from convexlm.diagnosis.page import render_page
from convexlm.diagnosis.rules import DERIVED, MEASURED, MEASURED_NOISE, REPORTED, RULES, Rule

__all__ = [
    "DERIVED",
    "MEASURED",
    "MEASURED_NOISE",
    "REPORTED",
    "RULES",
    "Advice",
    "Rule",
    "Sample",
    "advise",
    "analyse",
    "analyse_objective",
    "compare",
    "render_page",
]
