from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from convexlm import cli
from convexlm.checkpoints import INVENTORY_FILE
from convexlm.errors import UserError
from convexlm.export import export_checkpoint, kind_of
from convexlm.model_card import public_name
from convexlm.sharded import load_sharded

if TYPE_CHECKING:
    from pathlib import Path

MARKER = {
    "prompt": {"template": "alpaca", "add_bos": True},
    "objective": {"name": "convex", "k": 2.0, "level": "sequence", "length_weighting": "token", "mle_mix": 0.0},
}
IDS = torch.tensor([[1, 5, 9, 2, 7, 3]])


def logits(folder: Path | str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        return model(IDS).logits.float()


@pytest.fixture
def checkpoint(tiny_llama: Path, tmp_path: Path) -> Path:
    """A checkpoint as training leaves it, inside a run folder."""
    folder = tmp_path / "runs" / "exp" / "train" / "convex-k2" / "checkpoint-40"
    shutil.copytree(tiny_llama, folder)
    (folder / "convexlm.json").write_text(json.dumps(MARKER))
    (folder / INVENTORY_FILE).write_text(json.dumps({"files": {}, "resumable": True}))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(b"a pickle")
    (folder / "trainer_state.json").write_text(json.dumps({"epoch": 1.5, "global_step": 40}))
    recipe = {
        "name": "exp",
        "seeds": [1],
        "model": {"model_name_or_path": str(tiny_llama), "hub_token": "hf_abcdefghijkl"},
        "data": {"dataset": "/home/someone/secret/train.json", "max_records": 500},
        "train": {"learning_rate": 2e-5, "global_batch_size": 128, "hub_token": "hf_abcdefghijkl"},
        "arms": {"mle": {"objective": "mle"}, "convex-k2": {"objective": "convex", "k": 2.0, "max_steps": 40}},
        "versions": {"torch": "2.9.9"},
    }
    run = folder.parents[2]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rows = [
        {
            "arm": "convex-k2",
            "checkpoint": "checkpoint-40",
            "metric": "bleu",
            "score": 27.57,
            "signature": "nrefs:1|x",
        },
        {"arm": "convex-k2", "checkpoint": "checkpoint-20", "metric": "bleu", "score": 11.11, "signature": ""},
        {"arm": "mle", "checkpoint": "checkpoint-40", "metric": "bleu", "score": 22.22, "signature": ""},
    ]
    about = {"seed": 1, "role": "test", "test_set": "wmt22", "pair": "en-de", "search": "beam4"}
    (run / "scores.jsonl").write_text("".join(json.dumps({**about, **row}) + "\n" for row in rows))
    return folder


def card(folder: Path) -> tuple[dict[str, Any], str]:
    text = (folder / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_plain_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    result = export_checkpoint(checkpoint, tmp_path / "out")
    assert result["kind"] == "plain" and result["scores"] == 1
    assert torch.equal(logits(tmp_path / "out"), logits(checkpoint))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "convexlm.json", "README.md"} <= names
    assert not {name for name in names if name.endswith((".pt", ".pth", ".bin"))}
    assert not {"trainer_state.json", INVENTORY_FILE} & names
    assert json.loads((tmp_path / "out" / "convexlm.json").read_text()) == MARKER
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (checkpoint, tmp_path / "out")]
    assert tokenizers[0]("say one two").input_ids == tokenizers[1]("say one two").input_ids
    assert str(tmp_path) not in "".join(p.read_text() for p in (tmp_path / "out").glob("*.json"))


def test_decoding_finds_its_prompts_there(checkpoint: Path, tmp_path: Path) -> None:
    from convexlm.tokenization import PromptSettings

    export_checkpoint(checkpoint, tmp_path / "out")
    assert PromptSettings.load(tmp_path / "out") == PromptSettings("alpaca", add_bos=True)


