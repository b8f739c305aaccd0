"""The fused head asks a device for its numbers once a batch, not once a chunk: on a GPU each time would stall it."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from convexlm import head_products
from convexlm.head import fused_objective
from convexlm.objectives import get_objective


class Counting(TorchDispatchMode):
    """How often each operation was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func.overloadpacket).removeprefix("aten.")] += 1
        return func(*args, **(kwargs or {}))


def calls(name: str, chunk_tokens: int | None, normalizer: float | None) -> collections.Counter[str]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(256, 16, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator, requires_grad=True)
    labels, ids = torch.randint(50, (256,), generator=generator), torch.arange(256) // 16
    with Counting() as counting:
        out = fused_objective(
            hidden,
            weight,
            labels,
            ids,
            get_objective(name),
            normalizer,
            chunk_tokens=chunk_tokens,
            need_accuracy=False,  # on a CPU counted row by row
        )
        out.loss.backward()
    return counting.calls


@pytest.mark.parametrize("normalizer", [None, 256.0])
@pytest.mark.parametrize("name", ["mle", "convex", "dft"])
def test_sequences_are_numbered_once_however_many_chunks_there_are(name: str, normalizer: float | None):
    few, many = (calls(name, chunk_tokens, normalizer) for chunk_tokens in (None, 16))
    assert many["mm"] + many["addmm_"] > 4 * (few["mm"] + few["addmm_"]), "there are more chunks"
    for counted in (few, many):
        # Of the batch's runs, at its beginning; `unique` once, to see that no sequence comes in two runs.
        assert counted["unique_consecutive"] == 1
        assert counted["_unique2"] + counted["unique_dim"] <= 1
        assert counted["nonzero"] == 0, "no label is masked"
    if normalizer is not None:  # a tensor on a CPU is checked, where that costs nothing
        assert many["_local_scalar_dense"] == few["_local_scalar_dense"]


def test_tiles_of_the_weight_are_for_a_cpu():
    meta = torch.empty(2000, 8, dtype=torch.bfloat16, device="meta")
    gradient = head_products.WeightGradient(meta, torch.bfloat16, torch.bfloat16, 3, None, None)
    assert gradient._tile == 2000
    assert head_products.WeightGradient(meta, torch.bfloat16, torch.bfloat16, 3, 7, None)._tile == 7
    on_cpu = torch.empty(2000, 8, dtype=torch.bfloat16)
    assert head_products.WeightGradient(on_cpu, torch.bfloat16, torch.bfloat16, 3, None, None)._tile < 2000
