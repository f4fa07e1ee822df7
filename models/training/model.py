"""A small transformer of the Llama 2 architecture, and the gradients of a sampled softmax over it."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from .batches import Batch
from .settings import Shape

NORM_EPSILON = 1e-5
ROPE_BASE = 10000.0


class Block(nn.Module):
    """One layer: attention, then a SwiGLU feed-forward, each behind an RMSNorm."""

    def __init__(self, shape: Shape):
        super().__init__()
        dim, ff = shape.dim, shape.ff
        self.heads = shape.heads
        self.attn_norm = nn.RMSNorm(dim, eps=NORM_EPSILON)
        self.ffn_norm = nn.RMSNorm(dim, eps=NORM_EPSILON)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.gate_up = nn.Linear(dim, 2 * ff, bias=False)
        self.down = nn.Linear(ff, dim, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The hidden states of shape (batch, time, dim) after this layer."""
        batch, time, dim = x.shape
        head = dim // self.heads
        q, k, v = self.qkv(self.attn_norm(x)).view(batch, time, 3, self.heads, head).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        # Written out: for short sequences on a CPU this trains twice as fast as the fused one.
        scores = (q @ k.transpose(-1, -2)).float() * head**-0.5 + mask
        mixed = scores.softmax(-1).to(v.dtype) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, dim))
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (arXiv 2104.09864) of the pairs (i, i + half of the head)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class Llama(nn.Module):
    """The whole model; `embed` is also its output matrix."""

    def __init__(self, n_tokens: int, shape: Shape):
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(n_tokens, shape.dim)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.dim, eps=NORM_EPSILON)
        half = shape.dim // shape.heads // 2
        angles = torch.arange(shape.context)[:, None] * ROPE_BASE ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos()[:, None], persistent=False)
        self.register_buffer("sin", angles.sin()[:, None], persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=self._deviation(name, parameter.shape[1]))

    def _deviation(self, name: str, columns: int) -> float:
        """Of the random weights of a matrix; smaller where a layer adds to the hidden states."""
        if "embed" in name:
            return float(self.shape.dim**-0.5)
        deviation = float(0.5 * columns**-0.5)
        is_added = ".out." in name or ".down." in name
        return deviation / math.sqrt(2 * self.shape.layers) if is_added else deviation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The last hidden states for embedded tokens, both of shape (batch, time, dim)."""
        time = x.shape[1]
        mask = torch.full((time, time), -1e9).triu(1)
        for block in self.blocks:
            x = block(x, self.cos[:time], self.sin[:time], mask)
        return self.norm(x)


def learn(
    run: Callable[[torch.Tensor], torch.Tensor],
    embedding: torch.Tensor,
    batch: Batch,
    negatives: int,
    bf16: bool,
    share: float,
) -> float:
    """Add the gradients of a batch, scaled by `share`, to all parameters; return its loss.

    The softmax covers the tokens of the batch and some random others, which are weighted up so
    that the sum approximates the one over the whole vocabulary. Only those rows of the embedding
    matrix get a gradient.
    """
    sample, shift, place = _sample_tokens(batch, embedding.shape[0], negatives)
    rows = embedding.detach()[sample].requires_grad_()
    x = functional.embedding(place[batch.ids], rows)
    for axis in (0, 1):  # one compiled graph for all rows and widths
        torch._dynamo.maybe_mark_dynamic(x, axis)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = run(x).flatten(0, 1)[batch.positions] @ rows.T
    losses = functional.cross_entropy(logits.float() + shift, place[batch.targets], reduction="none")
    loss = (losses * batch.weights).sum()
    (loss * share).backward()
    assert embedding.grad is not None, "the stage sets it to zeros"
    embedding.grad.index_add_(0, sample, rows.grad)
    return float(loss.item())


def _sample_tokens(batch: Batch, n_tokens: int, negatives: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tokens of the softmax, what to add to their logits, and the place of each of the batch."""
    known = torch.unique(torch.cat((batch.ids.flatten(), batch.targets)))
    is_known = torch.zeros(n_tokens, dtype=torch.bool)
    is_known[known] = True
    others = torch.randint(n_tokens, (negatives,))
    others = others[~is_known[others]].unique()
    place = torch.zeros(n_tokens, dtype=torch.long)
    place[known] = torch.arange(len(known))
    shift = torch.zeros(len(known) + len(others))
    shift[len(known) :] = math.log((n_tokens - len(known)) / len(others))
    return torch.cat((known, others)), shift, place
