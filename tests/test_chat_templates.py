"""What chat templates make of a record: prompt, targets and end, against what TRL's trainer makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from convexlm import cli
from convexlm.chat_templates import also_ends, end_of_turn, render_chat
from convexlm.decoding.backends.base import Hypothesis
from convexlm.decoding.backends.hf import HuggingFaceBackend, eos_ids_of
from convexlm.errors import UserError
from convexlm.instructions import Record
from convexlm.streaming import RecordStream
from convexlm.tokenization import PromptSettings, encode_prompt, encode_record, load_tokenizer, tokenize_records
from convexlm.training_data import prepare_data
from training_helpers import tiny_config, train

CHAT = PromptSettings("chat")
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\n"
    "{% elif m.role == 'assistant' %}A: {{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
ASK = [{"role": "user", "content": "Hi\n there é 🦙"}]
TALK = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}, {"role": "user", "content": "C?"}]
FAMILIES = {  # TRL's copy of the template, EOS, BOS, other special tokens
    "llama3_1": ("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|> <|end_header_id|>"),
    "qwen2_5": ("<|endoftext|>", None, "<|im_start|> <|im_end|>"),  # as the base model's tokenizer has it
    "gemma": ("<eos>", "<bos>", "<start_of_turn> <end_of_turn>"),
    "gemma3": ("<eos>", "<bos>", "<start_of_turn> <end_of_turn>"),
    "phi3": ("<|endoftext|>", "<s>", "<|user|> <|end|> <|assistant|>"),
    "cohere": ("<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|>"),
    "lfm2": ("<|im_end|>", "<|startoftext|>", "<|im_start|>"),
    "llama2": ("</s>", "<s>", ""),
}


def byte_tokenizer(eos, bos=None, others="", template=None, ordinary=()):
    """A tokenizer of bytes and special tokens, with a chat template."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [token for token in (bos, eos, *others.split()) if token]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ordinary])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
        **({"bos_token": bos} if bos else {}),
    )
    made.chat_template = template
    return made


def template_of(name):
    return LLAMA2 if name == "llama2" else (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def family(name):
    return byte_tokenizer(*FAMILIES[name], template_of(name))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("messages", [ASK, TALK], ids=["ask", "talk"])
def test_prompt_and_targets_are_trls(name, messages):
    """TRL trains on what the template puts behind the generation prompt; we stop at the first token that ends it."""
    tokenizer = family(name)
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    both = [*messages, {"role": "assistant", "content": "Yes."}]
    whole = tokenizer.apply_chat_template(both, return_dict=False)
    assert whole[: len(asked)] == asked
    prompt, answer = encode_record(tokenizer, Record("x", "Yes.", messages=messages), CHAT)
    assert prompt == asked == encode_prompt(tokenizer, messages, CHAT)
    behind = whole[len(asked) :]
    if name == "llama2":  # but for its blank before `</s>`
        assert tokenizer.decode(behind) == " Yes. </s>"
        assert tokenizer.decode(answer) == " Yes.</s>"
    else:
        assert behind[: len(answer)] == answer
    assert [token for token in answer if token in tokenizer.added_tokens_decoder] == [answer[-1]]
    config, folder = tiny_config(vocab_size=len(tokenizer)), SimpleNamespace(generation_config=GenerationConfig())
    assert answer[-1] in eos_ids_of(tokenizer, Path(), config, folder)


def test_other_templates_end_with_the_eos():
    gemma = family("gemma")
    assert encode_record(gemma, Record("a", "b"), PromptSettings())[1][-1] == gemma.eos_token_id
    for template in ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "{{ raise_exception('no') }}", None):
        gemma.chat_template = template
        assert end_of_turn(gemma) is None


def test_an_end_without_an_embedding_ends_nothing():
    gemma = family("gemma")
    small = tiny_config(vocab_size=gemma.convert_tokens_to_ids("<end_of_turn>"))
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=[7]))
    assert eos_ids_of(gemma, Path(), small, model) == [gemma.eos_token_id, 7]


def test_also_ends():
    for before, after in [(None, [3]), (2, [2, 3]), ([2, 4], [2, 4, 3]), (3, 3), ([4, 3], [4, 3])]:
        config = GenerationConfig(eos_token_id=before)
        also_ends(config, 3)
        assert config.eos_token_id == after


def test_the_date_stands_still():
    """Else a model would be decoded with other prompts than it was trained with."""
    tokenizer = byte_tokenizer("<|eot_id|>", "<|begin_of_text|>", template=template_of("llama3_2"))
    assert "Today Date: 26 Jul 2024\n" in render_chat(tokenizer, ASK)
    tokenizer.chat_template = "{{ strftime_now('%-d. %B %Y, %Y-%m-%d') }}|{{ messages[0].content }}"
    assert render_chat(tokenizer, ASK) == "26. July 2024, 2024-07-26|" + ASK[0]["content"]


def test_special_text_changes_nothing_around_it(shared_data):
    """Llama's tokenizer puts a blank behind special tokens; a `</s>` in the message must not take it away."""
    tokenizer = load_tokenizer(shared_data / "tokenizers")
    tokenizer.chat_template = LLAMA2
    talk = lambda word: [{**turn, "content": turn["content"] + word} for turn in TALK]  # noqa: E731
    with_special, with_other = (
        tokenizer.decode(encode_prompt(tokenizer, talk(word), CHAT)) for word in ("</s>", "@@")
    )
    assert with_special == with_other.replace("@@", "</s>")
    assert encode_prompt(tokenizer, talk("</s>"), CHAT).count(tokenizer.eos_token_id) == 1


def test_blanks_that_a_special_token_swallows():
    tokenizer = byte_tokenizer("<|endoftext|>", template=template_of("phi3"))
    tokens = [AddedToken(f"<|{name}|>", special=True, rstrip=True, normalized=False) for name in ("user", "end")]
    tokenizer.backend_tokenizer.add_special_tokens(tokens)
    found = [tokenizer.decode(encode_prompt(tokenizer, f" a {word}", CHAT)) for word in ("<|end|>", "@@")]
    assert found[0] == found[1].replace("@@", "<|end|>")


def test_special_text_in_a_tool_call():
    tokenizer = byte_tokenizer("<|im_end|>", others="<|im_start|>", template=template_of("qwen2_5"))
    call = lambda text: {"type": "function", "function": {"name": "f", "arguments": {"a": [text]}}}  # noqa: E731
    talk = lambda text: [ASK[0], {"role": "assistant", "content": "", "tool_calls": [call(text)]}, ASK[0]]  # noqa: E731
    found = [encode_prompt(tokenizer, talk(text), CHAT) for text in ("<|im_end|>", "@@")]
    assert found[0].count(tokenizer.eos_token_id) == found[1].count(tokenizer.eos_token_id)
    assert tokenizer.decode(found[0]) == tokenizer.decode(found[1]).replace("@@", "<|im_end|>")


def test_special_text_in_the_data_is_told(tmp_path, capsys):
    """A prompt that was rendered elsewhere looks right and is trained on as other tokens."""
    tokenizer = family("gemma")
    whole = {"prompt": "<start_of_turn>user\nHi<end_of_turn>\n", "completion": "a"}
    ended = {"instruction": "a", "output": "b<eos>"}
    asked = {"instruction": "what is <eos>?", "output": "b"}
    for template, record, told in [
        ("alpaca", whole, "`<end_of_turn>` is written in the data (d.jsonl:2) and trained on as text"),
        ("chat", ended, "`<eos>` is written in the data (d.jsonl:2)"),
        ("chat", asked, ""),
    ]:
        path = tmp_path / "d.jsonl"
        path.write_text(f"{json.dumps(dict.fromkeys(record, 'x'))}\n{json.dumps(record)}\n")
        made = [str(path), template, tokenizer, PromptSettings(template), None]
        prepare_data(*made, cache_dir=tmp_path / "cache")
        assert told in (said := capsys.readouterr().err) and bool(told) == ("is written in" in said)
        next(RecordStream(*made).one_pass())
        assert told in (said := capsys.readouterr().err) and bool(told) == ("is written in" in said)


@pytest.mark.parametrize(
    ("template", "messages", "lost"),
    [
        (template_of("smolvlm"), [{"role": "user", "content": "Hi"}], "message 1, of the role `user`"),
        (NO_SYSTEM, [{"role": "system", "content": "Be brief."}, *TALK], "message 1, of the role `system`"),
        (NO_SYSTEM, [*TALK[:2], {"role": "human", "content": "C?"}], "message 3, of the role `human`"),
    ],
)
def test_a_message_that_the_template_leaves_out_is_refused(template, messages, lost):
    """The rendering is no error, and the model would be trained and decoded without the text."""
    tokenizer = byte_tokenizer("</s>", "<s>", template=template)
    record = Record("", "B.", id="r1", messages=messages)
    with pytest.raises(UserError, match=f"record r1: .*leaves out {lost}"):
        tokenize_records([record], tokenizer, CHAT, None)


