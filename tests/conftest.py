"""Fixtures that several test modules share."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# Before anything of Hugging Face is imported: no test may wait for a network, or fill the user's cache.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "HF_DATASETS_CACHE" not in os.environ:
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="convexlm-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import pytest

# A failure in a helper shows what was compared, as one in a test does.
pytest.register_assert_rewrite("forks", *(file.stem for file in Path(__file__).parent.glob("*_helpers.py")))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data, beside the project's; tests that need it skip where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("CONVEXLM_SHARED_DATA", default))
    if not path.is_dir():
        pytest.skip(f"real data not at hand ({path}); set CONVEXLM_SHARED_DATA to its folder")
    return path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama with random weights and a byte-level tokenizer that knows a few words."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from convexlm.tinyworld.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = train_tokenizer(["say one two three four"], vocab_size=512)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last digits of log-probabilities depend on the number of threads: the same in all processes."""
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def report_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that most tests of reports read."""
    from report_helpers import make_run

    return make_run(tmp_path_factory.mktemp("runs") / "plain")


@pytest.fixture
def report_copy(report_run: Path, tmp_path: Path) -> Path:
    """One to change."""
    return shutil.copytree(report_run, tmp_path / "copy")
