"""Put the tables of README and docs/evidence in, in place, out of the rows and intervals in results/.

    python benchmarks/evidence/publish.py            # README.md, docs/evidence.md, docs/evidence/*.md
    python benchmarks/evidence/publish.py --check    # change nothing; exit 1 if one of them would change

A table lies between `<!-- table: KIND ARGUMENT... -->` and `<!-- /table -->`. The kinds:

- `summary NAME`, `starts NAME`: a table of tables.yaml;
- `compared EXPERIMENT [ARM...]`: its arms (all, or these) against `mle` at the same search, with every interval;
- `parts EXPERIMENT PART,PART SEARCH,SEARCH ARM...`: the same on parts of the test sentences;
- `appendix`: every experiment of experiments.yaml with its commands, its cost, validation, and scores by test set.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))

from appendix import appendix  # noqa: E402
from rows import read_jsonl  # noqa: E402
from summaries import parts, starts, summary  # noqa: E402
from tables import compared  # noqa: E402

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MARKED = re.compile(r"(<!-- table: (.+?) -->\n).*?(\n?<!-- /table -->)", re.DOTALL)


class Published:
    """What the tables are made of.

    Args:
        results: folder with `evidence.jsonl`, `evidence-intervals.json` and `evidence-ranks.json`.
    """

    def __init__(self, results: Path) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {}
        for row in read_jsonl(results / "evidence.jsonl"):
            self.rows.setdefault(row["experiment"], []).append(row)
        self.intervals: dict[str, list[dict[str, Any]]] = {}
        self.parts: dict[str, list[dict[str, Any]]] = {}
        for one in json.loads((results / "evidence-intervals.json").read_text(encoding="utf-8")):
            whole = one.get("part", "all") == "all"
            (self.intervals if whole else self.parts).setdefault(one["experiment"], []).append(one)
        self.ranks = json.loads((results / "evidence-ranks.json").read_text(encoding="utf-8"))
        self.tables = yaml.safe_load((HERE / "tables.yaml").read_text(encoding="utf-8"))
        self.experiments = yaml.safe_load((HERE / "experiments.yaml").read_text(encoding="utf-8"))["experiments"]

    def render(self, kind: str, words: list[str]) -> str:
        """One table as Markdown.

        Args:
            kind: as in the marker.
            words: its arguments.

        Raises:
            KeyError: a table or experiment that is not there.
            ValueError: an unknown kind.
        """
        if kind == "summary":
            lines = summary(self.tables[words[0]], self.intervals)
        elif kind == "starts":
            lines = starts(self.tables[words[0]], self.rows, self.intervals)
        elif kind == "compared":
            lines = compared(self.rows[words[0]], self.intervals[words[0]], "mle", "bleu", words[1:])
        elif kind == "parts":
            experiment, names, searches, *arms = words
            lines = parts(self.parts[experiment], names.split(","), searches.split(","), arms)
        elif kind == "appendix":
            lines = appendix(self.experiments, self.rows, self.ranks)
        else:
            raise ValueError(f"a table of kind {kind!r}")
        return "\n".join(lines)

    def refresh(self, text: str) -> str:
        """A page with its tables made anew; the rest as it is."""

        def put(found: re.Match[str]) -> str:
            kind, *words = found[2].split()
            return f"{found[1]}\n{self.render(kind, words)}\n\n<!-- /table -->"

        return MARKED.sub(put, text)


def pages() -> list[Path]:
    """The files that have tables."""
    return [ROOT / "README.md", ROOT / "docs" / "evidence.md", *sorted((ROOT / "docs" / "evidence").glob("*.md"))]


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, tell which would change")
    args = parser.parse_args()
    published = Published(ROOT / "results")
    stale = 0
    for page in pages():
        old = page.read_text(encoding="utf-8")
        new = published.refresh(old)
        if new != old:
            stale += 1
            print(f"{page.relative_to(ROOT)}: {'is not what results/ says' if args.check else 'written'}")
            if not args.check:
                page.write_text(new, encoding="utf-8")
    return int(args.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
