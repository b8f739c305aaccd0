"""What an objective would do to your data and model, before you train.

An objective weighs a record by a function of its mean log-probability m, so one forward pass over a sample of the data
says where each objective's gradient would go. `sample` reads and samples the data, `measure` makes the pass, `analyse`
computes statistics for any number of objectives at once, `advice` holds the rules, `page` writes the page.
"""

from __future__ import annotations

from convexlm.diagnosis.advice import DERIVED, MEASURED, REPORTED, RULES, Advice, Rule, advise
from convexlm.diagnosis.analyse import Sample, analyse, analyse_objective, compare
from convexlm.diagnosis.page import render_page

__all__ = [
    "DERIVED",
    "MEASURED",
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
