"""What FSDP2 hands on of a model's outputs under mixed precision, and where FSDP would not be what is trained with."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils._pytree import tree_map_only

from convexlm.fused_forward import FusedModelOutput, Statistics, keep_output_dtype
from training_helpers import train, write_model_files, write_records


def test_fsdp_leaves_the_loss_in_its_own_dtype():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.bfloat16)
    plugin = SimpleNamespace(mixed_precision_policy=policy)
    keep_output_dtype(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    assert plugin.mixed_precision_policy == replace(policy, output_dtype=None)
    keep_output_dtype(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=None)))


def test_no_wrapper_sees_into_the_statistics():
    statistics = Statistics(tokens=torch.tensor(257.0, dtype=torch.float64))
    out = FusedModelOutput(loss=torch.tensor(1.0), statistics=statistics)
    cast = tree_map_only(torch.Tensor, lambda x: x.to(torch.bfloat16), out)
    assert cast.loss.dtype == torch.bfloat16 and cast.statistics is statistics


@pytest.mark.parametrize("said", [["--fsdp"], ["--fsdp", "full_shard"]])
def test_fsdp_by_transformers_own_option_is_not_ddp_on_the_cpu(tmp_path, capfd, said):
    write_model_files(tmp_path / "model")
    write_records(tmp_path / "data.jsonl", 4)
    given = {"config_name": tmp_path / "model", "tokenizer_name": tmp_path / "model"}
    assert train(tmp_path / "run", *said, dataset=tmp_path / "data.jsonl", **given) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert "FSDP on the CPU: accelerate would train without it" in line
    assert not (tmp_path / "run").exists()
