"""A prompt with a name, with places for parameters and with defaults. Knows nothing of files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from llamacli.errors import UsageError

PLACE = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}")  # two braces are one; any other brace is itself
STDIN = "stdin"  # a place that is not a parameter's: what is piped in goes there


@dataclass(frozen=True, slots=True)
class Parameter:
    """`choices`: the values that are taken, and the text that stands for each in the prompt; empty where any is."""

    name: str
    description: str = ""
    default: str | None = None
    choices: Mapping[str, str] = field(default_factory=dict)

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    def text(self, value: str) -> str:
        """What stands in the prompt. Raises UsageError for a value that is not taken."""
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise UsageError(f"{self.option} must be text in UTF-8")
        if not value.strip():
            raise UsageError(f"{self.option} is empty")
        if not self.choices:
            return value
        if value not in self.choices:
            raise UsageError(f"{self.option} must be {' or '.join(self.choices)}, not {value[:60]!r}")
        return self.choices[value]


@dataclass(frozen=True, slots=True)
class Task:
    """A preset with its parameters filled in: what is to be done with a text.

    is_joined   of a text that is read in parts, the answers follow one another and are not combined
    note        what -v says of it
    """

    name: str
    instruction: str
    needs_text: bool = False
    is_joined: bool = False
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """`source` is where it was found; `hides` a preset of the package that has the same name.

    settings   defaults for settings of these names
    schema     and the next two: the form of the answer, as on a command line
    """

    name: str
    source: str
    prompt: str
    description: str = ""
    system: str | None = None
    needs_text: bool = False
    is_joined: bool = False
    hides: bool = False
    parameters: tuple[Parameter, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    schema: str | None = None
    json_object: bool = False
    choices: str | None = None

    @property
    def spelling(self) -> str:
        return f"@{self.name}"

    def task(self, given: Mapping[str, str]) -> Task:
        """Raises UsageError for a parameter that is missing or has a wrong value."""
        note = f"{self.spelling} is your own, of {self.source}, in place of the built-in one" if self.hides else None
        from llamacli.prompt import without_place

        # What a value or two braces make look like the place of what is piped in is none. No prompt holds a NUL.
        said = filled(self.prompt, {**self._values(given), STDIN: "\0"})
        instruction = without_place(said).replace("\0", f"{{{STDIN}}}").strip()
        return Task(self.name, instruction, needs_text=self.needs_text, is_joined=self.is_joined, note=note)

    def defaults(self, given: Mapping[str, str]) -> dict[str, object]:
        """Of settings, the system prompt among them. Raises UsageError."""
        if self.system is None:
            return dict(self.settings)
        system = filled(self.system, self._values(given))
        if system.startswith("@") and not self.system.startswith("@"):
            raise UsageError(f"{self.spelling}: its system prompt would begin with @, and so name a file")
        return {**self.settings, "system": system}

    def _values(self, given: Mapping[str, str]) -> dict[str, str]:
        values = {}
        for each in self.parameters:
            value = given.get(each.name, each.default)
            if value is None:
                what = f" ({each.description.rstrip('.')})" if each.description else ""
                raise UsageError(f"{self.spelling} needs {each.option}{what}")
            values[each.name] = each.text(value)
        return values


def places(text: str) -> list[str]:
    """The names in braces, each once."""
    return list(dict.fromkeys(match[1] for match in PLACE.finditer(text) if match[1] is not None))


def filled(text: str, values: Mapping[str, str]) -> str:
    """The text with the values in their places."""

    def put(match: re.Match[str]) -> str:
        return match[0][0] if match[1] is None else values[match[1]]

    return PLACE.sub(put, text)
