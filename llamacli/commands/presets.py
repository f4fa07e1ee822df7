"""`@NAME` on the command line: which preset is meant, what is given to it, and what it does. And the list of all."""

from __future__ import annotations

import difflib
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamacli.commands import table, terminal
from llamacli.commands.question import RunOptions
from llamacli.config import flag_name
from llamacli.errors import UsageError
from llamacli.presets.library import find, library
from llamacli.presets.preset import Parameter, Preset

_NAME = re.compile(r"@\S+")  # a prompt that begins with @ has a space somewhere
_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Asked:
    """A preset that was asked for, with what was given to it."""

    preset: Preset
    given: Mapping[str, str]

    @property
    def defaults(self) -> tuple[str, dict[str, object]]:
        """The preset's name, and what it says of settings."""
        return self.preset.name, self.preset.defaults(self.given)

    def wishes(self, options: RunOptions) -> RunOptions:
        """With the task; and with its form and stop strings, unless the command line has others."""
        preset = self.preset
        if not options.has_form:
            options = replace(options, schema=preset.schema, json_object=preset.json_object, choices=preset.choices)
        stop = options.stop or (() if options.has_form else preset.stop)
        return replace(options, task=preset.task(self.given), stop=stop)


def asked(arguments: Sequence[str], takes_value: Mapping[str, bool], path: Path) -> tuple[Asked | None, list[str]]:
    """The preset that is the prompt of these arguments of `run`, and the arguments without it and what is its own.

    takes_value   the options of `run`, and whether a value follows each
    path          the user's presets

    Raises UsageError. Shows the preset instead, and leaves with SystemExit, where --help is asked for.
    """
    place = _place(arguments, takes_value)
    if place is None:
        return None, list(arguments)
    preset = find(arguments[place][1:], library(path))
    _check_names(preset, takes_value)
    given, rest = _own(preset, arguments[place + 1 :], takes_value)
    return Asked(preset, given), [*arguments[:place], *rest]


def _place(arguments: Sequence[str], takes_value: Mapping[str, bool]) -> int | None:
    """Where the prompt stands, if it is a preset's name."""
    skip = False
    for i, each in enumerate(arguments):
        if skip:
            skip = False
        elif each == "--":
            return None
        elif _is_option(each):
            skip = _value_follows(each, takes_value)
        else:
            return i if _NAME.fullmatch(each) else None
    return None


def _is_option(argument: str) -> bool:
    return argument.startswith("-") and argument != "-"


def _value_follows(option: str, takes_value: Mapping[str, bool]) -> bool:
    """Whether the next argument is this option's value: not after --name=value, -n5, or -q."""
    if option.startswith("--"):
        return "=" not in option and takes_value.get(option, False)
    letters = [f"-{letter}" for letter in option[1:]]
    first = next((i for i, letter in enumerate(letters) if takes_value.get(letter, False)), None)
    return first == len(letters) - 1


def _own(preset: Preset, arguments: Sequence[str], takes_value: Mapping[str, bool]) -> tuple[dict[str, str], list[str]]:
    """What is said to the preset, and all else."""
    options = {each.option: each.name for each in preset.parameters}
    given: dict[str, str] = {}
    rest: list[str] = []
    todo = list(arguments)
    while todo:
        each = todo.pop(0)
        name, equals, value = each.partition("=")
        if each == "--":
            return given, [*rest, each, *todo]
        if each in ("--help", "-h"):
            _show(preset)
            raise SystemExit(0)
        if name in options:
            if not equals and not todo:
                raise UsageError(f"{name} needs a value")
            given[options[name]] = value if equals else todo.pop(0)
            continue
        if name.startswith("--") and name not in takes_value:
            raise _unknown_option(preset, name, [*options, *takes_value])
        rest.append(each)
        if _is_option(each) and _value_follows(each, takes_value) and todo:
            rest.append(todo.pop(0))
    return given, rest


