"""The sample projects: test suites of other people's clients, which know nothing of llamacli but its surface."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLE = Path(__file__).parent / "sample"


def clean_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMACLI_", "PYTEST_"))}
    return kept | {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}


def test_four_python_clients_are_tested_against_the_fixture_alone(tmp_path: Path) -> None:
    project = shutil.copytree(SAMPLE / "python", tmp_path / "project")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=project, env=clean_environment(), capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_a_node_client_is_tested_against_the_server(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    version = subprocess.run([node, "--version"], capture_output=True, encoding="utf-8", check=True).stdout
    if int(version.strip().removeprefix("v").partition(".")[0]) < 18:
        pytest.skip(f"node {version.strip()} has no fetch and no test runner: 18 is the first that has")
    project = shutil.copytree(SAMPLE / "node", tmp_path / "project")
    environment = clean_environment() | {"LLAMACLI": str(Path(sys.executable).with_name("llamacli"))}
    done = subprocess.run([node, "--test"], cwd=project, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout
