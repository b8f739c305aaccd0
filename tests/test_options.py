from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from convexlm.errors import UserError
from convexlm.options import VerbParser, did_you_mean, load_yaml, parse_yaml

if TYPE_CHECKING:
    from pathlib import Path


def make_parser() -> VerbParser:
    parser = VerbParser("convexlm try", "For tests.")
    parser.add_argument("--text", default="default")
    parser.add_argument("--number", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--flag", action="store_true")
    parser.add_argument("--maybe", type=lambda word: {"true": True, "false": False}[word])
    parser.add_argument("--metrics", nargs="+")
    parser.add_argument("--kind", choices=("a", "b"))
    parser.add_argument("--settings", type=json.loads)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    return parser


def parse(tmp_path: Path, config: str, *words: str, parser: VerbParser | None = None) -> Any:
    path = tmp_path / "config.yaml"
    path.write_text(config)
    return (parser or make_parser()).parse(["--config", str(path), *words])


def test_values_of_every_kind(tmp_path: Path) -> None:
    args = parse(
        tmp_path,
        """
text: "-- begins with dashes"
number: -3
rate: 1e-5
flag: true
maybe: false
metrics: [bleu, chrf]
settings: {k: 2.0, deep: [1, null, true], name: "a \\"b\\" ü"}
set: [a.b=1, c=x=y]
kind: b
""",
    )
    assert args.text == "-- begins with dashes"
    assert (args.number, args.rate, args.flag, args.maybe) == (-3, 1e-5, True, False)
    assert args.metrics == ["bleu", "chrf"]
    assert args.settings == {"k": 2.0, "deep": [1, None, True], "name": 'a "b" ü'}
    assert args.overrides == ["a.b=1", "c=x=y"]
    assert args.kind == "b"


def test_unset_and_false_are_as_if_not_there(tmp_path: Path) -> None:
    args = parse(tmp_path, "text:\nflag: false\nmetrics: [bleu]\nset: one=1\njson: true\n")
    assert (args.text, args.flag, args.json) == ("default", False, True)
    assert (args.metrics, args.overrides) == (["bleu"], ["one=1"])


def test_the_command_line_wins(tmp_path: Path) -> None:
    config = "text: file\nmetrics: [a, b]\nmaybe: false\nsettings: {a: 1}\n"
    args = parse(tmp_path, config, "--text", "typed", "--metrics", "c", "--maybe", "true", "--settings", '{"b": 2}')
    assert (args.text, args.metrics, args.maybe, args.settings) == ("typed", ["c"], True, {"b": 2})
    path = tmp_path / "config.yaml"
    parser = make_parser()
    assert parser.parse(["--text=typed", f"--config={path}"]).text == "typed"


def test_a_list_in_the_file_does_not_swallow_the_positional(tmp_path: Path) -> None:
    parser = make_parser()
    parser.add_argument("recipe")
    path = tmp_path / "config.yaml"
    path.write_text("metrics: [bleu, chrf]\n")
    for words in (["r.yaml", "--config", str(path)], ["--config", str(path), "r.yaml"]):
        args = parser.parse(words)
        assert (args.recipe, args.metrics) == ("r.yaml", ["bleu", "chrf"])
    path.write_text("recipe: other.yaml\n")
    with pytest.raises(UserError, match="`recipe` is given on the command line"):
        parser.parse(["r.yaml", "--config", str(path)])


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("txet: x\n", "config.yaml: unknown option `txet`; did you mean `text`?"),
        ("zzz: x\n", "unknown option `zzz`; known: flag, json, kind,"),
        ("config: x\n", "unknown option `config`"),
        ("help: true\n", "unknown option `help`"),
        ("overrides: [a]\n", "unknown option `overrides`"),
        ("1: x\n", "unknown option `1`"),
        ("number: three\n", "--number: invalid int value: 'three'"),
        ("number: 1.5\n", "--number: invalid int value: '1.5'"),
        ("number: [1, 2]\n", "`number` takes one value, not a list of 2"),
        ("kind: c\n", "--kind: invalid choice: 'c'"),
        ("flag: 3\n", "config.yaml: `flag` is true or false, not 3"),
        ("- text\n", "expected a YAML mapping"),
        ("text: [\n", "not valid YAML"),
        ("text: a\ntext: b\n", "line 2: not valid YAML (the key `text` is given twice)"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(tmp_path: Path, config: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse(tmp_path, config)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config"], "--config: expected one argument"),
        (["--config", "nothing.yaml"], "nothing.yaml: no such file"),
        (["--tex", "x"], "unknown option --tex; did you mean `--text`?"),
        (["--number", "x"], "(see convexlm try --help)"),
        (["extra"], "unrecognized arguments: extra"),
    ],
)
def test_bad_words_raise_and_print_nothing(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError) as error:
        make_parser().parse(words)
    assert said in str(error.value)
    assert capsys.readouterr() == ("", "")


def test_a_missing_option_is_named(tmp_path: Path) -> None:
    parser = make_parser()
    parser.add_argument("--dataset", required=True)
    with pytest.raises(UserError, match="the following arguments are required: --dataset"):
        parser.parse([])
    assert parse(tmp_path, "dataset: x\n", parser=parser).dataset == "x"


def test_the_train_verb_takes_its_options_from_a_file(tmp_path: Path) -> None:
    from convexlm.verbs.train import build_options
    from convexlm.verbs.train import make_parser as make_train_parser

    args = parse(
        tmp_path,
        f"""
dataset: d.json
model_name_or_path: m
output_dir: {tmp_path / "out"}
objective: convex
objective_kwargs: {{k: 2.0}}
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {{min_lr_rate: 0.1}}
learning_rate: 2e-5
gradient_checkpointing: false
use_cpu: true
bf16: false
report_to: [none]
use_peft: true
lora_target_modules: [q_proj, v_proj]
warmup_steps: 0.03
""",
        "--learning_rate",
        "3e-5",
        parser=make_train_parser("convexlm train"),
    )
    data, model, config = build_options(vars(args))
    assert data.dataset == "d.json"
    assert model.lora_target_modules == ["q_proj", "v_proj"]
    assert config.objective_kwargs == {"k": 2.0}
    assert config.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert config.learning_rate == 3e-5
    assert config.gradient_checkpointing is False
    assert config.build_objective().k == 2.0


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("torch_dtype", "here it is `--dtype`"),
        ("torch-dtype", "here it is `--dtype`"),
        ("batch_size", "here it is `--per_device_train_batch_size`"),
        ("global_batch_size", "give --per_device_train_batch_size and --gradient_accumulation_steps"),
        ("lora_rank", "here it is `--lora_r`"),
        ("group_by_length", "here it is `--train_sampling_strategy group_by_length`"),
        ("logging_dir", "TENSORBOARD_LOGGING_DIR"),
        ("overwrite_output_dir", "choose another --output_dir, or --resume"),
        ("early_stopping_patience", "training does not stop early"),
        ("warmup_ratio", "give --warmup_steps, of which a number below 1 is a share of all steps"),
        ("objectve", "did you mean `--objective`?"),
        ("auto_find_batch_sizes", "unknown option --auto_find_batch_sizes (see"),
        ("resume_from_checkpoints", "unknown option --resume_from_checkpoints (see"),
        ("cot", "unknown option --cot (see"),
    ],
)
def test_the_train_verb_knows_what_others_call_its_options(typed: str, said: str) -> None:
    from convexlm.verbs.train import make_parser as make_train_parser

    with pytest.raises(UserError) as error:
        make_train_parser("convexlm train").parse(["--dataset", "d.json", f"--{typed}", "1"])
    assert said in str(error.value)


