"""JSON schemas to llama.cpp's grammars: whatever the grammar lets through satisfies the schema.

Reference: JSON Schema 2020-12. What cannot be held by a grammar is refused by name, never ignored. The grammar may
write less than the schema allows: properties come in the schema's order, and none that it does not name where it names
some; numbers have 15 digits at most; a colon or a comma is followed by one space at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import cache, partial
from typing import Any, TypeVar
from urllib.parse import unquote

from llamacli.errors import UsageError
from llamacli.schema import keywords, numbers, text
from llamacli.schema.gbnf import (
    IMPOSSIBLE,
    NOTHING,
    Chars,
    Grammar,
    Many,
    Node,
    Ref,
    Rules,
    Text,
    either,
    maybe,
    one_of,
    then,
)
from llamacli.schema.merging import ANNOTATIONS, Schema, merged
from llamacli.schema.values import TYPES, is_of, same, spelt

T = TypeVar("T")
MAX_DEPTH = 64  # schemas in one another
MAX_MULTIPLES = 1000  # that are written out
_SPACE = maybe(Text(" "))
_ANY = ((0x01, 0xD7FF), (0xE000, 0x10FFFF))
_BEGINS_A_TEXT = ((0x01, 0x1F), (0x21, 0x7A), (0x7C, 0xD7FF), (0xE000, 0x10FFFF))  # neither a space nor a brace
_COMMA = then(Text(","), _SPACE)
_COLON = then(Text(":"), _SPACE)
_MODEL_SPACE = _SPACE  # the token with which a model likes to begin has one before it


def to_grammar(schema: Schema | bool) -> str:
    """GBNF for answers that satisfy the schema. See of_schema()."""
    return of_schema(schema).text


def of_schema(schema: Schema | bool) -> Grammar:
    """The grammar of answers that satisfy the schema.

    Raises UsageError for what is not supported, named with the place where it stands, for schemas that nothing can
    satisfy, and for those that need too large a grammar.
    """
    if schema is not True and not isinstance(schema, Mapping):
        raise UsageError("the schema must be a JSON object")
    return _guarded(schema, lambda: _whole(schema))


def _whole(schema: Schema | bool) -> Grammar:
    writer = _Writer(schema)
    return writer.rules.finish(then(_MODEL_SPACE, writer.value(schema, "#")))


def _guarded(schema: Any, write: Callable[[], T]) -> T:
    """What is written. Whoever stumbles over a schema that is none raises UsageError, which says where it is wrong."""
    try:
        return write()
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError):
        from llamacli.schema.checking import satisfies

        satisfies(None, schema)  # for what it says
        raise UsageError("#: the schema is too large or too strange to be held by a grammar") from None


@cache
def any_object() -> str:
    """GBNF for JSON objects of every form."""
    return to_grammar({"type": "object"})


def to_calls(functions: Mapping[str, Schema], *, required: bool) -> str:
    """GBNF for {"name":NAME,"arguments":...} with arguments that satisfy that function's schema.

    required   False: for any text as well, unless it begins as a call does

    Raises UsageError as to_grammar() does.
    """
    rules = Rules()
    calls = []
    for name, schema in functions.items():
        try:
            arguments = _guarded(schema, partial(_arguments, schema, rules))
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
        # No white space around them: a client sends name and arguments back, and the same text is to come of it.
        key = then(Text('{"name":'), Text(spelt(name, name)), Text(',"arguments":'))
        calls.append(then(key, arguments, Text("}")))
    call = rules.add("call", either(*calls))
    if required:
        return rules.spell(then(_MODEL_SPACE, call))
    words = then(Chars(_BEGINS_A_TEXT), Many(Chars(_ANY), 0, None))
    return rules.spell(then(_MODEL_SPACE, either(call, words, NOTHING)))


def _arguments(schema: Schema, rules: Rules) -> Node:
    return _Writer(schema, rules).value(merged({"type": "object"}, schema, "#"), "#")


def choices(texts: Sequence[str]) -> str:
    """GBNF for exactly one of these texts. See of_choices()."""
    return of_choices(texts).text


def of_choices(texts: Sequence[str]) -> Grammar:
    """The grammar of exactly one of these texts. Raises UsageError where there are none, or one is empty."""
    if not texts or not all(texts):
        raise UsageError("there must be at least one choice, and none may be empty")
    rules = Rules()
    return rules.finish(then(_MODEL_SPACE, one_of(rules, texts)))


class _Writer:
    """Turns the schemas within one document into rules. `where` is always a JSON pointer into the document."""

    def __init__(self, document: Any, rules: Rules | None = None) -> None:
        self.rules = rules or Rules()
        keywords.check_ids(document)
        self._document = document
        self._references: dict[str, Ref] = {}
        self._depth = 0
        self._any: Ref | None = None

    def value(self, schema: Any, where: str) -> Node:
        """A JSON value that satisfies the schema."""
        if schema is True or (isinstance(schema, Mapping) and not schema.keys() - ANNOTATIONS):
            return self._any_value()
        if schema is False:
            return IMPOSSIBLE
        if not isinstance(schema, Mapping):
            raise UsageError(f"{where}: a schema must be an object, true or false")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise UsageError(f"{where}: schemas nest more than {MAX_DEPTH} deep")
        try:
            return self._value(schema, where)
        finally:
            self._depth -= 1

    def _value(self, schema: Schema, where: str) -> Node:
        if not schema.keys() - ANNOTATIONS - {"$ref"}:
            return self._referred(schema["$ref"], where)
        schema = self._flat(schema, where)
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                return self._one_branch(schema, keyword, where)
        keywords.check_keywords(schema, where)
        if "enum" in schema or "const" in schema:
            return self._listed(schema, where)
        nodes = [self._typed(kind, schema, where) for kind in keywords.types_of(schema, where)]
        return self.rules.add("value", either(*nodes)) if len(nodes) > 1 else nodes[0]

    # -- schemas that are made of schemas --

    def _flat(self, schema: Schema, where: str) -> Schema:
        """Without allOf, and without a $ref beside other keywords: these are merged into it."""
        for _ in range(MAX_DEPTH):
            if "allOf" in schema:
                parts = keywords.listed_schemas(schema["allOf"], f"{where}/allOf")
                schema = {name: value for name, value in schema.items() if name != "allOf"}
                for part in parts:
                    schema = merged(schema, part, where)
            elif "$ref" in schema and schema.keys() - ANNOTATIONS - {"$ref"}:
                target = self._resolve(schema["$ref"], where)
                schema = {name: value for name, value in schema.items() if name != "$ref"}
                schema = merged(schema, keywords.as_mapping(target, where), where)
            elif "$ref" in schema:
                schema = keywords.as_mapping(self._resolve(schema["$ref"], where), where)
            else:
                return schema
        raise UsageError(f"{where}: $ref or allOf leads back to itself")

    def _one_branch(self, schema: Schema, keyword: str, where: str) -> Node:
        branches = keywords.listed_schemas(schema[keyword], f"{where}/{keyword}")
        base = {name: value for name, value in schema.items() if name != keyword}
        if keyword == "oneOf":
            self._check_disjoint(branches, f"{where}/oneOf")
        nodes = []
        for i, branch in enumerate(branches):
            place = f"{where}/{keyword}/{i}"
            whole = merged(base, branch, place) if base.keys() - ANNOTATIONS else branch
            nodes.append(self.value(whole, place))
        return self.rules.add("branch", either(*nodes))

    def _check_disjoint(self, branches: Sequence[Schema], where: str) -> None:
        flat = [self._flat(branch, where) for branch in branches]
        for i, one in enumerate(flat):
            for k, other in enumerate(flat[:i]):
                if not keywords.are_disjoint(one, other):
                    raise UsageError(f"{where}: branches {k} and {i} may both hold; say anyOf, or tell them apart")

    def _referred(self, pointer: Any, where: str) -> Node:
        """A rule for each target, made when it is first referred to: it may refer to itself."""
        target = self._resolve(pointer, where)
        if pointer not in self._references:
            self._references[pointer] = ref = self.rules.reserve("ref")
            self.rules.define(ref, self.value(target, pointer))
        return self._references[pointer]

    def _resolve(self, pointer: Any, where: str) -> Any:
        if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
            raise UsageError(f"{where}: $ref must point into this schema (#/...), not to {str(pointer)[:60]}")
        found = self._document
        for part in pointer.split("/")[1:]:
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            elif isinstance(found, Mapping) and name in found:
                found = found[name]
            else:
                raise UsageError(f"{where}: there is nothing at $ref {pointer[:60]}")
        return found

    # -- single types --

    def _typed(self, kind: str, schema: Schema, where: str) -> Node:
        writers: dict[str, Callable[[Schema, str], Node]] = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "number": self._number,
            "integer": self._integer,
            "boolean": lambda *_: either(Text("true"), Text("false")),
            "null": lambda *_: Text("null"),
        }
        return writers[kind](schema, where)

    def _any_value(self) -> Node:
        if self._any is None:
            self._any = self.rules.reserve("any")
            kinds = [self._typed(kind, {}, "#") for kind in TYPES if kind != "integer"]
            self.rules.define(self._any, either(*kinds))
        return self._any

    def _listed(self, schema: Schema, where: str) -> Node:
        values = schema.get("enum", [schema.get("const")])
        if not isinstance(values, list):
            raise UsageError(f"{where}: enum must be an array")
        if "const" in schema and "enum" in schema:
            values = [value for value in values if same(value, schema["const"])]
        more = schema.keys() - ANNOTATIONS - {"enum", "const", "type"}
        if more:
            from llamacli.schema.checking import satisfies

            values = [value for value in values if satisfies(value, schema, where)]
        kinds = keywords.types_of(schema, where)
        values = [value for value in values if any(is_of(value, kind) for kind in kinds)]
        return self.rules.add("one", one_of(self.rules, [spelt(value, where) for value in values]))

    def _string(self, schema: Schema, where: str) -> Node:
        shortest, longest = keywords.counts(schema, "minLength", "maxLength", where)
        special = [name for name in ("pattern", "format") if name in schema]
        if not special:
            return self.rules.add("string", text.any_string(self.rules, shortest, longest))
        if len(special) > 1 or shortest or longest is not None:
            raise UsageError(f"{where}: {special[0]} cannot be combined with other limits of a string")
        if special == ["format"]:
            if schema["format"] not in text.FORMATS:
                known = ", ".join(sorted(text.FORMATS))
                raise UsageError(f"{where}: format {str(schema['format'])[:40]} is not supported; {known} are")
            return self.rules.add("string", text.of_format(self.rules, schema["format"]))
        if not isinstance(schema["pattern"], str):
            raise UsageError(f"{where}: pattern must be a string")
        try:
            return self.rules.add("string", text.matching(self.rules, schema["pattern"]))
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None

    def _integer(self, schema: Schema, where: str) -> Node:
        span = keywords.span(schema, where)
        factor = keywords.number_of(schema, "multipleOf", where)
        if factor is None or factor == 1:
            return self.rules.add("integer", numbers.integers(span))
        if factor <= 0 or factor != int(factor):
            raise UsageError(f"{where}: multipleOf of an integer must be an integer above 0")
        low, high = numbers.whole_bounds(span)
        if low is None or high is None or (high - low) // int(factor) > MAX_MULTIPLES:
            raise UsageError(f"{where}: multipleOf needs a minimum and a maximum, {MAX_MULTIPLES:,} multiples at most")
        first = -(-low // int(factor)) * int(factor)
        return self.rules.add("integer", one_of(self.rules, map(str, range(first, high + 1, int(factor)))))

    def _number(self, schema: Schema, where: str) -> Node:
        if "multipleOf" in schema:
            raise UsageError(f"{where}: multipleOf is supported for integers only")
        span = keywords.span(schema, where)
        if span != numbers.Span():
            return self.rules.add("number", numbers.decimals(span))
        digits = Many(Chars(((0x30, 0x39),)), 1, numbers.MAX_DIGITS)
        sign = maybe(Chars(((0x2B, 0x2B), (0x2D, 0x2D))))
        power = then(Chars(((0x45, 0x45), (0x65, 0x65))), sign, Many(Chars(((0x30, 0x39),)), 1, 2))
        whole = numbers.integers(numbers.Span(low=Decimal(0)))
        return self.rules.add("number", then(maybe(Text("-")), whole, maybe(then(Text("."), digits)), maybe(power)))

    def _array(self, schema: Schema, where: str) -> Node:
        fewest, most = keywords.counts(schema, "minItems", "maxItems", where)
        if schema.get("uniqueItems") not in (None, False) and (most is None or most > 1):
            raise UsageError(f"{where}: uniqueItems is not supported")
        first = schema.get("prefixItems", [])
        if not isinstance(first, list):
            raise UsageError(f"{where}: prefixItems must be an array of schemas")
        first = first[: len(first) if most is None else most]
        if first and fewest <= len(first) and schema.get("items") is None:
            fewest = most = len(first)  # all that are described, and no others
        heads = [self.value(each, f"{where}/prefixItems/{i}") for i, each in enumerate(first)]
        item = self.rules.add("item", self.value(schema.get("items", True), f"{where}/items"))
        n_more = (max(fewest - len(first), 0), None if most is None else most - len(first))
        if not heads:
            inner = self._separated(item, *n_more)
        else:
            following = self.rules.repeat(then(_COMMA, item), *n_more)
            inner = then(heads[0], *[then(_COMMA, head) for head in heads[1:]], following)
        return self.rules.add("array", then(Text("["), inner, Text("]")))

    def _separated(self, item: Node, fewest: int, most: int | None) -> Node:
        """So many items, with commas between them."""
        if most == 0 or item == IMPOSSIBLE:
            return NOTHING if fewest == 0 else IMPOSSIBLE
        following = self.rules.repeat(then(_COMMA, item), max(fewest - 1, 0), None if most is None else most - 1)
        some = then(item, following)
        return some if fewest else maybe(some)

    def _object(self, schema: Schema, where: str) -> Node:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(properties, Mapping):
            raise UsageError(f"{where}: properties must be an object")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise UsageError(f"{where}: required must be an array of strings")
        others = schema.get("additionalProperties", True)
        unnamed = [name for name in dict.fromkeys(required) if name not in properties]
        named = {**properties, **dict.fromkeys(unnamed, others)}
        fewest, most = keywords.counts(schema, "minProperties", "maxProperties", where)
        if not named:
            return self._map(others, fewest, most, where)
        if fewest > len(set(required)) or (most is not None and most < len(named)):
            raise UsageError(f"{where}: minProperties and maxProperties cannot be combined with properties")
        members = []
        for name, value in named.items():
            place = f"{where}/properties/{name.replace('~', '~0').replace('/', '~1')}"
            key = Text(spelt(name, place))
            member = self.rules.add("member", then(key, _COLON, self.value(value, place)))
            members.append((member, name in required))
        return self.rules.add("object", then(Text("{"), self._members(members), Text("}")))

    def _members(self, members: Sequence[tuple[Node, bool]]) -> Node:
        """Members in this order, each one either required or not, with commas between those that are there."""
        following = NOTHING  # what may come after a member
        firsts: list[Node] = [NOTHING]  # the ways to begin here
        for member, is_required in reversed(members):
            begun = then(member, following)
            firsts = [begun] if is_required else [begun, *firsts]
            more = then(_COMMA, begun)
            following = self.rules.add("more", more if is_required else either(more, following))
        return either(*firsts)

    def _map(self, others: Any, fewest: int, most: int | None, where: str) -> Node:
        """An object with names of any kind."""
        value = self.value(others, f"{where}/additionalProperties")
        name = self.rules.add("string", text.any_string(self.rules))
        member = IMPOSSIBLE if value == IMPOSSIBLE else self.rules.add("member", then(name, _COLON, value))
        if fewest > 1:
            raise UsageError(f"{where}: minProperties above 1 needs properties: a name might be written twice")
        return self.rules.add("object", then(Text("{"), self._separated(member, fewest, most), Text("}")))


# -- what a schema says, checked ----------------------------------------------------------------------------------
