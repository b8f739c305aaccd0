"""The test set kind `tinyworld`: sources and one sampled reference for each, as a real test set has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.testsets import TestSet, register_test_set_kind
from convexlm.tinyworld.corpus import sample_corpus
from convexlm.tinyworld.grammar import DIRECTIONS
from convexlm.tinyworld.meaning import SPLITS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@register_test_set_kind("tinyworld", keys=("seed", "size", "split"))
def load_tinyworld(spec: Mapping[str, Any], pair: str, base_dir: Path) -> TestSet:
    """Sample a test set: `size` sentences (500) with `seed` (0) from `split` (`test`), without noise.

    `meta` names the kind, direction, seed, size and split: `convexlm.tinyworld.judge(sources, hypotheses, direction)`
    needs no more to hold hypotheses against the truth.

    Raises:
        UserError: a direction that the tiny world does not have, or a setting that is none.
    """
    del base_dir
    name = spec["name"]
    if pair not in DIRECTIONS:
        raise UserError(f"test set `{name}` has no pair `{pair}`; it has: {', '.join(DIRECTIONS)}")
    seed = _whole_number(spec, "seed", 0, least=None)
    size = _whole_number(spec, "size", 500, least=1)
    split = spec.get("split", "test")
    if split not in SPLITS:
        raise UserError(f"test set `{name}`: unknown `split` {split!r}; known: {', '.join(SPLITS)}")
    pairs = sample_corpus(pair, size, seed, split=split)
    return TestSet(
        name=name,
        pair=pair,
        sources=[item.source for item in pairs],
        references=[[item.target for item in pairs]],
        ids=[str(number) for number in range(size)],
        meta={"kind": "tinyworld", "direction": pair, "seed": seed, "size": size, "split": split},
    )


def _whole_number(spec: Mapping[str, Any], key: str, default: int, least: int | None) -> int:
    value = spec.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        wanted = "a whole number" if least is None else f"a whole number of at least {least}"
        raise UserError(f"test set `{spec['name']}`: `{key}` must be {wanted}, not {value!r}")
    return value
