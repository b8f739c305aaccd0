"""Heads that `training.py` times: each takes states and a weight and leaves gradients of both.

All of them but the bare products minimise the same loss, `-sum_i T_i exp(mean log-probability) / tokens` (or its
maximum-likelihood counterpart), over the same sequences of 64 target tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

SEQUENCE = 64
CUDA_ONLY = {"liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}
NAMES = [
    "products",
    "products-new-gradients",
    "convexlm-convex",
    "convexlm-mle",
    "convexlm-convex-recompute",
    "trl",
    "torch-linear-cross-entropy",
    "full-logits",
    *CUDA_ONLY,
]


class HeadCandidate:
    """One head on one shape; `run()` is one forward and backward pass."""

    def __init__(self, name: str, tokens: int, hidden_size: int, vocabulary: int, dtype: str, device: str) -> None:
        """Make the inputs, the same for every candidate."""
        if name in CUDA_ONLY and device != "cuda":
            raise RuntimeError(f"{name} needs CUDA")
        generator = torch.Generator(device).manual_seed(0)
        wanted = getattr(torch, dtype)

        def make(rows: int, width: int, scale: float = 1.0) -> torch.Tensor:
            x = torch.empty(rows, width, dtype=wanted, device=device)
            for part in x.split(8192):  # for in float32 all of it would be most of the memory
                part.copy_(torch.randn(part.shape, generator=generator, device=device) * scale)
            return x.requires_grad_()

        self.hidden, self.weight = make(tokens, hidden_size), make(vocabulary, hidden_size, scale=hidden_size**-0.5)
        self.labels = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
        self.ids = (torch.arange(tokens) // SEQUENCE).to(device)
        self._run = getattr(self, "_" + name.replace("-", "_"))
        self._buffers: list[torch.Tensor] = []

    def run(self) -> int:
        """One pass; returns the number of target tokens."""
        self.hidden.grad = self.weight.grad = None
        self._run()
        return len(self.labels)

    def _products(self) -> None:
        with torch.no_grad():
            hidden, weight = self.hidden, self.weight
            if not self._buffers:
                shapes = (len(hidden), len(weight)), hidden.shape, weight.shape
                self._buffers = [torch.empty(shape, dtype=hidden.dtype, device=hidden.device) for shape in shapes]
            logits, d_hidden, d_weight = self._buffers
            torch.mm(hidden, weight.t(), out=logits)
            torch.mm(logits, weight, out=d_hidden)
            torch.mm(logits.t(), hidden, out=d_weight)

    def _products_new_gradients(self) -> None:
        """As `products`, but the gradients are new memory in every pass, as those of a training step are."""
        with torch.no_grad():
            hidden, weight = self.hidden, self.weight
            if not self._buffers:
                self._buffers = [torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)]
            logits = torch.mm(hidden, weight.t(), out=self._buffers[0])
            self.hidden.grad, self.weight.grad = torch.mm(logits, weight), torch.mm(logits.t(), hidden)

    def _fused(self, name: str, **settings: bool) -> None:
        from convexlm.head import fused_objective
        from convexlm.objectives import get_objective

        out = fused_objective(self.hidden, self.weight, self.labels, self.ids, get_objective(name), **settings)
        out.loss.backward()

    def _convexlm_convex(self) -> None:
        self._fused("convex")

    def _convexlm_mle(self) -> None:
        self._fused("mle")

    def _convexlm_convex_recompute(self) -> None:
        self._fused("convex", recompute=True)

    def _trl(self) -> None:
        from trl.kernels import ChunkedLogProbFunction

        # As SFTTrainer asks for it, but for the entropy, which it only logs.
        outputs = ("log_probs", "is_top1")
        log_probs = ChunkedLogProbFunction.apply(
            self.hidden, self.weight, None, self.labels, 1.0, 32768, None, 1.0, outputs
        )[0]
        self._convex_of(log_probs).backward()

    def _torch_linear_cross_entropy(self) -> None:
        options = torch.nn.LinearCrossEntropyOptions()
        nll = F.linear_cross_entropy(self.hidden, self.weight, self.labels, reduction="none", options=options)
        self._convex_of(-nll).backward()

    def _full_logits(self) -> None:
        log_probs = (self.hidden @ self.weight.t()).log_softmax(-1).gather(-1, self.labels[:, None]).squeeze(-1)
        self._convex_of(log_probs).backward()

    def _liger(self) -> None:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        # Maximum likelihood, summed: its per-token form is another code path.
        arguments = (self.hidden, self.weight, self.labels, None, None, -100, 0.0, 0.0, "mean")
        LigerFusedLinearCrossEntropyFunction.apply(*arguments)[0].backward()

    def _cut_cross_entropy(self) -> None:
        from cut_cross_entropy import linear_cross_entropy

        self._convex_of(-linear_cross_entropy(self.hidden, self.weight, self.labels, reduction="none")).backward()

    def _convex_of(self, log_probs: torch.Tensor) -> torch.Tensor:
        count = int(self.ids[-1]) + 1
        zeros = log_probs.new_zeros(count, dtype=torch.float32)
        lengths = zeros.index_add(0, self.ids, torch.ones_like(log_probs, dtype=torch.float32))
        means = zeros.index_add(0, self.ids, log_probs.float()) / lengths
        return -(lengths * means.exp()).sum() / len(log_probs)
