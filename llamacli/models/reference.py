"""Takes apart what a user calls a model. Looks at no file and asks no hub.

7b-chat, 13b-chat:Q5_K_M            a name of the catalogue
org/repo[@REVISION][:QUANT]         a repository on the hub
org/repo[@REVISION]/file.gguf       one file of it
./x.gguf, /models/x.gguf            a path
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from llamacli.errors import ModelError
from llamacli.models.catalog import Entry, catalog

_QUANTIZATION = re.compile(r"[A-Za-z0-9_]{1,20}", re.ASCII)
_HUB = re.compile(
    r"(?P<repo_id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+?))?"
    r"(?::(?P<quantization>[A-Za-z0-9_]{1,20})|/(?P<filename>[\w ./()+-]+\.gguf))?",
    re.ASCII,
)
# A repository may be said to hold Llama 2 by its name alone.
_LLAMA2 = re.compile(r"llama-?2|code-?llama", re.IGNORECASE)
_MARKS = ("/", ".gguf", "\\", "~")  # of a path


@dataclass(frozen=True, slots=True)
class Reference:
    """What is meant: a file in a repository, or a path. Only one of `repo_id` and `path` is set.

    revision       a commit or a branch; None is whatever is there, or else the newest
    filename       in the repository; None where only the quantization was said
    quantization   in upper case; None is the default one
    entry          the catalogue's, where the name is from it
    """

    text: str
    path: Path | None = None
    repo_id: str | None = None
    revision: str | None = None
    filename: str | None = None
    quantization: str | None = None
    entry: Entry | None = None

    @property
    def is_llama2(self) -> bool:
        """Whether Meta's licence is to be mentioned."""
        if self.entry is not None:
            return "Llama 2" in self.entry.licence.name
        return self.repo_id is not None and _LLAMA2.search(self.repo_id) is not None


def parse(text: str) -> Reference:
    """Raises ModelError for a name that nothing has."""
    name, _, quantization = text.partition(":")
    # No name there looks like a path, and to read the catalogue takes 10 ms.
    entry = None if any(mark in name for mark in _MARKS) else catalog().find(name)
    if entry is not None and entry.repo_id is not None:
        return _published(text, entry, quantization)
    path = _expanded(text)
    # Anything may be the name of a file; it is one if it is there.
    if is_there(path):
        return Reference(text, path=path)
    is_bare_file = text.endswith(".gguf") and text.count("/") < 2
    match = None if is_bare_file else _HUB.fullmatch(text)
    if match and not text.startswith((".", "~")) and ".." not in text.split("/"):
        quantization = (match["quantization"] or "").upper()
        return Reference(
            text,
            repo_id=match["repo_id"],
            revision=match["revision"],
            filename=match["filename"],
            quantization=quantization or None,
        )
    if any(mark in text for mark in _MARKS) and ":" not in path.name:
        return Reference(text, path=path)
    raise _unknown(text)


def _published(text: str, entry: Entry, quantization: str) -> Reference:
    if ":" in text and not _QUANTIZATION.fullmatch(quantization):
        known = ", ".join(entry.quantizations)
        raise ModelError(f"{text[:100]}: after the colon comes a quantization, for example {known}")
    chosen = quantization.upper() or catalog().default(entry)
    return Reference(
        text,
        repo_id=entry.repo_id,
        revision=entry.revision,
        filename=entry.filename(chosen),
        quantization=chosen,
        entry=entry,
    )


def is_there(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ModelError(f"{str(path)[:200]} cannot be read: {error.strerror}") from None
    return True


def _expanded(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ModelError(f"{text}: there is no such user, so no such model file") from None


def _unknown(text: str) -> ModelError:
    import difflib

    names = catalog().names
    known = {alias: entry.name for entry in catalog().entries for alias in (entry.name, *entry.aliases)}
    near = difflib.get_close_matches(text.lower().partition(":")[0], known, n=6, cutoff=0.4)
    found = list(dict.fromkeys(known[each] for each in near))[:3]
    hint = f"did you mean {' or '.join(found)}?" if found else f"there are {', '.join(names)}."
    return ModelError(f"there is no model {text[:100]!r}: {hint} A path to a .gguf file works too, and ORG/REPO:QUANT")
