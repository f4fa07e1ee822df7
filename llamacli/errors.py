"""What can be expected to go wrong. Each error knows its exit code at a shell and its status over HTTP.

LlamacliError
├── UsageError      2 / 400   the request contradicts itself or is out of range
├── InputTooLong    4 / 400   the input does not fit the context window
├── ModelError      5 / 503   the model is missing, refused, corrupt or cannot be had
├── ResourceError   6 / 503   not enough memory or disk
├── SchemaError     7 / 500   the answer does not satisfy the schema
├── RemoteError     8 / 502   a server we asked has failed
└── EngineError     1 / 500   llama.cpp failed in a way that no input should be able to cause
    └── EngineCrashed   1 / 503   the process that it ran in has died; another one is started

The message is one line: what happened, with the numbers, and what to do about it. Anything that is not a
LlamacliError is a bug and shows its traceback.
"""


class LlamacliError(Exception):
    exit_code = 1
    http_status = 500


class UsageError(LlamacliError):
    exit_code = 2
    http_status = 400


class InputTooLong(LlamacliError):
    exit_code = 4
    http_status = 400


class ModelError(LlamacliError):
    exit_code = 5
    http_status = 503


class ResourceError(LlamacliError):
    exit_code = 6
    http_status = 503


class SchemaError(LlamacliError):
    exit_code = 7


class RemoteError(LlamacliError):
    exit_code = 8
    http_status = 502


class EngineError(LlamacliError):
    """A failure inside the native library. Not the user's fault, so it keeps exit code 1."""


class EngineCrashed(EngineError):
    """The engine's process is not there: it has died under a request, or is not back yet."""

    http_status = 503
