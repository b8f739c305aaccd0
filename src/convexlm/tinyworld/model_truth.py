"""A checkpoint's whole distribution against the true one: what it gives to every translation of a source.

Only a corpus whose translations can be listed allows this. It shows what scores of single outputs cannot: how much
probability lies on valid translations, how much on the best one, and how much sharper than the data the model is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.files import read_json_object, write_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convexlm.testsets import TestSet

SENTENCES = 50  # of a test set: with some 200 translations each (1,000 into Chinese), ten thousand sequences to score


def truth_of_checkpoint(
    checkpoint: str | Path,
    test_set: TestSet,
    cache_file: str | Path | None = None,
    instruction: str | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint on the first 50 sources of a tinyworld test set.

    Args:
        checkpoint: a model folder with `convexlm.json`.
        test_set: of kind `tinyworld`.
        cache_file: where the result is kept; an existing one of the same checkpoint, sources and instruction is
            returned.
        instruction: as of `DecodeJob`.

    Returns:
        `valid_mass`, `mode_mass`, `cross_entropy`, `truth_entropy`, `kl_divergence`, `model_entropy` (nats), and
        `num_sentences`, as `distribution_measures` gives them, with `checkpoint_sha256` and `sources_sha256`.
    """
    from convexlm.decoding import checkpoint_sha256
    from convexlm.files import text_sha256
    from convexlm.tinyworld import distribution_measures, translations

    sources = list(test_set.sources[:SENTENCES])
    identity = {"sources_sha256": text_sha256(sources)}
    if Path(checkpoint).exists() or cache_file is None:  # what was measured before one was deleted stays
        identity["checkpoint_sha256"] = checkpoint_sha256(Path(checkpoint))
    identity |= {} if instruction is None else {"instruction_sha256": text_sha256([instruction])}
    if cache_file is not None and Path(cache_file).exists():
        try:
            known = read_json_object(cache_file)
        except UserError:  # damaged: made anew
            known = {}
        if all(known.get(key) == identity.get(key) for key in (*identity, "instruction_sha256")):
            return known
    identity["checkpoint_sha256"] = checkpoint_sha256(Path(checkpoint))
    truth = [translations(source, test_set.pair) for source in sources]
    model = model_log_probs(checkpoint, sources, [list(one) for one in truth], test_set.pair, instruction)
    measures = distribution_measures(truth, model)
    del measures["sentences"]
    result = {**identity, **measures}
    if cache_file is not None:
        write_atomic(cache_file, json.dumps(result, indent=1) + "\n")
    return result


def model_log_probs(
    checkpoint: str | Path,
    sources: Sequence[str],
    candidates: Sequence[Sequence[str]],
    pair: str,
    instruction: str | None = None,
) -> list[dict[str, float]]:
    """Log-probability (nats, summed over tokens and EOS) that a checkpoint gives to candidate answers of each source.

    Computed in float32 by a teacher-forced pass, with the prompts that decoding uses.
    """
    import torch

    from convexlm.decoding.loading import load_model
    from convexlm.diagnosis.measure import measure
    from convexlm.objectives import IGNORE_INDEX
    from convexlm.templates import TRANSLATION_INSTRUCTION, fill_instruction, get_template
    from convexlm.tokenization import PromptSettings, encode_continuations, encode_prompts, load_tokenizer

    settings = PromptSettings.load(checkpoint)
    tokenizer = load_tokenizer(str(checkpoint))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(Path(checkpoint), device, torch.float32)
    template = get_template(settings.template)
    instruction = fill_instruction(TRANSLATION_INSTRUCTION if instruction is None else instruction, pair)
    prompts = [template.fill({"instruction": instruction, "input": source.strip()}) for source in sources]
    prompt_ids = encode_prompts(tokenizer, prompts, settings)
    places = [(number, text) for number, texts in enumerate(candidates) for text in texts]
    answers = encode_continuations(tokenizer, [text for _, text in places])
    rows = []
    for (number, text), answer in zip(places, answers, strict=True):
        prompt, answer_ids = prompt_ids[number], [*answer, tokenizer.eos_token_id]
        labels = [IGNORE_INDEX] * len(prompt) + answer_ids
        rows.append({"record_id": f"`{text}`", "input_ids": prompt + answer_ids, "labels": labels})
    found = measure(model, rows, eos_token_id=tokenizer.eos_token_id)
    out: list[dict[str, float]] = [{} for _ in sources]
    for (number, text), value in zip(places, (found.m * found.lengths).tolist(), strict=True):
        out[number][text] = value
    return [{text: found[text] for text in texts} for found, texts in zip(out, candidates, strict=True)]
