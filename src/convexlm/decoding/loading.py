"""Loading a checkpoint's model and tokenizer through transformers and PEFT, with failures in one line."""

from __future__ import annotations

import contextlib
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm import adapters
from convexlm.adapter_refusals import kind_of, not_to_be_repeated
from convexlm.decoding.checkpoint import base_of_adapter, is_adapter
from convexlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch

_EMBEDDINGS = ("", ".base_layer", ".token_adapter.base_layer")
"""Where PEFT has an embedding's own weight in its file, by what was put around it."""


def load_tokenizer(checkpoint: Path, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer; an adapter saved without one has its base model's.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    from convexlm import tokenization

    own = not is_adapter(checkpoint) or any(checkpoint.glob("tokenizer*"))
    folder = checkpoint if own else base_of_adapter(checkpoint)
    return tokenization.load_tokenizer(folder, trust_remote_code=trust_remote_code)


def load_model(
    checkpoint: Path,
    device: str,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool = False,
    merge_adapter: bool = False,
) -> Any:
    """The causal language model of a checkpoint, in evaluation mode, from safetensors only.

    An adapter stays beside its base model's weights unless `merge_adapter` adds it to them.

    Raises:
        UserError: it cannot be loaded, its weights do not cover the model (transformers would go on with random
            numbers in their place), or an adapter does part of its work outside of the base model's layers.
    """
    folder = base_of_adapter(checkpoint) if is_adapter(checkpoint) else checkpoint
    # Weights go straight to a GPU, without a copy of the model in main memory.
    placement = {} if device == "cpu" else {"device_map": {"": device}}
    model = whole_model(folder, dtype=dtype, local_files_only=True, trust_remote_code=trust_remote_code, **placement)
    if is_adapter(checkpoint):
        from peft import PeftModel

        # Not merged, unless asked for: in bfloat16 a merged model is another one than was trained.
        put = adapters.merge_adapter if merge_adapter else PeftModel.get_base_model
        model = or_refuse(
            f"{checkpoint}: the adapter cannot be put on its base model {folder}",
            lambda: put(_all_in_layers(with_adapter(model, checkpoint, device))),
        )
    return model.eval()


def whole_model(name: str | Path, **options: Any) -> Any:
    """A causal language model of a folder or hub name, from safetensors only; all of its weights come from there.

    Args:
        name: the folder or the name.
        options: of `from_pretrained`.

    Raises:
        UserError: it cannot be loaded, its weights do not cover the model (transformers would go on with random
            numbers in their place), or they have layers that the model's config does not (it would leave them out).
    """
    from transformers import AutoModelForCausalLM

    model, report = or_refuse(
        f"{name}: cannot be loaded as a causal language model",
        lambda: AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, output_loading_info=True, **options),
    )
    if (Path(name) / "generation_config.json").is_file():
        load_generation_config(Path(name))  # transformers goes on without one that cannot be read, and without its EOS
    lacking = sorted(map(str, [*report.get("missing_keys", ()), *report.get("mismatched_keys", ())]))
    if lacking:
        raise UserError(f"{name}: its weights do not fit its config ({len(lacking)} missing, such as {lacking[0]})")
    if beyond := _of_other_layers(report.get("unexpected_keys", ()), model):
        said = f"{len(beyond)} are of layers that it does not have, such as {beyond[0]}"
        raise UserError(f"{name}: its weights do not fit its config ({said})")
    return model


def _of_other_layers(unexpected: Iterable[str], model: Any) -> list[str]:
    """Names of weights that the model has, too, but for the number of the layer.

    Others that a model has no place for may be left out by right, such as buffers that older versions saved; layers
    for the prediction of several tokens are not among the unexpected: transformers knows their names.
    """

    def anywhere(name: str) -> str:
        return re.sub(r"\.\d+\.", ".N.", name.replace(".default.", "."))  # PEFT's name of the only adapter

    own = {anywhere(name) for name, _ in model.named_parameters() if ".N." in anywhere(name)}
    return sorted(name for name in map(str, unexpected) if anywhere(name) in own)


