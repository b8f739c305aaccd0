"""`ConvexCollator`: weights, rows and left padding beside TRL's own tensors."""

from __future__ import annotations

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from convexlm.collator import ROW, WEIGHT, ConvexCollator, check_weight

EXAMPLES = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "weight": 2.0},
    {"input_ids": [8], "labels": [8], "weight": None},
    {"input_ids": [9, 10], "labels": [-100, 10], "weight": 0.0},
]


def plain(examples):
    return [{key: value for key, value in example.items() if key != "weight"} for example in examples]


@pytest.mark.parametrize("settings", [{}, {"pad_to_multiple_of": 4}, {"padding_free": True}])
def test_trls_tensors_stay_as_they_are(settings):
    theirs = DataCollatorForLanguageModeling(0, **settings)(plain(EXAMPLES))
    ours = ConvexCollator(0, **settings)(EXAMPLES)
    assert set(ours) - set(theirs) == {WEIGHT, ROW} if settings.get("padding_free") else {WEIGHT}
    for key, value in theirs.items():
        assert torch.equal(ours[key], value) if isinstance(value, torch.Tensor) else ours[key] == value
    assert WEIGHT not in ConvexCollator(0, **settings)(plain(EXAMPLES))


def test_weights_follow_their_tokens():
    batch = ConvexCollator(0)(EXAMPLES)
    assert batch[WEIGHT].tolist() == [[2, 2, 2], [1, 0, 0], [0, 0, 0]]
    batch = ConvexCollator(0, padding_free=True, pad_to_multiple_of=4)(EXAMPLES)
    assert batch[WEIGHT].tolist() == [[2, 2, 2, 1, 0, 0, 0, 0]]
    assert batch[ROW].tolist() == [[0, 0, 0, 1, 2, 2, 0, 0]]
    assert batch["labels"][0, 6:].tolist() == [-100, -100]


def test_a_packed_row_carries_a_weight_for_every_token():
    packed = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "seq_lengths": [2, 1], "weight": [2.0, 2.0, 0.5]},
        {"input_ids": [8], "labels": [8], "seq_lengths": [1], "weight": [3.0]},
    ]
    batch = ConvexCollator(0, padding_free=True)(packed)
    assert batch[WEIGHT].tolist() == [[2, 2, 0.5, 3]]
    assert batch["seq_idx"].tolist() == [[0, 0, 1, 2]]
    assert batch[ROW].tolist() == [[0, 0, 0, 1]]


def test_left_padding_moves_everything_and_keeps_positions():
    right = ConvexCollator(0)(EXAMPLES)
    left = ConvexCollator(0, padding_side="left")(EXAMPLES)
    for key in ("input_ids", "labels", "attention_mask", WEIGHT):
        for row, example in enumerate(EXAMPLES):
            length = len(example["input_ids"])
            assert torch.equal(left[key][row, 3 - length :], right[key][row, :length]), key
            assert torch.equal(left[key][row, : 3 - length], right[key][row, length:]), key
    assert left["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("bad", [-0.5, float("nan"), float("inf"), float("-inf")])
def test_a_bad_weight_is_refused(bad):
    with pytest.raises(ValueError, match="finite number of at least 0"):
        check_weight(bad)
    with pytest.raises(ValueError, match="finite number of at least 0"):
        ConvexCollator(0)([{**EXAMPLES[0], "weight": bad}])
    check_weight(0.0)