def test_the_card(checkpoint: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    export_checkpoint(checkpoint, tmp_path / "my-model", license_name="apache-2.0")
    head, body = card(tmp_path / "my-model")
    assert (head["license"], head["library_name"], head["pipeline_tag"]) == (
        *("apache-2.0", "transformers", "text-generation"),
    )
    assert {"convexlm", "convex"} <= set(head["tags"]) and head["language"] == ["de", "en"]
    (entry,) = head["model-index"][0]["results"]
    assert entry["metrics"][0]["value"] == 27.57 and entry["task"]["type"] == "translation"
    for said in ("(1 - exp(k m)) / k", "k = 2.0", "27.57", "`nrefs:1\\|x`", "train.json", "first 500", "2e-05"):
        assert said in body, said
    assert "| global_batch_size | 128 |" in body and "| steps trained | 40 |" in body and "torch 2.9.9" in body
    assert "11.11" not in body and "22.22" not in body
    loaded = ModelCard.load(tmp_path / "my-model" / "README.md")
    assert loaded.data.eval_results is not None and loaded.data.eval_results[0].metric_value == 27.57


def test_a_card_holds_no_path_and_no_secret(checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    for leak in (str(tmp_path), "/home", "hf_", "someone", str(checkpoint)):
        assert leak not in text, leak
    assert not re.search(r"(?<![\w.])/[a-z]+/[a-z]+", text)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("gpt2", "gpt2"),
        ("/data/me/model", "model"),
        ("../x/model/", "model"),
        ("a/b/c.json", "c.json"),
        ("~/m", "m"),
        ("C:\\Users\\me\\m", "m"),
        ("https://user:pass@host.example/d/x.json?token=abc", "x.json"),
        ({"kind": "tinyworld"}, "tinyworld"),
        (None, None),
    ],
)
def test_names_for_others(given: Any, shown: Any) -> None:
    assert public_name(given) == shown


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_dtype(checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    result = export_checkpoint(checkpoint, tmp_path / "out", dtype=dtype)
    kinds = {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert kinds == {getattr(torch, dtype)} and result["dtype"] == dtype
    assert torch.allclose(logits(tmp_path / "out"), logits(checkpoint), atol=0.02)


# -- adapters


@pytest.fixture
def adapter(tiny_llama: Path, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """An adapter whose weights do something, and the logits it gives."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama), LoraConfig(r=4, target_modules="all-linear")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path / "checkpoint-7"
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, folder / name)
    (folder / "convexlm.json").write_text(json.dumps(MARKER))
    with torch.no_grad():
        return folder, model.eval()(IDS).logits


@pytest.mark.parametrize("base", [True, False])
def test_a_merged_adapter_gives_the_same_logits(
    adapter: tuple[Path, torch.Tensor], tiny_llama: Path, tmp_path: Path, base: bool
) -> None:
    folder, expected = adapter
    assert not torch.allclose(logits(tiny_llama), expected, atol=1e-3)
    result = export_checkpoint(
        folder, tmp_path / "out", merge_adapter=True, base_model=str(tiny_llama) if base else None
    )
    assert result["kind"] == "merged"
    assert torch.allclose(logits(tmp_path / "out"), expected, atol=1e-5)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    head, body = card(tmp_path / "out")
    assert head["library_name"] == "transformers" and str(tiny_llama.parent) not in body + str(head)


def test_an_adapter_stays_one(adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    folder, expected = adapter
    assert export_checkpoint(folder, tmp_path / "out")["kind"] == "adapter"
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
    assert card(tmp_path / "out")[0]["library_name"] == "peft"


def test_an_adapter_is_put_on_the_revision_it_was_trained_on(
    adapter: tuple[Path, torch.Tensor], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    told = {**config, "base_model_name_or_path": "some/base", "revision": "v2"}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    load, asked = AutoModelForCausalLM.from_pretrained, []

    def from_pretrained(name: str, **options: Any) -> Any:
        asked.append((name, options.pop("revision", None)))
        return load(tiny_llama, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    export_checkpoint(folder, tmp_path / "named", merge_adapter=True)
    export_checkpoint(folder, tmp_path / "given", merge_adapter=True, base_model="other/base")
    assert asked == [("some/base", "v2"), ("other/base", None)]
    monkeypatch.undo()
    assert torch.allclose(logits(tmp_path / "named"), expected, atol=1e-5)
    for base, shown in ((None, ("some/base", "v2")), ("other/base", ("other/base", None))):
        out = tmp_path / f"adapter-{base is None}"
        export_checkpoint(folder, out, base_model=base)
        written = json.loads((out / "adapter_config.json").read_text())
        assert (written["base_model_name_or_path"], written["revision"]) == shown


def test_an_adapter_without_its_base(adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, _ = adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(UserError, match="give --base_model"):
        export_checkpoint(folder, tmp_path / "out", merge_adapter=True)
    with pytest.raises(UserError, match="cannot be loaded"):
        export_checkpoint(folder, tmp_path / "out", merge_adapter=True, base_model=str(tmp_path / "nothing"))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


# -- shards


@pytest.fixture
def sharded(tiny_llama: Path, tmp_path: Path) -> Path:
    """As accelerate writes FSDP2's SHARDED_STATE_DICT: {"model": state} in `pytorch_model_fsdp_0`."""
    import torch.distributed.checkpoint as dcp

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    folder = tmp_path / "checkpoint-9"
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
    return folder


def test_shards_are_merged(sharded: Path, tiny_llama: Path, tmp_path: Path) -> None:
    assert kind_of(sharded) == "sharded"
    result = export_checkpoint(sharded, tmp_path / "out")
    assert result["kind"] == "sharded"
    assert torch.equal(logits(tmp_path / "out"), logits(tiny_llama))
    (sharded / "config.json").unlink()
    with pytest.raises(UserError, match="name the model with --base_model"):
        export_checkpoint(sharded, tmp_path / "other")
    export_checkpoint(sharded, tmp_path / "other", base_model=str(tiny_llama), dtype="bfloat16")
    assert torch.allclose(logits(tmp_path / "other"), logits(tiny_llama), atol=0.02)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_a_forged_metadata_runs_nothing(sharded: Path, tmp_path: Path) -> None:
    metadata = sharded / "pytorch_model_fsdp_0" / ".metadata"
    for content in (pickle.dumps(Bomb(tmp_path / "ran")), b"", b"junk", pickle.dumps({"a": 1})):
        metadata.write_bytes(content)
        with pytest.raises(UserError, match="not the metadata"):
            export_checkpoint(sharded, tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_an_object_among_the_shards_is_refused(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": {"w": torch.ones(2), "note": Bomb}}, checkpoint_id=tmp_path / "s", no_dist=True)
    with pytest.raises(UserError, match="is no tensor"):
        load_sharded(tmp_path / "s")


def test_missing_shards(sharded: Path, tmp_path: Path) -> None:
    next((sharded / "pytorch_model_fsdp_0").glob("*.distcp")).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        export_checkpoint(sharded, tmp_path / "out")


def test_shards_of_another_model(sharded: Path, tmp_path: Path) -> None:
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(UserError, match="do not fit"):
        export_checkpoint(sharded, tmp_path / "out")


def test_zero_shards_are_pickles(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    (folder / "global_step3").mkdir(parents=True)
    (folder / "latest").write_text("global_step3")
    (folder / "global_step3" / "x_optim_states.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(UserError, match="--allow_pickle"):
        export_checkpoint(folder, tmp_path / "out")
    try:
        import deepspeed  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="needs DeepSpeed"):
            export_checkpoint(folder, tmp_path / "out", allow_pickle=True)
    assert not (tmp_path / "ran").exists()


# -- refusals and the verb


def test_what_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="is not empty"):
        export_checkpoint(checkpoint, full)
    assert [path.name for path in full.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="holds no adapter"):
        export_checkpoint(checkpoint, tmp_path / "out", merge_adapter=True)
    with pytest.raises(UserError, match="no such folder"):
        export_checkpoint(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(UserError, match="--dtype float8"):
        export_checkpoint(checkpoint, tmp_path / "out", dtype="float8")
    with pytest.raises(UserError, match="no run folder"):
        export_checkpoint(checkpoint, tmp_path / "out", run_dir=full)
    with pytest.raises(UserError, match="no weights there"):
        export_checkpoint(full, tmp_path / "out")
    (full / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(UserError, match="are pickles"):
        export_checkpoint(full, tmp_path / "out")
    (checkpoint / INVENTORY_FILE).write_text(json.dumps({"files": {"model.safetensors": 3}}))
    with pytest.raises(UserError, match="were written"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "ran").exists()


def test_a_folder_that_is_there_stays_the_same_one(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    before = folder.stat().st_ino
    result = export_checkpoint(checkpoint, ".")
    assert result["output_dir"] == "." and folder.stat().st_ino == before and os.path.samefile(".", folder)
    assert set(result["files"]) == {path.name for path in folder.iterdir()} and "README.md" in result["files"]
    assert card(folder)[1].lstrip().startswith("# here")
    for path in folder.iterdir():
        path.unlink()
    (folder / ".export").mkdir()  # as a killed export leaves it
    export_checkpoint(checkpoint, tmp_path / "link")
    assert (
        (tmp_path / "link").is_symlink() and (folder / "config.json").is_file() and not (folder / ".export").exists()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "link", "runs"]


def test_an_output_that_cannot_be_is_told_before_the_work(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convexlm.export.load", lambda *_: pytest.fail("worked before it looked"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("file/out", "file/deeper/out", "loop", "loop/out", "x" * 300):
        with pytest.raises(UserError, match=r"^--output_dir .*: cannot be (written|read) \("):
            export_checkpoint(checkpoint, tmp_path / name)

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "out")

    monkeypatch.setattr("pathlib.Path.mkdir", denied)
    with pytest.raises(UserError, match="cannot be written.*Permission denied"):
        export_checkpoint(checkpoint, tmp_path / "out")


def test_the_verb(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()  # empty is fine
    words = ["export", "--checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "out"), "--json"]
    assert cli.main(words) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["kind"] == "plain" and "README.md" in told["files"]
    assert cli.main(words) == cli.EXIT_USER_ERROR
    assert "is not empty" in capfd.readouterr().err
    words[4] = str(tmp_path / "again")
    assert cli.main(words[:-1]) == 0
    assert "AutoModelForCausalLM.from_pretrained" in capfd.readouterr().out
