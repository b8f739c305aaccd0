"""Each of two processes computes its half of a batch through a wrapped model; rank 0 writes the averaged gradients.

Started by `torchrun` with a folder, where every way to wrap the model gets a file. Beside the gradients it has how
often the head's shards were gathered, in the forward and the backward pass.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from convexlm.fused_forward import HeadCall, add_fused_objective
from convexlm.launch import leave
from convexlm.objectives import get_objective
from training_helpers import tiny_model

FORMS = {"ddp": (0, 0), "fsdp2": (1, 0), "fsdp2-head-apart": (1, 1)}
"""How a model is wrapped (the last: its head a unit of FSDP's own), and how often that gathers the head."""


def batch():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 40, (4, 10), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1, 7:] = -100
    return ids, labels


def gradients(model, ids, labels, scale, chunk_tokens=None, between=lambda: None):
    normalizer = float((batch()[1][:, 1:] != -100).sum())
    call = HeadCall(get_objective("convex", k=0.5), normalizer=normalizer, chunk_tokens=chunk_tokens)
    out = model(input_ids=ids, labels=labels, fused_objective=call)
    between()
    (out.loss * scale).backward()
    return out


def count_gathers(weight_of, gathers):
    """Add to the last of `gathers` whenever FSDP gathers a group of parameters with that name in it."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups

    gather = groups.foreach_all_gather

    def counted(parameters, *args, **kwargs):
        gathers[-1] += any(parameter._param_fqn == weight_of for parameter in parameters)
        return gather(parameters, *args, **kwargs)

    groups.foreach_all_gather = counted


def wrapped(form):
    model = tiny_model()
    add_fused_objective(model)
    if form == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if form == "fsdp2-head-apart":
        fully_shard(model.lm_head, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main():
    dist.init_process_group("gloo")
    rank, gathers = dist.get_rank(), [0]
    count_gathers("lm_head.weight", gathers)
    ids, labels = batch()
    mine = slice(2 * rank, 2 * rank + 2)
    for form in FORMS:
        model = wrapped(form)
        for _ in range(2):  # the second time through finds what the first left behind
            model.zero_grad()
            gathers[:] = [0]
            # Both average over ranks, and the losses are parts of a sum. Seven targets a row: a chunk is a sequence.
            gradients(model, ids[mine], labels[mine], 2.0, chunk_tokens=7, between=lambda: gathers.append(0))
        found = {"gathers": torch.tensor(gathers)}
        for name, parameter in model.named_parameters():
            grad = parameter.grad
            found[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        if rank == 0:
            torch.save(found, f"{sys.argv[1]}/{form}.pt")
    leave(0)


if __name__ == "__main__":
    main()
