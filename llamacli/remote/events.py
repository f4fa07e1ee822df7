"""Server-sent events: bytes in, the data of each event out.

https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

from llamacli.errors import RemoteError

MAX_EVENT = 16 << 20  # characters


def events(parts: Iterable[bytes]) -> Iterator[str]:
    """The data of each event as soon as it is whole. An event that the end of the stream cuts is dropped.

    Raises RemoteError for what is no text, or has no end.
    """
    data: list[str] = []
    for line in _lines(parts):
        if not line:
            if data:
                yield "\n".join(data)
                data = []
            continue
        name, _, value = line.partition(":")
        if name == "data":
            data.append(value.removeprefix(" "))


def _lines(parts: Iterable[bytes]) -> Iterator[str]:
    """Lines ended by \\n, \\r\\n or \\r."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    # Text in universal newlines keeps a \r at the end of a part until it is known whether \n follows.
    from io import IncrementalNewlineDecoder

    newlines = IncrementalNewlineDecoder(decoder, translate=True)
    rest = ""
    for part in parts:
        try:
            rest += newlines.decode(part)
        except UnicodeDecodeError:
            raise RemoteError("the server's answer is not UTF-8 text") from None
        if len(rest) > MAX_EVENT:
            raise RemoteError(f"the server sends an event of more than {MAX_EVENT >> 20} million characters")
        *whole, rest = rest.split("\n")
        yield from whole
