"""`ConvexCollator`: weights, rows and left padding beside TRL's own tensors."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from convexlm.collator import ROW, WEIGHT, ConvexCollator, check_weight, keeps_packed_rows
from test_fused_forward import family

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
    assert batch[ROW].tolist() == [[0, 0, 0, 1, 2, 2, -1, -1]]
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


PACKED = [
    {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "seq_lengths": [2, 1], "weight": [2.0, 2.0, 0.5],
     "record_id": [3, 1]},
    {"input_ids": [8, 9, 10, 11, 12], "labels": [8, 9, 10, 11, 12], "seq_lengths": [2, 3], "weight": [3.0] * 5,
     "record_id": [0, 2]},
]  # fmt: skip


def test_packed_rows_stay_apart_with_their_sequences_numbered():
    batch = ConvexCollator(0, packed_rows=True)(PACKED)
    assert "attention_mask" not in batch  # with one, transformers would not look at the positions
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]]
    assert batch["labels"].tolist() == [[-100, 6, -100, -100, -100], [-100, 9, -100, 11, 12]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0, 0], [0, 1, 0, 1, 2]]
    assert batch["seq_idx"].tolist() == [[0, 0, 1, 2, 3], [0, 0, 1, 1, 1]]
    assert batch[ROW].tolist() == [[0, 0, 0, -1, -1], [1, 1, 1, 1, 1]]
    assert batch[WEIGHT].tolist() == [[2, 2, 0.5, 0, 0], [3, 3, 3, 3, 3]]
    assert batch["record_id"] == [[3, 1], [0, 2]]
    wider = ConvexCollator(0, packed_rows=True, pad_to_multiple_of=8)(PACKED)
    assert wider["labels"].shape == (2, 8) and (wider["labels"][:, 5:] == -100).all()
    for settings in ({"padding_free": True}, {"padding_side": "left"}):
        with pytest.raises(ValueError, match="goes with neither"):
            ConvexCollator(0, packed_rows=True, **settings)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "gpt_neox", "mixtral"])
def test_rows_kept_apart_give_every_token_the_logits_it_has_alone(name, attention):
    model = family(name)
    model.set_attn_implementation(attention)
    assert keeps_packed_rows(model.config)
    batch = ConvexCollator(0, packed_rows=True)(PACKED)
    inputs = {key: batch[key] for key in ("input_ids", "position_ids", "seq_idx")}
    with torch.no_grad():
        got = model(**inputs, use_cache=False).logits  # with a cache, transformers takes no mask from positions
        for row, example in enumerate(PACKED):
            start = 0
            for length in example["seq_lengths"]:
                alone = model(torch.tensor([example["input_ids"][start : start + length]])).logits[0]
                torch.testing.assert_close(got[row, start : start + length], alone, rtol=1e-4, atol=1e-5)
                start += length


def test_which_models_keep_packed_rows():
    for name in ("llama", "gemma2", "gpt2", "qwen3_moe"):
        assert keeps_packed_rows(family(name).config), name
    llama = AutoConfig.for_model("llama")
    assert keeps_packed_rows(llama, "eager")
    for kernel in ("flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2", "flex_attention"):
        assert not keeps_packed_rows(llama, kernel), kernel
    for name in ("mamba", "jamba", "qwen3_next"):
        assert not keeps_packed_rows(AutoConfig.for_model(name)), name


def test_left_padding_moves_everything_and_keeps_positions():
    right = ConvexCollator(0)(EXAMPLES)
    right["labels"][1, 0] = -100  # the first token of its row, which is no target where it comes to stand
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
