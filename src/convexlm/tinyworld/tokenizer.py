"""A byte-level BPE tokenizer for the tiny world, in which a prompt is a handful of tokens and a word is mostly one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convexlm.tinyworld.grammar import DIRECTIONS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def prompt_pieces(template: str = "alpaca") -> list[str]:
    """The fixed text of translation prompts: what a template puts around its fields, and the instructions.

    Blanks at the end of a prompt are left out: the same piece then serves templates with and without them.
    """
    from convexlm.templates import TRANSLATION_INSTRUCTION, fill_instruction, get_template

    marks = {"instruction": "\x00", "input": "\x01"}
    text = get_template(template).fill(marks)
    for mark in marks.values():
        text = text.replace(mark, "\x00")
    pieces = [piece for piece in text.rstrip().split("\x00") if len(piece) > 1]
    return pieces + [fill_instruction(TRANSLATION_INSTRUCTION, direction) for direction in DIRECTIONS]


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048, template: str = "alpaca") -> PreTrainedTokenizerFast:
    """Train the tokenizer: the same texts give the same tokenizer.

    All 256 bytes are in the vocabulary, so any text survives the round trip. The fixed pieces of `template` are tokens
    of their own. Specials are `<s>`, `</s>` and `<pad>`; encoding adds none of them by itself.

    Args:
        texts: sentences of both languages.
        vocab_size: tokens in all, specials and prompt pieces included; fewer if the texts hold no more to merge.
            One direction needs some 1300 for a word to be a token.
        template: the prompt template whose fixed text becomes tokens.

    Raises:
        ValueError: a vocabulary too small for the bytes, specials and prompt pieces.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pieces = prompt_pieces(template)
    least = 256 + 3 + len(pieces)
    if vocab_size < least:
        raise ValueError(f"vocab_size {vocab_size} is too small: bytes, specials and prompt take {least}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(pieces),
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
