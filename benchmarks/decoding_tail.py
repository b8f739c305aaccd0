"""What becomes of the few answers that are much longer than the others of their batch: three ways, same hypotheses.

    OMP_NUM_THREADS=1 python benchmarks/decoding_tail.py --checkpoint CHECKPOINT --output results/decoding_tail

`wait` runs each batch to its end (finished rows leave it), `put off` is what `convexlm decode` does, `refill` puts new
sentences into the places of finished ones: their keys and values are padded on the left to the width of the batch. It
was tried here, for greedy search, and is no part of the package. Refilling over the whole job needs one process that
has all of it; with a job cut into four lots, as for several processes, each lot waits for its last sentence again.
Answers of a tinyworld model do not differ in length, so 2 in 100 sources are a word said many times, which it goes on
translating; batches are random, as sorting by length would bring those together. Seconds are CPU time of one thread,
which other work on the machine disturbs little. Prints a table, writes OUTPUT.json and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from convexlm.decoding import DecodeJob, Search
from convexlm.decoding.backends.hf import HuggingFaceBackend
from convexlm.decoding.batching import plan_batches
from convexlm.decoding.generation import Rows
from convexlm.testsets import TestSet, load_test_set
from convexlm.tokenization import PromptSettings

LOTS = 4


class Refilled(Rows):
    """Rows of a greedy search that others can join."""

    def mask(self) -> torch.Tensor:
        """(rows, positions) bool: which are the row's own."""
        return torch.cat((self._prompt_mask, self._tail[:, 0]), dim=1)

    def join(self, new: Refilled) -> None:
        """Append rows; all end at the same position, and what no row needs any more is cut off in front."""
        old, own = self.mask(), new.mask()
        first = int(old.int().argmax(1).min())
        masks, width = (old[:, first:], own), max(old.shape[1] - first, own.shape[1])
        self._prompt_mask = torch.cat([torch.nn.functional.pad(mask, (width - mask.shape[1], 0)) for mask in masks])
        self._tail = self._prompt_mask.new_empty((len(self._prompt_mask), 1, 0))
        self._padded = True
        self._positions = torch.cat((self._positions, new._positions))
        self.logits = torch.cat((self.logits, new.logits))
        for layer, other in zip(self._cache.layers, new._cache.layers, strict=True):
            for buffer, fresh in zip(layer._buffers, other._buffers, strict=True):
                count, heads, _, size = buffer.used.shape
                data = buffer.used.new_zeros((len(self._prompt_mask), heads, width + 64, size))
                data[:count, :, width - masks[0].shape[1] : width] = buffer.used[:, :, first:]
                data[count:, :, width - own.shape[1] : width] = fresh.used
                buffer._data, buffer.length = data, width
            layer.keys, layer.values = (buffer.used for buffer in layer._buffers)

    def step(self, tokens: torch.Tensor, parents: torch.Tensor | None = None) -> None:
        """Append a token to each row."""
        self._tail = torch.nn.functional.pad(self._tail, (0, 1), value=True)
        self.logits = self._forward(tokens, self.mask() if self._padded else None, self._positions[:, None])[:, 0]
        self._positions = self._positions + 1


