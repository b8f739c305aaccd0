"""How sure an experiment's differences are: over sentences, by convexlm's own test, and over training seeds.

    python benchmarks/evidence/intervals.py WORK/multi30k-en-de-exchanged-30 --output results/evidence-intervals.json

Systems are (arm, search), such as `convex-k1 greedy`. All test sets and final seeds are taken together as
`convexlm run` does for the seeds of one recipe: the score is the mean over test sets and seeds, and sentences are
resampled for all seeds at once.
Beside that stand each seed's own differences, and Student's interval of their mean. Rows of other experiments that the
output has already stay.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from bisect import bisect_left
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

# The 97.5th percentile of Student's t by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def student_interval(values: list[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean of 2 to 10 values; None for another number of them."""
    spread = STUDENT.get(len(values) - 1)
    if spread is None:
        return None
    half = spread * stdev(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def read_corpora(folder: Path, arms: list[str] | None = None) -> list[Any]:
    """One corpus a final seed and test set, with every (arm, search) at its chosen checkpoint as a system.

    Args:
        folder: holds the run folders `final-seedN`.
        arms: these alone, of the seeds that have them all.
    """
    import yaml

    from convexlm.segments import read_hypotheses
    from convexlm.significance import Corpus

    corpora = []
    for run in sorted(path.parent for path in folder.glob("final*/comparison.json")):
        comparison = json.loads((run / "comparison.json").read_text(encoding="utf-8"))
        recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
        if not set(arms or ()) <= set(comparison["arms"]):
            continue
        tests = {(one["name"], pair) for one in recipe["test_sets"] for pair in one["pairs"]}
        lines = (run / "data" / "references.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
        for record in map(json.loads, lines):
            name, pair = record["test_set"], record["pair"]
            if (name, pair) not in tests:
                continue
            systems = {
                f"{arm} {search}": read_hypotheses(
                    run / "decode" / arm / comparison["checkpoints"][arm] / f"{name}.{pair}.{search}.jsonl"
                )
                for arm in arms or comparison["arms"]
                for search in comparison["searches"]
            }
            label = f"{name} {pair}, {run.name}"
            corpora.append(Corpus(label, pair.split("-")[1], systems, record["references"], group=f"{name} {pair}"))
    return corpora


def in_parts(corpora: list[Any], values: list[list[float]], names: Sequence[str]) -> dict[str, list[Any]]:
    """The corpora's sentences shared out by a number that each has, into parts of nearly equal size.

    Args:
        corpora: of `read_corpora`.
        values: one number a sentence, for each corpus.
        names: of the parts, that of the smallest numbers first; a number on a border falls into the lower part.
    """
    from convexlm.significance import Corpus

    ordered = sorted(value for one in values for value in one)
    borders = [ordered[math.ceil(len(ordered) * n / len(names)) - 1] for n in range(1, len(names))]
    parts: dict[str, list[Any]] = {name: [] for name in names}
    for corpus, numbers in zip(corpora, values, strict=True):
        for index, part in enumerate(parts.values()):
            places = [place for place, number in enumerate(numbers) if bisect_left(borders, number) == index]
            pick = lambda lines, places=places: [lines[place] for place in places]  # noqa: E731
            systems = {system: pick(lines) for system, lines in corpus.systems.items()}
            references = [pick(stream) for stream in corpus.references]
            part.append(Corpus(corpus.name, corpus.target_lang, systems, references, group=corpus.group))
    return parts


def by_length(corpora: list[Any]) -> dict[str, list[Any]]:
    """`short` and `long`: up to the median number of blanks-separated words of the first reference, and above it."""
    counts = [[float(len(text.split())) for text in corpus.references[0]] for corpus in corpora]
    return in_parts(corpora, counts, ("short", "long"))


def by_confidence(corpora: list[Any], decoded: Path) -> dict[str, list[Any]]:
    """`unsure`, `between` and `sure`: thirds by the mean log-probability of a model's own greedy hypotheses.

    Args:
        corpora: of `read_corpora`, whose groups are `TEST_SET PAIR`.
        decoded: a folder of that model's hypotheses, such as RUN/decode/start/checkpoint-3632.
    """
    values = []
    for corpus in corpora:
        name, pair = str(corpus.group).split(" ")
        lines = (decoded / f"{name}.{pair}.greedy.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
        values.append([json.loads(line)["mean_log_prob"] for line in lines])
    return in_parts(corpora, values, ("unsure", "between", "sure"))


def differences(corpora: list[Any], baseline: str, metric: str, n_samples: int) -> list[dict[str, Any]]:
    """Every system against `baseline`: one row a system, as `joint_test` gives them, with the seeds' own deltas."""
    from convexlm.significance import joint_test

    rows = []
    for row in joint_test(corpora, [metric], baseline=baseline, n_samples=n_samples):
        parts = row.pop("corpora")
        if row["system"] == baseline:
            continue
        by_seed: dict[str, list[float]] = {}
        for part in parts:
            by_seed.setdefault(part["name"].rsplit(", ", 1)[1].removeprefix("final-seed"), []).append(part["delta"])
        seeds = {seed: mean(deltas) for seed, deltas in by_seed.items()}
        rows.append({**row, "delta_by_seed": seeds, "seed_interval": student_interval(list(seeds.values()))})
    return rows


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", type=Path, nargs="+", help="folders that run.py made")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--metrics", nargs="+", default=["bleu", "chrf"])
    parser.add_argument("--baselines", nargs="+", default=["mle", "oracle-mle"], help="arms to compare with")
    parser.add_argument("--n_samples", type=int, default=1000)
    parser.add_argument("--by_length", action="store_true", help="also short and long sentences apart")
    parser.add_argument(
        "--by_confidence", type=Path, help="also thirds of the sentences, by the mean log-probabilities in this folder"
    )
    parser.add_argument("--arms", nargs="+", help="these alone, of the seeds that have them all; give a --part too")
    parser.add_argument(
        "--part", default="all", help="what the rows are called; old ones of the same part are replaced"
    )
    args = parser.parse_args()
    out = []
    for folder in args.experiments:
        everything = read_corpora(folder, args.arms)
        if not everything:
            parser.error(f"{folder}: no finished final-seedN with the arms {args.arms}")
        parts = {args.part: everything, **(by_length(everything) if args.by_length else {})}
        if args.by_confidence:
            parts |= by_confidence(everything, args.by_confidence)
        systems = list(everything[0].systems)
        for baseline in [name for name in systems if name.rsplit(" ", 1)[0] in args.baselines]:
            for metric, (part, corpora) in itertools.product(args.metrics, parts.items()):
                rows = differences(corpora, baseline, metric, args.n_samples)
                out += [{"experiment": folder.name, "part": part, **row} for row in rows]
    done = {(row["experiment"], row["part"]) for row in out}
    if args.output.exists():
        old = json.loads(args.output.read_text(encoding="utf-8"))
        out = [row for row in old if (row["experiment"], row.get("part", "all")) not in done] + out
    text = json.dumps(out, ensure_ascii=False, indent=1)
    args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
