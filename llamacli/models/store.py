"""Which file is meant by a model reference. Knows nothing of what is inside the file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from llamacli.errors import ModelError

TINY = "tiny"
TINY_FILENAME = "tiny-llama2-chat.Q8_0.gguf"
TINY_SHA256 = "577186b6078d9e10e84afcee78ab5c93d47eae69641be1ca1dbd4b80c5bca99e"

# Names of published models: repository on the hub and name of the file, where Q stands for the quantization.
PUBLISHED = {
    "7b-chat": ("TheBloke/Llama-2-7B-Chat-GGUF", "llama-2-7b-chat.Q.gguf"),
    "7b": ("TheBloke/Llama-2-7B-GGUF", "llama-2-7b.Q.gguf"),
    "13b-chat": ("TheBloke/Llama-2-13B-chat-GGUF", "llama-2-13b-chat.Q.gguf"),
    "13b": ("TheBloke/Llama-2-13B-GGUF", "llama-2-13b.Q.gguf"),
    "70b-chat": ("TheBloke/Llama-2-70B-Chat-GGUF", "llama-2-70b-chat.Q.gguf"),
    "70b": ("TheBloke/Llama-2-70B-GGUF", "llama-2-70b.Q.gguf"),
    "codellama-7b-instruct": ("TheBloke/CodeLlama-7B-Instruct-GGUF", "codellama-7b-instruct.Q.gguf"),
    "codellama-13b-instruct": ("TheBloke/CodeLlama-13B-Instruct-GGUF", "codellama-13b-instruct.Q.gguf"),
    "codellama-34b-instruct": ("TheBloke/CodeLlama-34B-Instruct-GGUF", "codellama-34b-instruct.Q.gguf"),
}
DEFAULT_QUANTIZATION = "Q4_K_M"
_QUANTIZATION = re.compile(r"[\w.-]+")
_HUB = re.compile(r"(?P<repo_id>[\w.-]+/[\w.-]+)(@[\w.-]+)?(:[\w.-]+|/[\w./-]+\.gguf)?")


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model on this machine. `name` is what the user called it; sha256 is None where none is known."""

    name: str
    path: Path
    sha256: str | None = None


def find(reference: str, directory: Path) -> ModelFile:
    """The file that a reference means: a path, `tiny`, or a published name whose file lies in `directory`.

    Raises ModelError that says how to get what is not here. Whether a path leads to a model at all is said by
    whoever reads the file.
    """
    if reference == TINY:
        return ModelFile(TINY, bundled(), TINY_SHA256)
    name, _, quantization = reference.partition(":")
    if name.lower() in PUBLISHED and (not quantization or _QUANTIZATION.fullmatch(quantization)):
        return _published(name.lower(), quantization.upper() or DEFAULT_QUANTIZATION, directory)
    path = _expanded(reference)
    looks_like_hub = _HUB.fullmatch(reference) and not reference.startswith(".")
    if _is_there(path) or (reference.endswith(".gguf") and reference.count("/") != 2):
        return ModelFile(reference, path)
    if looks_like_hub:
        raise ModelError(
            f"{reference} is not on this machine, and this version does not download: "
            "fetch the .gguf file from the Hugging Face hub and give its path with -m"
        )
    if "/" in reference:
        return ModelFile(reference, path)
    raise _unknown(reference)


def _expanded(reference: str) -> Path:
    try:
        return Path(reference).expanduser()
    except RuntimeError:
        raise ModelError(f"{reference}: there is no such user, so no such model file") from None


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ModelError(f"{str(path)[:200]} cannot be read: {error.strerror}") from None
    return True


def on_this_machine(directory: Path) -> list[ModelFile]:
    """The bundled model, and every .gguf file in `directory`."""
    paths = sorted(directory.glob("*.gguf")) if directory.is_dir() else []
    return [ModelFile(TINY, bundled(), TINY_SHA256), *(ModelFile(path.stem, path) for path in paths)]


def bundled() -> Path:
    """The tiny model: beside this file in an installed package, in models/ at the top of a checkout."""
    installed = Path(__file__).parent / "bundled" / TINY_FILENAME
    return installed if installed.exists() else Path(__file__).parents[2] / "models" / TINY_FILENAME


def verify(file: ModelFile) -> None:
    """Check a file against the checksum that is known for it. Reads it whole: a second for every gigabyte."""
    if file.sha256 is None:
        return
    found = sha256(replace(file, sha256=None))
    if found != file.sha256:
        raise ModelError(f"{file.path} is damaged: its sha256 is {found}, not {file.sha256}. Install llamacli again")


def sha256(file: ModelFile, cache: Path | None = None) -> str:
    """The checksum that is known, or else the file's own: a second for every gigabyte.

    cache   a directory that remembers it for as long as the file's size and time stay the same
    """
    if file.sha256 is not None:
        return file.sha256
    import hashlib

    state = file.path.stat()
    key = f"{file.path.resolve()}\0{state.st_size}\0{state.st_mtime_ns}"
    note = cache / "sha256" / hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest() if cache else None
    with suppress(OSError):
        if note and len(known := note.read_text("ascii").strip()) == 64:
            return known
    with file.path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if note:
        _remember(note, digest)
    return digest


def _remember(note: Path, digest: str) -> None:
    """Written whole or not at all; a cache that cannot be written is no error."""
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        draft = note.with_name(f"{note.name}.{os.getpid()}")
        draft.write_text(digest + "\n", "ascii")
        draft.replace(note)


def _published(name: str, quantization: str, directory: Path) -> ModelFile:
    repo_id, pattern = PUBLISHED[name]
    filename = pattern.replace("Q.gguf", f"{quantization}.gguf")
    path = directory / filename
    if _is_there(path):
        return ModelFile(name, path)
    raise ModelError(
        f"{name} is not on this machine, and this version does not download: fetch {filename} from {repo_id} "
        f"on the Hugging Face hub into {directory}, or try -m {TINY}, the bundled model"
    )


def _unknown(reference: str) -> ModelError:
    import difflib

    names: Iterable[str] = (TINY, *PUBLISHED)
    near = difflib.get_close_matches(reference.lower(), names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}."
    return ModelError(f"there is no model {reference!r}: {hint} A path to a .gguf file works too")
