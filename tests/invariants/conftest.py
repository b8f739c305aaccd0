"""The training runs that the invariance tests compare."""

from __future__ import annotations

import pytest
from training_runs import ARMS, EVALUATION, ON_TWO, WHOLE_ON_TWO, Runs


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
    return made
