"""A client's own test suite, written against the fixture alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from clients import ApiError, Client, WithHttpx, WithOpenai, WithRequests, WithUrllib

from llamacli.testing.api import Llama2Api

CLIENTS: dict[str, Callable[[str, str], Client]] = {
    "requests": WithRequests,
    "httpx": WithHttpx,
    "urllib": WithUrllib,
    "openai": WithOpenai,
}


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest, llama2_api: Llama2Api) -> Iterator[Client]:
    made = CLIENTS[request.param](llama2_api.url, llama2_api.key)
    yield made
    if isinstance(made, WithOpenai):
        made.close()


def test_an_answer_and_what_was_asked_for_it(client: Client, llama2_api: Llama2Api) -> None:
    llama2_api.reply("Llama 2 is a family of models.")
    assert client.ask("What is Llama 2?") == "Llama 2 is a family of models."
    (sent,) = llama2_api.requests
    asked = sent.json.get("prompt") or sent.json["messages"][0]["content"]
    assert (asked, sent.status) == ("What is Llama 2?", 200)
    assert llama2_api.key in sent.headers.get("ocp-apim-subscription-key", sent.headers.get("authorization", ""))


def test_replies_come_in_their_order(client: Client, llama2_api: Llama2Api) -> None:
    llama2_api.reply("one")
    llama2_api.reply("two")
    llama2_api.reply("a capital", when="[Cc]apital", times=1)
    assert [client.ask("a?"), client.ask("the capital?"), client.ask("b?")] == ["one", "a capital", "two"]
    assert client.ask("the capital?") == "two"


@pytest.mark.parametrize("status", [400, 500, 503])
def test_an_error_is_told_with_its_reason(status: int, client: Client, llama2_api: Llama2Api) -> None:
    llama2_api.reply(status=status, message="out of llamas")
    with pytest.raises(ApiError, match="out of llamas") as caught:
        client.ask("hi")
    assert caught.value.status == status


def test_a_bad_request_is_refused_as_by_the_real_server(client: Client) -> None:
    with pytest.raises(ApiError, match="empty") as caught:
        client.ask("")
    assert caught.value.status == 400


@pytest.mark.parametrize("name", CLIENTS)
def test_a_wrong_key_is_told(name: str, llama2_api: Llama2Api) -> None:
    client = CLIENTS[name](llama2_api.url, "wrong-key")
    with pytest.raises(ApiError, match="subscription key is not valid") as caught:
        client.ask("hi")
    assert caught.value.status == 401
    if isinstance(client, WithOpenai):
        client.close()


def test_a_busy_server_is_asked_again(client: Client, llama2_api: Llama2Api) -> None:
    llama2_api.simulate(status=429, retry_after=0, count=2)
    llama2_api.reply("at last")
    assert client.ask("hi") == "at last"
    assert [sent.status for sent in llama2_api.requests] == [429, 429, 200]


def test_a_server_that_stays_busy_is_given_up(client: Client, llama2_api: Llama2Api) -> None:
    llama2_api.simulate("status=429, retry-after=0")
    with pytest.raises(ApiError) as caught:
        client.ask("hi")
    assert caught.value.status == 429


def test_a_stream_comes_in_pieces(client: Client, llama2_api: Llama2Api) -> None:
    llama2_api.reply(pieces=["Lla", "ma", " 2"])
    assert [piece for piece in client.stream("hi") if piece] == ["Lla", "ma", " 2"]


def test_a_stream_that_is_cut_is_no_answer(client: Client, llama2_api: Llama2Api) -> None:
    llama2_api.reply("one two three four")
    llama2_api.simulate(cut_after=3)
    got = []
    with pytest.raises(ApiError):
        for piece in client.stream("hi"):
            got.append(piece)
    assert got and "four" not in "".join(got)


def test_a_slow_stream_shows_its_first_piece_before_its_last(client: Client, llama2_api: Llama2Api) -> None:
    llama2_api.reply("one two three")
    llama2_api.simulate(token_rate=20)
    started, arrivals = time.monotonic(), []
    for _ in client.stream("hi"):
        arrivals.append(time.monotonic() - started)
    assert arrivals[-1] - arrivals[0] > 0.05
