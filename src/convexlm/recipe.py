"""Recipes: one YAML file says a whole experiment. Read, checked to the last key, and resolved here.

    name: smoke
    vars: {data_dir: data}                       # ${data_dir} anywhere below, in other vars too; alone in a value it
                                               # keeps its type; `--set vars.data_dir=TEXT` changes it to that text
    seeds: [1, 2]                              # every arm is trained once a seed
    plugins: [my_objectives.py]                # modules of your own to import first
    model: {model_name_or_path: ..., tokenizer: ..., config: {...}, use_peft: false, ...}
    data: {dataset: FILE_OR_NAME, template: alpaca, max_records: null, eval_dataset: null}
    train: {...}                               # options of ConvexConfig for all arms; `global_batch_size` sets
                                               # gradient_accumulation_steps by the number of processes
    arms: {mle: {objective: mle}, convex-k1: {objective: convex, k: 1.0, init_from: ARM}}
    test_sets: [{name: ..., pairs: [de-en], sources: ..., references: ...}]
    validation_sets: [...]                     # as test_sets; for `selection: validation`
    selection: last                            # the checkpoint to compare at: last, validation, or test (which is
                                               # said in red); {on: validation, metric: bleu, search: greedy}
    decode: {searches: [{num_beams: 4}], checkpoints: all, batch_size: 8, instruction: ...}
    score: {metrics: [bleu, chrf]}
    launch: {accelerate_config: fsdp2, num_processes: 8}
    compare: {baseline: mle, n_samples: 1000, seed: 12345, reference_nll: true}

`extends: OTHER.yaml` starts from another recipe (a path beside this one) and changes what is written here.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.launch.settings import LaunchSettings, launch_settings
from convexlm.options import did_you_mean
from convexlm.plugins import load_plugins
from convexlm.recipe_text import override, substitute, variables, with_parents
from convexlm.recipe_types import as_mapping, check_types
from convexlm.redaction import find_secret
from convexlm.selection import check_selection
from convexlm.templates import get_template, split_pair
from convexlm.testsets import name_in_files

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")

STREAM_OPTIONS = {"streaming", "shuffle_buffer"}
DATA_OPTIONS = {"template", "add_bos", "max_records", "eval_dataset"} | STREAM_OPTIONS
SECTIONS: dict[str, set[str]] = {
    "model": {"config", "tokenizer"},  # and the options of TRL's ModelConfig
    "data": DATA_OPTIONS | {"dataset", "num_records"},
    "decode": {
        *("searches", "checkpoints", "batch_size", "token_budget", "backend", "dtype", "device"),
        *("instruction", "instruction_file", "compute_type", "gpu_memory_utilization", "num_processes"),
    },
    "score": {"metrics"},
    "compare": {"baseline", "n_samples", "seed", "reference_nll"},
}
SETS = ("test_sets", "validation_sets")
TOP_LEVEL = {
    *("name", "description", "extends", "plugins", "vars", "seeds", "train", "arms", "selection", "launch"),
    *SETS,
    *SECTIONS,
}
ARM_KEYS = {"init_from", "decode", "dataset"}


@dataclass(frozen=True)
class Arm:
    """One way of training: a set of options, from the recipe's model or from where another arm ended."""

    name: str
    train: dict[str, Any]
    init_from: str | None = None
    decode: bool = True
    dataset: Any = None


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `resolved` is the plain dict that the run folder keeps."""

    name: str
    resolved: dict[str, Any]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    model: dict[str, Any]
    data: dict[str, Any]
    test_sets: tuple[dict[str, Any], ...]
    decode: dict[str, Any]
    metrics: tuple[str, ...]
    compare: dict[str, Any]
    source: Path = field(default_factory=Path)
    validation_sets: tuple[dict[str, Any], ...] = ()
    selection: dict[str, Any] = field(default_factory=lambda: {"on": "last"})
    launch: LaunchSettings = field(default_factory=LaunchSettings)
    plain_seed: int | None = None  # of a run folder that began with one seed (see `runs`)

    def arm(self, name: str) -> Arm:
        """The arm called `name`."""
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def baseline(self) -> str:
        """The arm that the others are compared with."""
        return str(self.compare["baseline"])


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, resolve and check a recipe.

    Args:
        path: the YAML file.
        overrides: `dotted.key=value` words, the value in YAML: `train.max_steps=10`; a variable's is taken as it
            stands: `vars.data_dir=/data`.

    Raises:
        UserError: no such file, not YAML, an unknown or missing key, or a value that cannot be meant.
    """
    path = Path(path)
    raw = with_parents(path, ())
    for key in ("versions", "plain_seed"):  # of a run folder's recipe, which may begin another run
        raw.pop(key, None)
    for word in overrides:
        override(raw, word)
    found = variables(raw, path)
    raw = substitute({**raw, "vars": found} if found else raw, found, str(path))
    return check_recipe(raw, path)


