"""What a launch's options mean: settings, the variables they become, and the precision by device."""

from __future__ import annotations

import os

import pytest
import torch
import yaml

from convexlm.cli import main
from convexlm.errors import UserError
from convexlm.launch import environment, precision, settings
from convexlm.launch.environment import make_plan
from convexlm.launch.precision import choose_precision
from convexlm.launch.settings import PACKAGED, LaunchSettings, config_file, kind_of


@pytest.fixture
def gpus(monkeypatch):
    """As if the machine had so many GPUs."""

    def have(count, bf16=True):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)

    have(0)
    return have


@pytest.fixture
def deepspeed(monkeypatch):
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: object())


def own_file(folder, **says):
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", "mixed_precision": "no", **says}))
    return str(path)


def test_the_packaged_files_are_those_that_are_named():
    for name in PACKAGED:
        assert config_file(name).is_file()
    kinds = [kind_of(name) for name in PACKAGED]
    assert kinds == ["NO", "MULTI_GPU", "FSDP", "DEEPSPEED", "DEEPSPEED", "DEEPSPEED"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"accelerate_config": "zero4"}, "did you mean `zero"),
        ({"accelerate_config": "nowhere.yaml"}, "nowhere.yaml: no such file"),
        ({"num_processes": 0}, "--num_processes must be a whole number of at least 1, not 0"),
        ({"num_processes": "two"}, "--num_processes"),
        ({"num_machines": 2, "num_processes": 4}, "--num_machines needs --machine_rank"),
        ({"num_machines": 2, "machine_rank": 0, "num_processes": 4}, "--main_process_ip"),
        ({"num_machines": 2, "machine_rank": 2, "main_process_ip": "h", "num_processes": 4}, "counted from 0"),
        ({"num_machines": 2, "machine_rank": 0, "main_process_ip": "h", "num_processes": 3}, "no multiple"),
        ({"machine_rank": 1}, "counted from 0"),
        ({"main_process_port": 70000}, "ports end at"),
        ({"accelerate_config": "single_gpu", "num_processes": 2}, "is for one process, not 2"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_meant(asked, said):
    with pytest.raises(UserError) as error:
        LaunchSettings(**asked).resolved()
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("says", "said"),
    [
        ({"num_machines": "two"}, "own.yaml: `num_machines` must be a whole number, not 'two'"),
        ({"num_machines": [2]}, "`num_machines` must be a whole number, not [2]"),
        ({"num_processes": 1.5}, "`num_processes` must be a whole number, not 1.5"),
        ({"machine_rank": True}, "`machine_rank` must be a whole number, not True"),
        ({"main_process_port": "any"}, "`main_process_port` must be a whole number"),
        ({"main_process_ip": 10.1}, "`main_process_ip` must be an address"),
        ({"num_machines": 0}, "--num_machines must be a whole number of at least 1, not 0"),
    ],
    ids=str,
)
def test_a_file_that_cannot_be_meant_is_named(tmp_path, says, said):
    with pytest.raises(UserError) as error:
        LaunchSettings(accelerate_config=own_file(tmp_path, distributed_type="MULTI_GPU", **says)).resolved()
    assert said in str(error.value)


def test_the_command_line_wins_over_the_recipe_and_both_over_the_file(tmp_path):
    path = own_file(tmp_path, distributed_type="MULTI_GPU", num_processes=8, main_process_port=1234)
    recipe = LaunchSettings(accelerate_config=path, num_processes=4)
    assert recipe.resolved().processes == 4 and recipe.resolved().main_process_port == 1234
    assert LaunchSettings(num_processes=2).over(recipe).resolved().processes == 2
    assert LaunchSettings(accelerate_config=path).resolved().processes == 8
    assert not LaunchSettings() and LaunchSettings(num_processes=1)


def test_processes_are_one_a_gpu_where_nothing_is_said(gpus):
    gpus(4)
    assert LaunchSettings(accelerate_config="fsdp2").resolved().processes == 4
    assert LaunchSettings(accelerate_config="single_gpu").resolved().processes == 1
    two = LaunchSettings(num_machines=2, machine_rank=1, main_process_ip="h").resolved()
    assert (two.processes, two.local_processes, two.main_process_port) == (8, 4, 29500)


def test_more_processes_than_gpus_are_refused(gpus):
    gpus(2)
    with pytest.raises(UserError, match="has 2 GPUs"):
        make_plan(LaunchSettings(num_processes=4).resolved())
    assert make_plan(LaunchSettings(num_processes=4).resolved(), use_cpu=True).on_cpu


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ({"fsdp_version": 1}, "only the second FSDP trains; set `fsdp_version: 2`"),
        ({}, "only the second FSDP trains"),
        ({"fsdp_version": 2, "fsdp_offload_params": True}, "there is nothing to offload from"),
    ],
    ids=str,
)
def test_fsdp_that_does_not_train_on_a_cpu_is_refused(gpus, tmp_path, says, told):
    asked = LaunchSettings(accelerate_config=own_file(tmp_path, distributed_type="FSDP", fsdp_config=says))
    with pytest.raises(UserError, match=f"own.yaml: on the CPU {told}"):
        make_plan(LaunchSettings(num_processes=2).over(asked).resolved())
    gpus(2)
    assert make_plan(asked.resolved()).kind == "FSDP"


