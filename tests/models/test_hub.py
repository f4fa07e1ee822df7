"""What the hub says, through the real huggingface_hub, and what it cannot be made to say, each in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest
from loopback_hub import Fault, LoopbackHub

REPO = "org/model-GGUF"
CONTENT = b"GGUF" + bytes(100_000)

ASK = """
import json, sys
from dataclasses import asdict
from llamacli.errors import LlamacliError
from llamacli.models import hub
try:
    found = eval(sys.argv[1])
    print(json.dumps({"found": asdict(found)}))
except LlamacliError as error:
    print(json.dumps({"error": str(error), "code": error.exit_code}))
print(json.dumps(sorted(name for name in ("hf_xet", "httpx2") if name in sys.modules)))
"""


class Asker:
    """huggingface_hub reads its environment when it is imported: each question is a process of its own."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment

    def __call__(self, question: str, **variables: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", ASK, question],
            env=self.environment | variables,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
            check=True,
        )
        assert done.stderr == "", done.stderr
        answer, modules = done.stdout.splitlines()
        assert "hf_xet" not in json.loads(modules)
        found: dict[str, Any] = json.loads(answer)
        return found

    def refusal(self, question: str, **variables: str) -> str:
        answer = self(question, **variables)
        assert answer["code"] == 5
        said: str = answer["error"]
        assert "\n" not in said
        return said


@pytest.fixture
def ask(environment: dict[str, str], hub: LoopbackHub) -> Asker:
    hub.add(REPO, "model.Q8_0.gguf", CONTENT)
    return Asker(environment)


FILE = f'hub.file("{REPO}", "model.Q8_0.gguf")'


def test_a_file_is_known_before_its_first_byte(ask: Asker, hub: LoopbackHub) -> None:
    sha256 = hub.add(REPO, "model.Q8_0.gguf", CONTENT)
    found = ask(FILE)["found"]
    commit = hub.repositories[REPO].commit
    assert found == {
        "repo_id": REPO,
        "filename": "model.Q8_0.gguf",
        "revision": commit,
        "size": len(CONTENT),
        "sha256": sha256,
        "url": f"{hub.url}/{REPO}/resolve/{commit}/model.Q8_0.gguf",
    }
    assert [seen.kind for seen in hub.requests] == ["head"], "one request, and no telemetry"


def test_a_small_file_has_no_checksum(ask: Asker, hub: LoopbackHub) -> None:
    hub.add("org/small", "x.gguf", b"GGUF", lfs=False)
    found = ask('hub.file("org/small", "x.gguf")')["found"]
    assert (found["size"], found["sha256"]) == (4, None)


def test_a_repository_lists_its_files_with_sizes_and_checksums(ask: Asker, hub: LoopbackHub) -> None:
    sha256 = hub.add(REPO, "other.gguf", b"other")
    found = ask(f'hub.listing("{REPO}")')["found"]
    assert found["revision"] == hub.repositories[REPO].commit
    assert found["files"][1] == {"filename": "other.gguf", "size": 5, "sha256": sha256}


@pytest.mark.parametrize("fault", [Fault(status=503), Fault(status=429, retry_after="1"), Fault(status=500)])
def test_a_busy_hub_is_asked_again(fault: Fault, ask: Asker, hub: LoopbackHub) -> None:
    hub.fault("head", fault)
    assert "found" in ask(FILE)


def test_a_hub_that_cannot_be_reached_is_said_within_ten_seconds(ask: Asker, hub: LoopbackHub) -> None:
    hub.stop()
    started = time.monotonic()
    said = ask.refusal(FILE)
    assert time.monotonic() - started < 10
    assert f"the hub cannot be reached ({hub.url}" in said and "--offline" in said


def test_what_is_not_there_is_named(ask: Asker) -> None:
    assert "no repository org/none" in ask.refusal('hub.file("org/none", "x.gguf")')
    assert "no repository org/none" in ask.refusal('hub.listing("org/none")')
    assert "no revision nowhere" in ask.refusal(f'hub.file("{REPO}", "model.Q8_0.gguf", "nowhere")')
    assert "no revision nowhere" in ask.refusal(f'hub.listing("{REPO}", "nowhere")')
    assert "no file y.gguf" in ask.refusal(f'hub.file("{REPO}", "y.gguf")')
    assert "no repository's name" in ask.refusal('hub.listing("a/b/c")')


def test_a_gated_repository_names_its_licence_page_and_the_token(ask: Asker, hub: LoopbackHub) -> None:
    hub.add("meta/gated", "x.gguf", CONTENT, token="right")
    question = 'hub.file("meta/gated", "x.gguf")'
    without = ask.refusal(question)
    assert f"{hub.url}/meta/gated" in without and "HF_TOKEN" in without
    assert "refuses the token" in ask.refusal(question, HF_TOKEN="wrong")
    assert "HF_TOKEN's account may not read it" in ask.refusal(question, HF_TOKEN="known")
    assert ask(question, HF_TOKEN="right")["found"]["size"] == len(CONTENT)
    assert hub.requests[-1].token == "right"


@pytest.mark.parametrize("question", [FILE, f'hub.listing("{REPO}")'])
def test_a_login_page_is_not_the_hub(question: str, ask: Asker, hub: LoopbackHub) -> None:
    hub.is_portal = True
    assert "is not the hub" in ask.refusal(question)


def test_offline_asks_nobody(ask: Asker, hub: LoopbackHub) -> None:
    assert "HF_HUB_OFFLINE forbids" in ask.refusal(FILE, HF_HUB_OFFLINE="1")
    assert hub.requests == []


def test_a_proxy_is_used(ask: Asker, hub: LoopbackHub) -> None:
    said = ask.refusal(FILE, HF_ENDPOINT="http://hub.invalid", HTTP_PROXY="http://127.0.0.1:9", NO_PROXY="")
    assert "cannot be reached (http://hub.invalid" in said and "refused" in said
    assert os.environ.get("HTTP_PROXY") != "http://127.0.0.1:9"
