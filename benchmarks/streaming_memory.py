"""Peak memory of reading and tokenizing 10 thousand to 1 million records: streamed, and through the cache on disk.

    python benchmarks/streaming_memory.py --tokenizer FOLDER [--sizes 10000 100000 1000000] [--json FILE]

Records are made up (about 12 words a record). Every size and way runs in a process of its own; memory is its peak
resident set, less what it was before the first record. Reading every row of the memory-mapped cache counts pages of
the file that the system may take back at any time, so there the private memory (`RssAnon`) is what tells.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def write_data(path: Path, count: int) -> None:
    """Records of made-up words as JSON Lines."""
    draw = random.Random(0)
    words = [f"word{number}" for number in range(5000)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            prompt, answer = (" ".join(draw.choices(words, k=draw.randint(4, 8))) for _ in range(2))
            file.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")


def memory(name: str) -> float:
    """A line of this process's status, in MiB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").split("\n"):
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    return float("nan")


def one(way: str, data: str, tokenizer_name: str, folder: str) -> dict[str, float]:
    """Go over all rows once, in one of the ways."""
    from convexlm.streaming import RecordStream
    from convexlm.tokenization import PromptSettings, load_tokenizer
    from convexlm.training_data import prepare_data

    tokenizer = load_tokenizer(tokenizer_name)
    settings = PromptSettings().resolve(tokenizer)
    warm = RecordStream(data, "alpaca", tokenizer, settings, 512, max_records=200)
    assert sum(1 for _ in warm.one_pass()) == 200
    prepare_data(data, "alpaca", tokenizer, settings, 512, max_records=200, cache_dir=folder)
    before, begun, count, most = memory("RssAnon"), time.monotonic(), 0, 0.0
    if way == "shuffled":
        rows = RecordStream(data, "alpaca", tokenizer, settings, 512, shuffle_buffer=10_000).one_pass()
    elif way == "streamed":
        rows = RecordStream(data, "alpaca", tokenizer, settings, 512).one_pass()
    else:
        rows = iter(prepare_data(data, "alpaca", tokenizer, settings, 512, cache_dir=folder).dataset)
    for _ in rows:
        count += 1
        if count % 2000 == 0:
            most = max(most, memory("RssAnon"))
    seconds = time.monotonic() - begun
    return {
        "records": count,
        "seconds": round(seconds, 1),
        "records_per_second": round(count / seconds),
        "grown_mib": round(max(most, memory("RssAnon")) - before, 1),
        "peak_rss_mib": round(memory("VmHWM"), 1),
    }


def main() -> None:
    """Run every size and way, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--ways", nargs="+", default=["streamed", "shuffled", "cached"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("WAY", "DATA", "FOLDER"))
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one[0], args.one[1], args.tokenizer, args.one[2])))
        return
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            data = Path(folder) / f"{size}.jsonl"
            write_data(data, size)
            for way in args.ways:
                words = [sys.executable, __file__, "--tokenizer", args.tokenizer, "--one", way, str(data), folder]
                done = subprocess.run(words, check=True, capture_output=True, text=True)
                row = {"way": way, "size": size, **json.loads(done.stdout)}
                found.append(row)
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            data.unlink()
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