def with_adapter(model: Any, adapter: Path, device: str) -> Any:
    """The base model with the adapter beside it.

    Raises:
        ValueError: the adapter's file lacks weights, or has some for layers that the model does not have. PEFT goes
            on with those that training begins with, and without the others.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    config = PeftConfig.from_pretrained(adapter)
    if reason := not_to_be_repeated(config):
        raise ValueError(
            f"PEFT {reason}, so this is not the base that it was trained on; save it with "
            "`path_initial_model_for_weight_conversion` of PEFT's `save_pretrained`, which makes a plain LoRA of it"
        )
    if kind_of(config) == "FROD" and model.dtype.itemsize < 4:
        raise ValueError(
            f"FROD computes its bases from the base model's weights, other ones in {model.dtype}; use float32"
        )
    _fit_vocabulary(model, adapter)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        try:
            whole = PeftModel.from_pretrained(model, adapter, local_files_only=True, torch_device=device)
        except UserWarning as warning:
            lacking = [name.replace(".default.", ".") for name in re.findall("'([^']+)'", str(warning))]
            raise ValueError(f"its file lacks {len(lacking)} of its weights, such as {lacking[-1]}") from None
    # `from_pretrained` does not say what it left out.
    unexpected = load_peft_weights(str(adapter), device="cpu").keys() - get_peft_model_state_dict(whole).keys()
    if left_out := _of_other_layers(unexpected, whole):
        raise ValueError(f"the model has no place for {len(left_out)} of its weights, such as {left_out[0]}")
    return whole


def _all_in_layers(whole: Any) -> Any:
    """The adapted model, if its base model with the adapter in its layers gives the same logits for a few tokens.

    An adapter may work in PEFT's own forward pass, too, which decoding and measuring leave out.

    Args:
        whole: a `PeftModel`; its weights and the random state stay as they are.

    Raises:
        ValueError: the logits differ, or only PEFT's forward pass fails.
        RuntimeError, TypeError, IndexError: or the adapted layers do, in need of something that they are not given.
    """
    import torch

    base = whole.eval().get_base_model()
    size = base.config.get_text_config().vocab_size
    ids = torch.tensor([[(2 * place + 1) * size // 16 for place in range(8)]], device=base.device)

    def last(model: Any) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        return logits[0, -1].float()

    with torch.no_grad(), torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
        try:
            wanted = last(base)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            _unless_no_room(error)
            try:
                with whole.disable_adapter():
                    last(base)
            except Exception:
                return whole  # it is not the adapter: these tokens say nothing of this model
            raise
        found = last(whole)
    # The same passes, so that only a kernel's rounding may differ; NaN is told elsewhere.
    tolerance = 0.1 if base.dtype.itemsize < 4 else 1e-3
    if bool(((found - wanted).abs() > tolerance * wanted.std()).any()):
        kind = whole.active_peft_config.peft_type
        raise ValueError(f"an adapter of the kind {getattr(kind, 'value', kind)} works outside of the model's layers")
    return whole


def _unless_no_room(error: Exception) -> None:
    """Pass on an error of memory that ran out: it says nothing of the model."""
    from accelerate.utils.memory import should_reduce_batch_size

    if should_reduce_batch_size(error):
        raise error


def _fit_vocabulary(model: Any, adapter: Path) -> None:
    """An adapter trained with tokens added brings the whole embeddings along; the base model gets as many rows."""
    from safetensors import safe_open

    modules = {module: name for name, module in model.named_modules()}
    layers = [modules.get(layer) for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    names = {f"base_model.model.{layer}{inner}.weight" for layer in layers for inner in _EMBEDDINGS}
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        rows = {file.get_slice(name).get_shape()[0] for name in names.intersection(file.keys())}
    if len(rows) == 1 and rows != {model.config.get_text_config().vocab_size}:
        model.resize_token_embeddings(rows.pop(), mean_resizing=False)


def load_config(checkpoint: Path, *, trust_remote_code: bool = False) -> Any:
    """The model config of a checkpoint, or of an adapter's base model.

    Raises:
        UserError: it cannot be read.
    """
    from transformers import AutoConfig

    folder = base_of_adapter(checkpoint) if is_adapter(checkpoint) else checkpoint
    return or_refuse(
        f"{folder}: its config cannot be read",
        lambda: AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code),
    )


def load_generation_config(checkpoint: Path) -> Any:
    """The generation config that transformers gives the model: its own file's, else the model config's."""
    from transformers import GenerationConfig

    folder = base_of_adapter(checkpoint) if is_adapter(checkpoint) else checkpoint
    if (folder / "generation_config.json").is_file():
        return or_refuse(
            f"{folder}: its generation config cannot be read",
            lambda: GenerationConfig.from_pretrained(folder, local_files_only=True),
        )
    return GenerationConfig.from_model_config(load_config(checkpoint))


def or_refuse(what: str, load: Callable[[], Any]) -> Any:
    """What `load` returns; its failure as one line. Running out of memory is passed on as it is."""
    from accelerate.utils.memory import should_reduce_batch_size

    try:
        with _quiet():
            return load()
    except Exception as error:  # loaders raise OSError, ValueError, KeyError, SafetensorError, ... for a bad file
        if should_reduce_batch_size(error) or isinstance(error, MemoryError):
            raise
        lines = [line.strip() for line in str(error).split("\n") if line.strip()] or [type(error).__name__]
        # torch's first line announces what the next one says.
        reason = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
        raise UserError(f"{what} ({reason})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars and notes about loading off stderr: what matters in them is checked and raised."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
