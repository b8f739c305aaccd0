r"""Loading a tokenizer: transformers' files, a hub name, or a bare SentencePiece model turned into a fast tokenizer.

transformers 5 loads a folder that holds nothing but `tokenizer.model` without the dummy prefix, or (through its Llama
class) with pieces in another order of merging, so that " Hello" gets other ids than the model was trained with. The
conversion here is SentencePiece's own algorithm spelled out, and is checked against the sentencepiece library.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

_PROBES = ("Hello world", " two  blanks", "a\nb\n\n c", '"</s><s>', "Grüße, 你好 🦙", "1234.5", "\ttab", "")
_OF_A_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")  # transformers' files
_NORMAL, _BPE = 1, 2  # values of sentencepiece's protocol: piece types, model type


def load_tokenizer(path_or_name: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """A tokenizer, with a pad token.

    Where there is no pad token, the unknown token becomes it, or else the EOS token. Rows are masked by position
    (`attention_mask`, labels of -100) and never by id, so the EOS that ends an answer is trained in either case.

    Args:
        path_or_name: a folder with tokenizer files, or with `tokenizer.model` alone; such a `.model` file itself; or
            a name on the hub.
        trust_remote_code: run code that comes with the tokenizer.
        revision: branch, tag or commit of a name on the hub.

    Raises:
        UserError: no such file, folder or name; a folder without a tokenizer; a model that cannot be converted.
    """
    path = Path(path_or_name)
    if path.is_file():
        if path.suffix != ".model":
            raise UserError(f"{path}: expected a folder with tokenizer files, or a SentencePiece .model file")
        return _with_pad(_from_sentencepiece(path))
    if _is_bare(path):
        return _with_pad(_from_sentencepiece(path / "tokenizer.model"))
    hub_name = path.suffix != ".model" and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(path_or_name))
    if not path.is_dir() and not hub_name:
        raise UserError(f"{path_or_name}: no such file or folder")
    from transformers import AutoTokenizer

    try:
        at = {"revision": revision} if revision else {}
        tokenizer = AutoTokenizer.from_pretrained(str(path_or_name), trust_remote_code=trust_remote_code, **at)
    except Exception as error:  # OSError, ValueError, KeyError and the hub client's own, by what is missing
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        if not path.is_dir():
            what = "no such folder, and not loadable from the hub"
        elif any((path / name).is_file() for name in ("tokenizer.model", *_OF_A_TOKENIZER)):
            what = "its tokenizer cannot be loaded"
        else:
            what = "no tokenizer in this folder"
        raise UserError(f"{path_or_name}: {what} ({reason})") from None
    if path.is_dir() and len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f"{path}: no tokenizer in this folder (its vocabulary is empty)")
    return _with_pad(tokenizer)


def said_of_bos(tokenizer: Any, add_bos: bool | None, sources: Sequence[str | None]) -> str:
    """What to tell where prompts begin with a BOS that the tokenizer itself puts before no text; empty if they do not.

    `PromptSettings.resolve` takes a tokenizer that has a BOS and says nothing of it for one that wants it, as a bare
    SentencePiece model does. BLOOM's has one that it was not trained with.

    Args:
        tokenizer: any tokenizer of transformers.
        add_bos: what `resolve` made of None.
        sources: where tokenizer and model come from. Checkpoints of this package's have it settled.
    """
    paths = [Path(source) for source in sources if source]
    settled = any(path.suffix == ".model" or _is_bare(path) or (path / "convexlm.json").is_file() for path in paths)
    if not add_bos or settled or tokenizer("a", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]:
        return ""
    return (
        f"  prompts begin with the BOS token `{tokenizer.bos_token}`, which this tokenizer does not add by itself "
        "(nor would TRL); if the model was trained without it, give --add_bos false (a recipe: `data.add_bos: false`)"
    )


def _is_bare(folder: Path) -> bool:
    """Whether a folder has a SentencePiece model and nothing else of a tokenizer."""
    return (folder / "tokenizer.model").is_file() and not any((folder / name).is_file() for name in _OF_A_TOKENIZER)


def _with_pad(tokenizer: Any) -> Any:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _from_sentencepiece(path: Path) -> Any:
    """A fast tokenizer that gives the same ids as the SentencePiece BPE model in `path`.

    Raises:
        UserError: no SentencePiece model, not a BPE one with byte fallback, or its ids differ on the probe texts.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
    from transformers import PreTrainedTokenizerFast

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(path.read_bytes())
        oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # protobuf's DecodeError, sentencepiece's RuntimeError, OSError
        raise UserError(f"{path}: not a SentencePiece model ({error})") from None
    spec = model.trainer_spec
    if spec.model_type != _BPE or not spec.byte_fallback:
        raise UserError(f"{path}: only BPE models with byte fallback are read; save the tokenizer as tokenizer.json")
    names = {"unk_token": oracle.unk_id(), "bos_token": oracle.bos_id(), "eos_token": oracle.eos_id()}
    names["pad_token"] = oracle.pad_id()
    specials = {name: model.pieces[index].piece for name, index in names.items() if index >= 0}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_build_bpe(model), clean_up_tokenization_spaces=False, **specials
    )
    for text in _PROBES:
        if tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] != oracle.encode(text):
            raise UserError(f"{path}: a kind of SentencePiece model that is not read; save it as tokenizer.json")
    return tokenizer


def _build_bpe(model: Any) -> Any:
    """The Rust tokenizer of a SentencePiece model: its vocabulary, and every split of a piece in two as a merge.

    SentencePiece joins the neighbours whose joint piece has the highest score, so merges are ordered by that score.
    """
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    vocabulary = {piece.piece: index for index, piece in enumerate(model.pieces)}
    normal = {piece.piece for piece in model.pieces if piece.type == _NORMAL}
    merges = sorted(
        (-piece.score, index, cut)
        for index, piece in enumerate(model.pieces)
        if piece.type == _NORMAL
        for cut in range(1, len(piece.piece))
        if piece.piece[:cut] in normal and piece.piece[cut:] in normal
    )
    pairs = [(model.pieces[index].piece[:cut], model.pieces[index].piece[cut:]) for _, index, cut in merges]
    unknown = model.pieces[model.trainer_spec.unk_id].piece
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    blank: list[Any] = [normalizers.Replace(" ", "▁")]
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        blank.insert(0, normalizers.Prepend("▁"))
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(blank)
    tokenizer.decoder = decoders.Sequence(undo)
    return tokenizer
