"""Token bytes to text that is safe to show: whole characters only, and never the beginning of a stop string.

Knows nothing of tokens or models; it sees the bytes of one answer, piece by piece.
"""

from __future__ import annotations

import codecs


class Detokenizer:
    """The text of one answer.

    trim   drop the template's own white space: the one space before a Llama 2 answer, and whatever white space
           stands between the answer and its end
    """

    def __init__(self, stop: tuple[str, ...] = (), *, trim: bool = False) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = stop
        self._trim = trim
        self._at_start = True
        self._held = ""
        self.stopped = False  # a stop string came; nothing more will be shown

    def feed(self, piece: bytes) -> str:
        """The text that has become safe with these bytes; often empty."""
        return self._show(self._decoder.decode(piece))

    def flush(self) -> str:
        """What was held back, at the end of the answer. Half a character becomes U+FFFD."""
        text = self._show(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + (held.rstrip() if self._trim else held)

    def _show(self, text: str) -> str:
        if not text or self.stopped:
            return ""
        if self._at_start:
            self._at_start = False
            if self._trim:
                text = text.removeprefix(" ")
        text = self._held + text
        begins = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if begins:
            self.stopped, self._held = True, ""
            text = text[: min(begins)]
            return text.rstrip() if self._trim else text
        n_safe = len(text) - self._n_suspect(text)
        if self._trim:
            n_safe = len(text[:n_safe].rstrip())
        self._held = text[n_safe:]
        return text[:n_safe]

    def _n_suspect(self, text: str) -> int:
        """Length of the longest end of the text that a stop string could begin with."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for n in range(min(longest, len(text)), 0, -1):
            end = text[-n:]
            if any(stop.startswith(end) for stop in self._stop):
                return n
        return 0
