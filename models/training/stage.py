"""One stage of the training: the optimizers, the learning rate and the loop over the steps."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from .batches import Batches
from .conversations import held_out_set
from .encoding import encode
from .model import Llama, learn
from .settings import Settings, Stage
from .tasks import Conversation
from .vocabulary import Vocabulary

REPORT_EVERY = 100  # steps
CHECKED_PER_TASK = 12
HELD_OUT_SEED = 4242


class Optimizers:
    """Muon for the matrices, AdamW for norms and embeddings, under one schedule."""

    def __init__(self, model: Llama, stage: Stage):
        self._stage = stage
        rate = stage.learning_rate
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        norms = [p for p in model.parameters() if p.ndim == 1]
        adamw = [
            {"params": norms, "lr": rate / 2},
            {"params": [model.embed.weight], "lr": rate / 4, "eps": 1e-6},
        ]
        self._optimizers = (
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(adamw, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
        )
        self._groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        self._peaks = [group["lr"] for group in self._groups]

    def step(self, step: int, progress: float) -> None:
        """Follow the gradients with the learning rate of this step: a warmup, then a cosine."""
        warmup = min(1.0, (step + 1) / self._stage.warmup)
        scale = warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group, peak in zip(self._groups, self._peaks, strict=True):
            group["lr"] = peak * scale
        for optimizer in self._optimizers:
            optimizer.step()


@dataclass
class Progress:
    """How far a stage is, by steps or by the clock, and what it has seen."""

    stage: Stage
    started: float = field(default_factory=time.time)
    n_steps: int = 0
    n_tokens: int = 0
    loss: float | None = None  # a running mean over the batches

    @property
    def minutes(self) -> float:
        return (time.time() - self.started) / 60

    @property
    def share(self) -> float:
        by_steps = self.n_steps / self.stage.steps
        return max(by_steps, self.minutes / self.stage.minutes) if self.stage.minutes else by_steps

    def saw(self, n_tokens: int, loss: float) -> None:
        self.n_tokens += n_tokens
        self.loss = loss if self.loss is None else 0.98 * self.loss + 0.02 * loss

    def __str__(self) -> str:
        return (
            f"step {self.n_steps} loss {self.loss or 0:.4f} tokens {self.n_tokens / 1e6:.1f}M "
            f"{self.n_tokens / self.minutes / 60:.0f} tok/s {self.minutes:.1f} min"
        )


def train(
    model: Llama,
    run: Callable[[torch.Tensor], torch.Tensor],
    vocabulary: Vocabulary,
    settings: Settings,
    number: int,
    checkpoint: Path,
) -> None:
    """Train in the stage of that number and save the weights; `run` is the model, maybe compiled."""
    stage = settings.stages[number]
    torch.manual_seed(settings.seed)
    optimizers = Optimizers(model, stage)
    model.embed.weight.grad = torch.zeros_like(model.embed.weight)
    batches = Batches(vocabulary, settings.seed + number, settings.mixes, settings.batch_tokens)
    held_out = held_out_set(vocabulary.pieces, CHECKED_PER_TASK, HELD_OUT_SEED)
    progress = Progress(stage)
    while (share := progress.share) < 1:
        phase = stage.phase(share)
        for _ in range(phase.accumulate):
            batch = batches.next(phase)
            weight = 1 / phase.accumulate
            loss = learn(run, model.embed.weight, batch, settings.negatives, settings.bf16, weight)
            progress.saw(batch.ids.numel(), loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(progress.n_steps, share)
        model.zero_grad(set_to_none=False)
        progress.n_steps += 1
        if progress.n_steps % REPORT_EVERY == 0:
            print(progress, flush=True)
        if settings.check_every and progress.n_steps % settings.check_every == 0:
            shares = forced_accuracy(model, vocabulary, held_out)
            print("  " + ", ".join(f"{task} {share:.2f}" for task, share in shares.items()), flush=True)
            torch.save(model.state_dict(), checkpoint)
    print(f"stage {number + 1} ended: {progress}", flush=True)
    torch.save(model.state_dict(), checkpoint)


def forced_accuracy(model: Llama, vocabulary: Vocabulary, held_out: dict[str, list[Conversation]]) -> dict[str, float]:
    """By task: the share of conversations of which every answer token is the most likely one."""
    return {
        task: sum(_is_forced_right(model, vocabulary, case) for case in cases) / len(cases)
        for task, cases in held_out.items()
    }


def _is_forced_right(model: Llama, vocabulary: Vocabulary, conversation: Conversation) -> bool:
    encoded = encode(vocabulary.tokenize, conversation.system, conversation.turns)
    positions = encoded.answer_positions
    with torch.no_grad():
        hidden = model(model.embed(torch.tensor([encoded.ids])))[0]
        likeliest = (hidden[[position - 1 for position in positions]] @ model.embed.weight.T).argmax(-1)
    return bool(likeliest.tolist() == [encoded.ids[position] for position in positions])
