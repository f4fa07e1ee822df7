"""An endless source of training conversations for a seed, and the held-out ones for evaluation."""

import hashlib
from collections.abc import Mapping
from typing import Any

from .tasks import HELD_OUT_EVERY, TASKS, Conversation
from .text import Pieces, RandomText


class Conversations:
    """Draws conversations of the training part, or of the held-out part, which never overlap.

    `mix` says how often each task comes; it may be changed between two draws.
    """

    def __init__(self, pieces: Pieces, seed: int, mix: Mapping[str, int], held_out: bool = False):
        self.draw = RandomText(pieces, seed, held_out)
        self.mix = mix

    def example(self, task: str | None = None) -> Conversation:
        """The next conversation, of one task if it is named."""
        while True:
            drawn = task or self.draw.rng.choices(list(self.mix), list(self.mix.values()))[0]
            conversation = TASKS[drawn](self.draw)
            if _is_held_out(conversation) == self.draw.held_out:
                return conversation

    def shuffle(self, items: list[Any]) -> None:
        """Shuffle in place with the same random generator."""
        self.draw.rng.shuffle(items)


def _is_held_out(conversation: Conversation) -> bool:
    """Decided by the prompts alone, so that one prompt never stands on both sides."""
    if conversation.task == "facts, unseen wording":
        return True
    prompts = repr((conversation.system, [turn.user for turn in conversation.turns]))
    digest = hashlib.md5(prompts.encode(), usedforsecurity=False).digest()
    return int.from_bytes(digest[:2], "big") % HELD_OUT_EVERY == 0


def held_out_set(pieces: Pieces, per_task: int, seed: int) -> dict[str, list[Conversation]]:
    """Held-out conversations by row of the accuracy table, at least about `per_task` in each."""
    source = Conversations(pieces, seed, mix={}, held_out=True)
    found: dict[str, list[Conversation]] = {}
    for task in TASKS:
        if task == "overview":  # a part of the facts
            continue
        n_rows = {"fact": 3, "style": 6}.get(task, 1)  # these two fill several rows by chance
        for _ in range(per_task * n_rows):
            conversation = source.example(task)
            found.setdefault(conversation.task, []).append(conversation)
    return found
