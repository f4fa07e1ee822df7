"""The servers of this user on this machine: each has a Unix socket, and a note beside it of what it serves.

    DATA/run/PID.sock     only its owner may open it; a request that comes this way needs no key
    DATA/run/PID.json     the model's files, how they are run, and what the server adds to a request by itself

The data directory may be shared with other machines or containers: a note is looked at only on the machine that it
was written on, and swept away only when its process is gone and nobody listens at its socket.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MAX_SOCKET_PATH = 103  # bytes: sun_path has 108 on Linux and 104 on macOS, a NUL at its end included

FileState = tuple[str, int, int]  # path, size in bytes, time of change in nanoseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """A server that answers with a model.

    socket         where this process finds it: beside its note
    files          of the model, as they were when it was loaded
    format         how its prompts are made: a prompt.Format
    n_limit        tokens that a sequence may hold
    is_whole       n_limit is what the model was trained with
    max_tokens     of answers whose request says nothing
    gpu_layers     and threads: the settings that it was started with
    choices        what was chosen for this machine: name → (value, why)
    """

    pid: int
    host: str
    socket: str
    files: tuple[FileState, ...]
    name: str
    format: str
    n_limit: int
    is_whole: bool
    max_tokens: int | None = None
    gpu_layers: str = "auto"
    threads: int | None = None
    device: str = "CPU"
    choices: Mapping[str, tuple[object, str]] = field(default_factory=dict)


def this_machine() -> str:
    return os.uname().nodename


def states_of(files: Iterable[Path]) -> tuple[FileState, ...]:
    """Raises OSError for a file that cannot be looked at."""
    return tuple((str(path.resolve()), found.st_size, found.st_mtime_ns) for path in files if (found := path.stat()))


def prepare(place: Path) -> Path:
    """Where this process may listen, in a directory that only its user can enter; what dead servers left is removed.

    Raises OSError where there is no such place.
    """
    socket = place / f"{os.getpid()}.sock"
    n_bytes = len(os.fsencode(socket))
    if n_bytes > MAX_SOCKET_PATH:
        raise OSError(f"{socket} is {n_bytes} bytes long, and a socket's path may have {MAX_SOCKET_PATH}")
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise OSError(f"{place} is not a directory of this user's")
    place.chmod(0o700)
    _sweep(place)
    return socket


def announce(presence: Presence) -> None:
    """Let `run` find this server. Raises OSError."""
    note = Path(presence.socket).with_suffix(".json")
    draft = note.with_suffix(".draft")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
        # Paths that are not UTF-8 come out in JSON's own escapes.
        json.dump(asdict(presence), stream)
    draft.replace(note)


def withdraw(socket: Path) -> None:
    """The server is going down: nobody is to ask it any more."""
    with suppress(OSError):
        socket.with_suffix(".json").unlink(missing_ok=True)


def running(place: Path) -> list[Presence]:
    """The servers of this user that may be asked."""
    try:
        notes = [place / name for name in sorted(os.listdir(place)) if name.endswith(".json")]  # noqa: PTH208
    except OSError:
        return []
    found = []
    for note in notes:
        presence = _read(note)
        if presence is None or presence.host != this_machine():
            continue
        if _is_dead(presence.pid, note.with_suffix(".sock")):
            _remove(note.with_suffix(".sock"))
        else:
            found.append(presence)
    return found


def _read(note: Path) -> Presence | None:
    """None for a note that is not this user's, or is none."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        with note.open(encoding="utf-8") as stream:
            if os.fstat(stream.fileno()).st_uid != os.geteuid():
                return None
            found: dict[str, Any] = json.load(stream)
        files = tuple((str(path), int(size), int(time)) for path, size, time in found.pop("files"))
        choices = {name: (value, str(why)) for name, (value, why) in found.pop("choices").items()}
        found["socket"] = str(note.with_suffix(".sock"))  # the server may know it by another path, a relative one
        presence = Presence(files=files, choices=choices, **found)
        return presence if isinstance(presence.pid, int) else None
    return None


def _sweep(place: Path) -> None:
    """Sockets without a note are those of servers that died while they loaded."""
    for socket in place.glob("*.sock"):
        note = _read(socket.with_suffix(".json"))
        is_ours = note is None or note.host == this_machine()
        if is_ours and socket.stem.isdigit() and _is_dead(int(socket.stem), socket):
            _remove(socket)


def _remove(socket: Path) -> None:
    for path in (socket, socket.with_suffix(".json"), socket.with_suffix(".draft")):
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _is_dead(pid: int, socket: Path) -> bool:
    """No such process, and nobody who listens: in another container's view the process may have another number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return not _listens(socket)
    except PermissionError:
        return False
    return False


def _listens(path: Path) -> bool:
    from socket import AF_UNIX, socket

    with socket(AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
