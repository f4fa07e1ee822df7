"""`run` held to a form: --schema, --json-object and --choices, in real pipes and over a real server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
from conftest import Run
from test_remote import Server, Tell, clean_environment, one_line, reply, serving, tell

__all__ = ["tell"]

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
HOT = ("--temperature", "1.5", "--top-k", "0", "--top-p", "1", "--seed", "1")


@pytest.mark.parametrize("form", ["file", "inline", "short"])
def test_an_answer_satisfies_its_schema_however_it_is_given(form: str, llamacli: Run, tmp_path: Path) -> None:
    path = tmp_path / "person.json"
    path.write_text(json.dumps(PERSON))
    given = {"file": str(path), "inline": json.dumps(PERSON), "short": "name, age int"}[form]
    done = llamacli(*HOT, "-n", "60", "--schema", given, "Who is it?")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert list(value) == ["name", "age"]
    if form != "short":
        jsonschema.validate(value, PERSON)


def test_any_json_object_and_one_of_several_choices(llamacli: Run) -> None:
    assert isinstance(json.loads(llamacli(*HOT, "-n", "40", "--json-object", "Tell me").stdout), dict)
    answers = {llamacli(*HOT[:-1], str(seed), "--choices", "yes, no,maybe", "Is it?").stdout for seed in range(3)}
    assert answers <= {"yes\n", "no\n", "maybe\n"}


def test_a_choice_that_begins_with_a_space_is_that_choice_in_a_raw_prompt_too(llamacli: Run) -> None:
    for seed in range(3):
        done = llamacli(*HOT[:-1], str(seed), "--raw", "--choices", "yes,no,maybe", "Is it so? Answer:")
        assert done.returncode == 0, done.stderr
        assert done.stdout in ("yes\n", "no\n", "maybe\n")


def test_an_object_is_closed_within_its_budget_and_that_is_said(llamacli: Run) -> None:
    done = llamacli(*HOT, "-n", "20", "--schema", "name, tags[]", "Who is it?")
    assert done.returncode == 0
    assert json.loads(done.stdout).keys() == {"name", "tags"}
    assert "--max-tokens has no room for more" in one_line(done.stderr)
    cut = llamacli(*HOT, "-c", "64", "--json", "--schema", '{"type": "array", "items": {"type": "integer"}}', "Numbers")
    record = json.loads(cut.stdout)
    if cut.returncode == 3:
        assert "the context has no room for more" in one_line(cut.stderr)
    assert isinstance(json.loads(record["answer"]), list)
    assert record["usage"]["prompt_tokens"] + record["usage"]["completion_tokens"] <= 64


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--schema", '{"type": "array", "uniqueItems": true}'], "--schema: #: uniqueItems is not supported"),
        (["--schema", '{"properties": {"a": {"not": {}}}}'], "--schema: #/properties/a: not not supported"),
        (["--schema", '{"type": "object", "title": 3}'], "no valid JSON schema"),
        (["--schema", '{"enum": []}'], "never be satisfied"),
        (["--schema", '{"$ref": "#"}'], "no finite value"),
        (["--schema", '{"type": "object"'], "--schema is not JSON"),
        (["--schema", '{"const": ' + "1" * 5000 + "}"], "--schema holds a number of more digits than can be read"),
        (["--schema", '{"allOf": [{"enum": 5}, {"enum": [1]}]}'], "no valid JSON schema"),
        (["--schema", "name text"], "a type (str, int, number, bool) was expected"),
        (["--schema", "/no/such.json"], "No such file"),
        (["--schema", ""], "--schema is empty"),
        (["--choices", "yes,,no"], "--choices: there must be at least one choice, and none may be empty"),
        (["--choices", ""], "none may be empty"),
        (["--json-object", "--choices", "a,b"], "--json-object and --choices contradict"),
        (["--json-object", "--stop", "}"], "--stop might cut"),
        (["--schema", "name", "-n", "2"], "--max-tokens 2 is too few for --schema"),
    ],
)
def test_a_form_that_cannot_be_kept_is_refused_by_name(arguments: list[str], said: str, llamacli: Run) -> None:
    done = llamacli(*arguments, "hi")
    assert (done.returncode, done.stdout) == (2, "")
    assert said in one_line(done.stderr)


# -- servers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(clean_environment(tmp_path_factory.mktemp("server"))) as running:
        yield running


def test_a_remote_server_is_asked_for_the_form(server: Server, llamacli: Run) -> None:
    remote = ("--remote", server.url, *HOT)
    done = llamacli(*remote, "-n", "200", "--schema", json.dumps(PERSON), "Who is it?")
    assert done.returncode == 0, done.stderr
    jsonschema.validate(json.loads(done.stdout), PERSON)
    assert llamacli(*remote, "--choices", "yes,no,maybe", "Is it?").stdout in ("yes\n", "no\n", "maybe\n")
    refused = llamacli(*remote, "--schema", '{"not": {}}', "hi")
    assert refused.returncode == 2 and "not not supported" in one_line(refused.stderr)


def test_an_answer_without_its_form_is_exit_code_seven_and_stays(server: Server, llamacli: Run) -> None:
    done = llamacli("--remote", server.url, "--temperature", "0", "-n", "3", "--schema", json.dumps(PERSON), "Who?")
    assert done.returncode == 7
    assert done.stdout.startswith("{")
    assert re.search("the answer is not whole JSON: .* at character", one_line(done.stderr))


@pytest.mark.parametrize(
    ("said", "form", "reason"),
    [
        ({"response": '{"name": "Ann"}'}, ["--schema", json.dumps(PERSON)], "$: 'age' is a required property"),
        ({"response": "Certainly!"}, ["--choices", "yes,no"], "none of the choices (yes, no): 'Certainly!'"),
        ({"response": "[1]"}, ["--json-object"], "$: [1] is not of type 'object'"),
    ],
)
def test_a_server_that_knows_no_forms_is_found_out(
    said: dict[str, str], form: list[str], reason: str, llamacli: Run, tell: Tell
) -> None:
    told = tell(reply(said | {"finish_reason": "stop"}))
    done = llamacli("--remote", told.url, *form, "hi")
    assert "response_format" in told.body()
    assert done.returncode == 7
    assert done.stdout == said["response"] + "\n"
    assert reason in one_line(done.stderr)
