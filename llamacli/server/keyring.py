"""Which keys open the server, and whether a key may ask now. Pure memory: what the ledger holds is handed to it.

Knows nothing of HTTP. Requests per minute are counted here, by this server alone; tokens per day come from usage, and
count for all servers that share a ledger.
"""

from __future__ import annotations

import hmac
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llamacli.errors import UsageError
from llamacli.server.keys import COMMAND_LINE, Key, digest_of, id_in
from llamacli.server.usage import Usage, day_of, seconds_of_day_left

_MINUTE = 60.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a key may not ask now. `retry_after` is in seconds."""

    message: str
    retry_after: float


class KeyRing:
    """The keys in force. One thread asks (`check`, `admit`); another may `replace` them at any time."""

    def __init__(self, given: Sequence[str], usage: Usage) -> None:
        """`given` are the keys of --api-key and LLAMACLI_API_KEY. UsageError for one that no header can carry."""
        self._given = [_given(text) for text in given]
        self._usage = usage
        self._in_force: dict[str, Key] = {}
        self._windows: dict[str, deque[float]] = {}
        self._is_closed = bool(given)

    @property
    def is_open(self) -> bool:
        """Whether no key is needed: none was given, and none was ever created."""
        return not self._is_closed

    def replace(self, keys: Iterable[Key]) -> None:
        """Take over the keys that the ledger holds, revoked ones included."""
        keys = list(keys)
        self._in_force = {key.id: key for key in keys if key.revoked is None}
        # For good: a ledger that was removed must not open the server.
        self._is_closed = self._is_closed or bool(keys)

    def check(self, presented: str) -> Key | None:
        """The key in force with this text. Only the id, which is no secret, is looked up; digests are compared in
        constant time."""
        digest = digest_of(presented)
        key = self._in_force.get(id_in(presented))
        found = key if key is not None and hmac.compare_digest(key.digest, digest) else None
        for given in self._given:
            if hmac.compare_digest(given.digest, digest):
                found = given
        return found

    def admit(self, key: Key, now: float) -> Refusal | None:
        """Let a request in and count it for the minute, or say why not. `now` in Unix seconds.

        Tokens are known when an answer is over: requests that are let in together may pass the day's limit together.
        """
        if key.tokens_per_day is not None:
            used = self._usage.tokens(key.id, day_of(now))
            if used >= key.tokens_per_day:
                wait = seconds_of_day_left(now)
                return Refusal(
                    f"the key {key.name!r} has used {used:,} of its {key.tokens_per_day:,} tokens today: "
                    f"try again after midnight UTC, in {_spoken(wait)}",
                    wait,
                )
        return self._admit_to_minute(key, key.rpm, now) if key.rpm is not None else None

    def withdraw(self, key: Key, admitted: float) -> None:
        """The request that was let in at this time was refused for another reason: it does not count."""
        window = self._windows.get(key.id)
        if window is not None and admitted in window:
            window.remove(admitted)

    def _admit_to_minute(self, key: Key, rpm: int, now: float) -> Refusal | None:
        window = self._windows.setdefault(key.id, deque())
        # A time that lies ahead is from before the clock was set back; kept, it would lock the key out.
        while window and not 0 <= now - window[0] < _MINUTE:
            window.popleft()
        if len(window) < rpm:
            window.append(now)
            return None
        wait = window[0] + _MINUTE - now
        return Refusal(
            f"the key {key.name!r} may make {rpm:,} requests per minute: try again in {_spoken(wait)}",
            wait,
        )


def _given(text: str) -> Key:
    # The text is a secret: not even a wrong one is repeated in a message.
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise UsageError(
            "--api-key must be printable ASCII without spaces, as HTTP headers carry it; "
            "python3 -c 'import secrets; print(secrets.token_urlsafe(32))' makes a good one"
        )
    return Key(COMMAND_LINE, COMMAND_LINE, digest_of(text))


def _spoken(seconds: float) -> str:
    whole = max(1, round(seconds + 0.5))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if whole >= 120 else f"{whole} s"
