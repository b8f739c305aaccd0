"""`diagnose` where a batch's other rows would change a record's numbers, and what is refused before it measures."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, PeftType, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Phi3Config, Phi3ForCausalLM

from convexlm.cli import main
from convexlm.decoding.loading import load_model
from convexlm.diagnosis.batches import plan_batches, rows_together
from convexlm.diagnosis.measure import measure
from diagnosis_helpers import make_checkpoint, make_data
from training_helpers import tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVEXLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


def make_rows(count: int = 12, longest: int = 24) -> list[dict[str, Any]]:
    """Rows of many lengths, several of one length among them."""
    draw, rows = random.Random(0), []
    for number in range(count):
        ids = [draw.randrange(4, 40) for _ in range(draw.choice([6, 9, longest]))]
        rows.append({"record_id": str(number), "input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    return rows


def each_alone(model: Any, rows: list[dict[str, Any]]) -> np.ndarray:
    """Every target's log-probability, by the whole model on one row at a time."""
    found = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            log_probs = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
        found += [log_probs[place - 1, ids[0, place]].item() for place in range(3, ids.shape[1])]
    return np.array(found)


def longrope() -> Any:
    """A Phi-3 whose angles are others from 17 tokens on."""
    torch.manual_seed(0)
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 16}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    positions = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    config = Phi3Config(
        vocab_size=tiny_model(0).config.vocab_size, **shape, **positions, rope_parameters=rope, pad_token_id=0,
        initializer_range=0.5,
    )  # fmt: skip
    return Phi3ForCausalLM(config).eval()


def make_adapter(base: Path, folder: Path, kind: str) -> Path:
    """An adapter of one of PEFT's kinds, far from the one that training begins with."""
    options = {"CARTRIDGE": {"num_virtual_tokens": 4}, "SHADOW": {}}.get(
        kind, {"target_modules": ["q_proj", "v_proj"]}
    )
    torch.manual_seed(5)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind]](**options, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def words(checkpoint: Path, data: Path, *more: Any) -> list[str]:
    options = ["--device", "cpu", *map(str, more)]
    return ["diagnose", "--model_name_or_path", str(checkpoint), "--dataset", str(data), *options]


def refused(capsys: pytest.CaptureFixture, checkpoint: Path, data: Path, *more: Any) -> str:
    capsys.readouterr()
    assert main(words(checkpoint, data, *more)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_rows_go_together_where_that_changes_nothing(checkpoint: Path):
    assert rows_together(load_model(checkpoint, "cpu", torch.float32)) == "any"
    assert rows_together(load_model(checkpoint, "cpu", torch.bfloat16)) == "any"
    lengths = [5, 7, 5, 7, 7, 3]
    assert plan_batches(lengths, None, "cpu") == [[1, 3, 4, 0, 2, 5]]
    assert plan_batches(lengths, None, "cpu", "length") == [[1, 3, 4], [0, 2], [5]]
    assert plan_batches(lengths, 2, "cpu", "length") == [[1, 3], [4], [0, 2], [5]]
    assert plan_batches(lengths, 2, "cpu", "alone") == [[1], [3], [4], [0], [2], [5]]


def test_padding_that_shows_keeps_rows_of_other_lengths_apart(checkpoint: Path):
    """A model that takes padding for text, and is right without any."""
    model = load_model(checkpoint, "cpu", torch.float32)
    plain = type(model).forward

    def widest(self, input_ids, **kwargs):
        out = plain(self, input_ids=input_ids, **kwargs)
        out.logits = out.logits * (1 + input_ids.shape[1] / 50)
        return out

    model.forward = widest.__get__(model)
    assert rows_together(model) == "length"
    rows = make_rows()
    np.testing.assert_allclose(measure(model, rows).log_probs, each_alone(model, rows), atol=1e-3)


def test_a_model_with_angles_by_length_is_measured_length_by_length():
    model, rows, said = longrope(), make_rows(), []
    found = measure(model, rows, note=said.append)
    np.testing.assert_allclose(found.log_probs, each_alone(model, rows), atol=1e-3)
    assert len(said) == 1 and "records of one length" in said[0]


def test_a_lily_adapter_is_measured_one_record_at_a_time(checkpoint: Path, tmp_path: Path):
    """Its experts are mixed by the mean over the whole batch."""
    folder, rows, said = make_adapter(checkpoint, tmp_path / "adapter", "LILY"), make_rows(), []
    oracle = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), folder).eval()
    found = measure(load_model(folder, "cpu", torch.float32), rows, note=said.append)
    np.testing.assert_allclose(found.log_probs, each_alone(oracle, rows), atol=1e-3)
    assert len(said) == 1 and "one at a time" in said[0]


