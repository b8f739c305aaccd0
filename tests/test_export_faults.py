"""What an export may not pass over: missing weights, a dtype that nobody asked for, files of another folder."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from convexlm import cli
from convexlm.checkpoints import all_checkpoints
from convexlm.errors import UserError
from convexlm.export import export_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

IDS = torch.tensor([[1, 5, 9, 2, 7, 3]])
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def change(file: Path, how: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(how(load_file(file)), file, metadata={"format": "pt"})


def tell(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture
def plain(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "checkpoint-3")


def adapted(base: Path, folder: Path, words: int | None = None) -> torch.Tensor:
    """Write an adapter without a tokenizer (of a model with so many words); the logits that it gives."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    if words:
        model.resize_token_embeddings(words)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, save_embedding_layers=bool(words))
    return logits(model)


def test_weights_that_are_not_there_are_not_made_up(plain: Path, tmp_path: Path) -> None:
    change(plain / "model.safetensors", lambda state: {key: state[key] for key in state if key != Q_PROJ})
    with pytest.raises(UserError, match=f"1 missing, such as {Q_PROJ}"):
        export_checkpoint(plain, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_lacks_weights_is_not_merged(tiny_llama: Path, tmp_path: Path) -> None:
    adapted(tiny_llama, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    change(file, lambda state: {key: state[key] for key in state if "lora_B" not in key})
    with pytest.raises(UserError, match=r"lacks 1 of its weights, such as .*q_proj\.lora_B"):
        export_checkpoint(tmp_path / "adapter", tmp_path / "out", merge_adapter=True)


def test_an_adapter_of_more_words_is_merged_with_them(tiny_llama: Path, tmp_path: Path) -> None:
    words = json.loads((tiny_llama / "config.json").read_text())["vocab_size"] + 3
    expected = adapted(tiny_llama, tmp_path / "adapter", words)
    export_checkpoint(tmp_path / "adapter", tmp_path / "out", merge_adapter=True)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected, atol=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == words


@pytest.mark.parametrize("merge", [True, False])
def test_a_torn_file_is_one_line(plain: Path, tmp_path: Path, merge: bool) -> None:
    adapted(plain, tmp_path / "adapter")
    for folder, name in ((tmp_path / "adapter", "adapter_model.safetensors"), (plain, "model.safetensors")):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(kept[:-50])
        with pytest.raises(UserError, match="not fully covered"):
            export_checkpoint(folder, tmp_path / "out", merge_adapter=merge and folder != plain)
        (folder / name).write_bytes(kept)


def test_a_checkpoint_that_is_being_saved_is_refused(plain: Path, tmp_path: Path) -> None:
    (plain / ".saving").touch()
    with pytest.raises(UserError, match="not written to the end"):
        export_checkpoint(plain, tmp_path / "out")


def test_a_damaged_inventory_and_an_odd_name_are_no_checkpoint(plain: Path, tmp_path: Path) -> None:
    (plain / "convexlm.json").write_text("{}")
    (plain / "convexlm-files.json").write_text('{"files": [1]}')
    with pytest.raises(UserError, match=r"convexlm-files\.json is damaged"):
        export_checkpoint(plain, tmp_path / "out")
    (tmp_path / "checkpoint-²").mkdir()
    assert all_checkpoints(tmp_path) == [plain]
    with pytest.raises(UserError, match="null byte"):
        export_checkpoint(plain, f"{tmp_path}/a\0b")


def test_auto_is_the_dtype_of_the_weights_whatever_the_config_says(plain: Path, tmp_path: Path) -> None:
    tell(plain / "config.json", dtype="bfloat16")
    before = load_file(plain / "model.safetensors")
    assert export_checkpoint(plain, tmp_path / "same")["dtype"] == "float32"
    after = load_file(tmp_path / "same" / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)
    # Of two dtypes the one that holds both.
    change(plain / "model.safetensors", lambda state: {**state, Q_PROJ: state[Q_PROJ].bfloat16()})
    assert export_checkpoint(plain, tmp_path / "mixed")["dtype"] == "float32"
    change(plain / "model.safetensors", lambda state: {key: state[key].half() for key in state})
    assert export_checkpoint(plain, tmp_path / "half")["dtype"] == "float16"


def test_numbers_that_a_dtype_does_not_hold_are_refused(plain: Path, tmp_path: Path) -> None:
    adapted(plain, tmp_path / "adapter")
    for folder, name in ((tmp_path / "adapter", "adapter_model.safetensors"), (plain, "model.safetensors")):
        change(
            folder / name, lambda state: {key: state[key] * 1e8 if "q_proj" in key else state[key] for key in state}
        )
        with pytest.raises(UserError, match="q_proj.* holds numbers that are not finite, as float16"):
            export_checkpoint(folder, tmp_path / "out", dtype="float16")
        assert export_checkpoint(folder, tmp_path / f"out-{name}")["dtype"] == "float32"


def test_shards_keep_the_settings_of_generation(plain: Path, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    state = load_file(plain / "model.safetensors")
    dcp.save({"model": state}, checkpoint_id=plain / "pytorch_model_fsdp_0", no_dist=True)
    (plain / "model.safetensors").unlink()
    (plain / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "max_length": 77}))
    assert export_checkpoint(plain, tmp_path / "out")["kind"] == "sharded"
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (kept["eos_token_id"], kept["max_length"]) == ([2, 7], 77)


def test_shards_larger_than_any_memory_are_one_line(plain: Path, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    (plain / "model.safetensors").unlink()
    folder = plain / "pytorch_model_fsdp_0"
    dcp.save({"model": {"model.x": torch.ones(2)}}, checkpoint_id=folder, no_dist=True)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    next(iter(metadata.state_dict_metadata.values())).size = torch.Size([10**9, 10**9])
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="the sharded checkpoint cannot be read"):
        export_checkpoint(plain, tmp_path / "out")


@pytest.mark.parametrize("latest", [b"..", b".", b"../x", b"\xff\xfe"])
def test_where_the_states_of_deepspeed_lie_is_in_the_checkpoint(tmp_path: Path, latest: bytes) -> None:
    (tmp_path / "checkpoint-3" / "global_step3").mkdir(parents=True)
    (tmp_path / "checkpoint-3" / "latest").write_bytes(latest)
    with pytest.raises(UserError, match="names no folder of DeepSpeed's states there"):
        export_checkpoint(tmp_path / "checkpoint-3", tmp_path / "out")


def test_settings_of_generation_that_cannot_be_read_are_not_replaced(plain: Path, tmp_path: Path) -> None:
    (plain / "generation_config.json").write_text('{"eos_token')
    with pytest.raises(UserError, match="its generation config cannot be read"):
        export_checkpoint(plain, tmp_path / "out")


def test_the_tokenizer_comes_from_the_base_that_an_adapter_names(
    tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapted(tiny_llama, tmp_path / "adapter")
    assert export_checkpoint(tmp_path / "adapter", tmp_path / "out", merge_adapter=True)["tokenizer"] is True
    ids = [AutoTokenizer.from_pretrained(place)("say one two").input_ids for place in (tiny_llama, tmp_path / "out")]
    assert ids[0] == ids[1]
    bare = shutil.copytree(tiny_llama, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    words = ["export", "--checkpoint", str(bare), "--output_dir", str(tmp_path / "without")]
    assert cli.main(words) == 0
    assert "no tokenizer was there" in capfd.readouterr().out


def test_every_chat_template_goes_along(plain: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(plain)
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tools": "tools: {{ messages[0].content }}"}
    tokenizer.save_pretrained(plain)
    export_checkpoint(plain, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


@pytest.mark.parametrize("weight_map", [{Q_PROJ: "../other.safetensors"}, {Q_PROJ: "/other.safetensors"}, [], None])
def test_an_index_names_files_of_its_own_folder(plain: Path, tmp_path: Path, weight_map: Any) -> None:
    (plain / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"index\.json: (names a file outside its folder|does not say)"):
        export_checkpoint(plain, tmp_path / "out")


def test_a_full_disk_is_one_line_and_leaves_nothing(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(UserError, match=r"--output_dir .*: cannot be written \(.*No space left"):
        export_checkpoint(plain, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_an_interruption_leaves_a_folder_that_was_there_as_it_was(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    rename, calls = Path.rename, []

    def interrupted(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(plain, tmp_path / "here")
    monkeypatch.undo()
    assert not list((tmp_path / "here").iterdir())
    export_checkpoint(plain, tmp_path / "here")


def test_all_files_have_the_usual_permissions(plain: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        export_checkpoint(plain, tmp_path / "out")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o640}


def test_a_model_and_an_adapter_in_one_folder_are_not_chosen_between(plain: Path, tmp_path: Path) -> None:
    adapted(plain, tmp_path / "adapter")
    adapted(plain, plain)
    for folder, merge in ((plain, False), (plain, True), (tmp_path / "adapter", True)):
        with pytest.raises(UserError, match="holds a whole model and an adapter"):
            export_checkpoint(folder, tmp_path / "out", merge_adapter=merge)


def test_a_quantized_base_is_not_merged_into(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted(tiny_llama, tmp_path / "adapter")
    load = AutoModelForCausalLM.from_pretrained

    def quantized(*args: Any, **options: Any) -> Any:
        model, report = load(*args, **options)
        model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        return model, report

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", quantized)
    with pytest.raises(UserError, match="its weights are quantized"):
        export_checkpoint(tmp_path / "adapter", tmp_path / "out", merge_adapter=True)
