"""Where the server listens: TCP or a Unix socket, bound before anything is loaded; and its HTTP loop."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import os
import resource
import socket
import stat
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import uvicorn

from llamacli.errors import UsageError
from llamacli.server.connection import Connection, Patience

BACKLOG = 1024
MAX_DESCRIPTORS = 1 << 16


def lift_descriptor_limit() -> None:
    """A connection is a file descriptor, and many systems allow 1,024 unless asked for more."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if most == resource.RLIM_INFINITY else min(most, MAX_DESCRIPTORS)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """Raises UsageError for an address that is taken or is none of this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError(f"--host {host[:100]} is no address: {error.strerror}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        remedy = "stop what listens there, or choose another --port" if port else "choose another --host"
        raise UsageError(f"cannot listen at {host}:{port}: {error.strerror}; {remedy}") from None
    return bound


def bind_unix(path: Path) -> socket.socket:
    """A socket that only this user may open. A dead server's is replaced. Raises UsageError."""
    bound = socket.socket(socket.AF_UNIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() or path.is_symlink():
            _remove_dead(path)
        before = os.umask(0o177)
        try:
            bound.bind(str(path))
        finally:
            os.umask(before)
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise UsageError(f"cannot listen at {path}: {error.strerror or error}; choose another --uds") from None
    return bound


def _remove_dead(path: Path) -> None:
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise OSError(f"{path.name} is there and is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink()
            return
    raise OSError("another server listens there")


def url_of(bound: socket.socket) -> str:
    """How a client calls it."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Http(uvicorn.Server):
    """uvicorn with our connections and our signals instead of its own."""

    def __init__(self, app: Any, patience: Patience, *, tells_date: bool = True) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=cast(Any, functools.partial(Connection, patience=patience)),
                ws="none",
                lifespan="off",
                loop="none",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=tells_date,
                proxy_headers=False,
                timeout_graceful_shutdown=1,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield
