"""`--model_revision` and `--dtype` reach everything that is loaded or made by them."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from trl import ModelConfig

from convexlm import tokenization, training
from convexlm.config import ConvexConfig
from convexlm.data_options import DataOptions
from convexlm.decoding.checkpoint import base_of_adapter, checkpoint_sha256, find_checkpoint
from convexlm.errors import UserError
from convexlm.tokenizer_files import load_tokenizer
from convexlm.training_model import model_to_train, peft_config_of
from training_helpers import tiny_config, tiny_tokenizer, write_model_files

if TYPE_CHECKING:
    from pathlib import Path


def in_cache(cache: Path, name: str, **revisions: str) -> None:
    """A hub cache with these revisions of a model, each a file's content."""
    folder = cache / ("models--" + name.replace("/", "--"))
    for number, (revision, content) in enumerate(revisions.items()):
        snapshot = folder / "snapshots" / (f"{number}" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(content)
        (snapshot / "model.safetensors").write_text(content)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / revision).write_text(f"{number}" * 40)


def test_an_adapter_is_decoded_on_the_revision_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_cache(tmp_path, "some/base", main='{"of": "main"}', v2='{"of": "v2"}')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_text("")

    def base(**named: Any) -> Path:
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base", **named}))
        return base_of_adapter(adapter)

    for named in ({}, {"revision": None}):
        assert base(**named) == find_checkpoint("some/base")
    plain = checkpoint_sha256(adapter)
    assert (base(revision="v2") / "config.json").read_text() == '{"of": "v2"}'
    assert checkpoint_sha256(adapter) != plain
    with pytest.raises(UserError, match="base model of this adapter"):
        base(revision="v3")
    shutil.copytree(find_checkpoint("some/base"), tmp_path / "local")
    assert base(base_model_name_or_path=str(tmp_path / "local"), revision="v2") == tmp_path / "local"


@pytest.mark.parametrize(
    ("options", "revision"),
    [
        ({"model_name_or_path": "some/base", "model_revision": "v2"}, "v2"),
        ({"model_name_or_path": "some/base"}, None),
        ({"model_name_or_path": "LOCAL", "model_revision": "v2"}, None),
    ],
)
def test_training_takes_tokenizer_and_adapter_by_the_models_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], revision: str | None
) -> None:
    write_model_files(tmp_path / "LOCAL")
    monkeypatch.chdir(tmp_path)
    model = ModelConfig(**options, use_peft=True)
    assert peft_config_of(model).revision == revision
    asked: list[Any] = []

    def load(name: str, *, trust_remote_code: bool, revision: str | None) -> Any:
        asked.append((name, revision))
        raise UserError("far enough")

    monkeypatch.setattr(tokenization, "load_tokenizer", load)
    args = ConvexConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False)
    for data in (DataOptions("x.json"), DataOptions("x.json", tokenizer_name="other/one")):
        with pytest.raises(UserError, match="far enough"):
            training.train_model(model, data, args)
    assert asked == [(options["model_name_or_path"], revision), ("other/one", None)]


def test_a_tokenizers_revision_goes_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def load(name: str, **options: Any) -> Any:
        asked.append(options)
        return tiny_tokenizer()

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", load)
    load_tokenizer("some/base", revision="v2")
    assert asked[0]["revision"] == "v2"


@pytest.mark.parametrize(
    ("asked", "made"), [("bfloat16", torch.bfloat16), (None, torch.float32), ("auto", torch.float16)]
)
def test_a_new_model_has_the_dtype_asked_for(tmp_path: Path, asked: str | None, made: torch.dtype) -> None:
    tiny_config(dtype="float16").save_pretrained(tmp_path / "config")
    args = ConvexConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False)
    data = DataOptions("x.json", config_name=str(tmp_path / "config"))
    model, _ = model_to_train(ModelConfig(dtype=asked), data, args, tiny_tokenizer())
    assert not isinstance(model, str) and {parameter.dtype for parameter in model.parameters()} == {made}


def test_an_adapter_away_from_its_base_says_how_to_mend_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "models/tiny"}')
    with pytest.raises(UserError, match="a relative path counts from the current folder.*or change base_model_name"):
        base_of_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/nowhere/tiny"}')
    with pytest.raises(UserError, match="; change base_model_name_or_path in its adapter_config.json"):
        base_of_adapter(tmp_path)
