"""The `vllm` backend: greedy search and sampling. Tested with a stand-in of the library, not run on a GPU by us."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING, Any

from convexlm.decoding.backends.base import Backend, Hypothesis, register_backend, with_nbest
from convexlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from convexlm.decoding.search import Search


LEAST_TEMPERATURE = 0.01
"""vLLM takes any other temperature between 0 and this one for it."""


@register_backend("vllm")
class VllmBackend(Backend):
    """Greedy search and sampling by vLLM, which keeps the shared head of the prompts and refills batches by itself.

    Beam search is refused: vLLM divides a beam's score by the length of prompt and answer, transformers by the
    answer's alone, so with any length penalty but 0 the two find different hypotheses; and it has no n-gram rule.

    A sample's seed follows from the search's, the prompt and the sample's number, so it does not depend on the batch;
    the draws are vLLM's own, not those of the `hf` backend.
    """

    model: Any = None

    def check(self, search: Search) -> None:
        """Refuse beams, the n-gram rule, and temperatures that it changes."""
        if search.num_beams > 1:
            raise UserError(
                "the vllm backend does greedy search and sampling only: its beam search divides scores by the length "
                "of prompt and answer, transformers' by the answer's, so hypotheses would differ; use --backend hf or "
                "ctranslate2"
            )
        if search.no_repeat_ngram_size:
            raise UserError("the vllm backend has no no_repeat_ngram_size; use --backend hf or ctranslate2")
        if search.temperature is not None and search.temperature < LEAST_TEMPERATURE:
            raise UserError(
                f"the vllm backend raises a temperature of {search.temperature} to {LEAST_TEMPERATURE}; give no "
                "do_sample, for greedy search, or use --backend hf"
            )

    def check_installed(self) -> None:
        """Refuse a missing installation."""
        try:
            import vllm  # type: ignore[import-not-found]  # noqa: F401
        except ImportError:
            raise UserError("the vllm backend needs a library: pip install vllm (on a machine with a GPU)") from None

    def load(self, checkpoint: Path, device: str, dtype: str, *, trust_remote_code: bool = False) -> None:
        """Load the checkpoint into vLLM's engine, which takes most of the GPU's memory."""
        from convexlm.decoding.backends.hf import eos_ids_of
        from convexlm.decoding.checkpoint import is_adapter
        from convexlm.decoding.loading import load_config, load_tokenizer

        if device.partition(":")[0] != "cuda":
            raise UserError(f"the vllm backend needs a GPU, not the device {device}; use --backend hf or ctranslate2")
        if is_adapter(checkpoint):
            raise UserError(f"{checkpoint}: the vllm backend takes no adapter; use --backend hf")
        if index := device.partition(":")[2]:
            # vLLM takes the first device that it sees; this holds for a process that has not touched CUDA yet.
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(index)] if visible else index
        from vllm import LLM

        self.tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
        config = load_config(checkpoint, trust_remote_code=trust_remote_code)
        self.max_length = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.vocabulary = config.get_text_config().vocab_size
        self.eos_ids = eos_ids_of(self.tokenizer, checkpoint, config)
        self.model = LLM(
            model=str(checkpoint),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            skip_tokenizer_init=True,
            # The checkpoint's sampling settings must not leak into a search that says nothing of them.
            generation_config="vllm",
            enable_prefix_caching=True,
            logprobs_mode="raw_logprobs",
            disable_log_stats=True,
        )

    def room(self) -> tuple[int, int]:
        """Batches are vLLM's own, and it refills them; a batch of ours is what a crash can lose."""
        return 1 << 40, 1024

    def generate(self, prompts: Sequence[list[int]], search: Search) -> list[Hypothesis]:
        """The greedy answer or the samples of each prompt, with the model's own log-probabilities, before any rule."""
        from vllm import SamplingParams

        count = search.rows
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts for _ in range(count)]
        params: Any
        common: dict[str, Any] = {
            "max_tokens": search.max_new_tokens,
            "min_tokens": search.min_new_tokens,
            "stop_token_ids": self.eos_ids,
            "ignore_eos": False,
            "detokenize": False,
            "skip_special_tokens": False,
            "logprobs": 0,  # none beside the chosen token's
        }
        if search.do_sample:
            options = {"temperature": search.temperature, "top_p": search.top_p, "top_k": search.top_k or -1}
            params = [
                SamplingParams(**common, **options, seed=_seed(search, prompt, sample))
                for prompt in prompts
                for sample in range(count)
            ]
        else:
            params = SamplingParams(**common, temperature=0.0)
        outputs = self.model.generate(inputs, params, use_tqdm=False)
        found = [self._hypothesis(output.outputs[0]) for output in outputs]
        return [with_nbest(found[start : start + count], search) for start in range(0, len(found), count)]

    def close(self) -> None:
        """Let go of the engine."""
        super().close()
        self.model = None
        gc.collect()

    def _hypothesis(self, completion: Any) -> Hypothesis:
        tokens = list(completion.token_ids)
        log_prob = completion.cumulative_logprob
        finished = bool(tokens) and tokens[-1] in self.eos_ids
        return Hypothesis(tokens, None if log_prob is None else float(log_prob), finished)


def _seed(search: Search, prompt: Sequence[int], sample: int) -> int:
    """A request's seed: vLLM wants 63 bits."""
    from convexlm.decoding.generation.sampling import stream_key

    return stream_key(search, prompt, sample) & ((1 << 63) - 1)
