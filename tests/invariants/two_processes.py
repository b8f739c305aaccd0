"""Runs several command lines of `convexlm` one after another in each process of one launch.

Started by `torchrun`; its argument is a JSON file with a list of argument lists.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from convexlm import cli
from convexlm.launch import leave


def main():
    for argv in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        code = cli.main(argv)
        if code:
            sys.exit(f"exit code {code} of convexlm {' '.join(argv)}")
    leave(0)


if __name__ == "__main__":
    main()
