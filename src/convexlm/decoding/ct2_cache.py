"""Checkpoints converted for CTranslate2, once each, in a cache folder that many processes may use at once."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm import adapters
from convexlm.decoding import checkpoint as checkpoints
from convexlm.decoding import loading
from convexlm.decoding.checkpoint import base_of_adapter, is_adapter
from convexlm.errors import UserError
from convexlm.files import file_sha256, json_sha256, sync_folder, write_atomic

if TYPE_CHECKING:
    import torch

MANIFEST = "convexlm-files.json"
"""In a conversion: the sizes of its files."""
PROBE_TOKENS = 48
"""Length of the text on which a converted model must agree with the original."""


def cache_folder() -> Path:
    """The folder for what can be made again: `$CONVEXLM_CACHE`, else `~/.cache/convexlm`."""
    return Path(os.environ.get("CONVEXLM_CACHE") or Path.home() / ".cache" / "convexlm").expanduser()


def converted(checkpoint: Path, digest: str, *, trust_remote_code: bool = False) -> Path:
    """The folder of the checkpoint converted for CTranslate2; converts it if this is the first time.

    A conversion is there whole or not at all; of several processes that want the same one, one makes it and the
    others wait. An adapter is merged into its base model.

    Args:
        checkpoint: the checkpoint's or adapter's folder.
        digest: its `checkpoint_sha256`.
        trust_remote_code: let the checkpoint run its own Python code.

    Raises:
        UserError: CTranslate2 cannot convert it, what it makes computes something else, or the disk is full.
    """
    import ctranslate2
    import transformers

    # Another release of either may convert otherwise, and so may other code here.
    name = f"{digest[:32]}-{ctranslate2.__version__}-{transformers.__version__}-{_code_hash()[:8]}"
    root = cache_folder() / "ctranslate2"
    final = root / name
    if _is_whole(final):
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_whole(final):
                shutil.rmtree(final, ignore_errors=True)  # one that something else has cut or cleaned
                for stale in root.glob(f".{name}.*"):  # of a process that was killed: we hold the lock
                    shutil.rmtree(stale, ignore_errors=True)
                staging = root / f".{name}.{os.getpid()}"
                try:
                    _convert(checkpoint, staging, trust_remote_code)
                    write_atomic(staging / MANIFEST, json.dumps(_sizes(staging)) + "\n")
                    _sync(staging)
                    staging.rename(final)
                finally:
                    shutil.rmtree(staging, ignore_errors=True)
                sync_folder(root)
    except OSError as error:
        raise UserError(f"{root}: cannot keep the converted model there ({error.strerror or error})") from None
    return final


def _is_whole(folder: Path) -> bool:
    """Whether a conversion has its files, each as large as it was made."""
    try:
        made, there = json.loads((folder / MANIFEST).read_text(encoding="utf-8")), _sizes(folder)
        return all(there.get(name) == size for name, size in made.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.name != MANIFEST}


def _code_hash() -> str:
    """The hash of the code that loads, merges, converts and compares."""
    files = [Path(__file__), *(Path(str(module.__file__)) for module in (adapters, checkpoints, loading))]
    return json_sha256([file_sha256(file) for file in files])


def _convert(checkpoint: Path, output: Path, trust_remote_code: bool) -> None:
    import torch
    from ctranslate2.converters import TransformersConverter

    from convexlm.decoding.loading import load_model, load_tokenizer

    probe: dict[str, torch.Tensor] = {}

    class Converter(TransformersConverter):
        """Reads model and tokenizer as the other backends do, and keeps what the model says to a probe."""

        def load_model(self, model_class: Any, name: str, **kwargs: Any) -> Any:
            dtype = kwargs.get("dtype") or torch.float32
            dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
            adapter = is_adapter(checkpoint)
            model = load_model(
                checkpoint,
                "cpu",
                torch.float32 if adapter else dtype,
                trust_remote_code=trust_remote_code,
                merge_adapter=adapter,
            )
            vocabulary = model.config.get_text_config().vocab_size
            generator = torch.Generator().manual_seed(0)
            probe["ids"] = torch.randint(vocabulary, (PROBE_TOKENS,), generator=generator)
            with torch.inference_mode():
                logits = model(input_ids=probe["ids"][None]).logits[0]
            probe["log_probs"] = logits.float().log_softmax(-1)
            probe["exact"] = torch.tensor(model.dtype == torch.float32)
            return model

        def load_tokenizer(self, tokenizer_class: Any, name: str, **kwargs: Any) -> Any:
            return load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)

    folder = base_of_adapter(checkpoint) if is_adapter(checkpoint) else checkpoint
    try:
        Converter(str(folder), trust_remote_code=trust_remote_code).convert(str(output))
    except (ValueError, NotImplementedError, AttributeError, KeyError, TypeError) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(
            f"{checkpoint}: CTranslate2 cannot convert it ({reason}); --backend hf can decode it"
        ) from None
    _compare(checkpoint, output, probe)


def _compare(checkpoint: Path, output: Path, probe: dict[str, torch.Tensor]) -> None:
    """Refuse a conversion that went through and is another model, as it is where a setting was not understood."""
    import ctranslate2
    import numpy
    import torch

    try:
        generator = ctranslate2.Generator(str(output), device="cpu", compute_type="float32")
        made = numpy.array(generator.forward_batch([probe["ids"].tolist()], return_log_probs=True))[0]
    # Of a tokenizer without an EOS, for some models without an unknown token, and of heads of another size.
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{checkpoint}: CTranslate2 cannot run what it converted ({error}); --backend hf can decode it"
        ) from None
    vocabulary = probe["log_probs"].shape[1]
    log_probs = torch.from_numpy(made)[:, :vocabulary]
    distance = float((log_probs.exp() - probe["log_probs"].exp()).abs().sum(-1).mean())
    if not distance < (1e-3 if bool(probe["exact"]) else 0.05):
        raise UserError(
            f"{checkpoint}: CTranslate2 converts it to a model that computes something else (its probabilities are "
            f"{distance:.2g} away on average); use --backend hf"
        )


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
