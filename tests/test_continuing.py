"""`train --resume` with other options: what may change takes effect, what may not is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import LlamaForCausalLM

from convexlm.checkpoints import COMPLETE_FILE, best_checkpoint, best_step
from convexlm.continuing import refuse_what_cannot_change
from convexlm.errors import UserError
from convexlm.metrics_file import read_metrics
from training_helpers import Run, tiny_config, tiny_tokenizer, train, write_records

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"]}


def write_model(folder, seed=0):
    torch.manual_seed(seed)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_model(folder / "base")
    write_model(folder / "other", seed=7)
    shutil.copytree(folder / "base", folder / "moved")
    shutil.copytree(folder / "base", folder / "marked")
    spelled = json.loads((folder / "marked" / "tokenizer.json").read_text())
    spelled["model"]["vocab"] = {
        {"w1": "w2", "w2": "w1"}.get(word, word): number for word, number in spelled["model"]["vocab"].items()
    }
    (folder / "marked" / "tokenizer.json").write_text(json.dumps(spelled))
    write_records(folder / "data.jsonl", 25)
    write_records(folder / "other.jsonl", 25, seed=3)
    write_records(folder / "eval.jsonl", 3, seed=5)
    return folder


@pytest.fixture(autouse=True)
def here(files, monkeypatch):
    monkeypatch.chdir(files)


def given(**settings):
    made = {
        "model_name_or_path": "base",
        "dataset": "data.jsonl",
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "optim": "adamw_torch_fused",
        "learning_rate": 1e-3,
    }
    return {key: value for key, value in {**made, **settings}.items() if value is not None}


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    """Folders of four steps, each trained once."""
    made = {}

    def folder_of(kind, **settings):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("trained") / "run"
            assert train(made[kind], **given(**settings)) == 0
        return made[kind]

    return folder_of


def half(source, target):
    """A copy of a run as it was at step 2."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoint-4")
    return target


def error(capfd):
    told = capfd.readouterr().err
    assert "Traceback" not in told
    (line,) = [line for line in told.splitlines() if "error:" in line]
    return line


def groups(checkpoint):
    return torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"]


# -- another training


