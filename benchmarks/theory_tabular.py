"""Do models trained to convergence learn the distribution that `convexlm.theory` predicts?

    OMP_NUM_THREADS=1 python benchmarks/theory_tabular.py --output results/theory_tabular.json

Sentences of the embedded corpus have exact distributions over translations. Two models are trained on those with the
objectives of `convexlm.objectives`, on every translation at once with its probability as sample weight: a table (a
free softmax at every prefix, which can represent any distribution over the translations) and a small GRU over the
whole vocabulary, conditioned on the sentence. Tokens are words, and the end is one. Models start at random; a run with
a k goes on from the mle run, as in two-stage training. About a CPU minute. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from convexlm.objectives import get_objective
from convexlm.theory import entropy, optimum
from convexlm.tinyworld import sample_corpus, translations

ARMS = [
    ("mle", {}),
    ("convex", {"k": 1.0}),
    ("convex", {"k": 3.0}),
    ("convex", {"k": 5.0}),
    ("convex", {"k": 12.0}),
    ("power", {"k": 0.7}),
]


class Corpus:
    """Every translation of some sentences as rows of token ids, with its probability and its sentence's number."""

    def __init__(self, direction: str, sentences: int, seed: int) -> None:
        pairs = sample_corpus(direction, 200, seed)
        # Those with the fewest translations, so that a run takes seconds.
        sources = sorted({pair.source for pair in pairs}, key=lambda text: (len(translations(text, direction)), text))
        self.sources = sources[:sentences]
        texts = [(i, text, p) for i, s in enumerate(self.sources) for text, p in translations(s, direction).items()]
        words = sorted({word for _, text, _ in texts for word in text.split()})
        number = {word: i + 1 for i, word in enumerate(words)}
        rows = [[*(number[word] for word in text.split()), 0] for _, text, _ in texts]
        self.vocabulary = len(words) + 1
        self.lengths = torch.tensor([len(row) for row in rows])
        self.mask = torch.arange(int(self.lengths.max())) < self.lengths[:, None]
        self.tokens = torch.zeros(self.mask.shape, dtype=torch.long)
        self.tokens[self.mask] = torch.tensor([token for row in rows for token in row])
        self.sentence = torch.tensor([i for i, _, _ in texts])
        self.d = torch.tensor([p for _, _, p in texts], dtype=torch.float64)


class Table(nn.Module):
    """One free logit for each branch of the tree of translations, in double precision."""

    def __init__(self, corpus: Corpus) -> None:
        super().__init__()
        branches: dict[tuple[int, ...], int] = {}
        prefixes: dict[tuple[int, ...], int] = {}
        rows = zip(corpus.sentence.tolist(), corpus.tokens.tolist(), corpus.lengths.tolist(), strict=True)
        paths, owners = torch.zeros(corpus.mask.shape, dtype=torch.long), []
        for r, (sentence, tokens, length) in enumerate(rows):
            for t in range(length):
                path = (sentence, *tokens[: t + 1])
                if path not in branches:
                    branches[path] = len(branches)
                    owners.append(prefixes.setdefault(path[:-1], len(prefixes)))
                paths[r, t] = branches[path]
        self.paths, self.owners, self.prefixes = paths, torch.tensor(owners), len(prefixes)
        self.logits = nn.Parameter(0.1 * torch.randn(len(owners), dtype=torch.float64))

    def forward(self) -> torch.Tensor:
        """Log-probability of every token, (rows, length)."""
        sums = torch.zeros(self.prefixes, dtype=torch.float64).index_add(0, self.owners, self.logits.exp())
        return (self.logits - sums.log()[self.owners])[self.paths]


class SmallGru(nn.Module):
    """A GRU that sees the sentence's number and the words before."""

    def __init__(self, corpus: Corpus, width: int = 64) -> None:
        super().__init__()
        self.corpus = corpus
        self.words = nn.Embedding(corpus.vocabulary + 1, width)
        self.sentences = nn.Embedding(len(corpus.sources), width)
        self.cell = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, corpus.vocabulary)

    def forward(self) -> torch.Tensor:
        """Log-probability of every token, (rows, length)."""
        corpus = self.corpus
        before = torch.cat([torch.full((len(corpus.d), 1), corpus.vocabulary), corpus.tokens[:, :-1]], 1)
        state = self.sentences(corpus.sentence)
        hidden, _ = self.cell(self.words(before) + state[:, None], state[None])
        return self.head(hidden).log_softmax(-1).gather(-1, corpus.tokens[..., None]).squeeze(-1)


