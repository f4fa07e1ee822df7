"""What a test says to the server that its client talks to, and what it hears of the client."""

from __future__ import annotations

import base64
import http.client
import json as jsons
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class SentRequest:
    """A request as the client has sent it.

    headers   names in lower case
    status    of the answer; 499 for a client that went away before it
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    status: int

    @property
    def json(self) -> Any:
        """The body. Raises ValueError when it is no JSON."""
        return jsons.loads(self.body)


class Llama2Api:
    """A server of the Llama 2 API (POST /v1/getData) and of OpenAI's (/v1/chat/completions ...).

    url   without a path: http://127.0.0.1:PORT
    key   that a client must send
    """

    def __init__(self, url: str, key: str) -> None:
        self.url = url
        self.key = key

    @property
    def requests(self) -> list[SentRequest]:
        """All that was sent since the test began, the first one first; those that were refused too."""
        found = self._ask("GET", "/requests")["requests"]
        return [SentRequest(**each | {"body": base64.b64decode(each["body"])}) for each in found]

    def reply(
        self,
        text: str | None = None,
        *,
        pieces: Sequence[str] | None = None,
        json: Any = None,
        body: str | None = None,
        events: Sequence[Any] | None = None,
        status: int = 200,
        message: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
        content_type: str | None = None,
        finish_reason: str | None = None,
        route: str | None = None,
        when: str | None = None,
        times: int | None = None,
    ) -> None:
        """Put an answer ready. Answers are given in their order, each once; the last one stays.

        text       what the model says: whole or streamed word by word, as the client asks, in the shape of its API
        pieces     the same, cut into events as you like
        json       a body, or `body` as text (with `content_type`), or `events` of a stream; with any `status`
        status     of 400 and more without a body: an error in the shape of the client's API, with `message`
        route      only for this path
        when       only for requests in whose body this regular expression is found; such go before those for all
        times      give it so often, also when no other follows

        Raises ValueError for what makes no sense.
        """
        given = {name: value for name, value in locals().items() if name != "self" and value is not None}
        self._ask("POST", "/replies", given)

    def simulate(
        self,
        faults: str | None = None,
        *,
        status: int | None = None,
        retry_after: int | None = None,
        delay: float | None = None,
        token_rate: float | None = None,
        cut_after: int | None = None,
        malformed: bool = False,
        content_type: str | None = None,
        reset: bool = False,
        slow_bytes: float | None = None,
        route: str | None = None,
        when: str | None = None,
        nth: int | Sequence[int] | None = None,
        probability: float | None = None,
        seed: int | None = None,
        count: int | None = None,
    ) -> None:
        """Let requests fail until the test ends: by keywords, or written as in the header X-Simulate.

        when          only requests in whose body this regular expression is found
        nth           only these of the requests that fit, counted from 1
        probability   0-1, by a generator with this `seed`
        count         so often and no more

        Raises ValueError for what makes no sense.
        """
        values = {
            "status": status,
            "retry-after": retry_after,
            "delay": delay,
            "token-rate": token_rate,
            "cut-after": cut_after,
            "content-type": content_type,
            "slow-bytes": slow_bytes,
        }
        parts = [faults] if faults else []
        parts += [f"{name}={value}" for name, value in values.items() if value is not None]
        parts += [name for name, is_on in (("malformed", malformed), ("reset", reset)) if is_on]
        numbers = nth if nth is None or isinstance(nth, int) else list(nth)
        rule = {
            "simulate": ", ".join(parts),
            "route": route,
            "body": when,
            "nth": numbers,
            "probability": probability,
            "seed": seed,
            "count": count,
        }
        self._ask("POST", "/rules", {name: value for name, value in rule.items() if value is not None})

    def replay(self, path: str | Path) -> None:
        """Answer from this recording until the test ends. Raises ValueError with the line at fault."""
        self._ask("POST", "/recording", Path(path).read_bytes())

    def reset(self) -> None:
        """Forget replies, faults, recordings and requests. Happens before each test by itself."""
        self._ask("DELETE", "")

    def _ask(self, method: str, path: str, value: Mapping[str, Any] | bytes | None = None) -> Any:
        host = urlsplit(self.url)
        connection = http.client.HTTPConnection(host.hostname or "", host.port, timeout=_SECONDS)
        body = value if isinstance(value, bytes | type(None)) else jsons.dumps(value).encode()
        try:
            connection.request(method, f"/simulation{path}", body, {"Ocp-Apim-Subscription-Key": self.key})
            response = connection.getresponse()
            answer = jsons.loads(response.read())
        finally:
            connection.close()
        if response.status != 200:
            raise ValueError(answer["message"])
        return answer
