"""Four clients of the Llama 2 API, as programs have them: over requests, httpx, urllib and the openai package."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import httpx
import openai
import requests

ATTEMPTS = 3
SECONDS = 5.0


class ApiError(Exception):
    """The server has refused or failed; `status` is None where it gave no sound answer at all."""

    def __init__(self, status: int | None, message: str) -> None:
        super().__init__(message)
        self.status = status


class Client(Protocol):
    def ask(self, prompt: str) -> str: ...

    def stream(self, prompt: str) -> Iterator[str]: ...


def _pieces(lines: Iterable[str]) -> Iterator[str]:
    """The text of a stream's events. Raises ApiError for one without its end."""
    for line in lines:
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))["response"]
    raise ApiError(None, "the stream was cut")


def _headers(key: str) -> dict[str, str]:
    return {"Ocp-Apim-Subscription-Key": key, "Content-Type": "application/json", "Cache-Control": "no-cache"}


class WithRequests:
    def __init__(self, url: str, key: str) -> None:
        self._url = f"{url}/v1/getData"
        self._headers = _headers(key)

    def ask(self, prompt: str) -> str:
        for attempt in range(ATTEMPTS):
            reply = requests.post(self._url, json={"prompt": prompt}, headers=self._headers, timeout=SECONDS)
            if reply.status_code != 429 or attempt == ATTEMPTS - 1:
                break
            time.sleep(float(reply.headers["Retry-After"]))
        if reply.status_code != 200:
            raise ApiError(reply.status_code, reply.json()["message"])
        return str(reply.json()["response"])

    def stream(self, prompt: str) -> Iterator[str]:
        asked = {"prompt": prompt, "stream": True}
        try:
            with requests.post(self._url, json=asked, headers=self._headers, timeout=SECONDS, stream=True) as reply:
                yield from _pieces(reply.iter_lines(chunk_size=1, decode_unicode=True))
        except requests.RequestException as error:
            raise ApiError(None, str(error)) from error


class WithHttpx:
    def __init__(self, url: str, key: str) -> None:
        self._url = f"{url}/v1/getData"
        self._headers = _headers(key)

    def ask(self, prompt: str) -> str:
        for attempt in range(ATTEMPTS):
            reply = httpx.post(self._url, json={"prompt": prompt}, headers=self._headers, timeout=SECONDS)
            if reply.status_code != 429 or attempt == ATTEMPTS - 1:
                break
            time.sleep(float(reply.headers["retry-after"]))
        if reply.status_code != 200:
            raise ApiError(reply.status_code, reply.json()["message"])
        return str(reply.json()["response"])

    def stream(self, prompt: str) -> Iterator[str]:
        asked = {"prompt": prompt, "stream": True}
        try:
            with httpx.stream("POST", self._url, json=asked, headers=self._headers, timeout=SECONDS) as reply:
                yield from _pieces(reply.iter_lines())
        except httpx.HTTPError as error:
            raise ApiError(None, str(error)) from error


class WithUrllib:
    def __init__(self, url: str, key: str) -> None:
        self._url = f"{url}/v1/getData"
        self._headers = _headers(key)

    def ask(self, prompt: str) -> str:
        for attempt in range(ATTEMPTS):
            try:
                with self._open({"prompt": prompt}) as reply:
                    return str(json.load(reply)["response"])
            except urllib.error.HTTPError as error:
                with error:
                    message = json.load(error)["message"]
                if error.code != 429 or attempt == ATTEMPTS - 1:
                    raise ApiError(error.code, message) from None
                time.sleep(float(error.headers["Retry-After"]))
        raise AssertionError("not reached")

    def stream(self, prompt: str) -> Iterator[str]:
        with self._open({"prompt": prompt, "stream": True}) as reply:
            # A body in chunks that breaks off looks like one that ends: _pieces() misses its last event.
            yield from _pieces(line.decode().rstrip("\n") for line in reply)

    def _open(self, asked: dict[str, Any]) -> Any:
        request = urllib.request.Request(self._url, json.dumps(asked).encode(), self._headers)
        return urllib.request.urlopen(request, timeout=SECONDS)


class WithOpenai:
    def __init__(self, url: str, key: str) -> None:
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, timeout=SECONDS, max_retries=0)
        self._model = "llama-2"

    def ask(self, prompt: str) -> str:
        for attempt in range(ATTEMPTS):
            try:
                done = self._client.chat.completions.create(
                    model=self._model, messages=[{"role": "user", "content": prompt}]
                )
                return done.choices[0].message.content or ""
            except openai.RateLimitError as error:
                if attempt == ATTEMPTS - 1:
                    raise ApiError(error.status_code, error.message) from error
                time.sleep(float(error.response.headers["retry-after"]))
            except openai.APIStatusError as error:
                raise ApiError(error.status_code, error.message) from error
        raise AssertionError("not reached")

    def stream(self, prompt: str) -> Iterator[str]:
        ended = False
        try:
            for chunk in self._client.chat.completions.create(
                model=self._model, messages=[{"role": "user", "content": prompt}], stream=True
            ):
                ended = ended or chunk.choices[0].finish_reason is not None
                if text := chunk.choices[0].delta.content:
                    yield text
        except Exception as error:  # what breaks off below comes out as the transport's own error
            raise ApiError(None, str(error)) from error
        if not ended:
            raise ApiError(None, "the stream was cut")

    def close(self) -> None:
        self._client.close()
