r"""Make the data of the experiment on ambiguity: tinyworld, with the number of equally good free translations varied.

    python benchmarks/evidence/make_ambiguity.py --choices 3 --output_dir OUT

Every English source has one *plain* German translation with a probability of 0.4 and n *free* ones, which begin with
the adverb and share 0.6 evenly. `choices` says in which slots a free translation may take either of two words: 0 none
(n = 1, and the free one is the most probable), 1 the verb, 2 and the object, 3 and the subject, 4 and a particle or
none. From 1 on the plain translation is the most probable one, while the likelier first word is a free one's: greedy
search with the data's own distribution finds the wrong one at every n.

Writes tokenizer/, train.jsonl (alpaca records), val500.LANG, test.LANG (1,000 sentences, one sampled reference),
truth.jsonl (a line a test sentence: every translation with its probability) and data.json.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from random import Random
from statistics import mean
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent))

from make_data import write_lines, write_rows  # noqa: E402

from convexlm.templates import TRANSLATION_INSTRUCTION, fill_instruction  # noqa: E402
from convexlm.tinyworld import german, lexicon  # noqa: E402
from convexlm.tinyworld.corpus import sample_corpus  # noqa: E402
from convexlm.tinyworld.german import noun_phrase  # noqa: E402
from convexlm.tinyworld.style import PLAIN, Style  # noqa: E402
from convexlm.tinyworld.tokenizer import train_tokenizer  # noqa: E402

if TYPE_CHECKING:
    from convexlm.tinyworld.corpus import Pair
    from convexlm.tinyworld.meaning import Meaning

PLAIN_PROBABILITY = 0.4
CHOICES = ("verb", "object", "subject", "particle")
_ONE = Style("one", ((1.0,), (1.0, 0.0), (1.0, 0.0, 0.0)), particle=0.0, adverb_first=True)
_TWO = Style("two", ((1.0,), (0.5, 0.5), (0.5, 0.5, 0.0)), particle=0.0, adverb_first=True)


def free_translations(meaning: Meaning, choices: int) -> list[str]:
    """The free German renderings of a meaning when the first `choices` slots may take either of two words."""
    style = {name: _TWO if number < choices else _ONE for number, name in enumerate(CHOICES)}
    verbs = (lexicon.VERBS_WITH_THINGS | lexicon.VERBS_WITH_PERSONS)[meaning.verb].de
    on_object = meaning.describes_object
    adjective_of = {True: None, False: meaning.adjective}
    subject = noun_phrase(meaning.subject, adjective_of[on_object], True, "nom", style["subject"])
    particles = ("", f" {lexicon.PARTICLES['de']}") if choices > CHOICES.index("particle") else ("",)
    adverb = lexicon.ADVERBS[meaning.adverb].de[0]
    out = []
    for verb, p in style["verb"].slot(verbs):
        thing = noun_phrase(meaning.object, adjective_of[not on_object], meaning.definite, verb.case, style["object"])
        out += [
            f"{adverb[0].upper()}{adverb[1:]} {verb.form}{one}{particle}{other}."
            for one, q in subject
            for other, r in thing
            for particle in particles
            if p * q * r > 0
        ]
    return sorted(set(out))


def distribution(pair: Pair, choices: int) -> dict[str, float]:
    """Every translation of a source with its probability; they sum to 1."""
    clause = max(german.clauses(pair.meaning, PLAIN), key=lambda one: one.share)
    plain = "".join(max(slot, key=lambda word: word[1])[0] for slot in clause.slots)
    free = free_translations(pair.meaning, choices)
    assert plain not in free
    return {plain: PLAIN_PROBABILITY} | {text: (1 - PLAIN_PROBABILITY) / len(free) for text in free}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choices", type=int, required=True, choices=range(len(CHOICES) + 1))
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--size", type=int, default=30_000)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    instruction = fill_instruction(TRANSLATION_INSTRUCTION, "en-de")
    about: dict = {"choices": args.choices}
    for name, size, seed, split in (
        ("train", args.size, 1, "train"),
        ("val500", 500, 3, "test"),
        ("test", 1000, 7, "test"),
    ):
        pairs = sample_corpus("en-de", size, seed, split=split)
        truths = [distribution(pair, args.choices) for pair in pairs]
        random = Random(f"ambiguity {name} {args.choices}")
        targets = [random.choices(list(truth), list(truth.values()))[0] for truth in truths]
        if name == "train":
            rows = [
                {"instruction": instruction, "input": pair.source, "output": target}
                for pair, target in zip(pairs, targets, strict=True)
            ]
            write_rows(args.output_dir / "train.jsonl", rows)
            # From the corpus itself, so that every number of choices has the same tokens.
            texts = [text for pair in pairs for text in (pair.source, pair.target)]
            train_tokenizer(texts, template="prompt_no_alpaca").save_pretrained(args.output_dir / "tokenizer")
            continue
        write_lines(args.output_dir / f"{name}.en", [pair.source for pair in pairs])
        write_lines(args.output_dir / f"{name}.de", targets)
        if name == "test":
            write_rows(args.output_dir / "truth.jsonl", truths)
            about["variants"] = round(math.exp(mean(math.log(len(truth) - 1) for truth in truths)), 2)
    text = json.dumps(about, indent=1) + "\n"
    (args.output_dir / "data.json").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
