"""Batches of conversations for the training, padded to similar lengths."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from .conversations import Conversations
from .encoding import Encoded, encode
from .settings import Phase
from .vocabulary import Vocabulary

POOL = 1500  # conversations that are drawn and sorted by length at once
ALIGNMENT = 16  # widths are multiples of this


@dataclass(frozen=True)
class Batch:
    """Conversations and what is to be predicted in them."""

    ids: torch.Tensor  # (rows, width), padded with 0
    positions: torch.Tensor  # (n,), in the flattened ids: from where to predict
    targets: torch.Tensor  # (n,), the ids that come next
    weights: torch.Tensor  # (n,), of the losses; they add up to 1


class Batches:
    """An endless stream of batches of at most `tokens` ids each."""

    def __init__(self, vocabulary: Vocabulary, seed: int, mixes: Mapping[str, Mapping[str, int]], tokens: int):
        self._tokenize = vocabulary.tokenize
        self._mixes = mixes
        self._tokens = tokens
        self._conversations = Conversations(vocabulary.pieces, seed, mix={})
        self._pool: list[Batch] = []

    def next(self, phase: Phase) -> Batch:
        """The next batch; those that an earlier phase has drawn are used up first."""
        if not self._pool:
            self._fill(phase)
        return self._pool.pop()

    def _fill(self, phase: Phase) -> None:
        rows = self._draw(phase)
        self._conversations.shuffle(rows)
        rows.sort(key=_width)
        while rows:
            n_rows = 1
            while n_rows < len(rows) and _width(rows[n_rows]) * (n_rows + 1) <= self._tokens:
                n_rows += 1
            self._pool.append(pad(rows[:n_rows]))
            rows = rows[n_rows:]
        self._conversations.shuffle(self._pool)

    def _draw(self, phase: Phase) -> list[Encoded]:
        self._conversations.mix = self._mixes[phase.mix]
        rows: list[Encoded] = []
        while len(rows) < POOL:
            conversation = self._conversations.example()
            encoded = encode(self._tokenize, conversation.system, conversation.turns)
            if len(encoded.ids) <= phase.longest:
                rows.append(encoded)
        return rows


def pad(rows: list[Encoded]) -> Batch:
    """Rows in ascending order of their length as one batch."""
    width = _width(rows[-1])
    ids = np.zeros((len(rows), width), np.int64)
    positions: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = row.ids
        learnt = row.answer_positions
        positions += [i * width + position - 1 for position in learnt]
        targets += [row.ids[position] for position in learnt]
        weights += [1 / math.sqrt(len(learnt))] * len(learnt)  # short answers count, too
    weight = torch.tensor(weights)
    return Batch(torch.from_numpy(ids), torch.tensor(positions), torch.tensor(targets), weight / weight.sum())


def _width(row: Encoded) -> int:
    return math.ceil(len(row.ids) / ALIGNMENT) * ALIGNMENT
