"""OpenAI's embeddings: request bodies and answers."""

from __future__ import annotations

import json
from array import array
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass

from llamacli.server.failure import Failure
from llamacli.server.fields import Fields, parse

MAX_INPUTS = 2048


@dataclass(frozen=True, slots=True)
class Request:
    """`inputs` are texts or token ids. `model` is the name that the client gave; None when it gave none."""

    inputs: tuple[str | tuple[int, ...], ...]
    model: str | None
    as_base64: bool


def read(raw: bytes) -> Request:
    """A body of /v1/embeddings. Raises Failure 400."""
    fields = parse(raw)
    inputs = _inputs(fields)
    form = fields.choice("encoding_format", "float", "base64")
    if fields.take("dimensions") is not None:
        raise Failure(400, "dimensions is not supported: vectors cannot be shortened here", param="dimensions")
    model = fields.text("model")
    fields.know(["user"])
    fields.refuse_unknown()
    return Request(inputs, model, form == "base64")


def _inputs(fields: Fields) -> tuple[str | tuple[int, ...], ...]:
    """One text or many, the token ids of one, or of many."""
    given = fields.take("input")
    if isinstance(given, str) or (isinstance(given, list) and given and all(map(_is_token, given))):
        given = [given]
    if not isinstance(given, list) or not given:
        fields.refuse("input", "a string, an array of strings, or token ids")
    if len(given) > MAX_INPUTS:
        raise Failure(400, f"input holds {len(given):,} texts; {MAX_INPUTS:,} are allowed", param="input")
    inputs: list[str | tuple[int, ...]] = []
    for i, each in enumerate(given):
        is_tokens = isinstance(each, list) and all(map(_is_token, each))
        if not isinstance(each, str) and not is_tokens:
            raise Failure(400, f"input[{i}] must be a string or an array of token ids", param="input")
        if not each:
            raise Failure(400, f"input[{i}] is empty", param="input")
        inputs.append(each if isinstance(each, str) else tuple(each))
    return tuple(inputs)


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def body(request: Request, vectors: Sequence[bytes], n_tokens: int, model: str) -> bytes:
    """vectors   float32 in little endian"""
    data = [
        {"object": "embedding", "index": i, "embedding": _written(vector, as_base64=request.as_base64)}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    answer = {"object": "list", "data": data, "model": model, "usage": usage}
    return json.dumps(answer, separators=(",", ":")).encode()


def _written(vector: bytes, *, as_base64: bool) -> str | list[float]:
    return b64encode(vector).decode() if as_base64 else array("f", vector).tolist()
