"""A conversation as it is kept: its turns, and what they were asked of. Knows neither models nor files."""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass, field

from llamacli.errors import UsageError

LONGEST_NAME = 100  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One question and its answer.

    id              0 while it is not stored
    answer          None while there is none
    tokens          the ids that the model wrote the answer with; none where they are not known
    finish_reason   stop, length, context, cancelled ...
    """

    question: str
    answer: str | None = None
    tokens: array[int] = field(default_factory=lambda: array("i"))
    id: int = 0
    model: str | None = None
    asked: float = 0.0  # Unix seconds
    answered: float | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What is known of a conversation beside its turns.

    id        0 while it is not stored
    start     id of the turn with which the conversation begins as a model is to see it: earlier ones had no room
    summary   of those earlier turns, if there is one
    """

    id: int = 0
    name: str | None = None
    model: str | None = None
    system: str | None = None
    created: float = 0.0  # Unix seconds
    updated: float = 0.0
    start: int = 0
    summary: str | None = None

    @property
    def reference(self) -> str:
        """What a user may call it."""
        return self.name or str(self.id)


def checked_name(name: str) -> str:
    """Raises UsageError for what cannot be told from an id, or cannot be read."""
    name = name.strip()
    if not name or not name.isprintable() or len(name) > LONGEST_NAME:
        raise UsageError(f"a session's name is 1 to {LONGEST_NAME} printable characters")
    if name.isdecimal():
        raise UsageError(f"a session's name must not be a number, as ids are: {name}")
    return name


def packed(tokens: array[int]) -> bytes:
    """int32, little-endian."""
    return _turned(tokens).tobytes()


def unpacked(raw: bytes) -> array[int]:
    tokens = array("i")
    tokens.frombytes(raw[: len(raw) // 4 * 4])
    return _turned(tokens)


def _turned(tokens: array[int]) -> array[int]:
    if sys.byteorder == "big":
        tokens = tokens[:]
        tokens.byteswap()
    return tokens
