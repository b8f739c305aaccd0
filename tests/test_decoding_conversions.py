"""Models that CTranslate2 converts and computes otherwise, which the probe of a conversion does not always show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from convexlm.decoding import decode_jobs
from convexlm.errors import UserError
from decoding_helpers import make_job, make_tokenizer, read

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("ctranslate2")

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 8192,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVEXLM_CACHE", str(tmp_path / "cache"))


def test_texts_beyond_an_attention_window_are_refused(tmp_path: Path):
    """CTranslate2 computes a Mistral's window otherwise, and the probe of a conversion is shorter than windows are."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**SIZES, num_key_value_heads=2, vocab_size=420, eos_token_id=2, sliding_window=66)
    MistralForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    job = make_job(tmp_path / "out.jsonl", ["house", "dog"], max_new_tokens=8)
    with pytest.raises(UserError, match="cannot run what it converted.*--backend hf"):  # without an unknown token
        decode_jobs(tmp_path / "model", [job], backend="ctranslate2", device="cpu")
    tokenizer.unk_token = "<unk>"
    tokenizer.save_pretrained(tmp_path / "model")
    texts = []
    for backend in ("hf", "ctranslate2"):
        job = make_job(tmp_path / f"{backend}.jsonl", ["house", "dog"], max_new_tokens=8)
        decode_jobs(tmp_path / "model", [job], backend=backend, device="cpu")
        texts.append([row["hypothesis"] for row in read(job.output_file)])
    assert texts[0] == texts[1]
    job = make_job(tmp_path / "longer.jsonl", ["house", "dog"], max_new_tokens=20)
    with pytest.raises(UserError, match=r"more than the 66 tokens of an attention window.*--backend hf"):
        decode_jobs(tmp_path / "model", [job], backend="ctranslate2", device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": LLAMA3}, "angles of the kind llama3"),
        ({"head_dim": 16, "num_key_value_heads": 2}, "cannot run what it converted"),
    ],
)
def test_llamas_that_it_computes_otherwise_are_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    """The first of them passes the probe: its angles go wrong with the position."""
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**SIZES, **changes, vocab_size=420, eos_token_id=2)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{message}.*--backend hf"):
        decode_jobs(tmp_path, [make_job(tmp_path / "out.jsonl")], backend="ctranslate2", device="cpu")
