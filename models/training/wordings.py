"""Reads the word lists and the wordings of the tasks from the TOML files beside it."""

import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def read_toml(filename: str) -> dict[str, Any]:
    """A data file of this directory."""
    return tomllib.loads((HERE / filename).read_text(encoding="utf-8"))


# A list of single words is written as one text in words.toml, a list of phrases as an array.
WORDS: dict[str, tuple[str, ...]] = {
    name: tuple(value.split() if isinstance(value, str) else value) for name, value in read_toml("words.toml").items()
}

WORDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    task: {name: tuple(phrases) for name, phrases in table.items()}
    for task, table in read_toml("wordings.toml").items()
}