def refill(engine: HuggingFaceBackend, prompts: list[list[int]], search: Search, width: int) -> list[list[int]]:
    """Greedy answers, `width` at a time; new sentences come in when a quarter of the places is free."""
    answers: list[list[int]] = [[] for _ in prompts]
    owners, queue = list(range(len(prompts)))[:width], list(range(len(prompts)))[width:]
    rows = Refilled(engine.model, [prompts[owner] for owner in owners], engine.pad_id, engine.prefix)
    while True:
        chosen, left = rows.logits.argmax(1), []
        for row, (owner, token) in enumerate(zip(owners, chosen.tolist(), strict=True)):
            ended = owner < 0 or (answers[owner] and answers[owner][-1] in engine.eos_ids)
            if not ended:
                answers[owner].append(token)
                ended = token in engine.eos_ids or len(answers[owner]) == search.max_new_tokens
            if ended:
                owners[row] = -1
            else:
                left.append(row)
        new = queue[: width - len(left)] if 4 * (width - len(left)) >= width else []
        if not left and not new:
            return answers
        queue = queue[len(new) :]
        if left and (new or 8 * (len(owners) - len(left)) >= len(owners)):
            rows.take(torch.tensor(left))
            owners, chosen = [owners[row] for row in left], chosen[left]
        if left:
            rows.step(chosen[:, None])
        if new:
            fresh = Refilled(engine.model, [prompts[owner] for owner in new], engine.pad_id, engine.prefix)
            if left:
                rows.join(fresh)
            else:
                rows, owners = fresh, []
            owners = [*owners, *new]


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="benchmarks/decoding.py's `short prompt` model")
    parser.add_argument("--num_sentences", type=int, default=800)
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--num_beams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default="results/decoding_tail", help="path without suffix")
    args = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint, settings = Path(args.checkpoint), PromptSettings.load(Path(args.checkpoint))
    engine = HuggingFaceBackend()
    engine.load(checkpoint, "cpu", "float32")
    passes = [0]
    engine.model.register_forward_pre_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    rows: list[dict[str, Any]] = []
    for beams in args.num_beams:
        for width in args.batch_sizes:
            search = Search(num_beams=beams, max_new_tokens=args.max_new_tokens)
            job = DecodeJob(_test_set(args.num_sentences), search, Path("unused.jsonl"), settings)
            new = _measure(engine, engine.encode(job.prompts(), settings), search, width, args.repeats, passes)
            print("\n".join(map(_line, new)), flush=True)
            rows += new
    command = "OMP_NUM_THREADS=1 python benchmarks/decoding_tail.py " + " ".join(
        "CHECKPOINT" if word == args.checkpoint else word for word in sys.argv[1:]
    )
    found = {"command": command, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "rows": rows}
    Path(f"{args.output}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    head = "| beams | batch | way | CPU seconds, median (all) | forward passes | mean and longest answer |"
    text = (
        f"# Long answers in a batch\n\n`{command}`, {found['date']}. What the ways are: `benchmarks/decoding_tail.py`."
    )
    table = "\n".join([head, "|---:|---:|---|---|---:|---|", *map(_line, rows)])
    Path(f"{args.output}.md").write_text(f"{text}\n\n{table}\n", encoding="utf-8")


def _test_set(size: int) -> TestSet:
    sources = list(load_test_set({"name": "t", "kind": "tinyworld", "size": size, "seed": 7}, "en-de").sources)
    chance, words = random.Random(0), sorted({word for source in sources for word in source.split()})
    for place in range(0, size, 50):
        sources[place] = " ".join([chance.choice(words)] * 9)
    return TestSet("tail", "en-de", sources, [], list(map(str, range(size))))


def _measure(
    engine: HuggingFaceBackend, prompts: list[list[int]], search: Search, width: int, repeats: int, passes: list[int]
) -> list[dict[str, Any]]:
    engine.begin(prompts)
    order = list(range(len(prompts)))
    random.Random(5).shuffle(order)
    lengths = list(map(len, prompts))

    def decode(places: list[int], patient: bool) -> dict[int, Any]:
        found = (engine.generate if patient else engine.generate_most)([prompts[place] for place in places], search)
        return dict(zip(places, found, strict=True))

    def wait(put_off: bool = False) -> dict[int, list[int]]:
        found: dict[int, Any] = {}
        batches = [order[start : start + width] for start in range(0, len(order), width)]
        while batches:
            for batch in batches:
                found.update(decode(batch, not put_off or len(batches) == 1))
            later = [place for place in order if found[place] is None]
            batches = [list(batch) for batch in plan_batches(later, lengths, lengths, width)]
        return {place: hypothesis.token_ids for place, hypothesis in found.items()}

    def refilled(lots: int) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        size = -(-len(order) // lots)
        with torch.inference_mode():
            for start in range(0, len(order), size):
                lot = order[start : start + size]
                answers = refill(engine, [prompts[place] for place in lot], search, width)
                found.update(zip(lot, answers, strict=True))
        return found

    ways: dict[str, Any] = {"wait": wait, "put off": lambda: wait(True)}
    if search.num_beams == 1:
        ways |= {"refill, whole job": lambda: refilled(1), f"refill, {LOTS} lots": lambda: refilled(LOTS)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    counts, expected = {}, None
    for _ in range(repeats):
        for way, run in ways.items():
            passes[0], begun = 0, time.process_time()
            found = run()
            seconds[way].append(round(time.process_time() - begun, 2))
            counts[way], expected = passes[0], expected or found
            if found != expected:
                raise SystemExit(f"{way}: other hypotheses")
    assert expected is not None
    tokens = [len(answer) for answer in expected.values()]
    shape = {"beams": search.num_beams, "batch": width, "mean": statistics.mean(tokens), "longest": max(tokens)}
    return [{**shape, "way": way, "seconds": seconds[way], "passes": counts[way]} for way in ways]


def _line(row: dict[str, Any]) -> str:
    times = f"{statistics.median(row['seconds'])} ({', '.join(map(str, sorted(row['seconds'])))})"
    cells = (row["beams"], row["batch"], row["way"], times, row["passes"], f"{row['mean']:.1f}, {row['longest']}")
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
