"""`convexlm export`: a training checkpoint -> a plain folder that any program of the ecosystem loads.

Sharded weights become one set of safetensors, an adapter can be merged into its base, and the tokenizer, the prompt
settings (`convexlm.json`) and a model card go with them. What only training needs (optimizer, schedule, pickled
arguments) stays behind. Pickles are not loaded unseen: see `sharded` for FSDP2, `launch.deepspeed` for DeepSpeed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from convexlm.checkpoints import COMPLETE_FILE, SAVING_FILE, read_marker, sync_tree, why_incomplete
from convexlm.decoding.checkpoint import is_adapter, refuse_several_adapters
from convexlm.errors import UserError, first_line
from convexlm.export_weights import ADAPTER_CONFIG, base_of, copy_adapter, load, sharded_folder
from convexlm.files import give_usual_permissions, read_json_object, write_atomic
from convexlm.launch.deepspeed import refuse_code, zero_folder
from convexlm.own_prompts import KEY as OWN_PROMPTS

VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
    "tekken.json",
)
TOKENIZER_FILES = (
    *VOCABULARIES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja"),
)
TEMPLATES = "additional_chat_templates"  # where transformers writes those beside the default one
STAGING = ".export"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def export_checkpoint(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    merge_adapter: bool = False,
    base_model: str | None = None,
    dtype: str = "auto",
    run_dir: str | Path | None = None,
    allow_pickle: bool = False,
    license_name: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint as a plain folder.

    Args:
        checkpoint: a `checkpoint-STEP` of training, or any folder that `from_pretrained` or PEFT loads.
        output_dir: where to; must be empty or not be there.
        merge_adapter: put an adapter's weights into those of its base model.
        base_model: the base of an adapter, or where a sharded checkpoint's config comes from, if it does not say.
        dtype: of the written weights; "auto" keeps what they have.
        run_dir: the run folder that the card takes settings and scores from; found by the checkpoint's path if None.
        allow_pickle: let DeepSpeed unpickle a ZeRO checkpoint, whatever is in it. Only for one that you made yourself.
        license_name: the card's licence, as the hub names it.
        trust_remote_code: run code that comes with the model.

    Returns:
        `output_dir`, `kind` (plain, adapter, merged, sharded or zero), `parameters`, `dtype`, `files`, `tokenizer`
        (whether there is one), `card` (its path), `scores` (how many the card shows).

    Raises:
        UserError: the checkpoint is incomplete or cannot be exported as asked, or `output_dir` is not empty or cannot
            be written.
    """
    from safetensors import SafetensorError

    from convexlm.model_card import write_card

    source, target = Path(checkpoint), _real_path(output_dir)
    _check(source, target, output_dir, dtype)
    kind = kind_of(source)
    if merge_adapter and kind != "adapter":
        raise UserError(f"--merge_adapter: {source} holds no adapter ({ADAPTER_CONFIG} is missing)")
    if kind == "zero" and not allow_pickle:
        _refuse_code(source)
    # A folder that is there stays the same one: somebody's shell may be in it.
    staging = target / STAGING if target.is_dir() else target.parent / f".{target.name}{STAGING}"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        has_tokenizer = _copy_tokenizer(source, staging, _base(source, kind, merge_adapter, base_model))
        if kind == "adapter" and not merge_adapter:
            count, written = copy_adapter(source, staging, dtype, base_model)
        else:
            model = load(source, kind, base_model, dtype, trust_remote_code)
            if has_tokenizer:
                own = any((source / name).is_file() for name in VOCABULARIES)
                _end_as_trained(model, source, source if own else staging, trust_remote_code)
            model.save_pretrained(staging)
            count, written = sum(p.numel() for p in model.parameters()), str(model.dtype).removeprefix("torch.")
            _without_paths(staging / "config.json")
        final = "merged" if kind == "adapter" and merge_adapter else kind
        _copy_marker(source, staging)
        card = write_card(
            staging,
            checkpoint=source,
            run_dir=run_dir,
            kind=final,
            parameters=count,
            dtype=written,
            base_model=base_model,
            license_name=license_name,
            name=target.name,
        )
        give_usual_permissions(path for path in staging.rglob("*") if path.is_file())
        sync_tree(staging)
        _put_in_place(staging, target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--output_dir {output_dir}: cannot be written ({first_line(error)})") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return {
        "output_dir": str(output_dir),
        "kind": final,
        "parameters": count,
        "dtype": written,
        "files": sorted(path.name for path in target.iterdir()),
        "tokenizer": has_tokenizer,
        "card": str(Path(output_dir) / "README.md"),
        "scores": card["scores"],
    }


def kind_of(checkpoint: Path) -> str:
    """What a checkpoint folder holds: `adapter`, `plain`, `sharded` (FSDP2) or `zero` (DeepSpeed).

    Raises:
        UserError: nothing that can be exported.
    """
    if (checkpoint / ADAPTER_CONFIG).is_file():
        if not is_adapter(checkpoint):
            raise UserError(f"{checkpoint}: holds a whole model and an adapter; take out the one that is not meant")
        refuse_several_adapters(checkpoint)
        return "adapter"
    if (checkpoint / "config.json").is_file() and any(checkpoint.glob("*.safetensors")):
        return "plain"
    if sharded_folder(checkpoint) is not None:
        return "sharded"
    if (checkpoint / "latest").is_file() or any(checkpoint.glob("global_step*")):
        return "zero"
    if inner := sorted(path.parent for path in checkpoint.glob("*/adapter_config.json")):
        raise UserError(f"{checkpoint}: no weights there; did you mean {inner[-1]}?")
    if any(checkpoint.glob("*.bin")):
        raise UserError(
            f"{checkpoint}: its weights are pickles (.bin), which are not loaded; save them as safetensors"
        )
    raise UserError(f"{checkpoint}: no weights there (safetensors, an adapter, or FSDP2's or ZeRO's shards)")


