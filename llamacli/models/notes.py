"""What was once found out about a file, believed for as long as its size and its time stay the same.

Kept in the cache directory. A cache that cannot be read or written is no error: then it is found out again.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


class Notes:
    """cache   the directory in which they are kept, and other things beside them"""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self._directory = cache / "models"

    def read(self, path: Path) -> dict[str, Any]:
        """What is known about the file as it is now."""
        with suppress(OSError, ValueError):
            found = json.loads(self._place(path).read_text("utf-8"))
            if isinstance(found, dict) and found.pop("state", None) == _state(path):
                return found
        return {}

    def add(self, path: Path, **facts: Any) -> None:
        """Written whole or not at all."""
        with suppress(OSError):
            known = self.read(path) | facts | {"state": _state(path)}
            place = self._place(path)
            place.parent.mkdir(parents=True, exist_ok=True)
            draft = place.with_name(f"{place.name}.{os.getpid()}")
            draft.write_text(json.dumps(known), "utf-8")
            draft.replace(place)

    def forget(self, path: Path) -> None:
        for place in (self._place(path), self._used(path)):
            with suppress(OSError):
                place.unlink()

    def use(self, path: Path) -> None:
        """Remember that the model was used just now."""
        with suppress(OSError):
            used = self._used(path)
            used.parent.mkdir(parents=True, exist_ok=True)
            used.touch()

    def last_used(self, path: Path) -> float | None:
        """Unix seconds."""
        with suppress(OSError):
            return self._used(path).stat().st_mtime
        return None

    def _place(self, path: Path) -> Path:
        name = str(path.absolute()).encode("utf-8", "surrogateescape")
        return self._directory / f"{hashlib.sha256(name).hexdigest()[:32]}.json"

    def _used(self, path: Path) -> Path:
        return self._place(path).with_suffix(".used")


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]
