"""What a client is told when its request fails, in the shape of the API that it speaks.

Below /v1/, getData excepted, that is OpenAI's; elsewhere the Llama 2 API's: code, message, traceId.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from http import HTTPStatus

from llamacli.errors import LlamacliError

_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Failure(Exception):
    """A request that gets an error for an answer.

    retry_after   seconds until it is worth trying again
    param, code   OpenAI's names for the field at fault and for the kind of error
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(max(1, math.ceil(retry_after)))


def of(error: LlamacliError) -> Failure:
    """An error of ours. What may pass by itself (a model that is loading again) is worth another try."""
    return Failure(error.http_status, str(error), retry_after=1 if error.http_status == 503 else None)


def speaks_openai(path: str) -> bool:
    return path.startswith("/v1/") and path != "/v1/getData"


def _phrase(status: int) -> str:
    """OpenAI's kind of name for a status that has no better one."""
    known = status in HTTPStatus.__members__.values()
    return HTTPStatus(status).phrase.lower().replace(" ", "_") if known else f"status_{status}"


def body(failure: Failure, path: str, trace_id: str) -> bytes:
    """The error as JSON."""
    if speaks_openai(path):
        kind = _OPENAI_TYPES.get(failure.status) or (
            "invalid_request_error" if failure.status < 500 else "server_error"
        )
        code = failure.code or _phrase(failure.status)
        shape: object = {"error": {"message": failure.message, "type": kind, "param": failure.param, "code": code}}
    else:
        shape = {"code": failure.status, "message": failure.message, "traceId": trace_id}
    return json.dumps(shape, ensure_ascii=False).encode("utf-8", "replace")
