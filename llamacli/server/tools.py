"""Function calls over a model that was never trained for them: told in the system prompt, held by a grammar.

An answer that calls a function is exactly {"name":"NAME","arguments":{...}}, with arguments that obey the
function's own schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llamacli.errors import UsageError
from llamacli.schema import grammar
from llamacli.server.failure import Failure
from llamacli.server.fields import Fields

NAME = "[A-Za-z0-9_-]{1,64}"
_CALL = re.compile(r' ?\{"name": ?"([\w-]+)", ?"arguments":', re.ASCII)
ANY_ARGUMENTS: dict[str, Any] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class Function:
    name: str
    description: str
    parameters: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tools:
    """The functions that an answer may call.

    required   it must call one
    grammar    of an answer: a call, or else, where none is required, a text that does not look like one
    """

    functions: tuple[Function, ...]
    required: bool
    grammar: str

    def system_prompt(self) -> str:
        listed = "\n".join(
            json.dumps({"name": f.name, "description": f.description, "parameters": f.parameters}, ensure_ascii=False)
            for f in self.functions
        )
        when = "Answer with a call of one of these functions" if self.required else "You can call these functions"
        return (
            f"{when}. A call is one JSON object and nothing else: "
            '{"name":"FUNCTION","arguments":{...}}. The functions, one on each line:\n' + listed
        )


def read(fields: Fields) -> Tools | None:
    """`tools` and `tool_choice` of a request. None when no function may be called. Raises Failure 400."""
    functions = [_function(each) for each in fields.objects("tools") or []]
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        raise Failure(400, f"tools names a function twice: {', '.join(names)}", param="tools")
    choice = fields.take("tool_choice")
    if isinstance(choice, dict):
        wanted = _chosen(Fields(choice, "tool_choice."))
        functions = [function for function in functions if function.name == wanted]
        if not functions:
            known = ", ".join(names) or "none"
            raise Failure(400, f"tool_choice names {wanted}; the functions are: {known}", param="tool_choice")
        return _made(functions, required=True)
    if choice not in (None, "none", "auto", "required"):
        fields.refuse("tool_choice", "none, auto, required or an object that names a function")
    if not functions:
        if choice in ("auto", "required"):
            raise Failure(400, f"tool_choice is {choice}, but there are no tools", param="tool_choice")
        return None
    return None if choice == "none" else _made(functions, required=choice == "required")


def _made(functions: Sequence[Function], *, required: bool) -> Tools:
    try:
        held = grammar.to_calls({each.name: each.parameters for each in functions}, required=required)
    except UsageError as error:
        raise Failure(400, f"tools: {error}", param="tools") from None
    return Tools(tuple(functions), required, held)


def _function(tool: Fields) -> Function:
    tool.choice("type", "function")
    described = tool.object("function")
    if described is None:
        tool.refuse("function", "an object with the function's name")
    name = described.text("name")
    if name is None or not re.fullmatch(NAME, name):
        described.refuse("name", "1 to 64 letters, digits, _ or -")
    described.flag("strict")
    parameters = described.take("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        described.refuse("parameters", "a JSON schema")
    function = Function(name, described.text("description") or "", parameters or ANY_ARGUMENTS)
    described.refuse_unknown()
    tool.refuse_unknown()
    return function


def _chosen(choice: Fields) -> str:
    choice.choice("type", "function")
    function = choice.object("function")
    name = function.text("name") if function else None
    if name is None:
        choice.refuse("function", "an object with the function's name")
    return name


@dataclass(frozen=True, slots=True)
class Call:
    """`id` is the client's name for an earlier call."""

    name: str
    arguments: str
    id: str = ""


def call_in(text: str, *, is_cut: bool) -> Call | None:
    """The call that a whole answer is, or None for a text. A call that was cut short is one with cut arguments."""
    match = _CALL.match(text)
    if not match:
        return None
    arguments = text[match.end() :].lstrip(" ")
    return Call(match[1], arguments if is_cut else arguments.removesuffix("}"))


def is_whole(text: str) -> bool:
    """Whether the answer that is a call is one to its end: a stop string may stand in the arguments."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):  # a thousand brackets, and the stop string
        return False
    return True


class CallReader:
    """Tells a call from a text while it streams. Holds back what may still belong to the call's beginning."""

    def __init__(self) -> None:
        self._held = ""
        self._has_begun = False  # the arguments, that is
        self.name: str | None = None
        self.is_text = False

    def feed(self, text: str, *, ended: bool, is_cut: bool) -> tuple[str, str]:
        """What the text adds: (to the content, to the arguments)."""
        if self.is_text:
            return text, ""
        self._held += text
        if self.name is None:
            match = _CALL.match(self._held)
            if match:
                self.name, self._held = match[1], self._held[match.end() :]
            elif ended or self._held.lstrip(" ")[:1] not in ("", "{"):
                self.is_text = bool(self._held)
                content, self._held = self._held, ""
                return content, ""
            else:
                return "", ""
        if not self._has_begun:
            self._held = self._held.lstrip(" ")
            self._has_begun = bool(self._held)
        if ended:
            arguments, self._held = self._held, ""
            return "", arguments if is_cut else arguments.removesuffix("}")
        ready = self._held[:-1]  # the last bracket closes the call, not the arguments
        self._held = self._held[-1:]
        return "", ready


def told_apart(call: Call, calls: Sequence[Call]) -> str:
    """What a call is called among those of its message."""
    is_alone = sum(each.name == call.name for each in calls) == 1
    return call.name if is_alone else f"{call.name} with {call.arguments}"


def spoken(calls: Sequence[Call]) -> str:
    """Earlier calls as the assistant would have written them."""
    return "\n".join(f'{{"name":{json.dumps(call.name)},"arguments":{call.arguments}}}' for call in calls)
