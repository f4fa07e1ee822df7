"""The stored prefixes of a loaded model: which files on the disk hold cells that it would compute itself."""

from __future__ import annotations

import os
from array import array
from pathlib import Path
from typing import TYPE_CHECKING

from llamacli.engine.bindings import bindings
from llamacli.engine.kv import MIN_STORED
from llamacli.models import checksum

if TYPE_CHECKING:
    from llamacli.engine.prefix_store import PrefixStore
    from llamacli.engine.prefixes import Prefixes
    from llamacli.launch import Launch


def of(launch: Launch, directory: Path, *, least: int = MIN_STORED) -> Prefixes | None:
    """For the engine of a loaded model. None where the user wants none.

    directory   of all prefixes: see config.Directories.prefixes
    least       tokens of a prompt that is worth its room
    """
    assert launch.weights is not None
    store = _store(launch, directory, is_rewritten=launch.weights.is_rewritten)
    if store is None:
        return None
    from llamacli.engine.prefixes import Prefixes

    return Prefixes(store, least=least)


def held(launch: Launch, tokens: array[int], directory: Path, *, is_rewritten: bool) -> int:
    """How many tokens of a prompt are stored, as computed with the weights in one order or the other."""
    if len(tokens) < MIN_STORED:
        return 0
    store = _store(launch, directory, is_rewritten=is_rewritten)
    found = None if store is None else store.find(tokens)
    return 0 if found is None else found.length


def _store(launch: Launch, directory: Path, *, is_rewritten: bool) -> PrefixStore | None:
    settings = launch.settings
    if settings.no_cache or settings.cache_size == 0:
        return None
    fingerprint = _fingerprint(launch, is_rewritten)
    if fingerprint is None:
        return None
    from llamacli.engine.prefix_store import PrefixStore

    return PrefixStore(directory, fingerprint, budget=settings.cache_size, label=launch.file.name)


def expecting(launch: Launch, tokens: array[int], directory: Path) -> Prefixes | None:
    """The same, with a look for this prompt under way. For one that is too short nothing is even imported."""
    if len(tokens) < MIN_STORED:
        return None
    prefixes = of(launch, directory)
    if prefixes is not None:
        prefixes.expect(tokens)
    return prefixes


def _fingerprint(launch: Launch, is_rewritten: bool) -> bytes | None:
    """What cells depend on beside the tokens: llama.cpp would take another model's without a word.

    None for a model's file that has gone.
    """
    from hashlib import sha256

    found = sha256()
    try:
        for path in launch.file.files:
            state = path.stat()
            found.update(f"{state.st_size} {state.st_mtime_ns} ".encode() + checksum.sample(path))
        found.update(bindings().build().encode("utf-8", "surrogateescape"))
    except OSError:
        return None
    # Rewritten weights round otherwise. The rotation of a quantized cache is llama.cpp's own switch.
    rotation = os.environ.get("LLAMA_ATTN_ROT_DISABLE", "")
    found.update(f" {launch.settings.kv_type} {is_rewritten} {rotation}".encode())
    if launch.flash_attention is not None:  # without it, values lie in another order
        found.update(f" {launch.flash_attention}".encode())
    return found.digest()
