"""A text as the model's tokens."""

from __future__ import annotations

import json
from array import array

from llamacli.commands import terminal
from llamacli.commands.obtain import models_in, obtain
from llamacli.commands.terminal import Notices, harmless
from llamacli.config import Directories, Settings
from llamacli.engine.llama import Vocabulary, open_vocabulary
from llamacli.errors import UsageError
from llamacli.gguf import read_model
from llamacli.models.notes import Notes


def run(settings: Settings, text: str | None, places: Directories, *, count_only: bool, as_json: bool) -> int:
    """Print the tokens of a text. No BOS, no template: the text alone. Returns the exit code."""
    notices = Notices(quiet=settings.quiet)
    if text is None or text == "-":
        if not terminal.stdin_has_text(asked_for=text == "-"):
            raise UsageError('nothing to tokenize: llamacli tokenize "your text", or pipe a text into it')
        text = terminal.read_stdin(notices)
    else:
        text = terminal.decoded(text.encode("utf-8", "surrogateescape"), "the text", notices)
    path = obtain(settings, models_in(places), Notes(places.cache), notices).path
    read_model(path)  # says better than llama.cpp what is wrong with a file
    vocabulary = open_vocabulary(path)
    tokens = vocabulary.tokenize(text)
    if as_json:
        shown = json.dumps(_record(tokens, vocabulary), ensure_ascii=False) + "\n"
    elif count_only:
        shown = f"{len(tokens)}\n"
    else:
        shown = "".join(f"{token}\t{_visible(vocabulary.name(token))}\n" for token in tokens)
    terminal.write_all(terminal.STDOUT, shown.encode("utf-8", "replace"))
    return 0


def _record(tokens: array[int], vocabulary: Vocabulary) -> dict[str, object]:
    return {"count": len(tokens), "tokens": list(tokens), "pieces": [vocabulary.name(t) for t in tokens]}


def _visible(piece: str) -> str:
    """A piece on one line: a newline in it would break the table."""
    return harmless(piece.replace("\n", "\\n").replace("\t", "\\t"))
