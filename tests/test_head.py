"""The fused head against full logits in float64, written out with torch's own log_softmax."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from convexlm import head as head_module
from convexlm import head_products, head_scaling
from convexlm.head import fused_objective
from convexlm.head_chunks import chunk_limit, default_chunk_tokens, pieces_of, plan_groups
from convexlm.head_products import products_dtype
from convexlm.objectives import Objective, get_objective, register_objective

HIDDEN, VOCABULARY = 12, 41
LENGTHS = (5, 1, 17, 8, 3)


@register_objective("test-reciprocal")
@dataclass(frozen=True, kw_only=True)
class Reciprocal(Objective):
    def value(self, m):
        return m / (m - 1)

    def weight(self, m):
        return 1 / (m - 1) ** 2


OBJECTIVES = {
    "mle": get_objective("mle"),
    "mle by sequence": get_objective("mle", length_weighting="sequence"),
    "convex": get_objective("convex", k=0.7),
    "convex by sequence": get_objective("convex", k=2.0, length_weighting="sequence"),
    "dft": get_objective("dft"),
    "token level by sequence": get_objective("convex", level="token", length_weighting="sequence"),
    "power": get_objective("power", k=0.4),
    "mixed": get_objective("convex", k=3.0, mle_mix=0.2),
    "registered": get_objective("test-reciprocal"),
}
VARIANTS = {
    "plain": {},
    "bias": {"bias": True},
    "soft-cap": {"logit_softcap": 3.0},
    "scale": {"logit_scale": 0.3},
    "all three": {"bias": True, "logit_softcap": 2.0, "logit_scale": -0.7},
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def batch(dtype, lengths=LENGTHS, bias=False, seed=0, hidden_size=HIDDEN, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    tensors = {
        "hidden": torch.randn(n, hidden_size, generator=generator),
        "weight": torch.randn(vocabulary, hidden_size, generator=generator) * 0.5,
    }
    if bias:
        tensors["bias"] = torch.randn(vocabulary, generator=generator)
    tensors = {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}
    labels = torch.randint(0, vocabulary, (n,), generator=generator)
    # Ids need not count up, nor start at 0.
    names = torch.tensor([7, 3, 100, -2, 50, 8, 9])[: len(lengths)]
    return tensors, labels, names.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))


def reference(tensors, labels, ids, objective, normalizer=None, sample_weights=None, scale=1.0, cap=None):
    """Loss, gradients and statistics from full logits in float64."""
    exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    logits = exact["hidden"] @ exact["weight"].T
    if "bias" in exact:
        logits = logits + exact["bias"]
    logits = logits * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    mask = labels != -100
    chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1)
    out = objective(chosen, mask, sequence_ids=ids, normalizer=normalizer, sample_weights=sample_weights)
    gradients = torch.autograd.grad(out.loss, list(exact.values()))
    p = logits.detach().softmax(-1)
    repeats = mask.double() if sample_weights is None else sample_weights * mask
    extra = {
        "correct": ((logits.argmax(-1) == labels) * repeats).sum(),
        "entropy_sum": (torch.special.entr(p).sum(-1) * repeats).sum(),
    }
    return out, dict(zip(exact, gradients, strict=True)), extra


def error(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-300)).item()


def check(dtype, objective, lengths=LENGTHS, frozen=(), labels=None, sample_weights=None, normalizer=None, **kwargs):
    transform = {"scale": kwargs.get("logit_scale", 1.0), "cap": kwargs.get("logit_softcap")}
    tensors, own_labels, ids = batch(dtype, lengths, bias=kwargs.pop("bias", False))
    labels = own_labels if labels is None else labels
    for name in frozen:
        tensors[name].requires_grad_(False)
    out = fused_objective(
        tensors["hidden"],
        tensors["weight"],
        labels,
        ids,
        objective,
        normalizer,
        bias=tensors.get("bias"),
        sample_weights=sample_weights,
        need_entropy=True,
        **kwargs,
    )
    wanted, gradients, extra = reference(tensors, labels, ids, objective, normalizer, sample_weights, **transform)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.loss.double(), wanted.loss.detach(), rtol=tolerance, atol=tolerance)
    assert out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    up = 2.0**12 if dtype == torch.float16 else 1.0  # float16 gradients need the loss scaled up, as a GradScaler does
    if out.loss.requires_grad:
        (out.loss * up).backward()
    for name, x in tensors.items():
        if name in frozen:
            assert x.grad is None
        else:
            assert x.grad.dtype == dtype
            assert error(x.grad.double() / up, gradients[name]) < tolerance, name
    statistics = {**wanted.statistics(), **extra}
    assert set(out.statistics()) == set(statistics)
    for name, value in statistics.items():
        if name == "correct" and dtype in (torch.bfloat16, torch.float16):
            continue  # rounding the logits makes and breaks ties
        torch.testing.assert_close(
            out.statistics()[name].double(), value.detach().double(), rtol=3 * tolerance, atol=3 * tolerance, msg=name
        )
    torch.testing.assert_close(out.mean_log_probs.double(), wanted.mean_log_probs, rtol=tolerance, atol=3 * tolerance)
    torch.testing.assert_close(out.weights.double(), wanted.weights, rtol=3 * tolerance, atol=3 * tolerance)
    return out


# chunk_tokens: everything in one chunk; several, each of whole sequences; one sequence too long; pieces of two tokens
@pytest.mark.parametrize("chunk_tokens", [None, 18, 9, 2])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_value_gradients_and_statistics_are_those_of_full_logits(dtype, name, chunk_tokens):
    out = check(dtype, OBJECTIVES[name], chunk_tokens=chunk_tokens)
    alone = name in ("mle", "dft")
    too_long = chunk_tokens is not None and chunk_tokens < max(LENGTHS) and not alone
    assert out.path == ("recompute" if too_long else "one-pass")
    assert out.recomputed_tokens == (0 if not too_long else 17 if chunk_tokens == 9 else sum(LENGTHS) - 1)
    if chunk_tokens is not None:
        assert out.chunk_tokens == chunk_tokens


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("hidden",), ("weight", "bias")], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_logit_transform_and_frozen_part(dtype, variant, frozen, recompute):
    settings = VARIANTS[variant]
    if not settings.get("bias"):
        frozen = tuple(name for name in frozen if name != "bias")
    out = check(dtype, OBJECTIVES["convex"], frozen=frozen, recompute=recompute, chunk_tokens=18, **settings)
    assert out.path == ("recompute" if recompute else "one-pass")


def test_weighted_records_and_the_global_normalizer():
    weights = torch.tensor([2.0, 0.0, 0.5, 1.0, 3.0]).repeat_interleave(torch.tensor(LENGTHS))
    for objective in OBJECTIVES.values():
        for chunk_tokens in (None, 9):
            for normalizer in (None, 123.0, torch.tensor(50)):
                check(
                    torch.float64, objective, sample_weights=weights, normalizer=normalizer, chunk_tokens=chunk_tokens
                )


def test_ignored_labels_take_no_part():
    _, labels, _ = batch(torch.float64)
    labels[torch.tensor([0, 5, 9, 10, -1])] = -100  # among them a whole sequence
    for name in OBJECTIVES:
        for chunk_tokens in (None, 4):
            check(torch.float64, OBJECTIVES[name], labels=labels, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("lengths", [(), (4,)], ids=["no tokens", "all masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_to_learn_is_a_zero_with_a_graph(lengths, dtype):
    tensors, labels, ids = batch(dtype, lengths, bias=True)
    labels = torch.full_like(labels, -100)
    out = fused_objective(
        tensors["hidden"], tensors["weight"], labels, ids, OBJECTIVES["convex"], bias=tensors["bias"]
    )
    assert out.loss == 0
    out.loss.backward()
    for x in tensors.values():
        assert x.grad is not None
        assert not x.grad.any()
    assert out.statistics()["num_tokens"] == out.statistics()["correct"] == 0
    # And as one rank's or micro-batch's empty part of a batch that has targets elsewhere.
    assert fused_objective(tensors["hidden"], tensors["weight"], labels, ids, OBJECTIVES["convex"], 10.0).loss == 0


def test_tokens_of_a_sequence_that_are_not_side_by_side_are_recomputed():
    tensors, labels, ids = batch(torch.float64)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))
    shuffled = {"hidden": tensors["hidden"][order].detach().requires_grad_(), "weight": tensors["weight"]}
    objective = OBJECTIVES["convex by sequence"]
    out = fused_objective(*shuffled.values(), labels[order], ids[order], objective, chunk_tokens=10)
    assert (out.path, out.reason) == ("recompute", "the tokens of a sequence are not side by side")
    _, gradients, _ = reference(shuffled, labels[order], ids[order], objective)
    out.loss.backward()
    for name, x in shuffled.items():
        assert error(x.grad, gradients[name]) < 1e-12


@dataclass(frozen=True, kw_only=True)
class Coupled(Objective):
    """An objective whose loss is no sum over sequences: the mean of convex losses, squared."""

    def value(self, m):
        return -m

    def weight(self, m):
        return torch.ones_like(m)

    def __call__(self, *args, **kwargs):
        out = super().__call__(*args, **kwargs)
        object.__setattr__(out, "loss", out.loss**2)
        return out


def test_an_objective_that_couples_sequences_is_recomputed():
    out = check(torch.float64, Coupled(), chunk_tokens=18)
    assert out.path == "recompute"
    assert "__call__" in out.reason


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


@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck(recompute):
    tensors, labels, ids = batch(torch.float64, lengths=(3, 4), bias=True, hidden_size=3, vocabulary=5)

    def loss(hidden, weight, bias):
        return fused_objective(
            hidden,
            weight,
            labels,
            ids,
            OBJECTIVES["mixed"],
            bias=bias,
            logit_softcap=2.0,
            logit_scale=0.5,
            chunk_tokens=4,
            recompute=recompute,
        ).loss

    assert torch.autograd.gradcheck(loss, tuple(tensors.values()))
    with pytest.raises(RuntimeError, match="does not require grad"):
        (grad,) = torch.autograd.grad(loss(*tensors.values()), tensors["hidden"], create_graph=True)
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_may_be_scaled_added_and_used_again(dtype):
    tensors, labels, ids = batch(dtype, bias=True)

    def run():
        return fused_objective(
            tensors["hidden"], tensors["weight"], labels, ids, OBJECTIVES["convex"], bias=tensors["bias"]
        ).loss

    def grads(loss, **kwargs):
        return torch.autograd.grad(loss, list(tensors.values()), **kwargs)

    once = grads(run())
    for loss in (run() * 3, run() + 2 * run(), (lambda x: x + x + x)(run())):
        for got, wanted in zip(grads(loss), once, strict=True):
            torch.testing.assert_close(
                got.float(), 3 * wanted.float(), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
            )
    loss = run()
    first = [x.clone() for x in grads(loss, retain_graph=True)]
    run()  # another batch in between overwrites the working buffers, not what was saved
    for got, wanted in zip(grads(loss), first, strict=True):
        assert torch.equal(got, wanted)
    with pytest.raises(RuntimeError, match="second time"):
        grads(loss)


def test_whether_gradients_may_be_overwritten_is_what_backward_was_told():
    """On a GPU the factor is put into the formed gradients, but not where they can be asked for again."""
    seen = []

    class Asking(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(head_scaling._graph_is_kept())
            return grad

    x = torch.ones(2, requires_grad=True)
    y = Asking.apply(x).sum()
    torch.autograd.grad(y, x, retain_graph=True)
    y.backward()
    assert seen == [True, False] and head_scaling._graph_is_kept()


def test_tied_embeddings_add_up():
    tensors, labels, ids = batch(torch.float64)
    weight, inputs = tensors["weight"], torch.arange(len(labels)) % VOCABULARY

    def through(weight, full):
        hidden = torch.tanh(weight[inputs])
        if not full:
            return fused_objective(hidden, weight, labels, ids, OBJECTIVES["convex"], chunk_tokens=18).loss
        log_probs = (hidden @ weight.T).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
        return OBJECTIVES["convex"](log_probs, torch.ones_like(labels, dtype=torch.bool), sequence_ids=ids).loss

    got, wanted = (torch.autograd.grad(through(weight, full), weight)[0] for full in (False, True))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype_and_returns_the_parameters(dtype):
    tensors, labels, ids = batch(torch.float32)
    with torch.autocast("cpu", dtype):
        out = fused_objective(tensors["hidden"], tensors["weight"], labels, ids, OBJECTIVES["convex"])
    out.loss.backward()
    wanted, gradients, _ = reference(tensors, labels, ids, OBJECTIVES["convex"])
    torch.testing.assert_close(out.loss.double(), wanted.loss.detach(), rtol=2e-2, atol=0)
    for name, x in tensors.items():
        assert x.grad.dtype == torch.float32
        assert error(x.grad, gradients[name]) < TOLERANCE[dtype]


def test_parameters_in_another_dtype_than_the_states():
    tensors, labels, ids = batch(torch.float32)
    weight = tensors["weight"].detach().bfloat16().requires_grad_()
    exact = {"hidden": tensors["hidden"], "weight": weight}
    out = fused_objective(*exact.values(), labels, ids, OBJECTIVES["convex"])
    out.loss.backward()
    _, gradients, _ = reference(exact, labels, ids, OBJECTIVES["convex"])
    assert error(exact["hidden"].grad, gradients["hidden"]) < 1e-5
    assert error(weight.grad, gradients["weight"]) < 1e-2
    assert weight.grad.dtype == torch.bfloat16


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


def test_ties_count_for_the_first_token_as_in_argmax():
    hidden, weight = torch.ones(3, 2), torch.zeros(5, 2)
    weight[1] = weight[3] = 1.0
    ids = torch.zeros(3, dtype=torch.int64)
    for dtype in (torch.float32, torch.bfloat16):
        out = fused_objective(hidden.to(dtype), weight.to(dtype), torch.tensor([1, 3, 0]), ids, OBJECTIVES["mle"])
        assert out.statistics()["correct"] == 1


def test_extreme_logits_stay_finite():
    tensors, labels, ids = batch(torch.float32)
    hidden = (tensors["hidden"].detach() * 1e3).requires_grad_()
    out = fused_objective(
        hidden, tensors["weight"], labels, ids, OBJECTIVES["convex"], chunk_tokens=9, need_entropy=True
    )
    out.loss.backward()
    exact = (hidden.detach() @ tensors["weight"].detach().T).double().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(out.log_probs.double(), exact, rtol=1e-5, atol=1e-4)
    assert all(math.isfinite(x) for x in map(float, out.statistics().values()))
    assert hidden.grad.isfinite().all()
    banned = torch.zeros(VOCABULARY)
    banned[VOCABULARY - 1] = -math.inf  # a padded vocabulary
    labels = labels.clamp(max=VOCABULARY - 2)
    out = fused_objective(
        tensors["hidden"], tensors["weight"], labels, ids, OBJECTIVES["convex"], bias=banned, need_entropy=True
    )
    out.loss.backward()
    assert math.isfinite(out.statistics()["entropy_sum"])
    assert tensors["weight"].grad.isfinite().all()


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 5)}, "hidden must be"),
        ({"hidden": torch.zeros(2, 4)}, "labels must be"),
        ({"labels": torch.tensor([0.0, 1.0, 2.0])}, "labels must be integers"),
        ({"labels": torch.tensor([0, 1, 6])}, r"labels must lie in \[0, 6\)"),
        ({"labels": torch.tensor([0, 1, -3])}, r"labels must lie in"),
        ({"sequence_ids": torch.zeros(2, dtype=torch.int64)}, "sequence_ids must be"),
        ({"bias": torch.zeros(5)}, "bias must be"),
        ({"chunk_tokens": 0}, "chunk_tokens must be"),
        ({"vocab_chunk": 1.5}, "vocab_chunk must be"),
        ({"logit_scale": 0.0}, "logit_scale must be"),
        ({"logit_softcap": -1.0}, "logit_softcap must be"),
        ({"normalizer": -1.0}, "normalizer must be"),
        ({"sample_weights": torch.tensor([1.0, -1.0, 1.0])}, "sample_weights must be finite"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int64)}, "must be floating"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {
        "hidden": torch.zeros(3, 4),
        "lm_head_weight": torch.zeros(6, 4),
        "labels": torch.tensor([0, 1, -100]),
        "sequence_ids": torch.zeros(3, dtype=torch.int64),
        "objective": OBJECTIVES["convex"],
    }
    with pytest.raises(ValueError, match=message):
        fused_objective(**{**arguments, **change})


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


def test_products_run_in_the_inputs_dtype_unless_that_is_slow(monkeypatch):
    threads = torch.get_num_threads()
    assert products_dtype("cpu", torch.float32) == torch.float32
    assert products_dtype("cpu", torch.float64) == torch.float64
    assert products_dtype("cpu", torch.float16) == torch.float32
    assert products_dtype("cpu", torch.bfloat16) in (torch.bfloat16, torch.float32)
    assert products_dtype("cuda", torch.float16) == torch.float16
    assert torch.get_num_threads() == threads
    for bf16_seconds, wanted in ((0.25, torch.bfloat16), (0.9, torch.float32), (4.0, torch.float32)):
        seconds = {torch.float32: 1.0, torch.bfloat16: bf16_seconds}
        monkeypatch.setattr(head_products, "_seconds_of_product", seconds.get)
        assert products_dtype.__wrapped__("cpu", torch.bfloat16) == wanted


@pytest.mark.parametrize("products", [torch.bfloat16, torch.float32], ids=str)
def test_both_choices_of_products_give_the_same_numbers(products, monkeypatch):
    monkeypatch.setattr(head_module, "products_dtype", lambda *args: products)
    for chunk_tokens in (None, 18, 9):
        check(torch.bfloat16, OBJECTIVES["convex"], chunk_tokens=chunk_tokens, bias=True, logit_softcap=4.0)


@pytest.mark.parametrize("cap", [30.0, 50.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_far_below_the_best_token_are_exact(dtype, cap):
    # Differences of logits beyond 70 and 100, where exp() underflows in part: with mle nothing hides the gradient.
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(6, 4, generator=generator) * 3).to(dtype).requires_grad_()
    weight = (torch.randn(9, 4, generator=generator) * 20).to(dtype).requires_grad_()
    labels, ids = (hidden @ weight.T).argmin(-1), torch.tensor([0, 0, 0, 1, 1, 1])
    out = fused_objective(hidden, weight, labels, ids, get_objective("mle"), logit_softcap=cap)
    out.loss.backward()
    tensors = {"hidden": hidden, "weight": weight}
    wanted, gradients, _ = reference(tensors, labels, ids, get_objective("mle"), cap=cap)
    assert wanted.loss > 50
    torch.testing.assert_close(out.loss.double(), wanted.loss.detach(), rtol=1e-6, atol=0)
    for name, x in tensors.items():
        assert error(x.grad, gradients[name]) < 1e-5, name
