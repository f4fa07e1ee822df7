"""What the Hugging Face hub says about a repository and its files. The only room that knows huggingface_hub.

HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME and the proxies' variables mean here what they mean there. The body
of a file is not fetched with it: it neither resumes in a new process, nor checks sha256, nor survives a reset.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any, TypeVar

from llamacli.errors import ModelError

# A server that is busy is asked again for this long. One that cannot be reached is not: its user waits for an answer.
PATIENCE = 30.0
TIMEOUT = 8.0  # seconds for a connection and for an answer
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_BUSY = frozenset({408, 429, 500, 502, 503, 504})
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file at one commit. `url` is the hub's own address of it, which redirects to wherever it is kept.

    sha256   None for a small file that the hub keeps in git
    """

    repo_id: str
    filename: str
    revision: str
    size: int
    sha256: str | None
    url: str


@dataclass(frozen=True, slots=True)
class Listed:
    filename: str
    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a repository at one commit."""

    repo_id: str
    revision: str
    files: Sequence[Listed]


def is_commit(revision: str | None) -> bool:
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids every request. As huggingface_hub reads it."""
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _OFFLINE)


_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def file(repo_id: str, filename: str, revision: str | None = None) -> RemoteFile:
    """What the hub says about a file. One request. Raises ModelError."""
    with _translated(repo_id, filename, revision):
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(repo_id, filename, revision=revision)
        found = _patiently(lambda: get_hf_file_metadata(url, token=None, timeout=TIMEOUT))
        if found.commit_hash is None or found.size is None or not is_commit(found.commit_hash):
            raise _not_the_hub(repo_id)
        sha256 = found.etag if found.etag and _SHA256.fullmatch(found.etag) else None
        pinned = hf_hub_url(repo_id, filename, revision=found.commit_hash)
        return RemoteFile(repo_id, filename, found.commit_hash, found.size, sha256, pinned)


def listing(repo_id: str, revision: str | None = None) -> Listing:
    """All files of a repository, with sizes and checksums. One request. Raises ModelError."""
    with _translated(repo_id, None, revision):
        from huggingface_hub import HfApi

        info = _patiently(lambda: HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=TIMEOUT))
        if not is_commit(info.sha) or info.siblings is None:
            raise _not_the_hub(repo_id)
        files = [
            Listed(each.rfilename, each.size or 0, each.lfs.sha256 if each.lfs else None) for each in info.siblings
        ]
        return Listing(repo_id, str(info.sha), files)


def headers() -> dict[str, str]:
    """What a request for a file's body carries: who asks, and the token if there is one."""
    from huggingface_hub.utils._headers import build_hf_headers

    found: dict[str, str] = build_hf_headers(library_name="llamacli")
    return found


def _prepare() -> None:
    """No telemetry, and no warnings of its own beside our errors."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # importing hf_xet would write logs
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def _patiently(ask: Callable[[], T]) -> T:
    """Ask again while the hub is busy, as long as it wishes within PATIENCE."""
    from huggingface_hub.errors import HfHubHTTPError

    ends = monotonic() + PATIENCE
    delay = 1.0
    while True:
        try:
            return ask()
        except HfHubHTTPError as error:
            wish = error.response.headers.get("Retry-After", "")
            wait = float(wish) if wish.isdigit() else delay
            if error.response.status_code not in _BUSY or monotonic() + wait > ends:
                raise
        sleep(wait)
        delay *= 2


@contextmanager
def _translated(repo_id: str, filename: str | None, revision: str | None) -> Iterator[None]:
    """huggingface_hub's errors as one line each."""
    if is_offline():
        raise ModelError(
            f"{repo_id} is not on this machine, and HF_HUB_OFFLINE forbids to ask the hub: unset it to download"
        )
    _prepare()
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        said = _of_repository(error, repo_id, filename, revision) or _of_network(error, repo_id)
        if said is None:
            raise
        raise ModelError(said) from None


def _of_repository(error: Exception, repo_id: str, filename: str | None, revision: str | None) -> str | None:
    """What the hub means by an answer that is an error; the most specific first."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return _gated(repo_id, error)
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no revision {revision}: leave @{revision} out for the newest"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        at = f" at revision {revision}" if revision else ""
        return f"{repo_id} has no file {filename}{at}: look at {_endpoint()}/{repo_id} for those that it has"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no repository {repo_id}, or it is private: check the name, or set HF_TOKEN"
    if isinstance(error, errors.HfHubHTTPError):
        return _answered(f"{repo_id}/{filename}" if filename else repo_id, error)
    if isinstance(error, errors.HFValidationError):
        return f"{repo_id} is no repository's name: it is written ORGANISATION/NAME"
    return None


def _of_network(error: Exception, repo_id: str) -> str | None:
    """What lies between us and the hub."""
    import httpx2

    if isinstance(error, httpx2.TimeoutException):
        return f"the hub does not answer within {TIMEOUT:g} s ({_endpoint()}): {_REMEDY}"
    if isinstance(error, httpx2.TransportError | httpx2.InvalidURL):
        said = " ".join(str(error).split()) or type(error).__name__
        return f"the hub cannot be reached ({_endpoint()}: {said}): {_REMEDY}"
    if isinstance(error, json.JSONDecodeError | KeyError | TypeError):  # whatever answered does not speak as the hub
        return str(_not_the_hub(repo_id))
    return None


_REMEDY = "check the network and the proxy; with a model on this machine, --offline"


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _gated(repo_id: str, error: Any) -> str:
    page = f"{_endpoint()}/{repo_id}"
    if error.response.status_code == 401:
        return f"{repo_id} is gated: accept its licence at {page}, then set HF_TOKEN to a token of that account"
    return f"{repo_id} is gated, and HF_TOKEN's account may not read it: accept its licence at {page}"


def _answered(place: str, error: Any) -> str:
    status = error.response.status_code
    if status == 401:
        return f"the hub refuses the token for {place} (401): check HF_TOKEN, or unset it"
    if status == 403:
        return f"the hub refuses {place} (403): HF_TOKEN's account may not read it"
    said = " ".join((error.server_message or "").split())[:200]
    return f"the hub answers {status} for {place}{f' ({said})' if said else ''}: try again later"


def _not_the_hub(repo_id: str) -> ModelError:
    return ModelError(
        f"what answers for {_endpoint()} is not the hub, when asked for {repo_id}: a login page or a proxy of this "
        "network? Open a web page, log in and try again"
    )
