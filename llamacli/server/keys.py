"""Subscription keys in the ledger: made, listed, revoked.

A key reads `llk_ID_SECRET`. The secret is 256 random bits, which nobody can guess or try through; a plain SHA-256 of
the key is therefore enough to keep (a slow hash with salt protects what people choose themselves), and is quick enough
for every request. The key itself is not kept anywhere. A revoked key stays in the ledger, for its usage, and because a
server that ever had a key stays closed.
"""

from __future__ import annotations

import hashlib
import secrets
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from llamacli.errors import UsageError
from llamacli.server.ledger import Ledger

PREFIX = "llk_"
NO_KEY = "-"  # whom requests without a key are counted for
COMMAND_LINE = "command line"  # the name of the keys that --api-key gives
_LONGEST_NAME = 64
_MOST_RPM = 100_000  # a time is remembered for each request of the last minute
_MOST_TOKENS = 10**15
_COLUMNS = "id, name, digest, rpm, tokens_per_day, created, revoked"


@dataclass(frozen=True, slots=True)
class Key:
    """A key as the server knows it, without its secret.

    digest                SHA-256 of the whole key, 32 bytes
    rpm, tokens_per_day   None is no limit
    created, revoked      Unix seconds; `revoked` is None while the key is in force
    """

    id: str
    name: str
    digest: bytes = field(repr=False)
    rpm: int | None = None
    tokens_per_day: int | None = None
    created: float = 0.0
    revoked: float | None = None


def digest_of(text: str) -> bytes:
    # Whatever a client sends must have a digest, half a surrogate pair from a query string too.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def id_in(text: str) -> str:
    """The id that a key names, "" for a text that is no key of ours."""
    return text[len(PREFIX) :].partition("_")[0] if text.startswith(PREFIX) else ""


@contextmanager
def created(
    ledger: Ledger, name: str, *, now: float, rpm: int | None = None, tokens_per_day: int | None = None
) -> Iterator[tuple[Key, str]]:
    """A new key, and its text, which is shown to its owner within the block: a key that nobody saw is not kept.

    Raises UsageError for a name that is taken or cannot be one, and for limits out of range.
    """
    name = _checked_name(name)
    _check_limit("--rpm", rpm, _MOST_RPM)
    _check_limit("--tokens-per-day", tokens_per_day, _MOST_TOKENS)
    with ledger.transaction():
        keys = every(ledger)
        _check_free(name, keys)
        key_id = _new_id({key.id for key in keys} | {folded(key.name) for key in keys})
        text = f"{PREFIX}{key_id}_{secrets.token_urlsafe(32)}"
        key = Key(key_id, name, digest_of(text), rpm, tokens_per_day, now)
        ledger.write(
            f"INSERT INTO keys ({_COLUMNS}, folded) VALUES (?, ?, ?, ?, ?, ?, NULL, ?)",
            [(key.id, name, key.digest, rpm, tokens_per_day, now, folded(name))],
        )
        yield key, text


def every(ledger: Ledger) -> list[Key]:
    """All keys that were ever made, the oldest first."""
    return [Key(*row) for row in ledger.read(f"SELECT {_COLUMNS} FROM keys ORDER BY created, id")]


def revoke(ledger: Ledger, reference: str, *, now: float) -> tuple[Key, bool]:
    """End a key. Returns it as it now is, and False if it had been revoked before. UsageError if there is no such."""
    with ledger.transaction():
        key = find(every(ledger), reference)
        if key.revoked is not None:
            return key, False
        ledger.write("UPDATE keys SET revoked = ? WHERE id = ?", [(now, key.id)])
    return replace(key, revoked=now), True


def find(keys: list[Key], reference: str) -> Key:
    """The key with this name or id. Of several with one name, the one in force, or else the newest."""
    named = [key for key in keys if key.id == reference or folded(key.name) == folded(reference)]
    if named:
        return max(named, key=lambda key: (key.id == reference, key.revoked is None, key.created))
    raise unknown(reference, [key.name for key in keys])


def unknown(reference: str, names: list[str]) -> UsageError:
    import difflib

    shown = reference if len(reference) <= _LONGEST_NAME else f"{reference[:_LONGEST_NAME]}..."
    if not names:
        return UsageError(f"there is no key {shown!r}, nor any other: llamacli keys create --name NAME")
    spellings = {folded(name): name for name in names}
    near = difflib.get_close_matches(folded(reference), spellings, n=1)
    hint = f"did you mean {spellings[near[0]]!r}?" if near else "llamacli keys list shows those there are"
    return UsageError(f"there is no key {shown!r}; {hint}")


def folded(name: str) -> str:
    """Names that differ in case or in how an accent is encoded are one name."""
    return unicodedata.normalize("NFKC", name).casefold()


def _checked_name(name: str) -> str:
    name = unicodedata.normalize("NFC", name)
    if not name.isprintable() or name != name.strip() or not 0 < len(name) <= _LONGEST_NAME:
        raise UsageError(
            f"--name must be 1 to {_LONGEST_NAME} printable characters without spaces around them, not {name[:80]!r}"
        )
    if folded(name) in (NO_KEY, COMMAND_LINE):
        raise UsageError(f"--name {name!r} is what usage says of requests without such a key: choose another name")
    return name


def _new_id(taken: set[str]) -> str:
    while (key_id := secrets.token_hex(4)) in taken:
        pass
    return key_id


def _check_limit(flag: str, value: int | None, most: int) -> None:
    if value is not None and not 1 <= value <= most:
        raise UsageError(f"{flag} must be a whole number between 1 and {most:,}, not {value:,}")


def _check_free(name: str, keys: list[Key]) -> None:
    for key in keys:
        if key.id == folded(name):
            raise UsageError(f"{name!r} is the id of the key {key.name!r}: choose another name")
        if key.revoked is None and folded(key.name) == folded(name):
            raise UsageError(
                f"there is a key {key.name!r} already: choose another name, or llamacli keys revoke {key.id}"
            )
