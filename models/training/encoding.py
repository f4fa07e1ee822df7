"""A conversation as token ids in Llama 2's chat format, and which of them the model must learn."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .tasks import Turn

BOS, EOS = 1, 2

# The ids of a text, without BOS and EOS and without special tokens.
Tokenize = Callable[[str], tuple[int, ...]]


class Encoded(NamedTuple):
    ids: list[int]
    is_answer: list[bool]  # for every id: part of an answer or the EOS behind it

    @property
    def answer_positions(self) -> list[int]:
        return [position for position, is_answer in enumerate(self.is_answer) if is_answer]


def prompt(user: str, system: str = "") -> str:
    """What stands between BOS and the answer; only a first turn may have a system prompt."""
    if system:
        user = f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}"
    return f"[INST] {user} [/INST]"


def encode(tokenize: Tokenize, system: str, turns: Sequence[Turn]) -> Encoded:
    """Every turn is BOS + "[INST] user [/INST] answer " + EOS.

    Prompt and answer are tokenized apart, which gives the same ids (see `check`) and can be cached.
    """
    ids: list[int] = []
    is_answer: list[bool] = []
    for i, turn in enumerate(turns):
        prompt_ids = tokenize(prompt(turn.user, "" if i else system))
        answer_ids = tokenize(turn.answer + " ")
        ids += [BOS, *prompt_ids, *answer_ids, EOS]
        is_answer += [False] * (1 + len(prompt_ids)) + [True] * (len(answer_ids) + 1)
    return Encoded(ids, is_answer)


def check(tokenize: Tokenize, system: str, turns: Sequence[Turn]) -> None:
    """Raise ValueError if a turn has other ids when it is tokenized as one text."""
    for i, turn in enumerate(turns):
        text = prompt(turn.user, "" if i else system)
        if tokenize(text) + tokenize(turn.answer + " ") != tokenize(f"{text} {turn.answer} "):
            raise ValueError(f"ambiguous tokens: {text!r} {turn.answer!r}")
