"""What looks like a token, key or password is found, and what only holds its letters is not."""

from __future__ import annotations

import pytest

from convexlm.redaction import clean, find_secret


@pytest.mark.parametrize(
    "secret",
    [
        "hf_abcdefghijklmnop",
        "hf_QxYzAbCdEfGhIjKlMnOpQrStUvWxYzAbCd",
        "sk-1f2e3d4c5b6a79880716253443526170",
        "sk-proj-a1B2_c3D4-e5F6g7H8i9J0k1L2",
        "sk-ant-api03-Zz9Yy8Xx7-Ww6Vv5_Uu4Tt3",
        "ghp_abcdefghijkl0123456789ABCDEFGHIJKLMN",
        "github_pat_11ABCDEFG0abcdefghijkl_mnopqrstuvwxyz",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0",
        "://me:pass@",
        "token=abcdef",
        "API_KEY: x12",
        "AKIA1234567890ABCD",
    ],
)
def test_secrets_are_removed(secret: str) -> None:
    assert secret not in clean(f"before {secret} after") and clean(f"a {secret}").startswith("a (removed)")


@pytest.mark.parametrize(
    "name",
    [
        "data/task-translation.jsonl",
        "org/multitask-llama-7b",
        "/data/disk-partition1/x",
        "/models/llama_7b_hf_converted",
        "/models/hf_converted",
        "/scratch/risk-Model-2-of-the-large-kind",
        "sk-learn-text-classification-base-v2",
        "high_ghs_emissions",
        "https://host.example:8080/a",
    ],
)
def test_names_that_hold_the_letters_of_a_token_stay(name: str) -> None:
    assert clean(name) == name and find_secret({"dataset": [name]}) is None


@pytest.mark.parametrize("before", ["", "a ", "/", "=", '"', "x-", "é"])
def test_a_secret_is_found_wherever_a_word_begins(before: str) -> None:
    text = f"{before}hf_QxYzAbCdEfGhIjKlMnOpQrStUvWxYzAbCd"
    assert find_secret({"a": {"b": text}}) == "a.b" and clean(text) == f"{before}(removed)"
