"""The file by which `serve` tells the program that started it that it is ready, and where: `--ready-file`."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llamacli.errors import UsageError


@dataclass(frozen=True, slots=True)
class ReadyFile:
    """One JSON object: url, key (null where none is needed), model, pid; for a Unix socket its path as well."""

    path: Path

    def prepare(self) -> None:
        """Take away what another server has left, so that nobody believes it. Raises UsageError."""
        try:
            self.path.unlink(missing_ok=True)
            self._draft.write_bytes(b"")
            self._draft.unlink()
        except OSError as error:
            raise UsageError(f"--ready-file {self.path} cannot be written: {error.strerror}") from None

    def write(self, *, url: str, key: str | None, model: str, socket: Path | None = None) -> None:
        """All at once: whoever sees the file sees all of it. It holds a key, and is for this user alone.

        Raises UsageError.
        """
        told = {"url": url, "key": key, "model": model, "pid": os.getpid()}
        if socket is not None:
            told["socket"] = str(socket)
        try:
            with os.fdopen(os.open(self._draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
                json.dump(told, stream)
                stream.write("\n")
            self._draft.replace(self.path)
        except OSError as error:
            raise UsageError(f"--ready-file {self.path} cannot be written: {error.strerror}") from None

    def remove(self) -> None:
        """The server ends: the file is no longer true."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    @property
    def _draft(self) -> Path:
        return self.path.with_name(f".{self.path.name}.{os.getpid()}")