def _real_path(output_dir: str | Path) -> Path:
    """Where the folder really is: what `.` and symbolic links stand for."""
    try:
        return Path(output_dir).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a link that leads to itself, a NUL
        raise UserError(f"--output_dir {output_dir}: cannot be written ({first_line(error)})") from None


def _put_in_place(staging: Path, target: Path) -> None:
    if staging.parent != target:
        staging.rename(target)
        return
    placed: list[Path] = []
    try:
        for path in sorted(staging.iterdir(), key=lambda path: path.name.endswith("config.json")):  # by which it loads
            placed.append(target / path.name)
            path.rename(placed[-1])
    except BaseException:  # a Ctrl-C among them
        for path in placed:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise
    staging.rmdir()


def _check(source: Path, target: Path, output_dir: str | Path, dtype: str) -> None:
    if not source.is_dir():
        raise UserError(f"--checkpoint {source}: no such folder")
    marker = source / COMPLETE_FILE
    if (marker.exists() or (source / SAVING_FILE).exists()) and (reason := why_incomplete(source)):
        raise UserError(f"--checkpoint {source}: {reason}")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: one of {', '.join(DTYPES)}")
    try:
        full = target.is_dir() and any(path.name != STAGING for path in target.iterdir())
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: cannot be read ({first_line(error)})") from None
    if full or (target.exists() and not target.is_dir()):
        raise UserError(f"--output_dir {output_dir}: is not empty; give a folder that does not exist yet")
    if source.resolve() == target:
        raise UserError("--output_dir is the checkpoint itself")


def _refuse_code(source: Path) -> None:
    """See that ZeRO's shards, which are pickles, hold nothing but what DeepSpeed puts there."""
    folder = zero_folder(source)
    if folder is None:
        raise UserError(f"{source}: there are no states of DeepSpeed (global_stepN)")
    try:
        refuse_code(folder)
    except UserError as error:
        raise UserError(f"{error}; if you made the checkpoint yourself, give --allow_pickle") from None


# -- what goes with them


def _copy_tokenizer(source: Path, target: Path, base: tuple[str, str | None] | None) -> bool:
    """The tokenizer's files as they are; from the base model (name and revision) where the checkpoint has none.

    Returns:
        whether there is one.
    """
    from transformers.utils import cached_file

    found = {name: source / name for name in TOKENIZER_FILES if (source / name).is_file()}
    if templates := sorted((source / TEMPLATES).glob("*.jinja")):
        (target / TEMPLATES).mkdir()
        found.update({f"{TEMPLATES}/{path.name}": path for path in templates})
    if not any(name in found for name in VOCABULARIES) and base is not None:
        # What is not there, or cannot be had, is no error here: `export_checkpoint` says that there is none.
        quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        of_base = {name: cached_file(base[0], name, revision=base[1], **quiet) for name in TOKENIZER_FILES}
        found = {**{name: Path(path) for name, path in of_base.items() if path}, **found}
    for name, path in found.items():
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
        (target / name).write_bytes(content)
    return any(name in found for name in VOCABULARIES)


def _base(source: Path, kind: str, merge_adapter: bool, base_model: str | None) -> tuple[str, str | None] | None:
    """Where a tokenizer may come from if the checkpoint has none; not from the hub for an adapter that stays one."""
    name, revision = (base_model, None) if base_model or kind != "adapter" else base_of(source)
    loaded = kind != "adapter" or merge_adapter
    return (name, revision) if name and (loaded or Path(name).is_dir()) else None


def _end_as_trained(model: Any, source: Path, tokenizer: Path, trust_remote_code: bool) -> None:
    """Let generation end where the answers of the training did: an adapter's base may not."""
    from convexlm.chat_templates import also_ends
    from convexlm.tokenization import PromptSettings, answer_end, load_tokenizer

    if not read_marker(source).get("prompt"):
        return
    settings = PromptSettings.load(source)
    if settings.template == "chat":
        also_ends(
            model.generation_config,
            answer_end(load_tokenizer(tokenizer, trust_remote_code=trust_remote_code), settings),
        )


def _copy_marker(source: Path, target: Path) -> None:
    """`convexlm.json`: how prompts look and what was minimised, without the list of the checkpoint's own files."""
    marker = read_marker(source)
    kept = {key: marker[key] for key in ("prompt", "objective", OWN_PROMPTS) if key in marker}
    if kept:
        write_atomic(target / COMPLETE_FILE, json.dumps(kept, indent=2, sort_keys=True) + "\n")


def _without_paths(config: Path) -> None:
    content = read_json_object(config)
    if Path(str(content.get("_name_or_path", ""))).is_absolute():
        del content["_name_or_path"]
        write_atomic(config, json.dumps(content, indent=2, sort_keys=True) + "\n")
