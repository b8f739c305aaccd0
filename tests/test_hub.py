from __future__ import annotations

import pytest

from convexlm.errors import UserError
from convexlm.hub import refuse_shared_repository


def test_two_trainings_are_not_pushed_to_one_repository() -> None:
    shared = {"push_to_hub": True, "hub_model_id": "me/model"}
    with pytest.raises(UserError, match="`hub_model_id: me/model`: `mle.seed1` and `mle.seed2` would be pushed"):
        refuse_shared_repository([("mle.seed1", shared), ("other", {"push_to_hub": True}), ("mle.seed2", shared)])
    with pytest.raises(UserError, match="same repository"):
        refuse_shared_repository([("mle", shared), ("convex", {**shared, "hub_model_id": "me/Model"})])
    refuse_shared_repository([("mle", shared)])
    refuse_shared_repository([("mle", shared), ("convex", {**shared, "hub_model_id": "me/convex"})])
    refuse_shared_repository([("mle", {"push_to_hub": True}), ("convex", {"push_to_hub": True})])
    refuse_shared_repository([(name, {**shared, "push_to_hub": False}) for name in ("mle", "convex")])
