"""Lets a request in by its key, and books what it used when it is over."""

from __future__ import annotations

from dataclasses import dataclass

from llamacli.server.access import presented_key
from llamacli.server.accounts import Accounts
from llamacli.server.exchange import Exchange
from llamacli.server.failure import Failure
from llamacli.server.keys import NO_KEY, Key
from llamacli.server.log import Record

_HOW = (
    "send it in the header Ocp-Apim-Subscription-Key, as Authorization: Bearer KEY, or as ?subscription-key=KEY; "
    "llamacli keys create makes one"
)


@dataclass(slots=True)
class Pass:
    """Under whose name a request runs. `admitted` is when it was counted for its key's minute."""

    key: Key | None = None
    admitted: float | None = None

    @property
    def name(self) -> str:
        return self.key.name if self.key else ""


@dataclass(slots=True)
class Gate:
    """accounts   None where nobody needs a key and nobody's usage is counted (--no-auth)"""

    accounts: Accounts | None

    @property
    def needs_key(self) -> bool:
        return self.accounts is not None and not self.accounts.ring.is_open

    def check(self, exchange: Exchange) -> Pass:
        """Whose request this is. Raises Failure 401 for a key that is missing or not in force."""
        if self.accounts is None:
            return Pass()
        presented = presented_key(exchange.headers, exchange.query)
        if presented is None:
            if self.accounts.ring.is_open:
                return Pass()
            raise _unauthorised(f"a subscription key is missing: {_HOW}")
        key = self.accounts.ring.check(presented)
        if key is None and not self.accounts.ring.is_open:
            raise _unauthorised(f"the subscription key is not valid: {_HOW}")
        return Pass(key)

    def admit(self, entry: Pass) -> None:
        """Count a request against the limits of its key. Raises Failure 429."""
        if self.accounts is None or entry.key is None:
            return
        now = self.accounts.usage.clock()
        refusal = self.accounts.ring.admit(entry.key, now)
        if refusal is not None:
            raise Failure(429, refusal.message, code="rate_limit_exceeded", retry_after=refusal.retry_after)
        entry.admitted = now

    def leave(self, entry: Pass, record: Record, *, is_counted: bool) -> None:
        """The request is over. One that failed before anything was computed does not count against its minute."""
        if self.accounts is None:
            return
        is_error = record.status >= 400
        is_free = is_error and not record.prompt_tokens and not record.completion_tokens
        if is_free and entry.key is not None and entry.admitted is not None:
            self.accounts.ring.withdraw(entry.key, entry.admitted)
        if is_counted:
            self.accounts.usage.record(
                entry.key.id if entry.key else NO_KEY,
                prompt_tokens=record.prompt_tokens,
                completion_tokens=record.completion_tokens,
                is_error=is_error,
            )


def _unauthorised(message: str) -> Failure:
    return Failure(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
