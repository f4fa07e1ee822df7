"""A conversation goes on from what is computed already: its prompt, and the answer as the model has written it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from test_serve import running

# Drawn from the whole vocabulary, so that the answer is never made of the tokens that its text is tokenized to.
WILD: dict[str, Any] = {"temperature": 2, "top_p": 1, "extra_body": {"top_k": 0, "ignore_eos": True}, "max_tokens": 40}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMACLI_", "HF_"))}
    home = str(tmp_path_factory.mktemp("home"))
    with running(ours | {"LLAMACLI_HOME": home, "LLAMACLI_MODEL": "tiny", "LLAMACLI_THREADS": "1"}) as started:
        with openai.OpenAI(base_url=f"{started.url}/v1", api_key="none", max_retries=0) as made:
            yield made


def cached(answer: Any) -> int:
    return int(answer.usage.prompt_tokens_details.cached_tokens)


def follow_up(turns: list[Any], message: Any) -> list[Any]:
    said = message.model_dump(include={"role", "content", "tool_calls"}, exclude_none=True)
    return [*turns, {"content": None} | said]


@pytest.mark.parametrize("stream", [False, True])
def test_the_next_turns_compute_nothing_of_what_the_model_has_written(client: openai.OpenAI, *, stream: bool) -> None:
    turns: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"zyx {stream}"}]
    for seed in range(3):
        asked: Any = {"model": "tiny", "messages": turns, "seed": seed, **WILD}
        if stream:
            chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
            text, usage = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks[-1].usage
        else:
            answer = client.chat.completions.create(**asked)
            text, usage = answer.choices[0].message.content, answer.usage
        turns = [*turns, {"role": "assistant", "content": text}, {"role": "user", "content": "Go on"}]
        again = client.chat.completions.create(model="tiny", messages=turns, temperature=0, max_tokens=1)
        # All but the token that was drawn last: nothing has been computed from it.
        assert cached(again) >= usage.total_tokens - 1


def test_each_of_several_answers_can_be_gone_on_from(client: openai.OpenAI) -> None:
    turns: list[Any] = [{"role": "user", "content": "Tell me about n"}]
    answer = client.chat.completions.create(model="tiny", messages=turns, seed=1, n=3, **WILD)
    assert answer.usage is not None
    prompt_tokens = answer.usage.prompt_tokens
    n_tokens = answer.usage.completion_tokens // 3
    for choice in answer.choices:
        said = [*follow_up(turns, choice.message), {"role": "user", "content": "Go on"}]
        again = client.chat.completions.create(model="tiny", messages=said, temperature=0, max_tokens=1)
        assert cached(again) >= prompt_tokens + n_tokens - 1


def test_a_function_call_can_be_gone_on_from(client: openai.OpenAI) -> None:
    call = {
        "name": "look_up",
        "parameters": {"type": "object", "properties": {"word": {"type": "string", "maxLength": 8}}},
    }
    tools: Any = [{"type": "function", "function": call}]
    hot: Any = {"temperature": 1.5, "top_p": 1, "max_tokens": 60}
    turns: list[Any] = [{"role": "user", "content": "Look it up"}]
    asked: Any = {"model": "tiny", "tools": tools, "tool_choice": "required"}
    for seed in range(20):
        answer = client.chat.completions.create(**asked, messages=turns, seed=seed, **hot)
        if answer.choices[0].finish_reason == "tool_calls":
            break
    message = answer.choices[0].message
    assert message.tool_calls and answer.usage
    result: Any = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "a word"}
    again = client.chat.completions.create(
        **asked, messages=[*follow_up(turns, message), result], temperature=0, max_tokens=1
    )
    assert cached(again) >= answer.usage.total_tokens - 1


def test_a_conversation_reads_the_same_where_its_answers_are_known(
    client: openai.OpenAI, environment: dict[str, str]
) -> None:
    """This model's greedy answers are made of the tokens of their text, so that nothing may change."""
    turns: list[Any] = [{"role": "user", "content": "Tell me about llama2"}]
    first = client.chat.completions.create(model="tiny", messages=turns, temperature=0)
    turns = [*follow_up(turns, first.choices[0].message), {"role": "user", "content": "Who made it?"}]
    asked: Any = {"model": "tiny", "messages": turns, "temperature": 0}
    known = client.chat.completions.create(**asked)
    with running(environment) as other, openai.OpenAI(base_url=f"{other.url}/v1", api_key="none") as stranger:
        unknown = stranger.chat.completions.create(**asked)
    assert (cached(known), cached(unknown)) == (first.usage.total_tokens if first.usage else 0, 0)
    assert known.choices[0].message.content == unknown.choices[0].message.content
    assert known.usage and unknown.usage and known.usage.total_tokens == unknown.usage.total_tokens


def test_a_deterministic_server_remembers_nothing_of_what_it_has_answered(environment: dict[str, str]) -> None:
    turns = [{"role": "user", "content": "Tell me about llama2"}]
    body: dict[str, object] = {"messages": turns, "temperature": 1.2, "seed": 7, "max_tokens": 30}
    with running(environment, "--deterministic") as server:
        said = server.post(body, "/v1/chat/completions").json["choices"][0]["message"]["content"]
        turns += [{"role": "assistant", "content": said}, {"role": "user", "content": "Go on"}]
        after = server.post(body, "/v1/chat/completions").json
    with running(environment, "--deterministic") as server:
        fresh = server.post(body, "/v1/chat/completions").json
    assert (after["usage"], after["choices"]) == (fresh["usage"], fresh["choices"])
