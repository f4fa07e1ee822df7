"""Posts JSON to a server and reads the answer as it comes, over TCP, TLS or a Unix socket.

Whatever goes wrong on the way is a RemoteError. Knows nothing of what is asked or answered.
"""

from __future__ import annotations

import base64
import http.client
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import suppress
from threading import Lock

from llamacli.errors import RemoteError
from llamacli.remote.address import Address, Proxy, proxy_for, redirected

CONNECT_SECONDS = 15.0
MAX_REDIRECTS = 5
MAX_BODY = 64 << 20  # bytes of an answer that comes in one piece
_REDIRECTS = (301, 302, 307, 308)


class Line:
    """The connection of a post() that runs in another thread, for whoever waits there no longer."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._socket: socket.socket | None = None
        self._is_cut = False

    def lead_to(self, connection: socket.socket) -> None:
        """post() has connected. It may do so more than once, where it is sent on."""
        with self._lock:
            self._socket = connection
            if self._is_cut:
                _shut(connection)

    def check(self) -> None:
        """Raises RemoteError after cut()."""
        if self._is_cut:
            raise RemoteError("nobody waits for the answer any more")

    def cut(self) -> None:
        """Hang up, now or as soon as there is a connection: post() raises RemoteError."""
        with self._lock:
            self._is_cut = True
            if self._socket is not None:
                _shut(self._socket)


class Reply:
    """A server's answer, its body still to be read."""

    def __init__(
        self, address: Address, response: http.client.HTTPResponse, connection: socket.socket | None = None
    ) -> None:
        self._address = address
        self._response = response
        self._socket = connection
        self.status = response.status
        self.reason = response.reason

    @property
    def headers(self) -> list[tuple[str, str]]:
        return self._response.getheaders()

    def close(self) -> None:
        """Hang up. What reads the body in another thread is told that it broke off."""
        if self._socket is not None:
            _shut(self._socket)

    def header(self, name: str) -> str:
        return self._response.headers.get(name, "")

    @property
    def content_type(self) -> str:
        return self.header("content-type").partition(";")[0].strip().lower()

    @property
    def retry_after(self) -> int | None:
        """Seconds that a busy server asks us to wait; None where it says nothing, or names a date."""
        wait = self.header("retry-after").strip()
        return int(wait) if re.fullmatch("[0-9]{1,6}", wait) else None

    def parts(self) -> Iterator[bytes]:
        """The body as it arrives. Raises RemoteError when it breaks off."""
        where = self._address.shown
        try:
            while part := self._response.read1(1 << 16):
                yield part
        except TimeoutError:
            raise RemoteError(f"{where} has fallen silent in the middle of its answer: see --remote-timeout") from None
        except (OSError, http.client.HTTPException) as error:
            raise RemoteError(f"{where} broke off in the middle of its answer: {_why(error)}") from None
        if self._response.length:
            raise RemoteError(
                f"{where} broke off in the middle of its answer: {self._response.length:,} bytes are missing"
            )

    def body(self) -> bytes:
        """All of it. Raises RemoteError."""
        parts, size = [], 0
        for part in self.parts():
            parts.append(part)
            size += len(part)
            self.check_size(size)
        return b"".join(parts)

    def check_size(self, n_bytes: int) -> None:
        """Of a body that is kept as a whole. Raises RemoteError beyond MAX_BODY."""
        if n_bytes > MAX_BODY:
            raise RemoteError(f"{self._address.shown} answers with more than {MAX_BODY >> 20} MiB: that is no answer")


def post(
    address: Address, body: bytes, headers: Mapping[str, str], *, silence: float, line: Line | None = None
) -> Reply:
    """Ask. Redirects on the same host are followed; to another one nothing is sent, neither the question nor a key.

    silence   seconds without a byte after which the server is given up
    line      by which another thread can end it

    Raises RemoteError, UsageError for a proxy that cannot be used.
    """
    for _ in range(MAX_REDIRECTS + 1):
        reply = _posted(address, body, headers, silence, line or Line())
        if reply.status not in _REDIRECTS:
            return reply
        there = redirected(address, reply.header("location"))
        if there is None or not address.trusts(there):
            to = there.shown if there is not None else "nowhere"
            raise RemoteError(
                f"{address.shown} answered {reply.status} and sends us to {to}, where the question was not sent: "
                f"give {address.option} the right address"
            )
        address = there
    raise RemoteError(
        f"{address.shown} sends us in circles: {MAX_REDIRECTS} redirects; give {address.option} the right address"
    )


def _posted(address: Address, body: bytes, headers: Mapping[str, str], silence: float, line: Line) -> Reply:
    line.check()
    proxy = proxy_for(address)
    connection = _connection(address, proxy)
    try:
        connection.connect()
        connection.sock.settimeout(silence)
    except (OSError, http.client.HTTPException) as error:
        via = f" by way of the proxy {proxy.host}:{proxy.port}" if proxy else ""
        raise RemoteError(f"{address.shown} cannot be reached{via}: {_why(error)}") from None
    line.lead_to(connection.sock)
    target, headers = address.target, dict(headers)
    if proxy is not None and address.scheme == "http":
        target = f"{address.shown}{target}"
        headers |= _proxy_headers(proxy)
    try:
        # Who refuses a request may do so before it has read all of it, and hang up; its reason is there all the same.
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", target, body, headers)
        used = connection.sock  # which getresponse() lets go of, where the server closes it after the answer
        return Reply(address, connection.getresponse(), used)
    except TimeoutError:
        raise RemoteError(f"{address.shown} has said nothing for {silence:g} s: see --remote-timeout") from None
    except (OSError, http.client.HTTPException) as error:
        raise RemoteError(f"{address.shown} gave no answer: {_why(error)}") from None


def _connection(address: Address, proxy: Proxy | None) -> http.client.HTTPConnection:
    if address.socket is not None:
        return _OverUnix(address.socket)
    host, port = (proxy.host, proxy.port) if proxy else (address.host, address.port)
    if address.scheme == "http":
        return http.client.HTTPConnection(host, port, timeout=CONNECT_SECONDS)
    secure = http.client.HTTPSConnection(host, port, timeout=CONNECT_SECONDS, context=ssl.create_default_context())
    if proxy is not None:
        secure.set_tunnel(address.host, address.port, _proxy_headers(proxy))
    return secure


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _OverUnix(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=CONNECT_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(CONNECT_SECONDS)
        self.sock.connect(self._path)


def _proxy_headers(proxy: Proxy) -> dict[str, str]:
    if proxy.credentials is None:
        return {}
    return {"Proxy-Authorization": f"Basic {base64.b64encode(proxy.credentials.encode()).decode()}"}


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or 'it may not speak TLS there'}"
    if isinstance(error, TimeoutError):
        return f"no connection within {CONNECT_SECONDS:g} s"
    if isinstance(error, http.client.RemoteDisconnected):
        return "it closed the connection"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection ended before the answer did"
    if isinstance(error, http.client.HTTPException):
        return f"what it says is not HTTP ({type(error).__name__})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