@pytest.mark.parametrize(
    ("start", "changes", "said"),
    [
        ("lora", {"lora_alpha": 64}, "lora_alpha was 8, not 64"),
        ("lora", {"lora_r": 8}, "lora_r was 4, not 8"),
        ("lora", {"use_rslora": True}, "use_rslora was False, not True"),
        ("lora", {"lora_target_modules": ["q_proj", "o_proj"]}, "lora_target_modules was ['q_proj', 'v_proj'], not"),
        ("lora", dict.fromkeys(LORA), "use_peft was True, not False"),
        ("full", LORA, "use_peft was False, not True"),
        ("full", {"model_name_or_path": "other"}, "the model was base, not other"),
        ("full", {"tokenizer_name": "marked"}, "the tokenizer was base, not marked"),
        ("full", {"seed": 7}, "seed was 1, not 7"),
        ("full", {"data_seed": 7}, "data_seed was 1, not 7"),
        ("full", {"dtype": "bfloat16"}, "dtype was float32, not bfloat16"),
        ("full", {"packing": True}, "packing was False, not True"),
        ("full", {"per_device_train_batch_size": 8}, "(rows x accumulation x processes) was 4, not 8"),
        ("full", {"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy was random, not group_by"),
        ("dropped", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, "was 4 x 1 x 1, not 2 x 2"),
        ("full", {"neftune_noise_alpha": 5}, "neftune_noise_alpha was unset, not 5"),
        ("full", {"model_init_kwargs": '{"attention_dropout": 0.5}'}, "model_init_kwargs was unset, not {'attention_"),
        ("full", {"streaming": True}, "streaming was False, not True"),
        ("streamed", {"shuffle_buffer": 4}, "shuffle_buffer was 0, not 4"),
        ("streamed", {"dataset": "other.jsonl"}, "the data was data.jsonl, not other.jsonl"),
        ("full", {"optim": "sgd"}, "--optim was adamw_torch_fused, not sgd"),
        ("full", {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_dataset": "eval.jsonl", "eval_strategy": "steps"},
         "--lr_scheduler_type was constant, not reduce_lr_on_plateau; the rate of reduce_lr_on_plateau follows"),
    ],
    ids=str,
)  # fmt: skip
def test_another_training_is_refused_in_one_line(trained, tmp_path, capfd, start, changes, said):
    first = {"lora": LORA, "full": {}, "streamed": {"streaming": True},
             "dropped": {"dataloader_drop_last": True}}[start]  # fmt: skip
    run = half(trained(start, **first), tmp_path / "run")
    capfd.readouterr()
    assert train(run, "--resume", **given(**{**first, **changes})) == 2
    assert said in error(capfd)
    assert {path.name for path in run.iterdir()} == {"README.md", "checkpoint-2", "metrics.jsonl"}


def test_what_changes_nothing_goes_on_to_the_same_weights(trained, tmp_path):
    """The base model elsewhere, the same global batch in another way."""
    whole = trained("lora", **LORA)
    run = half(whole, tmp_path / "run")
    same = {**LORA, "lora_target_modules": ["v_proj", "q_proj"], "model_name_or_path": "moved"}
    assert train(run, "--resume", **given(**same)) == 0
    assert read_metrics(run) == read_metrics(whole)
    for name, value in Run(run, 4).weights.items():
        assert torch.equal(value, Run(whole, 4).weights[name]), name
    shutil.rmtree(run / "checkpoint-4")
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert train(run, "--resume", **given(**same, **split)) == 0


def forget(checkpoint, *keys):
    """Make a marker as earlier versions wrote it."""
    marker = json.loads((checkpoint / COMPLETE_FILE).read_text())
    marker.pop("optimizer")
    for key in keys or [key for key in marker["training"] if key not in ("k_warmup", "max_length", "dataset")]:
        del marker["training"][key]
    (checkpoint / COMPLETE_FILE).write_text(json.dumps(marker))


@pytest.mark.parametrize(
    ("start", "changes", "said"),
    [
        (
            "lora",
            {"lora_target_modules": ["q_proj", "o_proj"]},
            "moments of the optimizer do not fit the model (exp_avg of",
        ),
        (
            "lora",
            {"lora_target_modules": ["q_proj"]},
            "moments of the optimizer do not fit the model (loaded state dict",
        ),
        ("lora", {"lora_r": 8}, "weights do not fit the model (size mismatch"),
        ("lora", dict.fromkeys(LORA), "use_peft was True, not False"),
        ("full", LORA, "use_peft was False, not True"),
    ],
    ids=str,
)
def test_older_checkpoints_are_held_to_their_shapes(trained, tmp_path, capfd, start, changes, said):
    run = half(trained(start, **({} if start == "full" else LORA)), tmp_path / "run")
    forget(run / "checkpoint-2")
    capfd.readouterr()
    assert train(run, "--resume", **given(**{**({} if start == "full" else LORA), **changes})) == 2
    assert said in error(capfd)


def test_older_checkpoints_go_on(trained, tmp_path):
    whole = trained("full")
    run = half(whole, tmp_path / "run")
    forget(run / "checkpoint-2")
    assert train(run, "--resume", **given()) == 0
    assert read_metrics(run) == read_metrics(whole)
    for name, value in Run(run, 4).weights.items():
        assert torch.equal(value, Run(whole, 4).weights[name]), name


# -- options of optimizer and schedule


def test_another_learning_rate_takes_effect(trained, tmp_path, capfd):
    run = half(trained("full"), tmp_path / "run")
    capfd.readouterr()
    assert train(run, "--resume", **given(learning_rate=0.05)) == 0
    assert "  learning_rate 0.001 -> 0.05 from step 2\n" in capfd.readouterr().err
    assert Run(run, 4).column("learning_rate").tolist() == [0.001, 0.001, 0.05, 0.05]
    assert {group["lr"] for group in groups(run / "checkpoint-4")} == {0.05}
    # Gone on with again, it is what was given last, and there is nothing to tell.
    whole = shutil.copytree(run, tmp_path / "whole")
    shutil.rmtree(run / "checkpoint-4")
    assert train(run, "--resume", **given(learning_rate=0.05)) == 0
    assert read_metrics(run) == read_metrics(whole)


def test_another_schedule_goes_on_at_its_own_place(files, tmp_path, capfd):
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert train(run, **given(max_steps=2, lr_scheduler_type="linear")) == 0
    capfd.readouterr()
    then = given(max_steps=6, lr_scheduler_type="cosine", learning_rate=0.05)
    assert train(run, "--resume", **then) == 0
    told = capfd.readouterr().err
    assert "learning_rate 0.001 -> 0.05, lr_scheduler_type linear -> cosine from step 2" in told
    assert train(whole, **then) == 0
    assert Run(run, 6).column("learning_rate")[2:].equal(Run(whole, 6).column("learning_rate")[2:])


def test_with_more_steps_the_schedule_is_that_of_all_of_them(files, tmp_path, capfd):
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert train(run, **given(max_steps=2, lr_scheduler_type="linear", k_warmup=0.5)) == 0
    capfd.readouterr()
    then = given(max_steps=4, lr_scheduler_type="linear", k_warmup=0.5)
    assert train(run, "--resume", **then) == 0
    told = "  rate of the next step 0 -> 0.0005 by the schedule, k_warmup 0.5 of 2 -> of 4 steps from step 2\n"
    assert told in capfd.readouterr().err
    assert train(whole, **then) == 0
    assert Run(run, 4).column("learning_rate")[2:].equal(Run(whole, 4).column("learning_rate")[2:])


def test_weight_decay_and_betas_take_effect_group_by_group(trained, tmp_path, capfd):
    run = half(trained("full"), tmp_path / "run")
    capfd.readouterr()
    assert train(run, "--resume", **given(weight_decay=0.5, adam_beta2=0.5, adam_epsilon=1e-6)) == 0
    told = capfd.readouterr().err
    assert "  weight_decay 0 -> 0.5, adam_beta2 0.999 -> 0.5, adam_epsilon 1e-08 -> 1e-06 from step 2\n" in told
    decayed, plain = groups(run / "checkpoint-4")
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.5, 0.0)
    assert tuple(decayed["betas"]) == tuple(plain["betas"]) == (0.9, 0.5)
    assert decayed["eps"] == 1e-6


def test_another_clipping_of_the_gradient_is_told(trained, tmp_path, capfd):
    run = half(trained("full"), tmp_path / "run")
    capfd.readouterr()
    assert train(run, "--resume", **given(max_grad_norm=0.01)) == 0
    assert "  max_grad_norm 1.0 -> 0.01 from step 2\n" in capfd.readouterr().err
    parts = [Run(one, 4).weights for one in (run, trained("full"))]
    assert any(not torch.equal(parts[0][name], parts[1][name]) for name in parts[0])


def test_another_precision_is_told(trained, tmp_path, capfd):
    run = half(trained("full"), tmp_path / "run")
    capfd.readouterr()
    assert train(run, "--resume", **given(bf16=True)) == 0
    assert "  bf16 False -> True from step 2\n" in capfd.readouterr().err


def test_how_often_is_logged_saved_and_evaluated_takes_effect(trained, tmp_path, capfd):
    run = half(trained("full"), tmp_path / "run")
    capfd.readouterr()
    often = {"save_steps": 1, "logging_steps": 2, "eval_dataset": "eval.jsonl", "eval_strategy": "steps"}
    assert train(run, "--resume", **given(**often, eval_steps=0.25)) == 0
    assert "do not match" not in capfd.readouterr().err
    assert [(line["step"], "loss" in line) for line in read_metrics(run)[2:]] == [(3, False), (4, True), (4, False)]
    assert (run / "checkpoint-3").is_dir()


def test_other_modules_to_optimize_are_refused(trained, tmp_path, capsys):
    run = half(trained("full"), tmp_path / "run")
    assert train(run, "--resume", **given(optim_target_modules=["q_proj"])) == 2
    assert "--optim_target_modules was unset, not q_proj; another optimizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_grad_norm": 0.5}, None),
        ({"learning_rate": 0.5}, "--learning_rate was 0.001, not 0.5; under DeepSpeed optimizer and schedule go on"),
        ({"weight_decay": 0.5}, "--weight_decay was 0.0, not 0.5; under DeepSpeed"),
        ({}, None),
    ],
)
def test_under_deepspeed_a_change_is_refused(trained, change, said):
    checkpoint = trained("full") / "checkpoint-2"
    marker = json.loads((checkpoint / COMPLETE_FILE).read_text())
    marker["optimizer"].update(change)
    if said is None:
        refuse_what_cannot_change(checkpoint, marker, deepspeed=True)
        return
    with pytest.raises(UserError) as raised:
        refuse_what_cannot_change(checkpoint, marker, deepspeed=True)
    assert said in str(raised.value)


