"""docs/evidence/appendix.md: every experiment's commands, cost, validation scores, choices, scores by test set."""

from __future__ import annotations

import re
from statistics import mean
from typing import Any

from tables import SEARCHES, final

RUN = "OMP_NUM_THREADS=1 python benchmarks/evidence/run.py --work_dir WORK --rows results/evidence.jsonl"
INTERVALS = (
    "python benchmarks/evidence/intervals.py WORK/{name} --output results/evidence-intervals.json --metrics bleu"
)
FIGURE = "python benchmarks/evidence/figure.py results/evidence.jsonl --experiment {name}"


def appendix(
    experiments: dict[str, dict[str, Any]], rows: dict[str, list[dict[str, Any]]], ranks: dict[str, float]
) -> list[str]:
    """A section an experiment, in the order of experiments.yaml.

    Args:
        experiments: name -> `title`, `page`, `commands`, and where there are any, `intervals`, `figure`,
            `figure_title`, `cost`.
        rows: by experiment.
        ranks: by experiment, where it was taken down: how often p̄ of the start ranks a right pair above a wrong one.
    """
    out = [at_the_edge([row for name in experiments for row in rows[name]]), ""]
    for name, about in experiments.items():
        title, page = about["title"], about["page"]
        out += [f"## {title[0].upper()}{title[1:]}", ""]
        out += [f"`{name}`, told on [{page.partition('.md')[0]}]({page}).", ""]
        out += ["```", *commands(name, about), "```", "", cost(rows[name], about), ""]
        if name in ranks:
            out += [
                f"p̄ of the start ranks a right pair above a wrong one in {100 * ranks[name]:.1f} % of couples.",
                "",
            ]
        out += [*scores(rows[name]), ""]
    return out[:-1]


def at_the_edge(rows: list[dict[str, Any]]) -> str:
    """How many of the rates that validation chose are the smallest or the largest that was tried."""
    tried: dict[tuple[str, str], set[float]] = {}
    for row in rows:
        if row["stage"] == "tune":
            tried.setdefault((row["experiment"], row["arm"]), set()).add(row["learning_rate"])
    chosen = {
        (row["experiment"], row["arm"]): row["learning_rate"]
        for row in rows
        if row["stage"] == "final" and row["selected"] and (row["experiment"], row["arm"]) in tried
    }
    smallest = sum(rate == min(tried[key]) for key, rate in chosen.items())
    largest = sum(rate == max(tried[key]) for key, rate in chosen.items())
    return (
        f"Of the {len(chosen)} learning rates that validation chose, {smallest} are the smallest that was tried and "
        f"{largest} the largest."
    )


def commands(name: str, about: dict[str, Any]) -> list[str]:
    """What repeats an experiment: run, intervals, figure."""
    out = about["commands"].format(name=name, run=RUN, m30k="--multi30k DATA/multi30k").splitlines()
    if "(validation only)" not in about["title"]:
        line = INTERVALS.format(name=name)
        out.append(f"{line} {about['intervals']}" if "intervals" in about else line)
    if "figure" in about:
        title = f' --title "{about["figure_title"]}"' if "figure_title" in about else ""
        out.append(f"{FIGURE.format(name=name)} --output docs/evidence/{about['figure']}{title}")
    return [part for line in out for part in folded(line)]


def folded(line: str, width: int = 125) -> list[str]:
    """A shell command in lines that are not too long; what is no command of these pages stays as it is."""
    if not line.startswith((RUN[:20], "python benchmarks", "convexlm")):
        return [line]
    out = [""]
    for word in re.findall(r'(?:"[^"]*"|\S)+', line):
        if out[-1].strip() and len(out[-1]) + len(word) > width:
            out[-1] += " \\"
            out.append("    " + word)
        else:
            out[-1] += f" {word}" if out[-1] else word
    return out


def cost(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """What the trainings took, of the rows, and what is told beside."""
    took = {
        (row["arm"], row["learning_rate"], row["seed"], "base" if row["stage"] == "base" else ""): row["minutes"]
        for row in rows
        if row["stage"] in ("base", "tune", "final")
    }
    text = f"{len(took)} trainings, {sum(took.values()):.0f} minutes of training in all"
    arms = [minutes for key, minutes in took.items() if key[3] != "base"]
    if len(took) > len(arms) > 0:
        text += f", {min(arms):.1f} to {max(arms):.1f} for that of an arm"
    return f"{text}. {about.get('cost', '')}".rstrip()


def scores(rows: list[dict[str, Any]]) -> list[str]:
    """An arm a row: BLEU by test set, validation BLEU by learning rate, the chosen rate, each seed's stopping step."""
    tested = [*final(rows, "bleu"), *(r for r in rows if r["stage"] == "base" and r["metric"] == "bleu")]
    tested = [row for row in tested if row["role"] == "test"]
    tuned = [row for row in rows if row["stage"] == "tune" and row["metric"] == "bleu" and row["search"] == "greedy"]
    sets = sorted({row["test_set"] for row in tested})
    rates = sorted({row["learning_rate"] for row in tuned})
    steps = sorted({row["step"] for row in tuned})
    heads = [*(name.removeprefix("test_").removesuffix("_flickr").replace("2017_mscoco", "mscoco") for name in sets)]
    heads += [f"validation at {rate:g}" if number == 0 else f"at {rate:g}" for number, rate in enumerate(rates)]
    heads += ["rate", "stopping steps"] if sets else []
    out = [
        "| arm | " + " | ".join(heads) + " |",
        "|---|" + "--:|" * (len(sets) + len(rates)) + ("--:|---|" if sets else ""),
    ]
    for arm in dict.fromkeys(row["arm"] for row in sorted([*tested, *tuned], key=lambda row: row["stage"] != "base")):
        cells = [pair([row for row in tested if (row["arm"], row["test_set"]) == (arm, name)]) for name in sets]
        for rate in rates:
            mine = sorted((r["step"], r["score"]) for r in tuned if (r["arm"], r["learning_rate"]) == (arm, rate))
            cells.append(" / ".join(f"{score:.2f}" for _, score in mine))
        if sets:
            chosen = {row["seed"]: row for row in final(rows, "bleu") if row["arm"] == arm}
            cells.append(f"{next(iter(chosen.values()))['learning_rate']:g}" if chosen else "")
            cells.append(", ".join(str(row["step"]) for _, row in sorted(chosen.items())))
        out.append(f"| `{arm}` | " + " | ".join(cells) + " |")
    if steps:
        told = " and ".join([", ".join(map(str, steps[:-1])), str(steps[-1])] if len(steps) > 1 else [str(steps[0])])
        out += ["", f"Validation: greedy, seed 1, after {told} steps."]
    return out


def pair(rows: list[dict[str, Any]]) -> str:
    """Greedy / beam 5, means over seeds; empty without rows."""
    found = [[row["score"] for row in rows if row["search"] == search] for search in SEARCHES]
    return " / ".join(f"{mean(some):.2f}" for some in found if some)
