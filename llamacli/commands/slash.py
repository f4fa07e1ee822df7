"""What may be typed in a chat beside questions: the commands after a slash, and texts of several lines."""

from __future__ import annotations

import re
from typing import NamedTuple

from llamacli.errors import UsageError

QUOTES = '"""'
COMMANDS = {
    "system": ("[TEXT|@FILE|-]", "show or set the system prompt; - takes it away"),
    "model": ("[NAME]", "show the model, or go on with another"),
    "file": ("PATH [QUESTION]", "put a text file before this or the next question"),
    "retry": ("", "answer the last question again"),
    "edit": ("[TEXT]", "change the last question and ask it again"),
    "save": ("[NAME]", "keep this conversation under a name"),
    "load": ("[NAME|ID]", "go on with a kept conversation, or list them"),
    "tokens": ("", "show what the conversation takes of the context"),
    "clear": ("", "begin a new one; this one stays in llamacli logs"),
    "help": ("", "show this"),
    "quit": ("", "leave, as Ctrl-D does"),
}
_ALIASES = {"exit": "quit", "bye": "quit", "q": "quit", "?": "help"}
_COMMAND = re.compile(r"/(\?|[A-Za-z]+)(?:\s+(.*))?", re.DOTALL)
_PATH = re.compile(r"""\s*(?:"([^"]+)"|'([^']+)'|((?:\\.|[^\s\\])+))""")
_TYPING = (
    ("Enter", "sends; Alt-Enter, or \\ at the end, begins a new line"),
    (QUOTES, f"begins a text of several lines, {QUOTES} ends it"),
    ("//text", 'sends "/text"'),
    ("Ctrl-C", "stops an answer and keeps what there is of it"),
    ("Ctrl-D", "leaves"),
    ("Up, Ctrl-R", "what was typed before, and search in it"),
)


class Command(NamedTuple):
    name: str
    argument: str


def command(text: str) -> Command | None:
    """The command that a text is. None for a question. Raises UsageError for one that does not exist."""
    match = _COMMAND.fullmatch(text.strip())
    if match is None:
        return None
    name = match[1].lower()
    name = _ALIASES.get(name, name)
    if name not in COMMANDS:
        raise UsageError(f"there is no /{name}: /help shows what there is, and // sends a text that begins with /")
    return Command(name, (match[2] or "").strip())


def question(text: str) -> str:
    """What was meant by what was typed: without the marks of several lines, or of a slash that is none."""
    text = text.strip()
    if text.startswith(QUOTES):
        return text.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    return text.removeprefix("/") if text.startswith("//") else re.sub(r"\\\n", "\n", text)


def path_and_rest(words: str) -> tuple[str, str]:
    """The path at the beginning, quoted as for a shell if there are spaces in it. Raises UsageError for none."""
    match = _PATH.match(words)
    if match is None:
        raise UsageError("/file PATH: which file?")
    path = next((part for part in match.groups()[:2] if part), None) or re.sub(r"\\(.)", r"\1", match[3])
    return path, words[match.end() :].strip()


def is_open(text: str) -> bool:
    """Whether more lines are to come before this is sent."""
    text = text.strip(" \t")
    if text.lstrip().startswith(QUOTES):
        rest = text.strip().removeprefix(QUOTES)
        return not rest.endswith(QUOTES)
    return text.endswith("\\") and not text.endswith("\\\\")


def help_text() -> str:
    rows = [(f"/{name} {argument}".rstrip(), says) for name, (argument, says) in COMMANDS.items()]
    width = max(len(left) for left, _ in rows)
    return "\n".join(f"  {left:<{width}}  {says}" for left, says in (*rows, ("", ""), *_TYPING)).replace(
        f"  {'':<{width}}  ", ""
    )