def test_where_no_step_is_left_nothing_is_refused_for_them(trained, tmp_path, capfd):
    run = shutil.copytree(trained("full"), tmp_path / "run")
    assert train(run, "--resume", **given(optim="sgd")) == 0
    assert "nothing to do" in capfd.readouterr().err


# -- the best checkpoint


BEST = {"eval_dataset": "eval.jsonl", "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "nll",
        "save_total_limit": 1, "objective": "mle"}  # fmt: skip


@pytest.mark.parametrize("how", ["moved", "cwd"])
def test_the_best_checkpoint_is_found_where_the_folder_is_now(files, tmp_path, capfd, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    near = {key: files / BEST[key] if key == "eval_dataset" else value for key, value in BEST.items()}
    near.update(model_name_or_path=files / "base", dataset=files / "data.jsonl")
    near.update(learning_rate=3.0)
    more = {"max_steps": 6, "learning_rate": 300.0}  # which makes nothing better
    assert train("run", **given(**near)) == 0
    run = tmp_path / "run"
    assert json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())["best_global_step"] == 2
    if how == "moved":
        run = run.rename(tmp_path / "there")
    else:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert best_checkpoint(run / "checkpoint-4") == str(run / "checkpoint-2")
    capfd.readouterr()
    assert train(run, "--resume", "--json", **given(**{**near, **more})) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["best_checkpoint"] == str(run / "checkpoint-2")
    assert "does not exist anymore" not in err
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-6"}
    assert train(run, "--resume", "--json", **given(**{**near, **more})) == 0
    assert json.loads(capfd.readouterr().out)["new_steps"] == 0


