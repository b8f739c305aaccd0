"""What every process of a launch runs: the training of the job's file. Started by `launch_training` alone."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from convexlm.launch.ending import leave
from convexlm.launch.processes import die_with
from convexlm.launch.training import JOB_VARIABLE, PARENT_VARIABLE, TRACEBACK_FILES


def main() -> int:
    """Train, and leave the outcome beside the job; returns the exit code."""
    die_with(int(os.environ.pop(PARENT_VARIABLE)))
    job_file = Path(os.environ.pop(JOB_VARIABLE))
    rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
    from convexlm.disk import disk_failure
    from convexlm.errors import Stopped, UserError
    from convexlm.verbs.train import train_here

    def tell(**outcome: Any) -> None:
        (job_file.parent / f"outcome.{rank.zfill(6)}.json").write_text(json.dumps(outcome), encoding="utf-8")

    job = json.loads(job_file.read_text(encoding="utf-8"))
    try:
        result = train_here(job["options"], resume=job["resume"], title=job["title"])
    except UserError as error:
        tell(kind="user_error", message=str(error))
        return 2
    except Stopped as error:
        tell(kind="stopped", message=str(error), exit_code=error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        tell(kind="interrupted")
        return 1
    except Exception as error:
        if (said := disk_failure(error)) is not None:
            tell(kind="failed", message=said)
        else:
            file = job_file.parent / TRACEBACK_FILES.replace("*", rank.zfill(6))
            file.write_text(traceback.format_exc(), encoding="utf-8")
        return 1
    if local_rank == "0":
        (job_file.parent / "result.json").write_text(json.dumps(result, default=str), encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    leave(code)
