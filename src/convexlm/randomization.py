"""sacreBLEU's own `PairedTest`, as `significance` calls it, and its approximate randomization by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convexlm.scoring import check_lengths, sacrebleu_seed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from convexlm.scoring import Scorer


def randomization_p(
    systems: Mapping[str, Sequence[str]], scorer: Scorer, metrics: Sequence[str], *, n_trials: int, seed: int
) -> dict[tuple[str, str], float]:
    """The p-values of sacreBLEU's paired approximate randomization alone, by (metric, system), without intervals."""
    check_lengths({"reference 1": scorer.references[0], **systems})
    _, results = sacrebleu_test(systems, scorer, metrics, "ar", n_trials, seed, 0)
    titles = [key for key in results if key != "System"]
    return {
        (name, system): float(result.p_value)
        for name, title in zip(metrics, titles, strict=True)
        for system, result in zip(systems, results[title], strict=True)
        if result.p_value is not None
    }


def sacrebleu_test(
    systems: Mapping[str, Sequence[str]],
    scorer: Scorer,
    metrics: Sequence[str],
    method: str,
    n_samples: int,
    seed: int,
    resamples: int,
) -> tuple[Any, Any]:
    """Signatures and results of sacreBLEU's `PairedTest`; `resamples` is how many intervals of `ar` rest on."""
    from numpy.random import SeedSequence
    from sacrebleu.significance import PairedTest

    with sacrebleu_seed(seed):
        test = PairedTest(
            [(name, list(lines)) for name, lines in systems.items()],
            {name: scorer.metrics[name] for name in metrics},
            None,
            test_type=method,
            n_samples=n_samples,
            n_ar_confidence=(resamples or -1) if method == "ar" else -1,
        )
        if seed == 0:
            test._seed = SeedSequence(0)  # PairedTest takes 0 for no seed; this draws the same and is not falsy
        return test()
