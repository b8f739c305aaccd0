"""A checkpoint's whole distribution against the true one: what it gives to every translation of a source.

Only a corpus whose translations can be listed allows this. It shows what scores of single outputs cannot: how much
probability lies on valid translations, how much on the best one, and how much sharper than the data the model is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.files import write_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convexlm.testsets import TestSet

SENTENCES = 50  # of a test set: with some 60 translations each, three thousand sequences to score
BATCH = 256


def truth_of_checkpoint(
    checkpoint: str | Path, test_set: TestSet, cache_file: str | Path | None = None
) -> dict[str, Any]:
    """Measure a checkpoint on the first 50 sources of a tinyworld test set.

    Args:
        checkpoint: a model folder with `convexlm.json`.
        test_set: of kind `tinyworld`.
        cache_file: where the result is kept; an existing one of the same checkpoint and sources is returned.

    Returns:
        `valid_mass`, `mode_mass`, `cross_entropy`, `truth_entropy`, `kl_divergence`, `model_entropy` (nats), and
        `num_sentences`, as `distribution_measures` gives them, with `checkpoint_sha256` and `sources_sha256`.
    """
    from convexlm.decoding import checkpoint_sha256
    from convexlm.files import text_sha256
    from convexlm.tinyworld import distribution_measures, translations

    sources = list(test_set.sources[:SENTENCES])
    identity = {"checkpoint_sha256": checkpoint_sha256(Path(checkpoint)), "sources_sha256": text_sha256(sources)}
    if cache_file is not None and Path(cache_file).exists():
        known = json.loads(Path(cache_file).read_text(encoding="utf-8"))
        if all(known.get(key) == value for key, value in identity.items()):
            return known
    truth = [translations(source, test_set.pair) for source in sources]
    model = model_log_probs(checkpoint, sources, [list(one) for one in truth], test_set.pair)
    measures = distribution_measures(truth, model)
    del measures["sentences"]
    result = {**identity, **measures}
    if cache_file is not None:
        write_atomic(cache_file, json.dumps(result, indent=1) + "\n")
    return result


def model_log_probs(
    checkpoint: str | Path, sources: Sequence[str], candidates: Sequence[Sequence[str]], pair: str
) -> list[dict[str, float]]:
    """Log-probability (nats, summed over tokens and EOS) that a checkpoint gives to candidate answers of each source.

    Computed in float32 by a teacher-forced pass, with the prompts that decoding uses.
    """
    import torch

    from convexlm.decoding.loading import load_model
    from convexlm.templates import TRANSLATION_INSTRUCTION, fill_instruction, get_template
    from convexlm.tokenization import PromptSettings, encode_continuations, encode_prompts, load_tokenizer

    settings = PromptSettings.load(checkpoint)
    tokenizer = load_tokenizer(str(checkpoint))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(Path(checkpoint), device, torch.float32)
    template, instruction = get_template(settings.template), fill_instruction(TRANSLATION_INSTRUCTION, pair)
    prompts = [template.fill({"instruction": instruction, "input": source.strip()}) for source in sources]
    prompt_ids = encode_prompts(tokenizer, prompts, settings)
    places = [(number, text) for number, texts in enumerate(candidates) for text in texts]
    answers = encode_continuations(tokenizer, [text for _, text in places])
    rows = [
        (prompt_ids[number], [*answer, tokenizer.eos_token_id])
        for (number, _), answer in zip(places, answers, strict=True)
    ]
    out: list[dict[str, float]] = [{} for _ in sources]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]) + len(rows[index][1]))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        for index, value in zip(chosen, _score(model, [rows[index] for index in chosen], device), strict=True):
            number, text = places[index]
            out[number][text] = value
    return [{text: found[text] for text in texts} for found, texts in zip(out, candidates, strict=True)]


def _score(model: Any, rows: list[tuple[list[int], list[int]]], device: str) -> list[float]:
    import torch

    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    attention, target = torch.zeros_like(ids), torch.zeros(len(rows), longest, dtype=torch.bool)
    for number, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[number, :end] = torch.tensor(prompt + answer)
        attention[number, :end] = 1
        target[number, len(prompt) : end] = True
    with torch.no_grad():
        logits = model(input_ids=ids.to(device), attention_mask=attention.to(device)).logits[:, :-1].float()
    log_probs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None].to(device)).squeeze(-1)
    return (log_probs.double() * target[:, 1:].to(device)).sum(1).tolist()
