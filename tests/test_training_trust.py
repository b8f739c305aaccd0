"""What could be run in a model or in data is not, and what could be told is not: pickles, code, tokens, the hub."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch

from resume_helpers import Payload, given, write_files
from training_helpers import train


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def test_weights_in_a_pickle_are_refused(files, tmp_path, capfd):
    folder = tmp_path / "model"
    shutil.copytree(files / "model", folder)
    torch.save({"x": Payload(tmp_path / "executed")}, folder / "pytorch_model.bin")
    options = {key: value for key, value in given(files).items() if key not in ("config_name", "tokenizer_name")}
    assert train(tmp_path / "run", model_name_or_path=folder, **options) == 2
    assert "no weights in safetensors format" in capfd.readouterr().err
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["data.pkl", "data.pt", "data.jsonl", "folder", "streamed"])
def test_data_in_a_pickle_are_refused(files, tmp_path, capfd, name):
    path = tmp_path / name
    if name in ("folder", "streamed"):
        path.mkdir()
        (path / "loader.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\n")
    target = path / "train.pkl" if path.is_dir() else path
    target.write_bytes(pickle.dumps([Payload(tmp_path / "executed")]))
    streaming = {"streaming": True} if name == "streamed" else {}
    assert train(tmp_path / "run", **given(files, dataset=path, **streaming)) == 2
    err = capfd.readouterr().err
    assert name.split(".")[0] in err and "Traceback" not in err
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("flag", [False, True])
def test_code_of_a_model_runs_by_the_flag_alone(files, tmp_path, capfd, monkeypatch, flag):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    shutil.copytree(files / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        f"import os\nos.makedirs({str(tmp_path / 'executed')!r}, exist_ok=True)\n"
        "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    options = given(files, config_name=folder, max_steps=1)
    code = train(tmp_path / "run", **options, **({"trust_remote_code": True} if flag else {}))
    assert code == 2  # with the flag, too: there is no model class for the config
    assert (tmp_path / "executed").exists() == flag
    out, err = capfd.readouterr()
    assert "Traceback" not in err and out == ""  # nobody is asked on the terminal, either


def test_tokens_are_written_nowhere(files, tmp_path, monkeypatch, capfd):
    secrets = ("hf_SecretOfTheOption", "hf_SecretOfTheEnvironment")
    monkeypatch.setenv("HF_TOKEN", secrets[1])
    options = given(files, hub_token=secrets[0], max_steps=2, save_steps=2)
    assert train(tmp_path / "run", "--json", **options) == 0
    files_written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files_written)
    assert any(path.name == "README.md" for path in files_written)
    for path in files_written:
        assert not any(secret.encode() in path.read_bytes() for secret in secrets), path
    assert not any(secret in text for text in capfd.readouterr() for secret in secrets)


def test_push_to_hub_is_transformers_own(files, tmp_path, monkeypatch):
    """The option reaches transformers, which asks the hub for the repository with the token."""
    asked = []

    class Hub:
        def create_repo(self, name, **kwargs):
            asked.append((name, kwargs.get("token"), kwargs.get("private")))
            raise OSError("no network here")

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    options = given(files, push_to_hub=True, hub_model_id="someone/model", hub_token="hf_x", hub_private_repo=True)
    assert train(tmp_path / "run", **options) == 2
    assert asked == [("someone/model", "hf_x", True)]