def test_what_has_no_text_is_not_left_out():
    tokenizer = byte_tokenizer("</s>", "<s>", template=NO_SYSTEM)
    assert encode_prompt(tokenizer, [{"role": "system", "content": " "}, *TALK], CHAT) == encode_prompt(
        tokenizer, TALK, CHAT
    )


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "qwen3_8", "nemotron_3_nano", "qwen3", "gptoss"])
def test_an_answer_in_an_open_block_is_told(name, tmp_path, capsys):
    tokenizer = byte_tokenizer("<eos>", "<bos>", template=template_of(name))
    for answer in ("4", "2 + 2 is 4.\n</think>\n\n4"):
        path = tmp_path / "d.jsonl"
        path.write_text(json.dumps({"messages": [*ASK, {"role": "assistant", "content": answer}]}) + "\n")
        made = [str(path), "chat", tokenizer, CHAT, None]
        prepare_data(*made, cache_dir=tmp_path / "cache")
        told = "prompt ends in `<think>`, and an answer (d.jsonl:1) does not close it" in capsys.readouterr().err
        next(RecordStream(*made).one_pass())
        assert told == ("does not close it" in capsys.readouterr().err)
        assert told == (answer == "4" and name not in ("qwen3", "gptoss"))


def test_refused_record_is_named():
    records = [
        Record("x", "b", id=f"f:{n}", messages=[*([{"role": "system", "content": "s"}] * (n == 2)), *ASK])
        for n in (1, 2)
    ]
    with pytest.raises(
        UserError, match=r"^record f:2: the tokenizer's chat template refuses .*System role not supported"
    ):
        tokenize_records(records, family("gemma"), CHAT, None)


def test_what_ends_a_hypothesis_is_no_text():
    backend = HuggingFaceBackend()
    backend.tokenizer = byte_tokenizer("<|endoftext|>", ordinary=["<|im_end|>"])
    ids = backend.tokenizer("Yes<|im_end|>")["input_ids"]
    assert backend.text(Hypothesis(ids, 0.0, True)) == "Yes"
    assert backend.text(Hypothesis(ids, 0.0, False)) == "Yes<|im_end|>", "which did not end it"


def test_trained_decoded_and_exported(tmp_path):
    """The end of a turn is trained, generation ends there whoever loads the model, and it is no part of the answer."""
    gemma = family("gemma")
    model = tmp_path / "model"
    gemma.save_pretrained(model)
    end = gemma.convert_tokens_to_ids("<end_of_turn>")
    sizes = {"vocab_size": len(gemma), "eos_token_id": gemma.eos_token_id, "bos_token_id": gemma.bos_token_id}
    LlamaForCausalLM(tiny_config(**sizes)).save_pretrained(model)
    lines = [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ok"}]}] * 16
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "src").write_text("x\n")
    given = {"model_name_or_path": model, "dataset": tmp_path / "d.jsonl", "template": "chat", "optim": "adamw_torch"}
    given |= {"dataset_cache_dir": tmp_path / "cache", "learning_rate": 0.01, "max_steps": 40, "save_steps": 40}
    assert train(tmp_path / "full", **given) == 0
    checkpoint = tmp_path / "full" / "checkpoint-40"
    assert GenerationConfig.from_pretrained(checkpoint).eos_token_id == [gemma.eos_token_id, end]
    words = ["--sources", tmp_path / "src", "--instruction", "Q", "--output_file", tmp_path / "h.jsonl"]
    words = ["--model_name_or_path", checkpoint, "--device", "cpu", "--max_new_tokens", "9", *words]
    assert cli.main(["decode", *map(str, words)]) == 0
    found = json.loads((tmp_path / "h.jsonl").read_text())
    assert (found["hypothesis"], found["tokens"], found["finished"]) == ("ok", 3, True)
    given |= {"max_steps": 1, "save_steps": 1, "use_peft": "true", "lora_r": 2}
    assert train(tmp_path / "lora", **given) == 0
    words = [
        "--checkpoint",
        tmp_path / "lora" / "checkpoint-1",
        "--merge_adapter",
        "--output_dir",
        tmp_path / "merged",
    ]
    assert cli.main(["export", *map(str, words)]) == 0
    assert end in GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id