def test_the_best_checkpoint_is_the_best_of_those_that_were_saved(files, tmp_path, capfd):
    """The first evaluation is as good as any, and nothing was saved at it."""
    run, even = tmp_path / "run", {**BEST, "eval_steps": 1, "metric_for_best_model": "num_target_tokens"}
    assert train(run, "--json", **given(**even)) == 0
    assert json.loads(capfd.readouterr().out)["best_checkpoint"] == str(run / "checkpoint-2")
    lines = [{"step": step, "eval_nll": nll} for step, nll in {2: 3.0, 3: 1.0, 4: 2.0, 5: float("nan")}.items()]
    assert best_step(lines, "nll", greater=False) == 3 == best_step(lines, "eval_nll", greater=False)
    assert best_step(lines, "nll", False, {2, 4, 5}) == 4 and best_step(lines, "nll", True, {2, 4, 5}) == 2
    assert best_step([*lines[3:], {"step": 6}], "nll", greater=False) is None


def test_another_comparison_is_over_all_evaluations_and_never_over_other_data(files, tmp_path, capfd):
    run, limit = tmp_path / "run", {**BEST, "save_total_limit": None}
    assert train(run, "--json", **given(**limit)) == 0
    nll = {line["step"]: line["eval_nll"] for line in read_metrics(run) if "eval_nll" in line}
    assert json.loads(capfd.readouterr().out)["best_checkpoint"] == str(run / "checkpoint-4") and nll[4] < nll[2]
    for steps in (4, 6):
        other = given(**limit, max_steps=steps, greater_is_better=True)
        assert train(run, "--resume", "--json", **other) == 0
        assert json.loads(capfd.readouterr().out)["best_checkpoint"] == str(run / "checkpoint-2")
    more = given(**{**limit, "eval_dataset": "data.jsonl"}, max_steps=8)
    assert train(run, "--resume", **more) == 2
    assert "the data to evaluate on were eval.jsonl, not data.jsonl, and --metric_for_best_model" in error(capfd)
    assert train(run, "--resume", **{**more, "max_steps": 6}) == 0  # no step is left


def test_a_best_checkpoint_that_is_gone_is_not_named(tmp_path):
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": "/away/checkpoint-2"}))
    assert best_checkpoint(folder) is None