def train(model: nn.Module, corpus: Corpus, objective: Any, steps: int, rate: float) -> None:
    """Full-batch Adam with a rate that falls to 0."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(model(), corpus.mask, sample_weights=corpus.d).loss.backward()
        optimizer.step()
        schedule.step()


def compare(model: nn.Module, corpus: Corpus, objective: Any) -> dict[str, float]:
    """Learned against predicted, averaged over the sentences."""
    with torch.no_grad():
        learned = (model().double() * corpus.mask).sum(-1).exp().numpy()
    rows = []
    for i in range(len(corpus.sources)):
        here = (corpus.sentence == i).numpy()
        d, q = corpus.d.numpy()[here], learned[here]
        best = optimum(d, corpus.lengths.numpy()[here], objective)
        p, mode = best.probabilities, int(np.argmax(d))
        rows.append(
            {
                "entropy_predicted": best.entropy,
                "entropy_learned": entropy(q / q.sum()),
                "mode_predicted": float(p[mode]),
                "mode_learned": float(q[mode]),
                "distance_to_prediction": 0.5 * float(np.abs(q - p).sum()),
                "distance_to_data": 0.5 * float(np.abs(q - d).sum()),
                "mass_elsewhere": max(0.0, float(1 - q.sum())),
            }
        )
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def main() -> None:
    """Train, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="results/theory_tabular.json")
    parser.add_argument("--direction", default="en-de")
    parser.add_argument("--sentences", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--table_steps", type=int, default=1500)
    parser.add_argument("--gru_steps", type=int, default=900)
    args = parser.parse_args()
    begun = time.process_time()
    corpus = Corpus(args.direction, args.sentences, args.seed)
    models = {"table": (Table, args.table_steps, 0.05), "gru": (SmallGru, args.gru_steps, 0.01)}
    results = []
    print("model weighting objective   H predicted learned   mode predicted learned   TV to it   to data   elsewhere")
    for kind, (make, steps, rate) in models.items():
        for weighting in ("token", "sequence"):
            if kind == "gru" and weighting == "sequence":
                continue  # the table shows what weighting does; the GRU shows that parameters do not change it
            torch.manual_seed(args.seed)
            first = make(corpus)
            for name, options in ARMS:
                objective = get_objective(name, length_weighting=weighting, **options)
                model = make(corpus)
                model.load_state_dict(first.state_dict())
                train(model, corpus, objective, steps, rate)
                if name == "mle":
                    first = model
                row = {"model": kind, "length_weighting": weighting, "objective": name, **options}
                row |= compare(model, corpus, objective)
                results.append(row)
                print(
                    f"{kind:5} {weighting:9} {name:6} {options.get('k', ''):4} "
                    f"{row['entropy_predicted']:11.3f} {row['entropy_learned']:7.3f}   "
                    f"{row['mode_predicted']:14.3f} {row['mode_learned']:7.3f}   "
                    f"{row['distance_to_prediction']:8.1e} {row['distance_to_data']:9.4f} "
                    f"{row['mass_elsewhere']:11.1e}",
                    flush=True,
                )
    content = {
        "command": f"OMP_NUM_THREADS=1 python benchmarks/theory_tabular.py --output {args.output} --direction "
        f"{args.direction} --sentences {args.sentences} --seed {args.seed} --table_steps {args.table_steps} "
        f"--gru_steps {args.gru_steps}",
        "sentences": [
            {
                "source": source,
                "translations": int((corpus.sentence == i).sum()),
                "entropy": entropy(corpus.d[corpus.sentence == i].numpy()),
                "lengths": sorted(set(corpus.lengths[corpus.sentence == i].tolist())),
            }
            for i, source in enumerate(corpus.sources)
        ],
        "results": results,
        "cpu_seconds": round(time.process_time() - begun, 1),
        "versions": {name: version(name) for name in ("convexlm", "torch", "numpy", "scipy")},
        "machine": {"processor": platform.machine(), "python": platform.python_version(), "device": "cpu, 1 thread"},
        "seed": args.seed,
    }
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
