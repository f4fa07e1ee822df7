"""The id under which a request is found again: in its answer, in the log, and in the caller's own tracing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from uuid import uuid4

# W3C Trace Context, section 3.2: version-traceid-parentid-flags; version ff and an id of zeros are invalid.
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?", re.ASCII
)
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}", re.ASCII)


def trace_id(headers: Mapping[str, str]) -> str:
    """The caller's, from `traceparent` or else `X-Request-Id`; or a new UUID."""
    if match := _TRACEPARENT.fullmatch(headers.get("traceparent", "").strip()):
        return match[1]
    given = headers.get("x-request-id", "").strip()
    return given if _REQUEST_ID.fullmatch(given) else str(uuid4())
