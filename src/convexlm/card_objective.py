"""What was minimised, in the formula and the words of a model card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convexlm.card_text import code, plain
from convexlm.recipe_types import as_mapping

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMULAS = {"mle": "-m", "convex": "(1 - exp(k m)) / k", "power": "(-m)^k / k", "dft": "1 - exp(m)"}
SETTINGS = ("k", "level", "length_weighting", "mle_mix")


def objective_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The objective that options ask for, with its `name` and `objective_kwargs`; empty where they name none."""
    if not settings.get("objective"):
        return {}
    kept = {key: settings[key] for key in SETTINGS if settings.get(key) is not None}
    own = as_mapping(settings.get("objective_kwargs"))
    kept |= own if isinstance(own, dict) else {}
    alias = {"level": "token", "k": 1.0} if settings["objective"] == "dft" else {}
    return {"name": str(settings["objective"]), **alias, **kept}


def objective_lines(objective: Mapping[str, Any], training: Mapping[str, Any]) -> list[str]:
    """A section of the card: formula, what m is, how answers are averaged, and what training did to it.

    Args:
        objective: `name` and settings, as `Objective.to_dict` gives them or `objective_of`; empty gives no section.
        training: training options, of which `k_warmup`, `label_smoothing_factor` and `neftune_noise_alpha` matter.
    """
    if not objective:
        return []
    name = str(objective.get("name"))
    by_token = objective.get("level") == "token"
    formula = _formula(name, _number(objective.get("mle_mix")))
    what = code(name)
    if formula:
        of = "each target token's log-probability" if by_token else "the mean log-probability of an answer's tokens"
        what += f": `{formula}`, where m is {of}"
        if name == "power":
            what += " (a parabola in place of the pole, where -m is below 1e-4)"
    said = [f"{what}."]
    if name == "convex" and by_token and _number(objective.get("k")) == 1:
        said.append("With k = 1 this is `1 - p` of each token, which has the gradient of DFT (`dft`).")
    said.append(_averaging(by_token, objective.get("length_weighting") == "sequence"))
    if name != "mle" and (warmup := _number(training.get("k_warmup"))):
        said.append(
            f"Over the first {100 * warmup:g} % of the training steps k went from its maximum-likelihood limit to its "
            "value."
        )
    if smoothing := _number(training.get("label_smoothing_factor")):
        said.append(
            f"Labels were smoothed by e = {smoothing:g}: -log p of a token became (1 - e) (-log p) + e times the mean "
            "of -log p over the vocabulary."
        )
    if noise := _number(training.get("neftune_noise_alpha")):
        said.append(f"In training, noise was added to the input embeddings (NEFTune, alpha = {noise:g}).")
    settings = ", ".join(f"{plain(key)} = {plain(value)}" for key, value in sorted(objective.items()) if key != "name")
    if settings:
        said.append(f"Settings: {settings}.")
    return ["## Objective", "", " ".join(said), ""]


def _formula(name: str, mix: float) -> str:
    own = FORMULAS.get(name, "")
    if not own or not mix or name == "mle":
        return own
    return f"{1 - mix:g} ({own}) + {mix:g} (-m)"


def _averaging(by_token: bool, by_sequence: bool) -> str:
    if by_sequence:
        return "All answers count the same" + (", each by the mean over its tokens." if by_token else ".")
    return "All target tokens count the same." if by_token else "An answer counts by its number of tokens."


def _number(value: Any) -> float:
    """A setting as a number; 0 where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0
