"""`convexlm decode`: hypotheses of a checkpoint for a test set, every sentence exactly once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.decoding.progress import progress_lines
from convexlm.decoding.ranks import Leader, find_world, follow
from convexlm.decoding.search import Search
from convexlm.errors import UserError
from convexlm.options import VerbParser

if TYPE_CHECKING:
    import argparse

    from rich.console import Console

    from convexlm.tokenization import PromptSettings

DEFAULTS = Search()


def make_parser(prog: str) -> VerbParser:
    """The verb's options."""
    parser = VerbParser(
        prog,
        "Decode sources with a checkpoint. Results are kept as they are made: a run that is stopped goes on "
        "with the same command, and a finished one does nothing.",
    )
    parser.add_argument(
        "--model_name_or_path", required=True, metavar="CHECKPOINT", help="checkpoint or adapter folder, or a hub name"
    )
    parser.add_argument("--revision", help="revision of a hub name")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--sources", metavar="FILE", help="one source a line, plain or .gz")
    which.add_argument(
        "--documents",
        metavar="FILE",
        help="documents with summaries, as CNN/DailyMail and XSum come: .csv, .json or .jsonl, .gz or .zip",
    )
    parser.add_argument(
        "--pair", default="", help="direction, such as en-de; fills [SRC] and [TGT] of the instruction"
    )
    parser.add_argument("--output_file", required=True, metavar="FILE.jsonl", help="the decode file to write")
    parser.add_argument(
        "--test_set",
        metavar="NAME",
        help="without a file: the test set that sacreBLEU knows by this name, such as wmt22; else the name of the "
        "sources in the result (default: the file's)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="decode the first N sources only")

    prompt = parser.add_argument_group("prompt")
    group = prompt.add_mutually_exclusive_group()
    group.add_argument("--instruction", metavar="TEXT", help="default: the translation instruction")
    group.add_argument("--instruction_file", metavar="FILE", help="file with the instruction")
    prompt.add_argument(
        "--template",
        metavar="NAME",
        help="its name, or its text, such as 'Translate: {input}'; default: the checkpoint's own, else alpaca",
    )

    search = parser.add_argument_group("search")
    for name, kind, text in (
        ("num_beams", int, "1 is greedy search"),
        ("no_repeat_ngram_size", int, "no n-gram of this size twice; 0 allows all"),
        ("max_new_tokens", int, "longer answers are cut"),
        ("min_new_tokens", int, "no EOS before"),
        ("num_return_sequences", int, "keep the N best of a beam search (`nbest` in the records), or N `samples`"),
        ("length_penalty", float, "power of the length that a beam's score is divided by"),
    ):
        default = getattr(DEFAULTS, name)
        search.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=f"{text} (default: {default})")
    search.add_argument(
        "--early_stopping",
        choices=("true", "false", "never"),
        default="false",
        help="stop a beam search at num_beams finished ones, by transformers' heuristic, or when none can get better",
    )

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--do_sample", action="store_true", help="draw each token from the model's probabilities")
    for name, kind, text in (
        ("temperature", float, "the logits are divided by it (default: 1.0)"),
        ("top_k", int, "draw from the N most probable tokens only (default: 0, all)"),
        ("top_p", float, "draw from the most probable tokens that together have this probability (default: 1.0)"),
        ("seed", int, "with prompt and number of the sample, what the draws follow from (default: 0)"),
    ):
        sampling.add_argument(f"--{name}", type=kind, metavar="N", help=text)

    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--backend",
        default="hf",
        help="hf, ctranslate2, vllm, or auto, which says what it chose and why (default: hf)",
    )
    machine.add_argument(
        "--compute_type",
        metavar="TYPE",
        help="of the ctranslate2 backend, in place of --dtype: int8, int8_float16, ...",
    )
    machine.add_argument(
        "--num_processes",
        type=int,
        metavar="N",
        help="processes on this machine that share the sentences; GPUs are taken in turn (default: 1; under torchrun "
        "or accelerate launch, the processes are its own)",
    )
    machine.add_argument("--batch_size", type=int, metavar="N", help="sentences a batch; default: by --token_budget")
    machine.add_argument(
        "--token_budget",
        type=int,
        metavar="N",
        help="most tokens of a batch whose keys and values are held: prompts, and the longest answers over all beams "
        "(default: what fits the GPU; 32768 on a CPU)",
    )
    machine.add_argument(
        "--gpu_memory_utilization",
        type=float,
        metavar="SHARE",
        help="of the vllm backend: the share of a GPU's memory that a process takes (default: vLLM's own, most of it)",
    )
    machine.add_argument("--device", help="torch device (default: the first GPU, else the CPU)")
    machine.add_argument("--dtype", help="float32, bfloat16, float16 (default: the checkpoint's; float32 on a CPU)")
    machine.add_argument("--trust_remote_code", action="store_true", help="run the checkpoint's own Python code")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Decode; returns the result for `--json`. Under a launcher, rank 0 does, and the other ranks work for it."""
    world = find_world()
    if world is None:
        return _run(args, None)
    if world.rank:
        follow(world)
        return {}
    with Leader(world) as leader:
        if args.num_processes not in (None, world.size):
            raise UserError(
                f"--num_processes {args.num_processes} does not fit the launcher's {world.size} processes "
                "(WORLD_SIZE); leave it out"
            )
        return _run(args, leader)


def _run(args: argparse.Namespace, leader: Leader | None) -> dict[str, Any]:
    search = Search(
        num_beams=args.num_beams,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
        max_new_tokens=args.max_new_tokens,
        min_new_tokens=args.min_new_tokens,
        num_return_sequences=args.num_return_sequences,
        length_penalty=args.length_penalty,
        early_stopping={"true": True, "false": False}.get(args.early_stopping, args.early_stopping),
        do_sample=args.do_sample,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    # Cheap mistakes are told before anything heavy is imported.
    test_set, instruction = _sources(args), _instruction(args)
    if args.template is not None:
        from convexlm.templates import get_template

        get_template(args.template)

    from convexlm.decoding.checkpoint import find_checkpoint
    from convexlm.decoding.job import DecodeJob
    from convexlm.decoding.run import decode_jobs

    if args.revision is not None and Path(args.model_name_or_path).exists():
        raise UserError(f"--revision is of a hub name, and {args.model_name_or_path} is a folder here: leave it out")
    checkpoint = find_checkpoint(args.model_name_or_path, revision=args.revision)
    settings, note = _prompt_settings(checkpoint, args.template)
    job = DecodeJob(test_set, search, Path(args.output_file), settings, instruction)
    with progress_lines(note=note) as progress:
        (result,) = decode_jobs(
            checkpoint,
            [job],
            backend=args.backend,
            device=args.device,
            dtype=args.dtype,
            batch_size=args.batch_size,
            token_budget=args.token_budget,
            trust_remote_code=args.trust_remote_code,
            compute_type=args.compute_type,
            gpu_memory_utilization=args.gpu_memory_utilization,
            num_processes=1 if leader or args.num_processes is None else args.num_processes,
            leader=leader,
            note=_note,
            progress=progress,
        )
    return {**result.to_dict(), "checkpoint": str(checkpoint)}


def show(result: dict[str, Any], console: Console) -> None:
    """Say what was written and what comes next."""
    total, resumed = result["num_sentences"], result["resumed"]
    if result["sentences_per_second"] is None:
        line = f"{result['output_file']} is complete: {total} sentences, nothing to do"
    else:
        line = (
            f"{result['output_file']}: {total} sentences ({result['search']}), {total - resumed} of them now in "
            f"{result['seconds']:.1f} s ({result['sentences_per_second']:.1f} sentences/s, "
            f"{result['tokens_per_second']:.0f} tokens/s)"
        )
    if result["cut"]:
        line += f"; {result['cut']} were cut at max_new_tokens"
    target = result["pair"].partition("-")[2] or "LANG"
    following = f"next: convexlm score --hypotheses {result['output_file']} --references FILE --target_lang {target}"
    for text in (line, following):
        console.print(text, markup=False, soft_wrap=True)


def _note(text: str) -> None:
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


def _sources(args: argparse.Namespace) -> Any:
    from convexlm.segments import read_plain
    from convexlm.templates import split_pair
    from convexlm.testsets import TestSet, load_test_set

    if args.pair:
        split_pair(args.pair)
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, not {args.limit}")
    if args.sources is not None:
        sources = read_plain(args.sources, "source")[: args.limit]
        name = args.test_set or Path(args.sources).name.removesuffix(".gz").removesuffix(".txt")
        return TestSet(name, args.pair, sources, [], [str(number) for number in range(len(sources))])
    if args.documents is not None:
        name = args.test_set or Path(args.documents).name.partition(".")[0]
        spec = {"name": name, "kind": "summarization", "file": args.documents, "limit": args.limit}
        return load_test_set(spec, args.pair or "en-en")
    if not args.test_set:
        raise UserError("what is to be decoded? Give --sources FILE, --documents FILE, or --test_set NAME, as wmt22")
    if not args.pair:
        raise UserError(f"--test_set {args.test_set}: give its direction with --pair, such as --pair en-de")
    return load_test_set({"name": args.test_set, "kind": "sacrebleu", "limit": args.limit}, args.pair)


def _instruction(args: argparse.Namespace) -> str | None:
    from convexlm.instruction_file import read_instruction_file, said_of_placeholders
    from convexlm.progress import note
    from convexlm.templates import TRANSLATION_INSTRUCTION

    instruction = args.instruction
    if args.instruction_file is not None:
        instruction = read_instruction_file(args.instruction_file, "--instruction_file")
    if instruction is not None and args.instruction_file is None:
        _check_text(instruction)
    if said := said_of_placeholders(instruction or ""):
        note(said)
    if args.documents is not None and instruction is None:
        raise UserError("say what is to be done with the documents: --instruction TEXT or --instruction_file FILE")
    if not args.pair and any(mark in (instruction or TRANSLATION_INSTRUCTION) for mark in ("[SRC]", "[TGT]")):
        raise UserError("the instruction names [SRC] or [TGT]: give the languages with --pair, such as --pair en-de")
    return instruction


def _check_text(instruction: str) -> None:
    if not instruction.strip():
        raise UserError("--instruction is empty; leave it out, or say what is to be done")
    try:
        instruction.encode()
    except UnicodeEncodeError:
        raise UserError("--instruction is no UTF-8 text; set a UTF-8 locale, or use --instruction_file") from None


def _prompt_settings(checkpoint: Path, template: str | None) -> tuple[PromptSettings, str]:
    """The checkpoint's own prompt settings, in which a given template has its place; and what to tell of them."""
    from dataclasses import replace

    from convexlm.decoding.checkpoint import has_prompt_settings
    from convexlm.own_prompts import refuse_unknown_prompts
    from convexlm.tokenization import PromptSettings

    known = has_prompt_settings(checkpoint)
    settings = PromptSettings.load(checkpoint) if known else PromptSettings()
    if template is not None:
        return replace(settings, template=template), ""
    refuse_unknown_prompts(checkpoint)
    if known:
        return settings, ""
    return settings, (
        f"{checkpoint} does not say how its prompts were made (no convexlm.json): using the template "
        f"`{settings.template}`; --template NAME chooses another"
    )
