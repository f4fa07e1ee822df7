"""Where a server is: its URL, or the Unix socket of one on this machine; and the proxy on the way to it.

Never holds a key: a key in a URL would show up in logs.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, replace
from urllib.parse import SplitResult, urlsplit

from llamacli.errors import UsageError

PORTS = {"http": 80, "https": 443}
ROUTE = "/v1/getData"


@dataclass(frozen=True, slots=True)
class Address:
    """`target` is what a request line names: path and query. `socket` is a Unix socket's path; the rest is idle.

    option   by which the user gave it
    """

    scheme: str
    host: str
    port: int
    target: str
    socket: str | None = None
    option: str = "--remote"

    @property
    def shown(self) -> str:
        """For people: without path and query, which may hold a secret."""
        if self.socket is not None:
            return self.host
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}" if self.port == PORTS[self.scheme] else f"{self.scheme}://{host}:{self.port}"

    @property
    def is_this_machine(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def trusts(self, other: Address) -> bool:
        """Whether a redirect may lead there: to the same place, or to the same host's encrypted one."""
        if (other.scheme, other.host, other.port) == (self.scheme, self.host, self.port):
            return True
        is_upgrade = self.scheme == "http" and other.scheme == "https"
        return is_upgrade and other.host == self.host and other.port == PORTS["https"]


def of(url: str, route: str = ROUTE, *, option: str = "--remote", key: str = "LLAMACLI_API_KEY") -> Address:
    """The address that questions go to: the URL itself if it ends in getData, else its v1/getData.

    route    another one below the same place: /v1/chat/completions
    option   and `key` are what the user has to mend

    Raises UsageError.
    """
    parts = _split(url)
    if parts is None or not parts.hostname:
        raise UsageError(f"{option} must be an address like http://127.0.0.1:8080, not {url[:100]!r}")
    if parts.username is not None:
        raise UsageError(f"{option} must not hold a user name or a key: give the key as {key}")
    path = parts.path.rstrip("/")
    if route != ROUTE:
        path = path.removesuffix("/getData").removesuffix("/v1") + route
    elif not path.endswith("getData"):
        path = path.removesuffix("/v1") + ROUTE
    return replace(_address(parts, path), option=option)


def redirected(base: Address, location: str) -> Address | None:
    """Where a Location header leads; None if that is no address."""
    from urllib.parse import urljoin

    try:
        parts = _split(urljoin(f"{base.shown}{base.target}", location))
    except ValueError:
        return None
    if parts is None or not parts.hostname:
        return None
    return replace(_address(parts, parts.path), option=base.option)


def _split(url: str) -> SplitResult | None:
    if not url.isascii() or any(c <= " " or c == "\x7f" for c in url):
        return None  # would break the request line
    try:
        parts = urlsplit(url)
        has_port = parts.port is None or parts.port > 0
    except ValueError:
        return None
    return parts if parts.scheme in PORTS and has_port else None


def _address(parts: SplitResult, path: str) -> Address:
    target = (path or "/") + (f"?{parts.query}" if parts.query else "")
    return Address(parts.scheme, parts.hostname or "", parts.port or PORTS[parts.scheme], target)


@dataclass(frozen=True, slots=True)
class Proxy:
    """`credentials`: user and password, where it asks for them."""

    host: str
    port: int
    credentials: str | None = None


def proxy_for(address: Address) -> Proxy | None:
    """The proxy that the environment names (http_proxy, https_proxy, no_proxy). Raises UsageError for a strange one."""
    if address.socket is not None or address.is_this_machine:
        return None
    from urllib.parse import unquote
    from urllib.request import getproxies, proxy_bypass

    url = getproxies().get(address.scheme)
    if not url or proxy_bypass(f"{address.host}:{address.port}"):
        return None
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
        parts = urlsplit("")
    if parts.scheme != "http" or not host:
        raise UsageError(
            f"the proxy in {address.scheme}_proxy cannot be used: it must be an address like http://proxy:3128"
        )
    user = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else None
    return Proxy(host, port or PORTS["http"], user)
