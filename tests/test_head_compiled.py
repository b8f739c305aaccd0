"""`torch_compile` through the trainer: the layers are compiled, the head is not, and training goes the same way."""

from __future__ import annotations

import torch

from convexlm import head
from trainer_helpers import assert_same_weights, logged, trained
from training_helpers import rows


def test_a_compiled_model_goes_the_way_of_the_plain_one(tmp_path, monkeypatch):
    compiling = []

    def watched(*args, **kwargs):
        compiling.append(torch.compiler.is_compiling())
        return plain_head(*args, **kwargs)

    plain_head = head._fused
    monkeypatch.setattr(head, "_fused", watched)
    data, steps = rows(12), {"max_steps": 3, "objective": "convex", "k": 0.5, "packing": True}
    wanted = trained(tmp_path / "plain", data, **steps)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # "aot_eager" traces forward and backward as inductor would, without a C++ compiler.
    got = trained(tmp_path / "compiled", data, torch_compile=True, torch_compile_backend="aot_eager", **steps)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs, "nothing was compiled"
    torch._dynamo.reset()
    assert compiling == [False] * 6
    for name in ("loss", "nll", "weight_mean", "grad_norm"):
        torch.testing.assert_close(logged(got, name), logged(wanted, name), rtol=1e-5, atol=1e-7, msg=name)
    assert_same_weights(got, wanted)
