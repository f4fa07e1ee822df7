"""Remembers the tokens behind the answers that were given, so that the next turn of a conversation goes on from them.

A model's own tokens are often not those that its text is tokenized to: what the KV cache holds of an answer could then
not be used when a client sends the text back. Knows nothing of templates or of the cache.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Lesson = tuple[str, "array[int] | None"]  # an answer, and its tokens if they are known

MAX_TOKENS = 1 << 20  # of all answers that are remembered: 4 MiB
_OVERHEAD = 64  # what an entry takes beside its tokens, in tokens


class Recall:
    """Answers by what was asked and what was said. White space around a text does not count. Threads may share it."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self._room = max_tokens
        self._answers: OrderedDict[tuple[str, bytes], array[int]] = OrderedDict()  # least recently used first
        self._n_texts: dict[str, int] = {}  # how often each text has been the answer to something
        self._lessons: list[Lesson] = []  # the next one last
        self._lock = threading.Lock()

    def note(self, prompt: array[int], answer: array[int], text: str) -> None:
        """These tokens were the answer to this prompt, and this is how they read."""
        said = text.strip()
        key = said, _digest(prompt)
        with self._lock:
            self._drop(key)
            self._answers[key] = answer
            self._n_texts[said] = self._n_texts.get(said, 0) + 1
            self._room -= len(answer) + _OVERHEAD
            while self._room < 0:
                self._drop(next(iter(self._answers)))

    @contextmanager
    def learning(self, answers: Sequence[Lesson]) -> Iterator[None]:
        """Note these answers, in the order in which they stand in the one prompt that is built meanwhile.

        To note() each would take a prompt for each of them.
        """
        self._lessons = [(text.strip(), tokens) for text, tokens in reversed(answers)]
        try:
            yield
        finally:
            self._lessons = []

    def knows(self, text: str) -> bool:
        """Whether this text has been the answer to anything: cheap, before a prompt is made for continued()."""
        return text.strip() in self._n_texts or bool(self._lessons)

    def continued(self, prompt: array[int], text: str) -> array[int] | None:
        """The prompt with the answer's own tokens behind it; None if it is not what this prompt was answered."""
        key = text.strip(), _digest(prompt)
        self._learn(prompt, key[0])
        with self._lock:
            answer = self._answers.get(key)
            if answer is None:
                return None
            self._answers.move_to_end(key)
            return prompt + answer

    def _learn(self, prompt: array[int], said: str) -> None:
        at = next((i for i in reversed(range(len(self._lessons))) if self._lessons[i][0] == said), None)
        if at is not None:
            tokens = self._lessons[at][1]
            del self._lessons[at:]
            if tokens is not None:
                self.note(prompt, tokens, said)

    def _drop(self, key: tuple[str, bytes]) -> None:
        answer = self._answers.pop(key, None)
        if answer is None:
            return
        self._room += len(answer) + _OVERHEAD
        self._n_texts[key[0]] -= 1
        if not self._n_texts[key[0]]:
            del self._n_texts[key[0]]


def spelling(text: str, tokens: array[int], piece: Callable[[int], bytes]) -> array[int] | None:
    """Those of an answer's tokens that spell the text its reader has seen.

    A stop string is not part of the text: the tokens behind it are left out. None if the text ends within a token, is
    empty, or if control tokens are among the answer's.
    """
    pieces = [piece(token) for token in tokens]
    if not text.strip() or not all(pieces):
        return None
    raw = b"".join(pieces)
    for n in range(len(tokens), 0, -1):
        said = raw.decode("utf-8", "replace").strip()
        if said == text.strip():
            return tokens[:n]
        if len(said) < len(text.strip()):
            break
        raw = raw[: len(raw) - len(pieces[n - 1])]
    return None


def _digest(tokens: array[int]) -> bytes:
    from hashlib import blake2b  # milliseconds that a single answer does not need

    return blake2b(tokens.tobytes(), digest_size=16).digest()
