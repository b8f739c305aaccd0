"""`convexlm VERB`: finds the verb's module, runs it, and turns its outcome into text or JSON and an exit code.

A verb is a module in `convexlm.verbs` with `make_parser(prog)`, `run(args)` (returns the result as a JSON-ready dict)
and `show(result, console)` (prints it for people). Modules are imported only when their verb is called, so that
`--help` is instant.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
import warnings
from typing import TYPE_CHECKING

from convexlm.errors import Stopped, UserError
from convexlm.options import did_you_mean
from convexlm.output import json_text, make_forgiving
from convexlm.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

VERBS = {
    "demo": "train, decode and compare on the embedded corpus, in a few minutes on a CPU",
    "run": "run a recipe from end to end, going on where it stopped",
    "train": "fine-tune a model with an objective",
    "decode": "translate or answer a file with a checkpoint",
    "score": "score hypotheses with sacreBLEU",
    "compare": "compare systems with a paired significance test",
    "report": "write a run's report as one HTML page",
    "export": "write a checkpoint as a plain folder with a model card, shards and adapters merged",
    "diagnose": "say what an objective would do to your data and model, before you train",
    "theory": "compute the distribution that an objective wants, or write the page that shows it",
}

PLAIN_WIDTH = 140
EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR = 0, 1, 2
EXIT_SIGNAL = 128  # and the signal's number: 130 for Ctrl-C, 143 for SIGTERM, as a shell counts


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0 done, 2 the user's input is wrong, 130 or 143 a signal, 1 anything else."""
    if sys.stdout is None or sys.stderr is None:
        if sys.stderr is not None:
            return _refuse("convexlm", "standard output is closed, so no result could be shown; send it to /dev/null")
        return EXIT_USER_ERROR
    make_forgiving()
    try:
        code = _main(argv)
    except BrokenPipeError:  # a reader that goes away early (`| head`) is no error
        _to_nowhere()
        return EXIT_DONE
    if argv is None and os.environ.get("WORLD_SIZE", "1") != "1":
        from convexlm.launch.ending import leave

        leave(code)
    return code


def _main(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return EXIT_DONE
    if words[0] in ("-V", "--version"):
        print(f"convexlm {__version__}")
        return EXIT_DONE
    verb = words[0]
    if verb not in VERBS:
        return _refuse("convexlm", f"unknown verb `{verb}`{did_you_mean(verb, VERBS)}")
    # Tokenizing before forking workers makes the tokenizers library warn at every start.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        # What libraries will do in a later release is nothing that a user of this one can act on.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
    prog = f"convexlm {verb}"
    # Some libraries log to standard output (DeepSpeed, which transformers imports where it is installed).
    with contextlib.redirect_stdout(sys.stderr):
        module = importlib.import_module(f"convexlm.verbs.{verb}")
    try:
        args = module.make_parser(prog).parse(words[1:])
        with contextlib.redirect_stdout(sys.stderr), _sigterm_stops():
            result = module.run(args)
    except UserError as error:
        return _refuse(prog, str(error))
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"{prog}: {stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        return _stopped(prog, signal.SIGINT)
    except _Terminated:
        return _stopped(prog, signal.SIGTERM)
    except Exception as error:
        from convexlm.disk import disk_failure

        if (said := disk_failure(error)) is None:
            raise
        print(f"{prog}: {said}", file=sys.stderr)
        return EXIT_FAILED
    if os.environ.get("RANK", "0") != "0":
        return EXIT_DONE  # under a launcher, one process speaks for all
    try:
        if args.json:
            print(json_text(result))
        else:
            from rich.console import Console

            # Where there is no terminal to ask, 80 columns would break every table.
            module.show(result, Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _to_nowhere()
        print(f"{prog}: standard output cannot be written ({error.strerror or error})", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_DONE


class _Terminated(BaseException):
    """SIGTERM, as `KeyboardInterrupt` is SIGINT."""


@contextlib.contextmanager
def _sigterm_stops() -> Iterator[None]:
    """SIGTERM ends a verb as Ctrl-C does, what is done kept; training notes it itself and saves first."""
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked worker, ended by the pool that it belongs to
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        raise _Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stopped(prog: str, number: signal.Signals) -> int:
    if os.environ.get("RANK", "0") == "0":
        print(f"{prog}: stopped; the same command goes on from here", file=sys.stderr)
    return EXIT_SIGNAL + number


def _to_nowhere() -> None:
    """Keep the interpreter's last flush from failing again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(prog: str, message: str) -> int:
    print(f"{prog}: error: {message}", file=sys.stderr)
    return EXIT_USER_ERROR


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {text}" for name, text in VERBS.items())
    return (
        "usage: convexlm VERB [options]\n\n"
        "Fine-tune language models for the best answer instead of every answer, and test whether it helped.\n\n"
        f"{verbs}\n\n"
        "`convexlm VERB --help` lists a verb's options; `convexlm --version` prints the version."
    )


if __name__ == "__main__":
    sys.exit(main())
