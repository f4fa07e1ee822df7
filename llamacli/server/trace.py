"""The id under which a request is found again: in its answer, in the log, and in the caller's own tracing.

And the time of day that answers name: of a server whose answers are to be repeatable, both are counted.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from uuid import uuid4

# W3C Trace Context, section 3.2: version-traceid-parentid-flags; version ff and an id of zeros are invalid.
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?", re.ASCII
)
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}", re.ASCII)
COUNTED_FROM = 1_700_000_000  # seconds since 1970: the first moment of a counted clock


def given_trace_id(headers: Mapping[str, str]) -> str | None:
    """The caller's own, from `traceparent` or else `X-Request-Id`."""
    if match := _TRACEPARENT.fullmatch(headers.get("traceparent", "").strip()):
        return match[1]
    given = headers.get("x-request-id", "").strip()
    return given if _REQUEST_ID.fullmatch(given) else None


class Drawn:
    """A new UUID for each request that brings no id, and the clock's time."""

    def rewind(self) -> None:
        """Nothing to begin anew with."""

    def trace_id(self, headers: Mapping[str, str], *, is_work: bool) -> str:
        return given_trace_id(headers) or str(uuid4())

    def now(self) -> int:
        return int(time.time())


class Counted:
    """Ids and seconds that count the requests, so that a fresh server gives the same ones again.

    Requests that ask the model are counted by themselves: however often somebody looks whether the server is ready
    must not show in their answers.
    """

    def __init__(self) -> None:
        self.rewind()

    def rewind(self) -> None:
        """Count from the beginning."""
        self._n_work = 0
        self._n_others = 0

    def trace_id(self, headers: Mapping[str, str], *, is_work: bool) -> str:
        if is_work:
            self._n_work += 1
        else:
            self._n_others += 1
        count = f"00000000-0000-4000-8000-{self._n_work:012x}"
        other = f"00000000-0000-4000-9000-{self._n_others:012x}"
        return given_trace_id(headers) or (count if is_work else other)

    def now(self) -> int:
        return COUNTED_FROM + self._n_work