def _unknown_option(preset: Preset, name: str, known: Sequence[str]) -> UsageError:
    nearest = difflib.get_close_matches(name, known, n=1)
    own = " and ".join(each.option for each in preset.parameters) or "none of its own"
    hint = f"did you mean {nearest[0]}?" if nearest else f"it takes {own}, and the options of run"
    return UsageError(f"{preset.spelling} has no option {name[:60]}; {hint}")


def _check_names(preset: Preset, takes_value: Mapping[str, bool]) -> None:
    for each in preset.parameters:
        if each.option in (*takes_value, "--help"):
            raise UsageError(
                f"{preset.source}: the parameter {each.name} of {preset.spelling} cannot be given: {each.option} is an "
                "option of run; call it otherwise"
            )


# -- shown --------------------------------------------------------------------------------------------------------


def show_list(path: Path, *, as_json: bool) -> None:
    """All presets on stdout. Raises UsageError for a file of the user's that cannot be understood."""
    presets = sorted(library(path).values(), key=lambda each: each.name)
    if as_json:
        table.write(json.dumps([_record(each) for each in presets], ensure_ascii=False))
        return
    rows = [(each.spelling, _parameters(each), each.description, each.source) for each in presets]
    table.show(("preset", "takes", "does", "from"), rows)


def _parameters(preset: Preset) -> str:
    return " ".join(each.option if each.default is None else f"[{each.option}]" for each in preset.parameters)


def _record(preset: Preset) -> dict[str, Any]:
    return {
        "name": preset.name,
        "description": preset.description,
        "source": preset.source,
        "prompt": preset.prompt,
        "needs_text": preset.needs_text,
        "parameters": [
            {
                "name": each.name,
                "option": each.option,
                "description": each.description,
                "default": each.default,
                "choices": list(each.choices) or None,
            }
            for each in preset.parameters
        ],
        "defaults": _defaults(preset),
    }


def _defaults(preset: Preset) -> dict[str, object]:
    """What it says beside the prompt, by the names that a presets file has."""
    more = {
        "system": preset.system,
        "schema": preset.schema,
        "json_object": preset.json_object,
        "choices": preset.choices,
        "stop": list(preset.stop),
    }
    return {**preset.settings, **{name: value for name, value in more.items() if value}}


def _show(preset: Preset) -> None:
    """The help of a preset."""
    text = "TEXT" if preset.needs_text else "MORE"
    lines = [f"Usage: llamacli {preset.spelling} [OPTIONS] [{text}]", ""]
    lines += _indented(preset.description) if preset.description else []
    lines += ["", "Its own options, after its name:"] if preset.parameters else []
    for each in preset.parameters:
        lines += _described(each)
    lines += ["", "It says to the model:", *_indented(preset.prompt)]
    defaults = ", ".join(f"{flag_name(name)} {_shown(value)}" for name, value in _defaults(preset).items())
    lines += ["", "Unless you say otherwise:", *_indented(defaults)] if defaults else []
    says = "What is said after the name is one more thing to mind"
    says += "; it is the text, where nothing is piped in and no -f given." if preset.needs_text else "."
    lines += ["", *textwrap.wrap(f"{says} All options of run are taken, too: llamacli run --help", _WIDTH)]
    required = [f"{each.option} ..." for each in preset.parameters if each.default is None]
    command = " ".join([preset.spelling, *required, *(["< FILE"] if preset.needs_text else [])])
    lines += ["", f"From: {preset.source}. Example: llamacli {command}"]
    table.write(terminal.harmless("\n".join(lines)))


def _described(parameter: Parameter) -> list[str]:
    takes = "|".join(parameter.choices) or "TEXT"
    default = "required" if parameter.default is None else parameter.default
    said = f"{parameter.description} [{default}]".strip()
    return [f"  {parameter.option} {takes}", *(f"      {line}" for line in textwrap.wrap(said, _WIDTH - 6))]


def _indented(text: str) -> list[str]:
    return [f"  {part}" for line in text.strip().splitlines() for part in textwrap.wrap(line, _WIDTH - 2) or [""]]


def _shown(value: object) -> str:
    written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return written if len(written) < 60 else f"{written[:57]}..."