def check_recipe(raw: dict[str, Any], path: Path) -> Recipe:
    """Turn a resolved mapping into a `Recipe`; every complaint names the file and the key."""

    def wrong(text: str) -> UserError:
        return UserError(f"{path}: {text}")

    _only_known(raw, TOP_LEVEL, wrong, "key")
    if where := find_secret(raw):
        raise wrong(
            f"`{where}` is a secret, by its looks, and a recipe is copied into run folders and reports; leave it out "
            "and set HF_TOKEN, or the like, in the environment"
        )
    name = raw.setdefault("name", path.stem)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise wrong(f"`name` must be letters, digits, `.`, `_`, `+` or `-`, not {name!r}")
    if not isinstance(raw.setdefault("plugins", []), list):
        raise wrong("`plugins` must be a list of modules or .py files")
    load_plugins(raw["plugins"])
    for section, known in SECTIONS.items():
        value = raw.setdefault(section, {})
        if not isinstance(value, dict):
            raise wrong(f"`{section}` must be a mapping")
        if "dataset_cache_dir" in value:
            raise wrong("`data.dataset_cache_dir`: a recipe writes into its run folder only; set HF_DATASETS_CACHE")
        _only_known(value, known | (_model_options() if section == "model" else set()), wrong, f"key in `{section}`")
    if not raw["data"].get("dataset"):
        raise wrong("`data.dataset` is missing: a file, a hub name, or {kind: tinyworld, ...}")
    if not raw["model"].get("model_name_or_path") and not raw["model"].get("config"):
        raise wrong("`model` needs `model_name_or_path` (a checkpoint) or `config` (for a new model)")
    if raw["model"].get("model_name_or_path") and raw["model"].get("config"):
        raise wrong("`model` has `model_name_or_path` and `config`; set the one that is not meant to null")
    for section in ("model", "data"):
        check_types(raw[section], f"{section}.", wrong)
    if not isinstance(raw.setdefault("train", {}), dict):
        raise wrong("`train` must be a mapping of training options")
    arms = _check_arms(raw, wrong)
    _in_recipe("data.template", lambda: get_template(str(raw["data"].get("template", "alpaca"))), wrong)
    seen: set[tuple[str, str]] = set()
    test_sets = _check_test_sets(raw.get("test_sets"), wrong, seen)
    validation_sets = _check_test_sets(raw["validation_sets"], wrong, seen) if raw.get("validation_sets") else ()
    seeds = _check_seeds(raw.get("seeds", [42]), wrong)
    raw["seeds"] = list(seeds)
    recipe = Recipe(
        name=name,
        resolved=raw,
        arms=arms,
        seeds=seeds,
        model=raw["model"],
        data=raw["data"],
        test_sets=test_sets,
        decode=_check_decode(raw["decode"], wrong),
        metrics=_check_metrics(raw["score"].setdefault("metrics", ["bleu", "chrf"]), wrong),
        compare=raw["compare"],
        source=path,
        validation_sets=validation_sets,
        launch=_check_launch(raw.get("launch"), wrong),
    )
    recipe.selection.update(check_selection(raw.get("selection"), recipe, wrong))
    if "selection" in raw:  # not set by default, so that a run folder of before is still this recipe's
        raw["selection"] = dict(recipe.selection)
    decoded = [arm.name for arm in arms if arm.decode]
    if not decoded:
        raise wrong("every arm has `decode: false`, so there would be nothing to compare")
    baseline = raw["compare"].setdefault("baseline", "mle" if "mle" in decoded else decoded[0])
    if baseline not in decoded:
        raise wrong(f"`compare.baseline` is `{baseline}`, which is no arm that is decoded: {', '.join(decoded)}")
    for key, default, least in (("n_samples", 1000, 1), ("seed", 12345, 0)):
        if not is_whole(value := raw["compare"].setdefault(key, default), least):
            raise wrong(f"`compare.{key}` must be a whole number of at least {least}, not {value!r}")
    from convexlm.resampling import MOST_SAMPLES

    if raw["compare"]["n_samples"] > MOST_SAMPLES:
        raise wrong(f"`compare.n_samples` must be at most {MOST_SAMPLES}, not {raw['compare']['n_samples']}")
    if not isinstance(wanted := raw["compare"].get("reference_nll", True), bool):
        raise wrong(f"`compare.reference_nll` must be true or false, not {wanted!r}")
    return recipe