def test_every_process_gets_its_rank_and_no_variable_of_an_earlier_launch(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("LOCAL_RANK", "7")
    asked = LaunchSettings(num_processes=4, num_machines=2, machine_rank=1, main_process_ip="h").resolved()
    found = [make_plan(asked).of_process(number, "h", 4242) for number in range(2)]
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [[one[name] for name in names] for one in found] == [
        ["2", "0", "4", "2", "1", "h", "4242"],
        ["3", "1", "4", "2", "1", "h", "4242"],
    ]
    alone = make_plan(LaunchSettings(accelerate_config="single_gpu").resolved()).of_process(0, "h", 1)
    assert not set(names) & set(alone)
    assert alone["CUDA_VISIBLE_DEVICES"] == "0"  # or transformers would split batches over both


def test_the_files_become_what_accelerate_makes_of_them(gpus, deepspeed):
    gpus(2)
    before = dict(os.environ)
    made = {name: make_plan(LaunchSettings(accelerate_config=name).resolved()).variables for name in PACKAGED}
    assert dict(os.environ) == before
    fsdp = made["fsdp2"]
    assert fsdp["ACCELERATE_USE_FSDP"] == "true" and fsdp["FSDP_VERSION"] == "2"
    assert fsdp["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT" and fsdp["FSDP_RESHARD_AFTER_FORWARD"] == "true"
    for name, stage, where in (("zero2", "2", "none"), ("zero3", "3", "none"), ("zero3_offload", "3", "cpu")):
        assert made[name]["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert made[name]["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == stage
        assert made[name]["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] == where
        assert made[name]["ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"] == where
        assert made[name].get("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL") == ("true" if stage == "3" else None)
    for name in ("single_gpu", "multi_gpu"):
        assert not {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & set(made[name])
    # Precision is the training options' to choose, not bf16 on devices that have none.
    assert {variables["ACCELERATE_MIXED_PRECISION"] for variables in made.values()} == {"no"}


def test_what_is_missing_for_deepspeed_is_named(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install deepspeed"):
        make_plan(LaunchSettings(accelerate_config="zero3").resolved())


def test_on_the_cpu_deepspeed_is_not_told_of_it_and_fsdp_needs_two(gpus, deepspeed):
    plan = make_plan(LaunchSettings(accelerate_config="zero2", num_processes=2).resolved())
    assert plan.on_cpu and plan.variables["DS_ACCELERATOR"] == "cpu"
    # Told to use the CPU, or with GPUs in sight, accelerate would leave DeepSpeed out or take them.
    assert plan.variables["ACCELERATE_USE_CPU"] == "false" and plan.variables["CUDA_VISIBLE_DEVICES"] == ""
    with pytest.raises(UserError, match="nothing to offload from"):
        make_plan(LaunchSettings(accelerate_config="zero3_offload", num_processes=2).resolved())
    with pytest.raises(UserError, match="at least 2"):
        make_plan(LaunchSettings(accelerate_config="fsdp2", num_processes=1).resolved())
    plan = make_plan(LaunchSettings(accelerate_config="fsdp2", num_processes=2).resolved())
    assert plan.on_cpu and plan.variables[environment.FSDP_ON_CPU] == "1"


def test_a_file_that_accelerate_cannot_use_is_named(tmp_path, gpus):
    gpus(2)
    path = own_file(tmp_path, distributed_type="MULTI_GPU", num_processes=2, no_such_key=1)
    with pytest.raises(UserError, match="own.yaml"):
        make_plan(LaunchSettings(accelerate_config=path).resolved())


@pytest.mark.parametrize(
    ("count", "bf16", "options", "in_file", "wanted"),
    [
        (1, True, {}, None, (True, False)),
        (1, False, {}, None, (False, True)),  # not float32 without a word
        (1, False, {"bf16": False}, None, (False, False)),
        (1, True, {"fp16": True}, None, (False, True)),
        (1, True, {}, "fp16", (False, True)),
        (1, True, {}, "fp8", (False, False)),
        (1, True, {"bf16": True}, "fp16", (True, False)),
        (1, True, {"use_cpu": True}, None, (False, False)),
        (0, False, {}, None, (False, False)),
    ],
    ids=str,
)
def test_precision(gpus, monkeypatch, count, bf16, options, in_file, wanted):
    gpus(count, bf16)
    monkeypatch.setattr(precision, "device_type", lambda use_cpu: "cuda" if count and not use_cpu else "cpu")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", in_file or "no")
    found = choose_precision(options)
    assert (found.bf16, found.fp16) == wanted
    assert found.why in str(found)


def test_float16_weights_cannot_be_trained_with_loss_scaling(gpus, monkeypatch):
    gpus(1, bf16=False)
    with pytest.raises(UserError, match="float16"):
        choose_precision({"dtype": "float16"})
    assert choose_precision({"dtype": "float16", "use_peft": True}).fp16
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert choose_precision({"dtype": "float16"}).fp16


def test_what_is_no_number_of_processes_is_one_line(monkeypatch, capsys):
    for value in ("abc", "0", "-1", "2.5"):
        monkeypatch.setenv("WORLD_SIZE", value)
        for more in ([], ["--num_processes", "2"]):
            assert main(["train", "--dataset", "none.jsonl", "--output_dir", "none", *more]) == 2
            assert f"at least 1, not '{value}'; unset it" in capsys.readouterr().err


def test_variables_that_are_set_to_nothing_are_unset(monkeypatch):
    for name in settings.OF_TORCH:
        monkeypatch.setenv(name, "")
    assert settings.started_processes() == 1 and not settings.under_a_launcher()
    assert not any(name in os.environ for name in settings.OF_TORCH)  # transformers reads them, too


def test_another_launchs_options_are_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert settings.under_a_launcher()
    settings.refuse_another_launch(LaunchSettings(num_processes=2))
    with pytest.raises(UserError, match="has started 2 processes already"):
        settings.refuse_another_launch(LaunchSettings(num_processes=3))


def test_one_process_where_accelerate_was_asked_for_several_is_an_error(monkeypatch):
    settings.refuse_half_a_launch()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    settings.refuse_half_a_launch()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError, match="has started one"):
        settings.refuse_half_a_launch()
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings.refuse_half_a_launch()
