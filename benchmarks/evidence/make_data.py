r"""Make an experiment's files from Multi30k's: instruction records with noise, the clean part of them, a tokenizer.

    python benchmarks/evidence/make_data.py --multi30k DATA/multi30k --output_dir OUT --pair en-de \
        --noise exchanged --share 0.3

writes into OUT

    train.jsonl          alpaca records; `clean` is false where the target was spoilt
    train.clean.jsonl    the records whose `clean` is true: what an oracle would keep
    tokenizer/           byte-level BPE, trained on the clean text of both languages
    val.LANG, test_2016_flickr.LANG, ...    plain text, one sentence a line; val500.LANG: the first 500 lines of val
    data.json            what was made, with counts and hashes

All is a function of the arguments and the files.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

sys.path.insert(0, str(Path(__file__).parent))

from noise import KINDS, OFF_TOPIC, spoil  # noqa: E402

SETS = ("val", "test_2016_flickr", "test_2017_flickr", "test_2017_mscoco")
LANGUAGES = ("en", "de")


def read(folder: Path, name: str, language: str) -> list[str]:
    """The sentences of one file of Multi30k, blanks around them removed."""
    text = gzip.decompress((folder / f"{name}.{language}.gz").read_bytes()).decode("utf-8")
    return [line.strip() for line in text.removesuffix("\n").split("\n")]


def join_up(pairs: list[tuple[str, str]], most: int, seed: int) -> list[tuple[str, str]]:
    """Runs of 1 to `most` neighbouring pairs made one, their number drawn for each: targets of very unequal lengths.

    Args:
        pairs: source and target.
        most: pairs in a run; 1 changes nothing.
        seed: of the numbers.
    """
    draw = random.Random(seed)
    joined, place = [], 0
    while place < len(pairs):
        run = pairs[place : place + draw.randint(1, most)]
        joined.append((" ".join(source for source, _ in run), " ".join(target for _, target in run)))
        place += len(run)
    return joined


def make(
    multi30k: Path,
    output: Path,
    pair: str,
    noise: str,
    share: float,
    seed: int,
    vocab_size: int,
    other_text: Sequence[Path] = (),
    join: int = 1,
    max_records: int | None = None,
) -> dict:
    """Write everything; returns what `data.json` holds."""
    from convexlm.templates import TRANSLATION_INSTRUCTION, fill_instruction
    from convexlm.tinyworld.tokenizer import train_tokenizer

    source, target = pair.split("-")
    clean = list(zip(read(multi30k, "train", source), read(multi30k, "train", target), strict=True))
    instruction = fill_instruction(TRANSLATION_INSTRUCTION, pair)
    other = [line for file in other_text for line in file.read_text(encoding="utf-8").split("\n")]
    rows = [
        {"instruction": instruction, "input": src, "output": tgt, "clean": is_clean}
        for src, tgt, is_clean in spoil(join_up(clean, join, seed)[:max_records], noise, share, seed, other)
    ]
    output.mkdir(parents=True, exist_ok=True)
    write_rows(output / "train.jsonl", rows)
    write_rows(output / "train.clean.jsonl", [row for row in rows if row["clean"]])
    for name in SETS:
        pairs = list(zip(*(read(multi30k, name, language) for language in LANGUAGES), strict=True))
        for language, lines in zip(LANGUAGES, zip(*join_up(pairs, join, seed), strict=True), strict=True):
            write_lines(output / f"{name}.{language}", lines)
            if name == "val":
                write_lines(output / f"val500.{language}", lines[:500])
    # From the clean text, so that every noise has the same tokens.
    texts = [text for one in sorted(clean if source < target else [(t, s) for s, t in clean]) for text in one]
    tokenizer = train_tokenizer(texts, vocab_size=vocab_size, template="prompt_no_alpaca")
    tokenizer.save_pretrained(output / "tokenizer")
    about = {
        **{"pair": pair, "noise": noise, "share": share, "seed": seed, "vocab_size": len(tokenizer)},
        **({"join": join} if join > 1 else {}),
        **{"records": len(rows), "clean": sum(row["clean"] for row in rows)},
        "sha256": hashlib.sha256((output / "train.jsonl").read_bytes()).hexdigest(),
    }
    (output / "data.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return about


def write_rows(path: Path, rows: list[dict]) -> None:
    """JSON Lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Plain text."""
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--multi30k", type=Path, required=True, help="folder with train.en.gz, train.de.gz, ...")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--pair", default="en-de", choices=["en-de", "de-en"])
    parser.add_argument("--noise", default="exchanged", choices=[*KINDS, OFF_TOPIC])
    parser.add_argument("--share", type=float, default=0.3, help="of the training pairs to spoil, 0 to 1")
    parser.add_argument(
        "--other_text",
        type=Path,
        nargs="+",
        default=[],
        help="for `off_topic`: sentences in the target language",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--vocab_size", type=int, default=6000)
    parser.add_argument("--max_records", type=int, help="take the first of the training records only")
    parser.add_argument("--join", type=int, default=1, help="make one record of 1 to JOIN neighbouring pairs")
    args = parser.parse_args()
    settings = (args.pair, args.noise, args.share, args.seed, args.vocab_size, args.other_text)
    about = make(args.multi30k, args.output_dir, *settings, args.join, args.max_records)
    print(json.dumps(about))


if __name__ == "__main__":
    main()