def _check_arms(raw: dict[str, Any], wrong: Any) -> tuple[Arm, ...]:
    arms = raw.get("arms")
    if not isinstance(arms, dict) or not arms:
        raise wrong("`arms` is missing: a mapping such as {mle: {objective: mle}, convex: {objective: convex, k: 1}}")
    known = _train_options()
    for key in raw["train"]:
        if key not in known:
            raise wrong(f"unknown option `train.{key}`{did_you_mean(key, known, _elsewhere())}")
    check_types(raw["train"], "train.", wrong)
    made: list[Arm] = []
    for name, entry in arms.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise wrong(f"arm {name!r}: a name is letters, digits, `.`, `_`, `+` or `-`")
        entry = {} if entry is None else entry
        if not isinstance(entry, dict):
            raise wrong(f"arm `{name}` must be a mapping of options")
        for key in entry:
            if key not in known | ARM_KEYS:
                raise wrong(f"arm `{name}`: unknown option `{key}`{did_you_mean(key, known | ARM_KEYS, _elsewhere())}")
        check_types(entry, f"arm `{name}`: ", wrong)
        start = entry.get("init_from")
        if start is not None and start not in [arm.name for arm in made]:
            raise wrong(f"arm `{name}`: `init_from: {start}` names no arm that comes before it")
        if start is not None and raw["model"].get("use_peft"):
            raise wrong(
                f"arm `{name}`: `init_from` needs a whole model, but with `model.use_peft` arm `{start}` leaves an "
                "adapter; export its checkpoint, and begin another recipe with `model_name_or_path` there"
            )
        options = {**raw["train"], **{key: value for key, value in entry.items() if key not in ARM_KEYS}}
        if "objective" not in options:
            raise wrong(f"arm `{name}`: `objective` is missing; give mle, convex, power, ...")
        _check_objective(options, name, wrong)
        if (seeded := re.fullmatch(r"(.+)\.seed\d+", name)) and seeded[1] in arms:
            raise wrong(f"arm `{name}`: that is what arm `{seeded[1]}` is called with another seed; name it otherwise")
        made.append(Arm(name, options, start, entry.get("decode", True), entry.get("dataset")))
    return tuple(made)


def _check_launch(launch: Any, wrong: Any) -> LaunchSettings:
    launch = {} if launch is None else launch
    if not isinstance(launch, dict):
        raise wrong("`launch` must be a mapping such as {accelerate_config: fsdp2, num_processes: 8}")
    known = {f.name for f in dataclasses.fields(LaunchSettings)} - {"machine_rank"}
    _only_known(launch, known, wrong, "key in `launch`")
    for key in ("accelerate_config", "main_process_ip"):
        if not isinstance(launch.get(key), (str, type(None))):
            raise wrong(f"`launch.{key}` must be a text, not {launch[key]!r}")
    settings = launch_settings(launch)
    _in_recipe("launch", lambda: settings.resolved(to_plan=True), wrong)
    return settings


def _check_objective(options: dict[str, Any], arm: str, wrong: Any) -> None:
    from convexlm.objectives import get_objective

    settings = {
        key: options[key] for key in ("k", "level", "length_weighting", "mle_mix") if options.get(key) is not None
    }
    settings.update(as_mapping(options.get("objective_kwargs")) or {})
    try:
        get_objective(options.get("objective", "convex"), **settings)
    except (ValueError, TypeError) as error:
        raise wrong(f"arm `{arm}`: {error}") from None


def _check_seeds(seeds: Any, wrong: Any) -> tuple[int, ...]:
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        seeds = [seeds]
    if not isinstance(seeds, list) or not seeds or any(not is_whole(s, 0) or s >= 2**32 for s in seeds):
        raise wrong(f"`seeds` must be a list of whole numbers from 0 to 2^32 - 1, not {seeds!r}")
    if len(set(seeds)) < len(seeds):
        raise wrong("`seeds` names a seed twice")
    return tuple(seeds)


def _check_metrics(metrics: Any, wrong: Any) -> tuple[str, ...]:
    from convexlm.scoring import get_metric

    if not isinstance(metrics, list) or not metrics or any(not isinstance(name, str) for name in metrics):
        raise wrong(f"`score.metrics` must be a list such as [bleu, chrf], not {metrics!r}")
    for name in metrics:
        _in_recipe("score.metrics", partial(get_metric, name), wrong)
    if len(set(metrics)) < len(metrics):
        raise wrong("`score.metrics` names a metric twice")
    return tuple(metrics)


def is_whole(value: Any, least: int) -> bool:
    """Whether a value of a recipe is a whole number of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _in_recipe(key: str, check: Callable[[], Any], wrong: Any) -> None:
    """A check from another module, its complaint put under the recipe's file and key."""
    try:
        check()
    except UserError as error:
        raise wrong(f"`{key}`: {error}") from None


