"""What an http or https address serves, as bytes. Bounded by what is read and by the clock, whatever the server says.

Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import re
import ssl
import threading
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, quote, urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
)

from llamacli import __version__
from llamacli.documents.document import MAX_TEXT, Teller, check_size, shown
from llamacli.errors import InputTooLong, LlamacliError, RemoteError, UsageError

PATIENCE = 3.0  # seconds before a slow server is mentioned
SILENCE = 20.0  # seconds without a byte
DEADLINE = 120.0  # seconds for all of it
MAX_PDF = 64 << 20  # bytes
MAX_REDIRECTS = 10
_URL = re.compile(r"https?://", re.IGNORECASE)
_TEXTS = re.compile(
    r"text/.*|application/(.*[+-])?(json|xml|yaml|toml|javascript|ndjson|jsonl|sql|rtf|pdf|x-sh|x-httpd-php|x-tex|"
    r"ecmascript|graphql|octet-stream)|"
)


@dataclass(frozen=True, slots=True)
class Fetched:
    """`kind` is the Content-Type without its parameters, in small letters; empty where none came."""

    raw: bytes
    kind: str
    charset: str | None


def is_address(place: str) -> bool:
    return _URL.match(place) is not None


def name_of(url: str) -> str:
    """For people and for a model: without user, fragment and query, which may hold a secret."""
    parts = _split(url)
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    port = f":{parts.port}" if parts.port else ""
    return shown(f"{parts.scheme}://{host}{port}{parts.path}" + ("?..." if parts.query else ""))


def fetch(
    url: str,
    teller: Teller,
    *,
    patience: float = PATIENCE,
    silence: float = SILENCE,
    deadline: float = DEADLINE,
) -> Fetched:
    """What is there. A page that sends us on is followed.

    patience   seconds before the teller is told that a server is slow
    silence    seconds without a byte after which it is given up
    deadline   seconds for all of it

    Raises UsageError for an address that is none and for what is no text, InputTooLong, and RemoteError.
    """
    request = Request(
        _spelt(url),
        headers={
            "User-Agent": f"llamacli/{__version__}",
            "Accept": "text/html, text/*, application/json, application/pdf, */*;q=0.5",
            "Accept-Encoding": "identity",
        },
    )
    name = name_of(url)
    ends = monotonic() + deadline
    out: SimpleQueue[Fetched | BaseException] = SimpleQueue()

    def work() -> None:
        try:
            out.put(_fetched(request, name, silence, ends))
        except BaseException as error:
            out.put(error)

    # In a thread of its own: names, handshakes and headers can be slow, too, a byte at a time.
    threading.Thread(target=work, name="fetch", daemon=True).start()
    try:
        found = _got(out, min(patience, deadline))
        if found is None:
            teller.say(f"waiting for {name}")
            found = out.get(timeout=max(0.0, ends - monotonic()))
    except Empty:
        raise _too_slow(name, deadline) from None
    if isinstance(found, BaseException):
        raise found
    return found


def _got(out: SimpleQueue[Fetched | BaseException], patience: float) -> Fetched | BaseException | None:
    with suppress(Empty):
        return out.get(timeout=patience)
    return None


def _fetched(request: Request, name: str, silence: float, ends: float) -> Fetched:
    try:
        with _opener(request).open(request, timeout=silence) as response:
            kind = response.headers.get_content_type() if response.headers.get("Content-Type") else ""
            if not _TEXTS.fullmatch(kind):
                raise UsageError(f"{name} is {shown(kind)[:60]}: only text, HTML and PDF can be read")
            raw = _body(response, response.headers, name, MAX_PDF if kind == "application/pdf" else MAX_TEXT, ends)
            return Fetched(raw, kind, response.headers.get_content_charset())
    except LlamacliError:
        raise
    except HTTPError as error:
        error.close()
        raise RemoteError(f"{name} cannot be had: {_refusal(error)}") from None
    except TimeoutError:
        raise RemoteError(f"{name} has said nothing for {silence:g} s") from None
    except (OSError, HTTPException, zlib.error, ValueError) as error:
        raise RemoteError(f"{name} cannot be had: {_why(error, silence)}") from None


def _body(response: Any, headers: Message, name: str, limit: int, ends: float) -> bytes:
    """All of it, decompressed. Both what comes and what becomes of it are counted."""
    began = monotonic()
    parts: list[bytes] = []
    size = 0
    for part in _decompressed(response, headers, name, limit):
        parts.append(part)
        size += len(part)
        if size > limit and limit == MAX_PDF:
            raise InputTooLong(f"{name} is more than {limit >> 20} MiB: give the part that matters")
        if limit == MAX_TEXT:
            check_size(size, name)
        if monotonic() > ends:
            raise _too_slow(name, ends - began)
    if response.length:
        raise RemoteError(f"{name} broke off: {response.length:,} bytes are missing")
    return b"".join(parts)


def _decompressed(response: Any, headers: Message, name: str, limit: int) -> Iterator[bytes]:
    """We ask for no compression; some servers compress all the same."""
    coding = headers.get("Content-Encoding", "identity").strip().lower()
    if coding in ("identity", ""):
        while part := response.read1(1 << 16):
            yield part
        return
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise UsageError(f"{name} comes compressed with {shown(coding)[:40]}, which cannot be read: download it first")
    unpack = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    n_packed = 0
    while part := response.read1(1 << 16):
        n_packed += len(part)
        check_size(n_packed - limit, name)
        while part:
            if unpack.eof:  # gzip may follow gzip (RFC 1952, 2.2)
                unpack = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
            yield unpack.decompress(part, 1 << 20)
            part = unpack.unused_data if unpack.eof else unpack.unconsumed_tail
    yield unpack.flush()
    if not unpack.eof:
        raise RemoteError(f"{name} broke off in the middle of its compressed text")


class _Redirects(HTTPRedirectHandler):
    max_redirections = MAX_REDIRECTS
    max_repeats = 2

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        if not is_address(newurl):
            raise HTTPError(newurl, code, msg, headers, fp)
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None:
            request.remove_header("Proxy-authorization")  # the next host may be asked without the proxy
        fp.close()  # urllib would read what comes with a redirect to its end
        return request


def _opener(request: Request) -> OpenerDirector:
    """Knows http and https alone: nobody is sent on to a file or to FTP."""
    opener = OpenerDirector()
    handlers: list[Any] = [HTTPHandler(), HTTPDefaultErrorHandler(), _Redirects(), HTTPErrorProcessor()]
    handlers.append(HTTPSHandler(context=_certificates()))
    host = request.host.rpartition("@")[2]
    if not re.fullmatch(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", host):  # no proxy leads to this machine
        handlers.append(ProxyHandler())
    for each in handlers:
        opener.add_handler(each)
    return opener


def _certificates() -> ssl.SSLContext:
    import truststore

    return truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def without_secrets(place: str) -> str:
    """Of what is no address that can be taken apart: all that cannot be a password or a query, on one line."""
    return shown(re.split(r"[?#]", re.sub(r"//.*@", "//", place, flags=re.DOTALL))[0])[:100]


def _split(url: str) -> SplitResult:
    """Raises UsageError."""
    try:
        parts = urlsplit(url)
        has_port = parts.port is None or parts.port > 0
    except ValueError:
        parts, has_port = urlsplit(""), False
    if not parts.hostname or not has_port or any(c < " " or "\x7f" <= c < "\xa0" for c in url):
        raise UsageError(f"{without_secrets(url)} is no web address")
    return parts


def _spelt(url: str) -> str:
    """As it goes into a request: a name or a path in any script is encoded."""
    parts = _split(url)
    if parts.username is not None or parts.password is not None:
        raise UsageError(
            f"{name_of(url)} must not hold a user name or a password: say `curl -u NAME URL | llamacli ...`"
        )
    host = parts.hostname or ""
    if not host.isascii():
        try:
            host = host.encode("idna").decode()
        except UnicodeError:
            raise UsageError(f"{without_secrets(url)} is no web address") from None
    host = f"[{host}]" if ":" in host else host
    port = f":{parts.port}" if parts.port else ""
    safe = "%/:=&?~+!$,;'@()*[]"
    with suppress(UnicodeError):
        query = f"?{quote(parts.query, safe)}" if parts.query else ""
        return f"{parts.scheme.lower()}://{host}{port}{quote(parts.path, safe) or '/'}{query}"
    raise UsageError(f"{without_secrets(url)} is no web address")


def _too_slow(name: str, seconds: float) -> RemoteError:
    return RemoteError(f"{name} has not come within {seconds:g} s: download it first")


def _refusal(error: HTTPError) -> str:
    reason = shown(str(error.reason)).split("\\n")[0][:80]
    if error.code in (301, 302, 303, 307, 308):
        if not is_address(error.url):
            return f"it sends us to {without_secrets(error.url)}, which is no web address"
        return f"it sends us in circles, or on more than {MAX_REDIRECTS} times ({error.code})"
    return f"its server answered {error.code} {reason}".rstrip()


def _why(error: Exception, silence: float) -> str:
    if isinstance(error, URLError):
        if not isinstance(error.reason, Exception):
            return str(error.reason)
        error = error.reason
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid: {error.verify_message}"
    if isinstance(error, TimeoutError):
        return f"nothing came for {silence:g} s"
    if isinstance(error, zlib.error):
        return "its compression is damaged"
    if isinstance(error, HTTPException):
        return f"it broke off, or what it says is not HTTP ({type(error).__name__})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return shown(str(error))[:120] or type(error).__name__
