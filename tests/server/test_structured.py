"""What programs read: answers held to schemas, function calls, embeddings; asked by the openai package."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from typing import Any, cast

import jsonschema
import openai
import pytest
from conftest import Run
from test_serve import Server, running

from llamacli.engine.sequence import SamplingParams
from llamacli.server.ask import Conversation
from llamacli.server.openai import read_chat

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["good", "bad"]},
    },
    "required": ["name", "age", "mood"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"$ref": "#/$defs/days"}},
            "required": ["city", "days"],
            "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
    },
}
TIME: Any = {"type": "function", "function": {"name": "get_time"}}
HOT: Any = {"temperature": 1.5, "top_p": 1, "max_tokens": 200}
MESSAGES: Any = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMACLI_", "HF_"))}
    home = str(tmp_path_factory.mktemp("home"))
    with running(ours | {"LLAMACLI_HOME": home, "LLAMACLI_MODEL": "tiny", "LLAMACLI_THREADS": "1"}) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_an_answer_is_held_to_a_json_schema(client: openai.OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
    for seed in range(5):
        answer = client.chat.completions.create(
            model="tiny", messages=MESSAGES, response_format=wanted, seed=seed, **HOT
        )
        assert answer.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(answer.choices[0].message.content or ""), PERSON)


def test_the_llama_2_api_holds_answers_to_a_schema_too(server: Server) -> None:
    wanted = {"type": "json_schema", "json_schema": {"schema": PERSON}}
    reply = server.post({"prompt": "Who is it?", "response_format": wanted, "max_tokens": 200})
    jsonschema.validate(json.loads(reply.json["response"]), PERSON)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "array", "uniqueItems": True}, "#: uniqueItems is not supported"),
        ({"properties": {"a": {"not": {}}}}, "#/properties/a: not not supported"),
        (3, "must be a JSON schema"),
    ],
)
def test_what_a_schema_wants_in_vain_is_named(schema: Any, reason: str, server: Server) -> None:
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    reply = server.post({"prompt": "hi", "response_format": wanted})
    assert reply.status == 400
    assert reason in reply.json["message"]


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "json_object", "schema": PERSON},
        {"type": "json_schema", "schema": PERSON, "json_schema": {"schema": PERSON}},
        {"type": "text", "json_schema": {"schema": PERSON}},
        {"type": "json_object", "strict": True},
    ],
)
def test_a_schema_that_would_not_hold_the_answer_is_refused(wanted: dict[str, Any], server: Server) -> None:
    reply = server.post({"prompt": "Who is it?", "response_format": wanted})
    assert reply.status == 400
    assert "response_format." in reply.json["message"]


# -- function calls ----------------------------------------------------------------------------------------------


def test_a_required_call_has_arguments_of_its_schema(client: openai.OpenAI) -> None:
    for seed in range(5):
        answer = client.chat.completions.create(
            model="tiny", messages=MESSAGES, tools=[WEATHER], tool_choice="required", seed=seed, **HOT
        )
        choice = answer.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        call: Any = (choice.message.tool_calls or [])[0]
        assert call.function.name == "get_weather"
        jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])


def test_a_named_function_is_the_one_that_is_called(client: openai.OpenAI) -> None:
    wanted: Any = {"type": "function", "function": {"name": "get_weather"}}
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=[TIME, WEATHER], tool_choice=wanted, seed=1, **HOT
    )
    call: Any = (answer.choices[0].message.tool_calls or [])[0]
    assert call.function.name == "get_weather"


def test_a_streamed_call_comes_as_a_name_and_then_its_arguments(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": MESSAGES, "tools": [TIME, WEATHER], "tool_choice": "required"}
    arguments, names, ids, reasons = "", [], [], []
    for chunk in client.chat.completions.create(**asked, **HOT, seed=1, stream=True):
        choice = chunk.choices[0]
        assert not choice.delta.content
        for part in choice.delta.tool_calls or []:
            assert part.index == 0 and part.function
            names += [part.function.name] if part.function.name else []
            ids += [part.id] if part.id else []
            arguments += part.function.arguments or ""
        reasons += [choice.finish_reason] if choice.finish_reason else []
    assert names in (["get_weather"], ["get_time"])
    assert isinstance(json.loads(arguments), dict)
    assert reasons == ["tool_calls"]
    assert len(ids) == 1


def test_a_call_that_a_stop_string_ends_does_not_pass_for_a_whole_one(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": MESSAGES, "tools": [WEATHER], "tool_choice": "required", "seed": 1} | HOT
    choice = client.chat.completions.create(**asked, stop='"days').choices[0]
    (call,) = cast(Any, choice.message.tool_calls)
    assert choice.finish_reason == "stop"
    assert call.function.arguments.startswith('{"city":') and call.function.arguments.endswith(",")
    streamed, reason = "", None
    for chunk in client.chat.completions.create(**asked, stop='"days', stream=True):
        for part in chunk.choices[0].delta.tool_calls or []:
            streamed += (part.function and part.function.arguments) or ""
        reason = chunk.choices[0].finish_reason or reason
    assert (streamed, reason) == (call.function.arguments, "stop")


def test_without_being_required_the_model_may_just_answer(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    asked: Any = {"model": "tiny", "messages": messages, "tools": [TIME], "temperature": 0, "max_tokens": 40}
    answer = client.chat.completions.create(**asked).choices[0]
    assert answer.message.content and not answer.message.tool_calls
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(pieces) == answer.message.content
    none = client.chat.completions.create(**asked, tool_choice="none").choices[0]
    assert none.message.content and not none.message.tool_calls


def test_the_result_of_a_call_goes_back_to_the_model(client: openai.OpenAI) -> None:
    call: Any = {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    history: Any = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    answer = client.chat.completions.create(model="tiny", messages=history, tools=[TIME], max_tokens=20)
    assert answer.usage and answer.usage.prompt_tokens > 50


def test_of_several_users_the_model_hears_who_says_what() -> None:
    def heard(*names: str | None) -> str:
        said = [{"role": "user", "content": f"word {i}", "name": name} for i, name in enumerate(names)]
        (source,) = read_chat(json.dumps({"messages": said}).encode(), SamplingParams()).ask.sources
        assert isinstance(source, Conversation)
        return source.messages[-1].content

    assert heard("Ann", "Ben") == "Ann: word 0\n\nBen: word 1"
    assert heard("Ann", None) == "Ann: word 0\n\nword 1"
    assert heard("Ann", "Ann") == heard(None, None) == "word 0\n\nword 1"


def test_a_result_is_told_with_the_call_that_it_is_of() -> None:
    def told(*results: tuple[str, str], asked: tuple[tuple[str, str], ...]) -> str:
        calls = [
            {"id": name + arguments, "type": "function", "function": {"name": name, "arguments": arguments}}
            for name, arguments in asked
        ]
        history = [
            *MESSAGES,
            {"role": "assistant", "content": None, "tool_calls": calls},
            *({"role": "tool", "tool_call_id": call_id, "content": content} for call_id, content in results),
        ]
        (source,) = read_chat(json.dumps({"messages": history}).encode(), SamplingParams()).ask.sources
        assert isinstance(source, Conversation)
        return source.messages[-1].content

    paris, rome, now = '{"city":"Paris"}', '{"city":"Rome"}', "{}"
    assert told(("get_time{}", "noon"), asked=(("get_time", now),)) == "The function get_time returned: noon"
    two = (("get_weather", paris), ("get_time", now))
    assert told(("get_time{}", "noon"), ("get_weather" + paris, "sun"), asked=two) == (
        "The function get_time returned: noon\n\nThe function get_weather returned: sun"
    )
    twice = (("get_weather", paris), ("get_weather", rome))
    assert told(("get_weather" + rome, "rain"), asked=twice) == f"The function get_weather with {rome} returned: rain"


def test_a_result_of_no_call_is_refused(server: Server) -> None:
    history = [*MESSAGES, {"role": "tool", "tool_call_id": "call_9", "content": "noon"}]
    reply = server.post({"messages": history}, "/v1/chat/completions")
    assert reply.status == 400 and "messages[1].tool_call_id must be the id of an" in reply.json["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "1 to 64 letters"),
        ({"tools": [TIME, TIME]}, "names a function twice"),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice names x"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [TIME], "tool_choice": "sometimes"}, "tool_choice must be"),
        ({"tools": [TIME], "response_format": {"type": "json_object"}}, "contradict"),
        ({"tools": [TIME], "logprobs": True}, "cannot be combined"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "f: #: no type",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]}, "f: #: not"),
        ({"tools": [{"type": "function", "function": {"name": "f", "mood": 1}}]}, "mood"),
    ],
)
def test_tools_that_cannot_be_called_are_refused(fields: dict[str, Any], reason: str, server: Server) -> None:
    reply = server.post({"model": "tiny", "messages": MESSAGES} | fields, "/v1/chat/completions")
    assert reply.status == 400
    assert reason in reply.json["error"]["message"]


# -- embeddings --------------------------------------------------------------------------------------------------


def test_embeddings_are_unit_vectors_that_tell_texts_apart(client: openai.OpenAI) -> None:
    texts = ["Llama 2 is a language model", "Llama 2 is a model of language", "3 + 4 = 7", "x" * 900]
    answer = client.embeddings.create(model="tiny", input=texts)
    vectors = [each.embedding for each in answer.data]
    assert [each.index for each in answer.data] == [0, 1, 2, 3]
    for vector in vectors:
        assert math.isclose(sum(x * x for x in vector), 1, rel_tol=1e-5)
    near, far = (sum(a * b for a, b in zip(vectors[0], other, strict=True)) for other in vectors[1:3])
    assert near > far
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 100


def test_floats_and_base64_are_the_same_numbers(client: openai.OpenAI) -> None:
    packed = client.embeddings.create(model="tiny", input="hi").data[0].embedding  # the client asks for base64
    plain = client.embeddings.create(model="tiny", input="hi", encoding_format="float").data[0].embedding
    assert plain == pytest.approx(packed, rel=1e-6)


def test_an_embedding_is_of_its_own_text_alone(client: openai.OpenAI) -> None:
    alone = client.embeddings.create(model="tiny", input="the same text").data[0].embedding
    long = "word " * 300  # more than one step
    among = client.embeddings.create(model="tiny", input=[long, "the same text", long])
    assert among.data[1].embedding == pytest.approx(alone, abs=1e-4)
    assert among.data[0].embedding == among.data[2].embedding


def test_the_embed_command_prints_the_same_numbers(client: openai.OpenAI, server: Server, llamacli: Run) -> None:
    texts = ["Llama 2 is a language model", "word " * 300]
    served = [client.embeddings.create(model="tiny", input=text, encoding_format="float") for text in texts]
    printed = [json.loads(llamacli("embed", "--json", text).stdout) for text in texts]
    assert [each["embeddings"][0] for each in printed] == [each.data[0].embedding for each in served]
    assert [each["usage"]["prompt_tokens"] for each in printed] == [each.usage.prompt_tokens for each in served]


def test_token_ids_are_embedded_as_they_are(client: openai.OpenAI) -> None:
    one = client.embeddings.create(model="tiny", input=[1, 15043]).data
    many = client.embeddings.create(model="tiny", input=[[1, 15043], [1, 3186]]).data
    assert len(one) == 1 and len(many) == 2
    assert one[0].embedding == pytest.approx(many[0].embedding, abs=1e-5)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "input must be"),
        ({"input": ""}, "input[0] is empty"),
        ({"input": []}, "input must be"),
        ({"input": ["a", 3]}, "input[1] must be"),
        ({"input": [10**6]}, "token outside"),
        ({"input": "word " * 3000}, "tokens; an embedding is made of"),
        ({"input": "word " * 60000}, "far longer"),
        ({"input": "a", "dimensions": 8}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "mood": 1}, "mood"),
    ],
)
def test_what_cannot_be_embedded_is_refused(fields: dict[str, Any], reason: str, server: Server) -> None:
    reply = server.post(fields, "/v1/embeddings")
    assert reply.status == 400
    assert reason in reply.json["error"]["message"]


def test_embeddings_do_not_stop_streams(server: Server, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, max_tokens=200, extra_body={"ignore_eos": True}
    )
    first = next(iter(stream))
    assert first.choices
    made = client.embeddings.create(model="tiny", input=["word " * 500] * 4)
    assert len(made.data) == 4
    assert sum(bool(chunk.choices[0].delta.content) for chunk in stream) > 100
