"""The presets that there are: the package's, and the user's own in a TOML file. What is wrong in it is said by line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llamacli.config import check, parsed_toml, unknown
from llamacli.errors import UsageError
from llamacli.presets.preset import STDIN, Parameter, Preset, places

BUILT_IN = Path(__file__).with_name("builtin.toml")
MAX_FILE = 1 << 20  # bytes
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_PARAMETER = re.compile(r"[a-z][a-z0-9_]*")
_SETTINGS = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "seed", "on_overflow")
_TEXTS = ("description", "prompt", "system")
_SWITCHES = ("needs_text", "json_object")
_KEYS = (*_TEXTS, *_SWITCHES, "parts", "parameters", "schema", "choices", "stop", *_SETTINGS)
_PARTS = ("combined", "joined")


class _Wrong(Exception):
    """What is wrong, and below which keys of the file."""

    def __init__(self, reason: str, *keys: str) -> None:
        super().__init__(reason)
        self.keys = keys


def library(path: Path) -> dict[str, Preset]:
    """All presets by name: the package's, then the user's, which come before these where names are the same.

    path   the user's file, which need not be there

    Raises UsageError for a file that cannot be read or understood: with the line, and the reason.
    """
    ours = _presets(BUILT_IN.read_bytes(), BUILT_IN, "built-in")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE + 1)
    except FileNotFoundError:
        return ours
    except OSError as error:
        raise UsageError(f"cannot read the presets in {path}: {error.strerror}") from None
    if len(raw) > MAX_FILE:
        raise UsageError(f"the presets in {path} are more than {MAX_FILE >> 10} KiB")
    theirs = _presets(raw, path, str(path))
    return ours | {name: replace(each, hides=name in ours) for name, each in theirs.items()}


def find(name: str, presets: Mapping[str, Preset]) -> Preset:
    """Raises UsageError, which names the nearest one."""
    if name in presets:
        return presets[name]
    error = unknown(f"preset @{name[:100]}", f"@{name}", [f"@{each}" for each in presets])
    raise UsageError(
        f"{error}{'' if str(error).endswith('?') else '.'} To prompt with the word: llamacli -- @{name[:100]}"
    )


def _presets(raw: bytes, path: Path, source: str) -> dict[str, Preset]:
    table = parsed_toml(raw, f"presets file {path}")
    found = {}
    for name, entry in table.items():
        try:
            found[name] = _preset(name, entry, path, source)
        except _Wrong as wrong:
            line = _line(raw.decode("utf-8-sig"), (name, *wrong.keys))
            raise UsageError(f"{path}, line {line}: in [{name[:60]}], {wrong}") from None
    return found


def _preset(name: str, entry: object, path: Path, source: str) -> Preset:
    if not isinstance(entry, dict):
        raise _Wrong(f"a preset is a table: write [{name}], and below it prompt = ...")
    if not _NAME.fullmatch(name):
        raise _Wrong("a preset's name is made of letters, digits, - and _, a letter first")
    for key in entry:
        if key not in _KEYS:
            raise _Wrong(str(unknown(f"key {key!r}", key, _KEYS)), key)
    texts = {key: _text(entry[key], key) for key in _TEXTS if key in entry}
    if not texts.get("prompt", "").strip():
        raise _Wrong("prompt is missing: it says to the model what to do")
    if entry.get("parts", _PARTS[0]) not in _PARTS:
        raise _Wrong(f"parts must be {' or '.join(_PARTS)}", "parts")
    parameters = _parameters(entry.get("parameters", {}))
    schema, choices = _form(entry, path)
    _check_places(texts, parameters)
    return Preset(
        name=name,
        source=source,
        prompt=texts["prompt"],
        description=texts.get("description", ""),
        system=_beside(texts.get("system"), Path(str(path.absolute()).replace("{", "{{").replace("}", "}}"))),
        needs_text=_switch(entry, "needs_text"),
        is_joined=entry.get("parts") == "joined",
        parameters=parameters,
        settings={key: _setting(key, entry[key]) for key in _SETTINGS if key in entry},
        stop=tuple(_text_list(entry["stop"], "stop")) if "stop" in entry else (),
        json_object=_switch(entry, "json_object"),
        schema=schema,
        choices=choices,
    )


def _text(value: object, *keys: str) -> str:
    if not isinstance(value, str):
        raise _Wrong(f"{keys[-1]} must be text", *keys)
    if "\0" in value:
        raise _Wrong(f"{keys[-1]} must not hold a NUL character", *keys)
    return value


def _text_list(value: object, *keys: str) -> list[str]:
    if not isinstance(value, list) or not value:
        raise _Wrong(f"{keys[-1]} must be a list of texts", *keys)
    return [_text(each, *keys) for each in value]


def _switch(entry: Mapping[str, Any], key: str) -> bool:
    value = entry.get(key, False)
    if not isinstance(value, bool):
        raise _Wrong(f"{key} must be true or false", key)
    return value


def _setting(key: str, value: object) -> object:
    try:
        return check(key, value)
    except UsageError as error:
        raise _Wrong(str(error), key) from None


def _form(entry: Mapping[str, Any], path: Path) -> tuple[str | None, str | None]:
    """The schema and the choices, as a command line would have them."""
    given = [key for key in ("schema", "choices", "json_object") if entry.get(key)]
    if len(given) > 1:
        raise _Wrong(f"{' and '.join(given)} contradict each other: an answer has one form", given[1])
    schema, choices = entry.get("schema"), entry.get("choices")
    if isinstance(schema, dict):
        schema = json.dumps(schema, default=str)
    elif schema is not None:
        schema = _text(schema, "schema")
        is_file = schema.startswith("@") or schema.endswith(".json") or "/" in schema
        if is_file and not schema.lstrip().startswith("{"):
            schema = _beside(f"@{schema.removeprefix('@')}", path)
    if choices is not None:
        choices = [choices] if isinstance(choices, str) else _text_list(choices, "choices")
        if isinstance(entry["choices"], list) and any("," in each for each in choices):
            raise _Wrong("a choice cannot hold a comma", "choices")
        choices = ",".join(choices)
    return schema, choices


def _beside(value: str | None, path: Path) -> str | None:
    """@FILE, named relative to the presets' own."""
    if value is None or not value.startswith("@") or value[1:2] in ("", "~", "/"):
        return value
    return f"@{path.parent.absolute() / value[1:]}"


