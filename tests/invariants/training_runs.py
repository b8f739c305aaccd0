"""Training runs that the invariance tests compare: each is made once a session, when a test first asks for it.

A run is a data set, an objective and a form: how the same global batches are split and laid out.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

from convexlm.launch.environment import make_plan
from convexlm.launch.settings import LaunchSettings
from training_helpers import TRAIN, Run, environment, tiny_model, train, words, write_model_files, write_records

# With record weights, but for the two whose numbers are to be TRL's.
OBJECTIVES = {
    "mle": {"objective": "mle"},
    "convex": {"objective": "convex", "k": 0.5},
    "convex_by_sequence": {"objective": "convex", "k": 0.5, "length_weighting": "sequence", "mle_mix": 0.1},
    "power": {"objective": "power", "k": 0.5},
    "dft": {"objective": "dft"},
}
LORA = {
    "use_peft": True,
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj", "v_proj"],
}
ARMS = {**OBJECTIVES, "lora": {"objective": "convex", "k": 0.5, **LORA}}
# Both objectives with both weightings, for several processes; the first is there for them alone.
MLE_BY_SEQUENCE = {"mle_by_sequence": {"objective": "mle", "length_weighting": "sequence"}}
BOTH_WEIGHTINGS = ("mle", "mle_by_sequence", "convex", "convex_by_sequence")
ENGINES = ("ddp", "fsdp2")
ZERO = ("zero2", "zero3")


def split(batch, accumulation=1, **others):
    return {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, **others}


# name -> options; the first of each group is what the others are held against.
BATCHES_OF_8 = {
    "8": split(8),
    "4x2": split(4, 2),
    "1x8": split(1, 8),
    "left": split(4, 2, padding_side="left"),
    "multiple_of_16": split(8, pad_to_multiple_of=16),
    "padding_free": split(8, padding_free=True),
    "padding_free_2x4": split(2, 4, padding_free=True),
    "checkpointing": split(4, 2, gradient_checkpointing=True),
}
WHOLE_DATA = {  # packing regroups the records, so here a step sees all of them
    "24": split(24),
    "bfd": split(24, packing=True, packing_strategy="bfd"),
    "bfd_1x32": split(1, 32, packing=True, packing_strategy="bfd"),
    "bfd_in_one_row": split(24, packing=True, packing_strategy="bfd", padding_free=True),
    "bfd_checkpointing": split(2, 16, packing=True, packing_strategy="bfd", gradient_checkpointing=True),
}
ON_TWO = {"2x2x2": split(2, 2), "2x4_padding_free": split(4, padding_free=True)}
WHOLE_ON_TWO = {
    "2x24": split(24),
    "2x1x32_bfd": split(1, 32, packing=True, packing_strategy="bfd"),
    "2x3x12_bfd": split(3, 12, packing=True, packing_strategy="bfd"),
}
EVALUATION = {"eval_strategy": "steps", "eval_steps": 6}
# The last of two steps is evaluated and not saved, and the model of the first is loaded.
FIRST_IS_BEST = {
    **{"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "save_strategy": "best"},
    **{"load_best_model_at_end": True, "metric_for_best_model": "nll", "greater_is_better": True},
}


def halfway(batch, stop=20):
    """Global batches of 8 and saving at step 10, with an optimizer that has a state."""
    adam = {"optim": "adamw_torch", "learning_rate": 0.003, "save_steps": 10, "max_steps": stop}
    return split(batch, 2, **adam)


class Runs:
    """Makes and remembers runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_model_files(folder / "model")
        self.base = folder / "base"  # an adapter goes on weights that are kept
        tiny_model(seed=1).save_pretrained(self.base)
        tiny_model(seed=1, tie_word_embeddings=True).save_pretrained(folder / "tied-base")
        for weights, name in ((True, "weighted"), (False, "plain")):
            write_records(folder / f"even-{name}.jsonl", 24, weights=weights)
            write_records(folder / f"uneven-{name}.jsonl", 21, weights=weights)
            write_records(folder / f"eval-{name}.jsonl", 7, seed=7, weights=weights)
        write_records(folder / "eval-many.jsonl", 200, seed=8)
        self._made: dict[str, Run] = {}
        self._planned: dict[str, dict[str, list[str]]] = {engine: {} for engine in (*ENGINES, *ZERO)}

    def in_bfloat16(self, batch):
        """With one evaluation of more batches than bfloat16 can count."""
        many = {"eval_dataset": self.folder / "eval-many.jsonl", "eval_strategy": "steps", "eval_steps": 20}
        return {"bf16": True, "per_device_eval_batch_size": batch, **many}

    def with_a_copy(self, form, stop=20):
        """An adapter that trains one of two tied embeddings as a whole, by an optimizer without a state."""
        tied = {"model_name_or_path": self.folder / "tied-base", "lora_modules_to_save": ["embed_tokens"]}
        return {**form, **tied, "max_steps": stop, "save_steps": 10}

    def options(self, arm, data, form):
        kind = "plain" if arm in ("mle", "dft") else "weighted"
        files = {"dataset": self.folder / f"{data}-{kind}.jsonl"}
        if "eval_strategy" in form:
            files["eval_dataset"] = self.folder / f"eval-{kind}.jsonl"
        start = {"model_name_or_path": self.base} if arm == "lora" else {"config_name": self.model}
        return {
            **start,
            "tokenizer_name": self.model,
            **files,
            **{**ARMS, **MLE_BY_SEQUENCE}[arm],
            **form,
        }

    def get(self, arm, data, name, form, step=20) -> Run:
        """A run in this process."""
        key = f"{arm}-{data}-{name}"
        if key not in self._made:
            assert train(self.folder / key, **self.options(arm, data, form)) == 0
            self._made[key] = Run(self.folder / key, step)
        return self._made[key]

    def plan_on_two(self, arm, data, name, form, engine="ddp", folder=None, resume=()):
        folder = folder or self.folder / f"two-{engine}-{arm}-{data}-{name}"
        options = words(*resume, output_dir=folder, **self.options(arm, data, form))
        key = f"{folder.name}{'-resumed' if resume else ''}"
        self._planned[engine][key] = ["train", "--json", *TRAIN, *options]

    def get_on_two(self, arm, data, name, engine="ddp") -> Run:
        """One of the runs on two processes; an engine's first call makes all of them in one launch."""
        self.make_on_two(engine)
        return Run(self.folder / f"two-{engine}-{arm}-{data}-{name}")

    def make_on_two(self, engine):
        if self._planned[engine]:
            jobs = self.folder / f"jobs-{engine}.json"
            jobs.write_text(json.dumps(list(self._planned[engine].values())), encoding="utf-8")
            self._planned[engine] = {}
            script = str(Path(__file__).with_name("two_processes.py"))
            # Small parameters would not be sharded.
            file = zero3_without_threshold(self.folder) if engine == "zero3" else engine
            settings = LaunchSettings(accelerate_config=None if engine == "ddp" else file, num_processes=2)
            plan = make_plan(settings.resolved(), use_cpu=True)
            self.launch(script, str(jobs), **plan.variables)

    def launch(self, *command, **variables):
        """Run a script with `torchrun` on two processes; fails with what it said on stderr."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        # `accelerate launch --cpu` would quietly start a single process.
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
        done = subprocess.run(
            [sys.executable, *launcher, *command],
            env={**environment(), **variables},
            capture_output=True,
            text=True,
            timeout=480,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done


def zero3_without_threshold(folder: Path) -> str:
    """An accelerate file of one's own: ZeRO-3 that shards every parameter, also those that it would keep whole."""
    automatic = dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        "auto",
    )
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    settings = folder / "zero3.json"
    settings.write_text(json.dumps({**automatic, "zero_optimization": zero}), encoding="utf-8")
    file = folder / "zero3.yaml"
    deepspeed = {"deepspeed_config_file": str(settings), "zero3_init_flag": True}
    file.write_text(json.dumps({"distributed_type": "DEEPSPEED", "deepspeed_config": deepspeed}), encoding="utf-8")
    return str(file)
