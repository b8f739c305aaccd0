"""`convexlm export`: a training checkpoint as a plain folder with a model card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convexlm.options import VerbParser

if TYPE_CHECKING:
    import argparse

    from rich.console import Console


def make_parser(prog: str) -> VerbParser:
    """Options: the checkpoint, where to, and what to do with an adapter or shards."""
    parser = VerbParser(
        prog,
        "Write a training checkpoint as a plain folder (safetensors, tokenizer, model card) that "
        "AutoModelForCausalLM.from_pretrained loads, or PEFT for an adapter.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a checkpoint of training")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="where to; must be empty or not be there")
    parser.add_argument("--merge_adapter", action="store_true", help="merge a LoRA adapter into its base model")
    parser.add_argument(
        "--base_model",
        metavar="M",
        help="the adapter's base (default: what its config names), or whose config shards have",
    )
    parser.add_argument("--dtype", default="auto", metavar="T", help="auto (as it is), float32, bfloat16 or float16")
    parser.add_argument(
        "--run_dir", metavar="DIR", help="run folder for the card's settings and scores (default: the checkpoint's)"
    )
    parser.add_argument("--license", metavar="ID", help="licence for the card, as the hub names it")
    parser.add_argument(
        "--allow_pickle",
        action="store_true",
        help="let DeepSpeed unpickle ZeRO shards whatever is in them; only for those that you made yourself",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Export."""
    from convexlm.export import export_checkpoint

    return export_checkpoint(
        args.checkpoint,
        args.output_dir,
        merge_adapter=args.merge_adapter,
        base_model=args.base_model,
        dtype=args.dtype,
        run_dir=args.run_dir,
        allow_pickle=args.allow_pickle,
        license_name=args.license,
        trust_remote_code=args.trust_remote_code,
    )


def show(result: dict[str, Any], console: Console) -> None:
    """What was written, and how to load it."""
    console.print(
        f"{result['kind']}: {result['parameters']:,} parameters in {result['dtype']} -> {result['output_dir']}",
        markup=False,
        soft_wrap=True,
    )
    console.print(f"files: {', '.join(result['files'])}", markup=False, soft_wrap=True)
    if not result["tokenizer"]:
        console.print("note:  no tokenizer was there to go with it")
    console.print(f"card:  {result['card']} ({result['scores']} scores)", markup=False, soft_wrap=True)
    loader = "peft.AutoPeftModelForCausalLM" if result["kind"] == "adapter" else "transformers.AutoModelForCausalLM"
    console.print(f'load:  {loader}.from_pretrained("{result["output_dir"]}")', markup=False, soft_wrap=True)
