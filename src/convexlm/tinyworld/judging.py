"""Hypotheses and models against the truth: exact measures, where a sampled reference could only estimate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from convexlm.tinyworld.grammar import translations

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def judge(sources: Sequence[str], hypotheses: Sequence[str], direction: str) -> dict[str, Any]:
    """Measure hypotheses against the exact distribution over translations.

    Returns:
        `mode_share`: share of hypotheses that are the most probable translation of their source;
        `valid_share`: share that are a translation at all;
        `mean_probability`: mean true probability of the hypotheses (its ceiling is `mean_mode_probability`, which only
        the most probable translations reach);
        `num_sentences`; and `sentences`, for each of them `source`, `hypothesis`, `probability`, `is_mode`, `is_valid`
        and `mode`.

    Raises:
        ValueError: lists of different length or empty, or a source that is no sentence of the tiny world.
    """
    if len(sources) != len(hypotheses):
        raise ValueError(f"{len(sources)} sources but {len(hypotheses)} hypotheses")
    if not sources:
        raise ValueError("nothing to judge: no sources")
    sentences = []
    ceiling = []
    for source, hypothesis in zip(sources, hypotheses, strict=True):
        truth = translations(source, direction)
        mode, mode_probability = next(iter(truth.items()))
        ceiling.append(mode_probability)
        sentences.append(
            {
                "source": source,
                "hypothesis": hypothesis,
                "probability": truth.get(hypothesis, 0.0),
                "is_mode": hypothesis == mode,
                "is_valid": hypothesis in truth,
                "mode": mode,
            }
        )
    n = len(sentences)
    return {
        "mode_share": sum(bool(row["is_mode"]) for row in sentences) / n,
        "valid_share": sum(bool(row["is_valid"]) for row in sentences) / n,
        "mean_probability": math.fsum(float(row["probability"]) for row in sentences) / n,  # type: ignore[arg-type]
        "mean_mode_probability": math.fsum(ceiling) / n,
        "num_sentences": n,
        "sentences": sentences,
    }


def distribution_measures(
    truth: Sequence[Mapping[str, float]], model_log_probs: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """Measure a model's distribution over whole translations against the true one.

    Args:
        truth: for each source, true probabilities of all its translations.
        model_log_probs: for each source, the model's log-probability (nats, summed over tokens and end mark) of each
            of the same translations.

    Returns:
        Means over sources, in nats: `valid_mass` (the model's probability of all valid translations together),
        `mode_mass` (of the most probable one), `cross_entropy` (of the truth under the model; infinite if the model
        rules out a true translation), `truth_entropy`, `kl_divergence` (their difference), and `model_entropy` (of the
        model's distribution among the valid ones; NaN if it gives them no mass); `num_sentences`, and `sentences` with
        the same per source.

    Raises:
        ValueError: lists of different length or empty, different translations, or numbers that are no distribution.
    """
    if len(truth) != len(model_log_probs):
        raise ValueError(f"{len(truth)} true distributions but {len(model_log_probs)} of the model")
    if not truth:
        raise ValueError("nothing to measure: no distributions")
    rows = [
        _measure(number, true, model) for number, (true, model) in enumerate(zip(truth, model_log_probs, strict=True))
    ]
    return {
        **{name: _mean([row[name] for row in rows]) for name in rows[0]},
        "num_sentences": len(rows),
        "sentences": rows,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if any(map(math.isinf, values)) else math.fsum(values) / len(values)


def _measure(number: int, truth: Mapping[str, float], model: Mapping[str, float]) -> dict[str, float]:
    where = f"distribution {number}"
    if truth.keys() != model.keys() or not truth:
        raise ValueError(f"{where}: the truth has {len(truth)} translations, the model {len(model)}, or others")
    total = math.fsum(truth.values())
    if not math.isclose(total, 1.0, abs_tol=1e-6) or min(truth.values()) < 0:
        raise ValueError(f"{where}: the true probabilities sum to {total}, not to 1")
    if any(math.isnan(value) or value > 1e-3 for value in model.values()):
        raise ValueError(f"{where}: a log-probability of the model is above 0 or not a number")
    masses = {text: math.exp(value) for text, value in model.items()}
    mass = math.fsum(masses.values())
    truth_entropy = -math.fsum(p * math.log(p) for p in truth.values() if p > 0)
    cross = [p * -model[text] for text, p in truth.items() if p > 0]
    cross_entropy = math.inf if math.inf in cross else math.fsum(cross)
    inside = [q / mass for q in masses.values() if q > 0] if mass > 0 else [math.nan]
    return {
        "valid_mass": mass,
        "mode_mass": masses[max(truth, key=lambda text: truth[text])],
        "cross_entropy": cross_entropy,
        "truth_entropy": truth_entropy,
        "kl_divergence": cross_entropy - truth_entropy,
        "model_entropy": -sum(q * math.log(q) for q in inside),
    }
