"""How the fused head cuts a batch into chunks: the same results, in how much memory and how many products."""

from __future__ import annotations

import logging

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from convexlm import head as head_module
from convexlm.head import fused_objective
from convexlm.head_chunks import chunk_limit, default_chunk_tokens, pieces_of, plan_groups
from head_helpers import OBJECTIVES, batch


def test_results_do_not_depend_on_the_chunk():
    tensors, labels, ids = batch(torch.float32, lengths=(30, 2, 64, 5), hidden_size=32, vocabulary=500)
    results = []
    for chunk_tokens in (1, 3, 16, 64, 1000):
        for vocab_chunk in (None, 7, 499):
            for x in tensors.values():
                x.grad = None
            out = fused_objective(
                tensors["hidden"],
                tensors["weight"],
                labels,
                ids,
                OBJECTIVES["convex"],
                chunk_tokens=chunk_tokens,
                vocab_chunk=vocab_chunk,
            )
            out.loss.backward()
            results.append([out.loss.detach(), *(x.grad for x in tensors.values())])
    for result in results[1:]:
        for got, wanted in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, wanted, rtol=2e-5, atol=1e-8)


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation returns, and the matrix products."""

    def __init__(self):
        super().__init__()
        self.elements, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.itemsize)
        name = func.name()
        self.products += name.split(".")[0] in ("aten::mm", "aten::addmm", "aten::addmm_")
        return out


def count(frozen=False, gradients=True, **kwargs):
    head_module.workspace.clear()
    tensors, labels, ids = batch(torch.float32, lengths=(64,) * 7, hidden_size=8, vocabulary=1000)
    tensors["weight"].requires_grad_(not frozen)
    with Largest() as largest, torch.set_grad_enabled(gradients):
        out = fused_objective(tensors["hidden"], tensors["weight"], labels, ids, OBJECTIVES["convex"], **kwargs)
        if gradients:
            out.loss.backward()
    head_module.workspace.clear()
    return largest


def test_no_tensor_beyond_one_chunk_of_logits():
    for kwargs in ({"chunk_tokens": 64}, {"chunk_tokens": 40}, {"chunk_tokens": 64, "recompute": True}):
        for need_entropy in (False, True):
            assert count(**kwargs, need_entropy=need_entropy).elements <= kwargs["chunk_tokens"] * 1000


def test_three_products_a_chunk_two_if_frozen_one_without_gradients():
    assert count(chunk_tokens=64).products == 3 * 7
    assert count(chunk_tokens=64, frozen=True).products == 2 * 7
    assert count(chunk_tokens=64, gradients=False).products == 7
    assert count(chunk_tokens=64, recompute=True).products == 4 * 7
    assert count(chunk_tokens=64, recompute=True, frozen=True).products == 3 * 7
    assert count(chunk_tokens=64, recompute=True, gradients=False).products == 7


def test_buffers_are_used_again_and_can_be_given_back():
    tensors, labels, ids = batch(torch.float32)
    fused_objective(*tensors.values(), labels, ids, OBJECTIVES["convex"])
    before = {key: x.data_ptr() for key, x in head_module.workspace._buffers.items()}
    assert before
    fused_objective(*tensors.values(), labels, ids, OBJECTIVES["convex"])
    assert before == {key: x.data_ptr() for key, x in head_module.workspace._buffers.items()}
    head_module.workspace.clear()
    assert not head_module.workspace._buffers


def test_the_log_says_which_path_ran_and_why(caplog):
    head_module._said.clear()
    tensors, labels, ids = batch(torch.float32)
    with caplog.at_level(logging.INFO, logger="convexlm.head"):
        for _ in range(2):
            fused_objective(*tensors.values(), labels, ids, OBJECTIVES["convex"], chunk_tokens=17)
            fused_objective(*tensors.values(), labels, ids, OBJECTIVES["convex"], chunk_tokens=16)
    assert [r.getMessage() for r in caplog.records] == [
        "fused head: one-pass path, because every sequence fits a chunk of 17 tokens",
        "fused head: recompute path, because a sequence has 17 target tokens and a chunk takes 16",
    ]
    assert [r.levelno for r in caplog.records] == [logging.INFO, logging.WARNING]


def test_the_plan_keeps_sequences_whole():
    groups = plan_groups([3, 4, 2, 9, 1], chunk_tokens=7)
    assert [g.pieces for g in groups] == [((0, 7),), ((7, 9),), ((9, 13), (13, 18)), ((18, 19),)]
    assert plan_groups([], 7) == []
    assert pieces_of(0, 10, 3) == ((0, 2), (2, 5), (5, 7), (7, 10))


def test_the_default_chunk_shrinks_with_the_vocabulary():
    cpu = torch.device("cpu")
    sizes = [default_chunk_tokens(v, 2, cpu) for v in (1000, 32_000, 150_000, 10**9)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] >= 1
    assert sizes[1] * 32_000 * 2 <= 256 * 2**20


def test_a_batch_is_one_chunk_where_several_would_take_more_memory():
    other, cpu = torch.device("meta"), torch.device("cpu")
    limit, row = default_chunk_tokens(150_000, 2, other), 150_000 * 2
    assert chunk_limit(limit + 100, 150_000, 2, other, 100 * row) == limit + 100
    assert chunk_limit(limit + 101, 150_000, 2, other, 100 * row) == limit
    assert chunk_limit(limit + 1, 150_000, 2, other, 0) == chunk_limit(5, 150_000, 2, other, 0) == limit
    on_cpu = default_chunk_tokens(150_000, 2, cpu)
    assert chunk_limit(on_cpu + 1, 150_000, 2, cpu, 100 * row) == on_cpu
