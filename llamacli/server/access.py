"""Which web pages and host names may reach the server, and how a request presents its key.

A page from elsewhere must not use a server on this machine behind its user's back: neither directly (its Origin
is refused) nor through a name of its own that resolves to 127.0.0.1 (the Host is refused, on a loopback bind).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from llamacli.server.failure import Failure

_LOCAL_ORIGIN = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.ASCII)
_LOCAL_HOST = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.ASCII | re.IGNORECASE)
_ORIGIN = re.compile(r"(?!http://.*:80$|https://.*:443$)[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+", re.ASCII)
_BEARER = re.compile(r"Bearer +(\S+)", re.ASCII | re.IGNORECASE)
KEY_HEADER = "ocp-apim-subscription-key"
KEY_PARAMETER = "subscription-key"
_ALLOWED_HEADERS = (
    "authorization, cache-control, content-type, ocp-apim-subscription-key, traceparent, x-request-id, x-simulate"
)
_EXPOSED_HEADERS = "retry-after, x-simulated, x-trace-id"


@dataclass(frozen=True, slots=True)
class Origins:
    """The origins whose pages may call.

    is_loopback   the server is bound to this machine alone, so that no other Host can be meant
    is_socket     it is bound to a Unix socket, which no browser can open: who passes a request on names it as he likes
    allowed       origins beside the local ones; "*" is any
    """

    is_loopback: bool
    allowed: frozenset[str] = frozenset()
    is_socket: bool = False

    def check(self, headers: Mapping[str, str]) -> None:
        """Raises Failure 403 for a page or a host name that may not call."""
        host = headers.get("host")
        if self._knows_its_names and host is not None and not _LOCAL_HOST.fullmatch(host):
            raise Failure(
                403,
                f"the host {host[:100]!r} is not this machine: call http://localhost or http://127.0.0.1; "
                "a proxy must send Host: localhost",
            )
        origin = headers.get("origin")
        if origin is not None and not self._admits(origin, host):
            raise Failure(
                403, f"pages from {origin[:100]} may not call: start the server with --cors-origin to let them"
            )

    @property
    def _knows_its_names(self) -> bool:
        return self.is_loopback and not self.is_socket

    def _admits(self, origin: str, host: str | None) -> bool:
        if "*" in self.allowed or origin in self.allowed or _LOCAL_ORIGIN.fullmatch(origin):
            return True
        return not self._knows_its_names and host is not None and origin in (f"http://{host}", f"https://{host}")

    def answer_headers(self, headers: Mapping[str, str]) -> list[tuple[str, str]]:
        """What lets the page read the answer. Only for an origin that has passed the check."""
        origin = headers.get("origin")
        if origin is None:
            return []
        return [
            ("access-control-allow-origin", origin),
            ("access-control-expose-headers", _EXPOSED_HEADERS),
            ("vary", "Origin"),
        ]


def is_origin(text: str) -> bool:
    """Whether a browser can send this as its Origin (RFC 6454, section 6.2): no path, no capitals, no default port."""
    return _ORIGIN.fullmatch(text) is not None


def is_preflight(method: str, headers: Mapping[str, str]) -> bool:
    return method == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers


def preflight_headers(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """The answer to a browser that asks whether it may call."""
    wanted = headers.get("access-control-request-headers", "")
    answer = [
        ("access-control-allow-methods", "GET, POST, OPTIONS"),
        ("access-control-allow-headers", ", ".join(filter(None, (_ALLOWED_HEADERS, wanted)))),
        ("access-control-max-age", "600"),
    ]
    if headers.get("access-control-request-private-network") == "true":
        answer.append(("access-control-allow-private-network", "true"))
    return answer


def presented_key(headers: Mapping[str, str], query: Mapping[str, str]) -> str | None:
    """The key that a request carries, wherever it carries it."""
    return next(iter(presented_keys(headers, query)), None)


def presented_keys(headers: Mapping[str, str], query: Mapping[str, str]) -> list[str]:
    """All of them. The first one counts."""
    bearer = _BEARER.fullmatch(headers.get("authorization", "").strip())
    found = (headers.get(KEY_HEADER), bearer[1] if bearer else None, query.get(KEY_PARAMETER))
    return [key for key in found if key]
