"""Shows every setting and where it came from. Decides nothing: llamacli.config has resolved it all."""

import json
from dataclasses import asdict
from typing import TextIO

from llamacli.config import Directories, Resolved

# A value longer than this (a system prompt) pushes its own source to the right, not everybody's.
WIDEST = 32


def show(resolved: Resolved, directories: Directories, as_json: bool, stream: TextIO) -> None:
    """Writes the settings, the config file's path and the directories, as lines or as one JSON object."""
    stream.write(as_object(resolved, directories) if as_json else as_lines(resolved, directories))


def as_object(resolved: Resolved, directories: Directories) -> str:
    settings = {
        name: {"value": value, "source": resolved.sources[name].kind, "from": resolved.sources[name].detail}
        for name, value in asdict(resolved.settings).items()
    }
    places = {name: str(place) for name, place in asdict(directories).items()}
    shown = {"config_file": str(directories.config_file), "directories": places, "settings": settings}
    return json.dumps(shown, indent=2) + "\n"


def as_lines(resolved: Resolved, directories: Directories) -> str:
    values = {name: spelled(value) for name, value in asdict(resolved.settings).items()}
    name_width = max(map(len, values))
    value_width = min(WIDEST, max(map(len, values.values())))
    lines = [
        f"{name:<{name_width}} = {value:<{value_width}}    ({printable(str(resolved.sources[name]))})"
        for name, value in values.items()
    ]
    absent = "" if directories.config_file.exists() else "    (absent)"
    lines += [
        "",
        f"config file: {printable(str(directories.config_file))}{absent}",
        f"data:        {printable(str(directories.data))}",
        f"cache:       {printable(str(directories.cache))}",
    ]
    return "\n".join(lines) + "\n"


def spelled(value: object) -> str:
    """As the config file would spell it, except that TOML has no word for none."""
    if value is None:
        return "none"
    # A control character or half a byte sequence would reach the terminal, or fail on the way, as it is.
    return json.dumps(value, ensure_ascii=isinstance(value, str) and not value.isprintable())


def printable(words: str) -> str:
    return words if words.isprintable() else spelled(words)
