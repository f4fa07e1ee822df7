"""A prompt with places for a line's values: `Classify: {text}`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llamacli.errors import UsageError

_PLACE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True, slots=True)
class Template:
    """Raises UsageError for a template without a place, or with a brace that is not closed."""

    text: str

    def __post_init__(self) -> None:
        stray = next((match for match in _PLACE.finditer(self.text) if match[0] in ("{", "}")), None)
        if stray is not None:
            raise UsageError(f"--template: the brace at character {stray.start() + 1} stands alone: write it twice")
        if not self.names:
            raise UsageError('--template names no column: write one in braces, as in "Classify: {text}"')

    @property
    def names(self) -> list[str]:
        found = [match[1].strip() for match in _PLACE.finditer(self.text) if match[1] is not None]
        return list(dict.fromkeys(found))

    def check(self, columns: Iterable[str]) -> None:
        """Raises UsageError for a place that no column fills."""
        columns = list(columns)
        missing = [name for name in self.names if name not in columns]
        if missing:
            raise UsageError(f"--template names {', '.join(missing)[:200]}; there are {', '.join(columns)[:200]}")

    def filled(self, values: Mapping[str, Any]) -> str:
        """Values that are no texts are written as JSON. Raises UsageError for one that is missing."""
        self.check(values)

        def put(match: re.Match[str]) -> str:
            if match[1] is None:
                return match[0][0]
            value = values[match[1].strip()]
            return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

        return _PLACE.sub(put, self.text)
