"""Reads a stretch of a remote file over HTTP, following redirects. Knows nothing of files on disk or of the hub.

The token goes to the origin that the URL names, and to no other: not to a CDN, and not to another port.
"""

from __future__ import annotations

import http.client
import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import time
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, OpenerDirector, Request, build_opener

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)", re.ASCII)
# 403 too: a signed URL that has expired is refused so, and asking the hub again gets a new one.
_PASSING = frozenset({403, 408, 425, 429, 500, 502, 503, 504})
AUTHORIZATION = "Authorization"
_MOST = 1 << 20  # bytes of one read


class Interrupted(Exception):
    """The line or the server failed in a way that may pass. `retry_after` is the server's own wish, in seconds."""

    def __init__(self, what: str, retry_after: float | None = None) -> None:
        super().__init__(what)
        self.retry_after = retry_after


class Refused(Exception):
    """The server will not hand the file out, however often it is asked."""

    def __init__(self, status: int, what: str) -> None:
        super().__init__(what)
        self.status = status


class NoRanges(Exception):
    """The server sends whole files only."""


class WrongFile(Exception):
    """What the server sends is not the file that was asked for."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a file of `size` bytes is. `headers` may hold an Authorization."""

    url: str
    size: int
    headers: Mapping[str, str]


def origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


class _Redirects(HTTPRedirectHandler):
    """Follows redirects; takes the Authorization along only within its origin."""

    def redirect_request(
        self, request: Request, body: IO[bytes], code: int, reason: str, headers: http.client.HTTPMessage, url: str
    ) -> Request | None:
        following = super().redirect_request(request, body, code, reason, headers, url)
        if following is not None:
            following.remove_header(AUTHORIZATION)
            token = request.unredirected_hdrs.get(AUTHORIZATION)
            if token is not None and origin(url) == origin(request.full_url):
                following.add_unredirected_header(AUTHORIZATION, token)
        return following


class Reader:
    """Opens stretches of remote files. Proxies come from the environment, certificates from the system.

    timeout   seconds to wait for a connection, or for the next bytes
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._opener: OpenerDirector = build_opener(_Redirects(), HTTPSHandler(context=_certificates()))

    @contextmanager
    def open(self, source: Source, start: int, end: int) -> Iterator[Callable[[], bytes]]:
        """The file's bytes start..end. Yields what reads the bytes that have come; none at the end.

        Raises Interrupted, Refused, NoRanges or WrongFile, the yielded function Interrupted alone.
        """
        try:
            with self._opener.open(_request(source, start, end), timeout=self._timeout) as response:
                _check(response, source, start, end)
                yield _reader(response)
        except HTTPError as error:
            with error:
                raise _refusal(error, source, start) from None
        except (OSError, http.client.HTTPException) as error:
            raise _interrupted(error) from None


def _certificates() -> ssl.SSLContext:
    import truststore

    return truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _request(source: Source, start: int, end: int) -> Request:
    plain = {name: value for name, value in source.headers.items() if name.title() != AUTHORIZATION}
    request = Request(source.url, headers=plain | {"Accept-Encoding": "identity"})
    if (start, end) != (0, source.size):
        request.add_header("Range", f"bytes={start}-{end - 1}")
    for name, value in source.headers.items():
        if name.title() == AUTHORIZATION:
            request.add_unredirected_header(AUTHORIZATION, value)
    return request


def _check(response: Any, source: Source, start: int, end: int) -> None:
    """That the answer is the stretch that was asked for."""
    if response.status == 206:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if not match or int(match[1]) != start or int(match[3]) != source.size:
            found = response.headers.get("Content-Range")
            raise WrongFile(f"the server answers with {found}, where bytes {start}- of {source.size} were asked for")
        return
    if (start, end) != (0, source.size):
        raise NoRanges
    length = response.headers.get("Content-Length")
    if length is not None and length != str(source.size):
        what = f"the server sends {length} bytes, where {source.size} were announced"
        if response.headers.get_content_type() == "text/html":
            raise WrongFile(f"{what}: a web page")
        raise Interrupted(what)


def _reader(response: Any) -> Callable[[], bytes]:
    def read() -> bytes:
        # What has come, and no more: bytes that wait in a buffer for others would be lost with the connection.
        try:
            piece: bytes = response.read1(_MOST)
        except (OSError, http.client.HTTPException) as error:
            raise _interrupted(error) from None
        return piece

    return read


def _interrupted(error: OSError | http.client.HTTPException) -> Interrupted:
    reason = error.reason if isinstance(error, URLError) else error
    if isinstance(reason, TimeoutError):
        return Interrupted("nothing came any more")
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return Interrupted(" ".join(str(text).split()).lower())


def _refusal(error: HTTPError, source: Source, start: int) -> Exception:
    if error.code == 416:
        return WrongFile(f"the server has no byte {start} of a file of {source.size}")
    said = error.headers.get("X-Error-Message") or error.reason
    is_elsewhere = origin(error.url or source.url) != origin(source.url)
    if error.code in _PASSING and (error.code != 403 or is_elsewhere):
        return Interrupted(f"the server answers {error.code}", _retry_after(error.headers.get("Retry-After")))
    return Refused(error.code, f"{error.code} {said}")


def _retry_after(value: str | None) -> float | None:
    """Seconds, of a header that holds seconds or a date."""
    if not value:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except ValueError:
        return None