def _parameters(table: object) -> tuple[Parameter, ...]:
    if not isinstance(table, dict):
        raise _Wrong("parameters must be a table", "parameters")
    return tuple(_parameter(name, entry) for name, entry in table.items())


def _parameter(name: str, entry: object) -> Parameter:
    """Its default alone, or a table of description, default and choices."""
    where = ("parameters", name)
    if not _PARAMETER.fullmatch(name) or name == STDIN:
        raise _Wrong(
            f"{name!r} cannot be a parameter: small letters, digits and _, a letter first; not {STDIN}", *where
        )
    if isinstance(entry, str | int | float) and not isinstance(entry, bool):
        return Parameter(name, default=_text(str(entry), *where))
    if not isinstance(entry, dict):
        raise _Wrong(f"parameter {name} must be its default, or a table", *where)
    for key in entry:
        if key not in ("description", "default", "choices"):
            raise _Wrong(f"{name}: {unknown(f'key {key!r}', key, ('description', 'default', 'choices'))}", *where, key)
    default = entry.get("default")
    if default is not None:
        is_number = isinstance(default, int | float) and not isinstance(default, bool)
        default = _text(str(default) if is_number else default, *where, "default")
    choices = _choices(entry["choices"], where) if "choices" in entry else {}
    if default is not None and choices and default not in choices:
        raise _Wrong(f"{name}: the default {default[:60]!r} is none of the choices", *where, "default")
    return Parameter(name, _text(entry.get("description", ""), *where, "description"), default, choices)


def _choices(value: object, where: tuple[str, ...]) -> dict[str, str]:
    if isinstance(value, list):
        return {each: each for each in _text_list(value, *where, "choices")}
    if not isinstance(value, dict) or not value:
        raise _Wrong(
            "choices must be a list, or a table of choices and the texts that stand for them", *where, "choices"
        )
    return {each: _text(text, *where, "choices", each).strip() for each, text in value.items()}


def _check_places(texts: Mapping[str, str], parameters: tuple[Parameter, ...]) -> None:
    names = [each.name for each in parameters]
    for key in ("prompt", "system"):
        allowed = [*names, STDIN] if key == "prompt" else names
        for place in places(texts.get(key, "")):
            if place not in allowed:
                near = unknown(f"place {{{place}}} in {key}", place, allowed) if allowed else f"{key} says {{{place}}}"
                raise _Wrong(f"{near}; declare it below parameters, or write {{{{{place}}}}} for the braces", key)
    for name in names:
        if name not in places(texts["prompt"]) + places(texts.get("system", "")):
            raise _Wrong(f"neither prompt nor system has a place {{{name}}}", "parameters", name)


_HEADER = re.compile(r"\s*\[+([^\[\]]+)\]+")
_KEY = re.compile(r"""\s*["']?([\w-]+)["']?\s*(?:\.[^=]*)?=""")


def _line(text: str, keys: tuple[str, ...]) -> int:
    """The line that says most of these keys, the first of several: a guess, but tables are written so."""
    best, found = 0, 1
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        header, key = _HEADER.match(line), _KEY.match(line)
        if header:
            table = tuple(part.strip().strip("\"'") for part in header[1].split("."))
            here = table
        elif key:
            here = (*table, key[1])
        else:
            continue
        depth = next((i for i, (a, b) in enumerate(zip(here, keys, strict=False)) if a != b), min(len(here), len(keys)))
        if (depth == len(here) and depth > best) or depth == len(keys) > best:
            best, found = depth, number
    return found
