"""The OpenAPI description, held against the real server by schemathesis, which makes up requests from it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alone import environment_at
from test_serve import Server, running

from llamacli.server import ask, embeddings, openai
from llamacli.server.description import PROBLEMS
from llamacli.server.stage import ROUTES

KEY = "testing"
SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
# A schema cannot say all that a request must be: that it fits the context, or that no two of its fields contradict
# each other. So a 400 for what the schema allows is no failure; all other checks count.
OPTIONS = [
    "--checks",
    "all",
    "--exclude-checks",
    "positive_data_acceptance",
    "--no-color",
    "--generation-deterministic",
]


def check(server: Server, place: Path, *options: str, tested: str = "1[23]") -> None:
    command = [str(SCHEMATHESIS), "run", f"{server.url}/openapi.json", "-H", f"Ocp-Apim-Subscription-Key: {KEY}"]
    environment = os.environ | {"no_proxy": "*", "PYTHONUTF8": "1"}
    done = subprocess.run(
        [*command, *OPTIONS, *options], cwd=place, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"Tested: {tested}\n", done.stdout), "of all operations"


def test_a_server_for_tests_does_what_its_description_says_of_simulation(tmp_path: Path) -> None:
    with running(environment_at(tmp_path), "-q", "--api-key", KEY, "--allow-simulation") as server:
        assert "/simulation" in described(server)["paths"]
        options = ["--include-path-regex", "^/simulation", "--phases", "examples,fuzzing", "-n", "30"]
        check(server, tmp_path, *options, tested="5")


def described(server: Server, **headers: str) -> Any:
    reply = server.request("GET", "/openapi.json", **headers)
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    return reply.json


def test_the_server_does_what_its_description_says(tmp_path: Path) -> None:
    with running(environment_at(tmp_path), "-c", "64", "-q", "--api-key", KEY) as server:
        check(server, tmp_path, "--phases", "examples,fuzzing,stateful", "-n", "12")


@pytest.mark.slow
def test_the_server_does_what_its_description_says_in_thousands_of_requests(tmp_path: Path) -> None:
    with running(environment_at(tmp_path), "-c", "64", "-q", "--api-key", KEY) as server:
        check(server, tmp_path, "-n", "200")


def test_the_description_has_the_limits_of_the_code_and_the_server_s_own_url(tmp_path: Path) -> None:
    with running(environment_at(tmp_path, LLAMACLI_TEMPERATURE="0.3"), "--max-body", "12345", "-q") as server:
        found = described(server)
        assert found["openapi"].startswith("3.1") and found["servers"] == [{"url": server.url}]
        assert described(server, Host="localhost:7")["servers"] == [{"url": "http://localhost:7"}]
        assert "12,345 bytes" in found["info"]["description"]
        assert found["security"][0] == {} and len(found["components"]["securitySchemes"]) == 3
        schemas = found["components"]["schemas"]
        temperature = schemas["GetDataRequest"]["properties"]["temperature"]
        assert (temperature["minimum"], temperature["maximum"]) == ask.TEMPERATURE and temperature["default"] == 0.3
        assert schemas["ChatRequest"]["properties"]["n"]["maximum"] == openai.MAX_N
        assert schemas["EmbeddingRequest"]["properties"]["input"]["anyOf"][1]["maxItems"] == embeddings.MAX_INPUTS
        statuses = {
            int(status) for path in found["paths"].values() for each in path.values() for status in each["responses"]
        }
        assert statuses - {200} == set(PROBLEMS) - {405}, "405 is for methods that are not described"


@pytest.mark.parametrize("options", [[], ["--allow-simulation"]])
def test_every_route_is_described_and_every_described_route_is_there(options: list[str], tmp_path: Path) -> None:
    with running(environment_at(tmp_path), "-q", *options) as server:
        paths = described(server)["paths"]
        assert {path for path in paths if path.startswith("/simulation")} == (set(ROUTES) if options else set())
        assert {"/", "/v1/getData", "/llama-2/v1/getData", "/v1/embeddings", "/metrics", "/openapi.json"} <= set(paths)
        for path, methods in paths.items():
            other = server.request("PUT", path.replace("{model}", "tiny"))
            assert other.status == 405
            assert other.headers["allow"].lower().split(", ") == sorted(methods)