def test_every_name_of_others_stands_for_an_option_that_is_not_refused() -> None:
    from convexlm.option_names import _BY_OTHER_NAME, _INSTEAD, NEVER_MEANT
    from convexlm.verbs.decode import make_parser as make_decode_parser
    from convexlm.verbs.train import make_parser as make_train_parser

    train = {word.lstrip("-") for word in make_train_parser("x")._option_string_actions}
    known = train | {word.lstrip("-") for word in make_decode_parser("x")._option_string_actions}
    meant = {name.partition("=")[0] for name in _BY_OTHER_NAME.values()} | {needs for needs, _ in _INSTEAD.values()}
    assert meant <= known - NEVER_MEANT
    assert not {*_BY_OTHER_NAME, *_INSTEAD} & train
    assert did_you_mean("group_by_length", known) == "; here it is `train_sampling_strategy: group_by_length`"


def test_yaml_numbers_and_texts() -> None:
    text = "[1e-3, 1E5, -2e+3, 1.5e3, 1e, e5, 1e5x, 0x1f, 12, 1_0e2, '1e-3', 1.]"
    assert parse_yaml(text, "here") == [1e-3, 1e5, -2e3, 1500.0, "1e", "e5", "1e5x", 31, 12, 1000.0, "1e-3", 1.0]


def test_a_yaml_file_is_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("base: &b {a: 1}\nchild: {<<: *b, c: 2}\n")
    assert load_yaml(path) == {"base": {"a": 1}, "child": {"a": 1, "c": 2}}
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\n")
    assert load_yaml(path) == {"a": 1}