def _check_test_sets(test_sets: Any, wrong: Any, seen: set[tuple[str, str]]) -> tuple[dict[str, Any], ...]:
    if not isinstance(test_sets, list) or not test_sets:
        raise wrong(
            "`test_sets` is missing: a list such as [{name: newstest, pairs: [de-en], sources: ..., references: ...}]"
        )
    for entry in test_sets:
        if not isinstance(entry, dict):
            raise wrong("each of `test_sets` is a mapping such as {name: newstest, pairs: [de-en], sources: ...}")
        _in_recipe("test_sets", partial(name_in_files, entry.get("name")), wrong)
        name = name_in_files(entry["name"])
        pairs = entry.get("pairs")
        if isinstance(pairs, str):
            pairs = entry["pairs"] = [pairs]
        if not isinstance(pairs, list) or not pairs:
            raise wrong(f"test set `{entry['name']}`: `pairs` is missing, such as [de-en, en-de]")
        for pair in pairs:
            _in_recipe(f"test_sets.{entry['name']}.pairs", partial(split_pair, pair), wrong)
            if (name, pair) in seen:
                raise wrong(f"test set `{entry['name']}` has the pair {pair} twice")
            seen.add((name, pair))
    return tuple(test_sets)


def _check_decode(decode: dict[str, Any], wrong: Any) -> dict[str, Any]:
    from convexlm.decoding.backends import get_backend
    from convexlm.decoding.search import Search

    searches = decode.setdefault("searches", [{"num_beams": 1}, {"num_beams": 4}])
    if not isinstance(searches, list) or not searches or not all(isinstance(entry, dict) for entry in searches):
        raise wrong("`decode.searches` must be a list such as [{num_beams: 1}, {num_beams: 4}]")
    names = []
    backend = str(decode.get("backend", "hf"))
    if backend != "auto":
        _in_recipe("decode.backend", partial(get_backend, backend), wrong)
    for entry in searches:
        try:
            search = Search.from_mapping(entry)
            names.append(search.name)
            if backend != "auto":  # told now, and not after the training
                get_backend(backend)().check(search)
        except (UserError, TypeError, ValueError) as error:
            raise wrong(f"decode.searches: {error}") from None
    if len(set(names)) < len(names):
        raise wrong(f"two entries of `decode.searches` have one name ({', '.join(names)}); give one a `label`")
    checkpoints = decode.setdefault("checkpoints", "last")
    steps_ok = isinstance(checkpoints, list) and all(is_whole(step, 1) for step in checkpoints)
    if checkpoints not in ("last", "all") and not (steps_ok and checkpoints):
        raise wrong(f"`decode.checkpoints` is `last`, `all` or a list of steps, not {checkpoints!r}")
    if steps_ok and len(set(checkpoints)) < len(checkpoints):
        raise wrong("`decode.checkpoints` names a step twice")
    share = decode.get("gpu_memory_utilization")
    if share is not None and (isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1):
        raise wrong(f"`decode.gpu_memory_utilization` must be a number above 0 and at most 1, not {share!r}")
    for key in ("batch_size", "token_budget", "num_processes"):
        if decode.get(key) is not None and not is_whole(decode[key], 1):
            raise wrong(f"`decode.{key}` must be a whole number of at least 1, not {decode[key]!r}")
    for key in ("instruction", "instruction_file", "dtype", "device", "compute_type"):
        if decode.get(key) is not None and not isinstance(decode[key], str):
            raise wrong(f"`decode.{key}` must be a text, not {decode[key]!r}")
    if decode.get("instruction") and decode.get("instruction_file"):
        raise wrong("give `decode.instruction` or `decode.instruction_file`, not both")
    return decode


def _train_options() -> set[str]:
    from convexlm.config import ConvexConfig

    # The run folder and the seeds are the pipeline's to set.
    options = {f.name for f in dataclasses.fields(ConvexConfig) if f.init} - {"output_dir", "seed"}
    return options | {"global_batch_size"}


def _model_options() -> set[str]:
    from trl import ModelConfig

    return {f.name for f in dataclasses.fields(ModelConfig) if f.init}


def _elsewhere() -> dict[str, str]:
    options = {"model": SECTIONS["model"] | _model_options(), "data": SECTIONS["data"]}
    return {"seed": "seeds", **{name: f"{section}.{name}" for section in options for name in options[section]}}


def _only_known(mapping: Mapping[str, Any], known: set[str], wrong: Any, what: str) -> None:
    for key in mapping:
        if key not in known:
            raise wrong(f"unknown {what}: `{key}`{did_you_mean(key, known)}")
