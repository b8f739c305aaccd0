"""Forward and backward through the fused head under ZeRO-3, its weight sharded; prints what happened as JSON.

Run by test_deepspeed.py in a process of its own, alone in its group.
"""

from __future__ import annotations

import json
import os

import deepspeed  # type: ignore[import-not-found,unused-ignore]
import torch
from deepspeed.utils import safe_get_full_grad  # type: ignore[import-not-found,unused-ignore]

from convexlm.fused_forward import HeadCall, add_fused_objective
from convexlm.objectives import get_objective
from training_helpers import tiny_model

ZERO = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
CONFIG = {"train_batch_size": 1, "zero_optimization": ZERO, "zero_allow_untested_optimizer": True}


def one(tied):
    call = HeadCall(get_objective("convex", k=0.5))
    torch.manual_seed(0)
    ids = torch.randint(4, 44, (2, 9))
    batch = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(9) < 3, -100), "fused_objective": call}
    whole, sharded = tiny_model(3, tie_word_embeddings=tied), tiny_model(3, tie_word_embeddings=tied)
    for model in (whole, sharded):
        add_fused_objective(model)
    wanted = whole(**batch).loss
    wanted.backward()
    engine = deepspeed.initialize(
        model=sharded, optimizer=torch.optim.SGD(sharded.parameters(), lr=0.1), config=dict(CONFIG)
    )[0]
    weight, gathers = sharded.lm_head.weight, {"forward": 0, "backward": 0}
    before, phase = weight.numel(), ["forward"]
    for parameter in sharded.parameters():
        counted(parameter, weight, gathers, phase)
    loss = engine(**batch).loss
    phase[0] = "backward"
    engine.backward(loss)
    gradient = safe_get_full_grad(weight)
    return {
        "numbers_before": before,
        "gathers": gathers,
        "loss": abs(float(loss.detach() - wanted.detach())),
        "gradient": float((gradient - whole.lm_head.weight.grad).abs().max()),
        "largest": float(gradient.abs().max()),
    }


def counted(parameter, weight, gathers, phase):
    gather = parameter.all_gather_coalesced

    def all_gather_coalesced(parameters, *args, **kwargs):
        gathers[phase[0]] += any(other is weight for other in parameters)
        return gather(parameters, *args, **kwargs)

    parameter.all_gather_coalesced = all_gather_coalesced


if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    print("found " + json.dumps([one(tied) for tied in (False, True)]), flush=True)
    os._exit(0)
