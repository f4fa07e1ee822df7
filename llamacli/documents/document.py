"""A text that was read somewhere, and how several stand together. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llamacli.errors import InputTooLong

MAX_TEXT = 16 << 20  # characters, or bytes of what is text as it stands; as much as standard input may have


class Teller(Protocol):
    """Where to say what should be known of a file that is read all the same."""

    def say(self, line: str) -> None: ...

    def detail(self, line: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Document:
    """`name` is fit to be shown; `kind` is text, html, pdf or stdin."""

    name: str
    text: str
    kind: str = "text"

    @property
    def told(self) -> dict[str, object]:
        """For --json."""
        return {"name": self.name, "kind": self.kind, "characters": len(self.text)}


def shown(name: str) -> str:
    """A name on one line, and nothing in it that a terminal or a reader could take for something else.

    Control and format characters are spelt as in Python; a byte that is no UTF-8 comes as a surrogate.
    """
    return "".join(character if character.isprintable() else _spelt(character) for character in name)


def _spelt(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def joined(documents: Sequence[Document]) -> str:
    """One alone as it is; several in their order, each below a line with its name, as head and tail print them.

    The same documents give the same text, so that what a model has computed of it can be used again.
    """
    if len(documents) == 1:
        return documents[0].text
    return "\n\n".join(f"==> {each.name} <==\n{each.text}" for each in documents)


def check_size(n: int, what: str) -> None:
    """Raises InputTooLong for more than MAX_TEXT characters or bytes."""
    if n > MAX_TEXT:
        raise InputTooLong(
            f"{what} is more than {MAX_TEXT >> 20} MiB of text, thousands of times what a context holds: "
            "give the part that matters"
        )
