"""The training runs that the invariance tests compare."""

from __future__ import annotations

import pytest
from training_runs import (
    ARMS,
    BOTH_WEIGHTINGS,
    ENGINES,
    EVALUATION,
    FIRST_IS_BEST,
    ON_TWO,
    WHOLE_ON_TWO,
    Runs,
    halfway,
)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("invariants"))
    for arm in ARMS:
        made.plan_on_two(arm, "even", "2x2x2", ON_TWO["2x2x2"])
    for arm in ("convex", "convex_by_sequence"):
        made.plan_on_two(arm, "even", "2x4_padding_free", ON_TWO["2x4_padding_free"])
        for name, form in WHOLE_ON_TWO.items():
            made.plan_on_two(arm, "even", name, form)
        made.plan_on_two(arm, "uneven", "2x2x2", {**ON_TWO["2x2x2"], **EVALUATION, "per_device_eval_batch_size": 2})
        padding_free = {**ON_TWO["2x4_padding_free"], **EVALUATION, "per_device_eval_batch_size": 3}
        made.plan_on_two(arm, "uneven", "2x4_padding_free", padding_free)
    made.plan_on_two("mle_by_sequence", "even", "2x2x2", ON_TWO["2x2x2"])
    for arm in ("mle", "mle_by_sequence"):
        made.plan_on_two(arm, "even", "2x1x32_bfd", WHOLE_ON_TWO["2x1x32_bfd"])
    for arm in BOTH_WEIGHTINGS:
        made.plan_on_two(arm, "even", "2x2x2", ON_TWO["2x2x2"], "fsdp2")
        made.plan_on_two(arm, "even", "2x1x32_bfd", WHOLE_ON_TWO["2x1x32_bfd"], "fsdp2")
    made.plan_on_two("lora", "even", "2x2x2", ON_TWO["2x2x2"], "fsdp2")
    made.plan_on_two("lora", "even", "copy", made.with_a_copy(ON_TWO["2x2x2"], stop=10), "fsdp2")
    half, copy = made.folder / "two-fsdp2-lora-even-copy", made.with_a_copy(ON_TWO["2x2x2"])
    made.plan_on_two("lora", "even", "", copy, "fsdp2", folder=half, resume=["--resume"])
    made.plan_on_two("convex", "even", "best", {**ON_TWO["2x2x2"], **FIRST_IS_BEST}, "fsdp2")
    for engine in ENGINES:
        made.plan_on_two("convex", "even", "bf16", {**ON_TWO["2x2x2"], **made.in_bfloat16(5)}, engine)
        made.plan_on_two("convex", "even", "first-half", halfway(2, stop=10), engine)
        half = made.folder / f"two-{engine}-convex-even-first-half"
        made.plan_on_two("convex", "even", "", halfway(2), engine, folder=half, resume=["--resume"])
    made.plan_on_two("convex", "even", "to-resume-on-one", halfway(2, stop=10))
    started_on_one = made.get("convex", "even", "to-resume-on-two", halfway(4, stop=10), step=10).folder
    made.plan_on_two("convex", "even", "", halfway(2), folder=started_on_one, resume=["--resume"])
    return made
