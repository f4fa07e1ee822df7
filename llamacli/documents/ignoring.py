"""Which names in a directory are nobody's texts: hidden ones, what a tool has put there, what .gitignore leaves out."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_DIRECTORIES = {"node_modules", "bower_components", "__pycache__", "site-packages", "CVS"}
_FILES = re.compile(
    r".*~|.*\.min\.(js|css)|.*\.(js|css)\.map|(package-lock|npm-shrinkwrap)\.json|pnpm-lock\.yaml|"
    r"(yarn|poetry|uv|Cargo|Gemfile|composer|Pipfile|flake)\.lock",
)
# Virtual environments, and what says of itself that it is a cache (https://bford.info/cachedir/).
_MARKS = ("pyvenv.cfg", "CACHEDIR.TAG")
_GITIGNORE = ".gitignore"
_LONGEST = 1 << 16  # bytes of a .gitignore that are looked at


def is_left_out(name: str, *, is_directory: bool) -> bool:
    """By its name alone."""
    if name.startswith("."):
        return True
    return name in _DIRECTORIES if is_directory else _FILES.fullmatch(name) is not None


def is_marked(path: Path) -> bool:
    """Whether a directory says of itself that nobody needs to read it."""
    return any(os.path.lexists(path / mark) for mark in _MARKS)


@dataclass(frozen=True, slots=True)
class _Rule:
    """`base` is the directory of the .gitignore, with a slash at its end; patterns are for paths below it."""

    base: str
    pattern: re.Pattern[str]
    leaves_out: bool
    directories_only: bool


@dataclass(frozen=True, slots=True)
class Rules:
    """What the .gitignore files of a directory and of those above it say (man gitignore). The last that fits wins."""

    rules: tuple[_Rule, ...] = ()

    def within(self, directory: Path) -> Rules:
        """With those of one more directory below."""
        return Rules(self.rules + tuple(_rules_of(directory)))

    def leave_out(self, absolute: Path, *, is_directory: bool) -> bool:
        path = str(absolute)
        for rule in reversed(self.rules):
            if rule.directories_only and not is_directory:
                continue
            if path.startswith(rule.base) and rule.pattern.fullmatch(path[len(rule.base) :]):
                return rule.leaves_out
        return False


def rules_above(directory: Path) -> Rules:
    """What holds for a directory already, in a checkout that begins at it or above it."""
    tree = [directory, *directory.parents]
    top = next((i for i, each in enumerate(tree) if (each / ".git").exists()), 0)
    rules = Rules()
    for each in reversed(tree[1 : top + 1]):
        rules = rules.within(each)
    return rules


def _rules_of(directory: Path) -> list[_Rule]:
    try:
        with (directory / _GITIGNORE).open("rb") as file:
            lines = file.read(_LONGEST).decode("utf-8-sig", "replace").splitlines()
    except OSError:
        return []
    base = f"{directory}/" if directory.name else str(directory)
    return [rule for line in lines if (rule := _rule(base, line)) is not None]


def _rule(base: str, line: str) -> _Rule | None:
    line = re.sub(r"(?<!\\) +$", "", line)
    if not line or line.startswith("#"):
        return None
    leaves_out = not line.startswith("!")
    line = line.removeprefix("!")
    directories_only = line.endswith("/")
    line = line.rstrip("/")
    is_anchored = "/" in line
    try:
        pattern = re.compile(("" if is_anchored else "(?:.*/)?") + _translated(line.removeprefix("/")), re.DOTALL)
    except re.error:
        return None
    return _Rule(base, pattern, leaves_out, directories_only) if line else None


_DEEP = re.compile(r"(?:^|(?<=/))(?:\*\*/)+")
_GLOB = re.compile(r"/\*\*\Z|\*+|\?|\[!?\]?[^\]]*\]|\\.|.", re.DOTALL)


def _translated(glob: str) -> str:
    """Whatever is between two stars takes the first place where it fits: to try them all could take for ever."""
    first, *between = map(_segments, _DEEP.split(glob))
    if not between:
        return first
    return first + "".join(f"(?>(?:.*?/)??{each})" for each in between[:-1]) + "(?:.*/)?" + between[-1]


def _segments(glob: str) -> str:
    """What stands between two `**/`."""
    text, chunks = "", [""]
    for piece in _GLOB.findall(glob):
        if piece[0] == "*":
            chunks.append("")
        elif piece in ("/", "/**"):
            text += _starred(chunks) + ("/" if piece == "/" else "/.*")
            chunks = [""]
        else:
            chunks[-1] += _literal(piece)
    return text + _starred(chunks)


def _starred(chunks: list[str]) -> str:
    first, *between = chunks
    if not between:
        return first
    return first + "".join(f"(?>[^/]*?{each})" for each in between[:-1]) + "[^/]*" + between[-1]


def _literal(piece: str) -> str:
    if piece == "?":
        return "[^/]"
    if piece[0] == "[" and len(piece) > 1:
        return ("[^" if piece[1] == "!" else "[") + piece[1:].removeprefix("!").replace("\\", "\\\\")
    return re.escape(piece[-1] if piece[0] == "\\" else piece)