def test_a_shadow_adapter_is_measured_with_its_own_state(checkpoint: Path, tmp_path: Path):
    """The state begins in the whole model's call; the backbone alone would go on with the last call's."""
    folder, rows = make_adapter(checkpoint, tmp_path / "adapter", "SHADOW"), make_rows()
    oracle = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), folder).eval()
    wanted = each_alone(oracle, rows)
    model = load_model(folder, "cpu", torch.float32)
    np.testing.assert_allclose(measure(model, rows).log_probs, wanted, atol=1e-3)
    assert np.abs(wanted - each_alone(load_model(checkpoint, "cpu", torch.float32), rows)).max() > 0.01


def test_a_measurement_kept_by_an_older_version_is_not_taken(checkpoint: Path, tmp_path: Path, capsys, monkeypatch):
    """Those before version 2 may hold numbers that a batch's other records changed."""
    from convexlm.diagnosis import cache

    data = make_data(tmp_path / "d.jsonl", 5)
    for schema, cached in ((1, False), (cache.SCHEMA, False), (cache.SCHEMA, True)):
        monkeypatch.setattr(cache, "SCHEMA", schema)
        assert main([*words(checkpoint, data), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["cached"] == [cached]


def gpt2(folder: Path, positions: int) -> Path:
    torch.manual_seed(positions)
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": positions}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=tiny_model(0).config.vocab_size, **shape))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("first", ["many", "few"])
def test_comparing_with_a_model_of_fewer_positions(first: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    folders = {"many": gpt2(tmp_path / "many", 128), "few": gpt2(tmp_path / "few", 20)}
    checkpoint, other = folders.pop(first), next(iter(folders.values()))
    data = make_data(tmp_path / "d.jsonl", 30, longest=40)
    options = ("--template", "prompt_no_alpaca", "--compare", other, "--no_cache")
    assert main([*words(checkpoint, data, *options), "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["reading"]["max_length"] == 20 and found["reading"]["truncated"] > 0
    assert f"{found['reading']['truncated']} cut at max_length 20" in err
    assert ("few's 20 positions" in err) == (first == "many")
    assert main([*words(checkpoint, data, *options, "--max_length", 50), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["reading"] == found["reading"]
    assert "--max_length 50 is more than " in err and "'s 20 positions, which are taken" in err


def test_a_revision_of_a_local_folder_is_refused(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    data = make_data(tmp_path / "d.jsonl", 5)
    assert "--revision is of a hub name" in refused(capsys, checkpoint, data, "--revision", "main")


@pytest.mark.parametrize("option", ["output_file", "page", "records_file"])
def test_a_file_that_cannot_be_written_is_refused_before_measuring(
    option: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    from convexlm.diagnosis import run

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it was measured")

    data = make_data(tmp_path / "d.jsonl", 5)
    monkeypatch.setattr(run, "measure", never)
    for path in ("/proc/o.json", tmp_path / ("o" * 250)):
        assert f"--{option} {path}: cannot be written" in refused(capsys, checkpoint, data, f"--{option}", path)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").write_text("kept")
    for name in ("old", "new"):
        with pytest.raises(AssertionError, match="it was measured"):
            main(words(checkpoint, data, f"--{option}", folder / name))
    assert [path.name for path in folder.iterdir()] == ["old"] and (folder / "old").read_text() == "kept"


def test_adapters_that_would_not_act_are_refused(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    data = make_data(tmp_path / "d.jsonl", 5)
    folder = make_adapter(checkpoint, tmp_path / "cartridge", "CARTRIDGE")
    assert "CARTRIDGE (virtual tokens)" in refused(capsys, folder, data)
    folder = make_adapter(checkpoint, tmp_path / "lora", "LORA")
    assert main(words(folder, data)) == 0
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "alora_invocation_tokens": [5, 6]}))
    assert "an activated LoRA (alora_invocation_tokens)" in refused(capsys, folder, data)
