"""Advice from a diagnosis: the facts that its figures hold, and what the table in `rules.py` says of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from convexlm.diagnosis.optimum import WANTED_RATIO
from convexlm.diagnosis.rules import RULES
from convexlm.tables import signed

if TYPE_CHECKING:
    from convexlm.diagnosis.rules import Facts


_GENTLER = {"convex": "a smaller k", "power": "a k nearer to 1"}  # what makes weights more even


@dataclass(frozen=True)
class Advice:
    """One piece of advice: `rule` is its name, `objective` the label it is about ("" for the data as a whole)."""

    rule: str
    objective: str
    finding: str
    advice: str
    reason: str
    evidence: str


def advise(analysis: dict[str, Any]) -> list[Advice]:
    """What the rules say about an analysis: of the data, then of each objective, then of the comparison.

    Args:
        analysis: from `analyse`, with `comparison` from `compare` if there is one, and `reading` (`lost_share`,
            `max_length`) and `end_p` where they are known.
    """
    told = _told("data", "", _data_facts(analysis))
    for entry in analysis["objectives"]:
        told += _told("objective", entry["label"], _objective_facts(entry, analysis))
    if analysis.get("comparison"):
        told += _told("compare", "", _compare_facts(analysis["comparison"]))
    return told


def grouped(advice: list[dict[str, str]]) -> list[list[dict[str, str]]]:
    """Advice of one rule and one wording together, so that what holds of several objectives is said once."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for one in advice:
        groups.setdefault((one["rule"], one["advice"]), []).append(one)
    return list(groups.values())


def as_dicts(advice: list[Advice]) -> list[dict[str, str]]:
    """JSON-ready."""
    return [asdict(one) for one in advice]


def _told(about: str, label: str, facts: Facts) -> list[Advice]:
    told = []
    for rule in RULES:
        if rule.about == about and rule.when(facts):
            finding, advice, reason = (text.format_map(facts) for text in (rule.finding, rule.advice, rule.reason))
            told.append(Advice(rule.name, label, finding, advice, reason, rule.evidence))
    return told


def _data_facts(analysis: dict[str, Any]) -> Facts:
    data, reading = analysis["data"], analysis.get("reading") or {}
    judged = data.get("judged")
    low, high = judged["p_bar_interval"] if judged else (None, None)
    return {
        "judged_share": judged and judged["p_bar_ranks_right"],
        "judged_low": low,
        "judged_high": high,
        "num_records": data["num_records"],
        "p_bar_median": data["p_bar"]["quantiles"]["0.5"],
        "lost_share": reading.get("lost_share", 0.0),
        "max_length": reading.get("max_length"),
    }


def _objective_facts(entry: dict[str, Any], analysis: dict[str, Any]) -> Facts:
    optimum = entry["optimum"] or {}
    exponents = optimum.get("exponent")
    settings, hint = entry["objective"], entry["k_for_ratio"]
    # A source counts as starved that MLE gives at least a twentieth, and this objective less than a quarter of that.
    starved = min(
        (row for row in entry["by_source"] if row["mle_share"] >= 0.05 and row["share"] < 0.25 * row["mle_share"]),
        key=lambda row: row["share"] / row["mle_share"],
        default=None,
    )
    return {
        "family": settings["name"],
        "gentler": _GENTLER.get(settings["name"], "a flatter weight"),
        "level": settings["level"],
        "mle_mix": settings["mle_mix"],
        "k": entry["k"],
        "k_hint": f"k <= {hint:g}, or " if hint is not None and hint < entry["k"] else "",
        "wanted": WANTED_RATIO,
        "update_ratio": entry["update_ratio"],
        "ess": entry["weight"]["effective_sample_size"],
        "weight_max": entry["weight"]["max"],
        "units": entry["weight"]["units"],
        "nothing_share": entry["gets_nothing"]["share"],
        "nothing_count": entry["gets_nothing"]["count"],
        "nothing_below": entry["gets_nothing"]["below"],
        "starved_source": starved and starved["source"],
        "starved_share": starved and starved["share"],
        "starved_mle_share": starved and starved["mle_share"],
        "length_moved": entry["length_weighting"]["moved"],
        "collapsed": optimum.get("collapsed", 0),
        "shortest": optimum.get("shortest"),
        "exponent_median": exponents and exponents["0.5"],
        "end_p": analysis.get("end_p"),
    }


def _compare_facts(comparison: dict[str, Any]) -> Facts:
    tenths = comparison["by_p_bar"]
    rises = [row["nll_after"] - row["nll_before"] for row in tenths]
    rise = comparison["all"]["nll_after"] - comparison["all"]["nll_before"]
    return {
        "lowest_rise": rises[0],
        "lowest_after": tenths[0]["nll_after"],
        "tenths": len(tenths),
        "worse_tenths": sum(rise > 0.01 for rise in rises),
        "nll_rise": rise,
        "nll_rise_said": signed(rise),
    }
