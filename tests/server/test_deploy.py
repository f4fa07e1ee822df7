"""What runs llamacli as a service does what it says: the Dockerfile's commands and the systemd unit, as far as without
either of the two.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PROGRAM
from test_serve import started

import llamacli

CHECKOUT = Path(__file__).parents[2]
UNIT = Path(llamacli.__file__).parent / "server" / "deploy" / "llamacli.service"


# -- Docker ------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """(instruction, its arguments), comments and line breaks taken out."""
    lines = [line for line in (CHECKOUT / "Dockerfile").read_text("utf-8").splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def last(name: str) -> list[str]:
    """The exec form of an instruction: arguments without a shell."""
    found = [rest for each, rest in instructions() if each == name][-1]
    words: list[str] = json.loads(found[found.index("[") :])
    return words


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel installed that is built of what the Dockerfile copies, and of nothing else."""
    source, site = tmp_path_factory.mktemp("src"), tmp_path_factory.mktemp("site")
    let_in = {line[1:] for line in (CHECKOUT / ".dockerignore").read_text("utf-8").splitlines() if line[:1] == "!"}
    for name, rest in instructions():
        if name != "COPY" or rest.startswith("--from"):
            continue
        *copied, target = rest.split()
        for each in copied:
            assert each in let_in, f".dockerignore keeps {each} out"
            place = source / target / Path(each).name if target.endswith("/") else source / target
            place.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (CHECKOUT / each).is_dir() else shutil.copy
            copy(CHECKOUT / each, place)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(source / "dist"), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (source / "dist").glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    return site


def free_port() -> str:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return str(bound.getsockname()[1])


def test_the_container_serves_is_found_healthy_and_ends_in_order(image: Path, environment: dict[str, str]) -> None:
    port = free_port()
    command, check = [
        [word.replace("8080", port) for word in words]
        for words in ([*last("ENTRYPOINT"), *last("CMD")], last("HEALTHCHECK"))
    ]
    assert f"127.0.0.1', {port}" in check[-1] and check[0] == "python"
    checking = [sys.executable, *check[1:]]
    assert subprocess.run(checking, capture_output=True, check=False).returncode != 0
    inside = environment | {"PYTHONPATH": str(image), "LLAMACLI_API_KEY": "secret"}
    with started([str(image / "bin" / command[0]), *command[1:]], inside) as server:
        assert server.url.endswith(f":{port}")
        assert subprocess.run(checking, capture_output=True, check=False).returncode == 0
        server.end()


def test_the_container_compiles_the_version_that_is_pinned() -> None:
    script = next(rest for name, rest in instructions() if name == "RUN" and "sed -n" in rest)
    sed = re.findall(r"llama_cpp=\$\((.*)\) +&&", script)[0]
    found = subprocess.run(["sh", "-c", sed], cwd=CHECKOUT, capture_output=True, encoding="utf-8", check=True).stdout
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text("utf-8"))["project"]
    assert found.strip() in project["dependencies"] and found.startswith("llama-cpp-python==")


def test_the_container_is_nobody_s_root_and_keeps_what_must_stay() -> None:
    told = dict(instructions())
    assert told["USER"].split(":")[0].isdigit() and int(told["USER"].split(":")[0]) > 0
    assert f"LLAMACLI_HOME={told['VOLUME']}" in told["ENV"].split()


def test_the_first_process_of_a_container_hears_sigterm(environment: dict[str, str]) -> None:
    """The kernel hides signals without a handler from process 1. Here it waits for its stdin."""
    command = ["unshare", "--pid", "--fork", "--kill-child", *PROGRAM, "-m", "tiny"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*command[:4], "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("needs a PID namespace")
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as outside:
        try:
            first = within(5, lambda: Path(f"/proc/{outside.pid}/task/{outside.pid}/children").read_text().split())
            within(5, lambda: hears(int(first[0]), signal.SIGTERM))
            os.kill(int(first[0]), signal.SIGTERM)
            assert outside.wait(10) == 128 + signal.SIGTERM
        finally:
            outside.kill()


def hears(pid: int, number: int) -> bool:
    caught = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[0]
    return bool(int(caught, 16) >> (number - 1) & 1)


def within(seconds: float, found: Callable[[], Any]) -> Any:
    ends = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < ends
        time.sleep(0.02)
    return value


# -- systemd -----------------------------------------------------------------------------------------------------


def directives() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text("utf-8").splitlines():
        name, is_one, value = line.partition("=")
        if is_one and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def test_the_unit_s_command_serves_and_ends_within_its_time(environment: dict[str, str]) -> None:
    unit = directives()
    command = shlex.split(unit["ExecStart"][0])
    grace = float(command[command.index("--grace") + 1])
    assert grace < float(unit["TimeoutStopSec"][0])
    assert unit["Environment"] == [f"LLAMACLI_HOME=/var/lib/{unit['StateDirectory'][0]}"]
    command[command.index("--port") + 1] = "0"
    with started([*PROGRAM, *command[1:]], environment) as server:
        assert server.post({"prompt": "hi", "max_tokens": 1}).status == 200
        server.process.send_signal(getattr(signal, unit["KillSignal"][0]))
        assert server.process.wait(20) == 0


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text("utf-8").replace("/opt/llamacli/bin/llamacli", sys.executable), "utf-8")
    done = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_does_not_get_better_by_itself_is_not_started_again(environment: dict[str, str]) -> None:
    codes = directives()["RestartPreventExitStatus"][0].split()
    for options in (["--slots", "0"], ["-m", "/no/such.gguf"]):
        done = subprocess.run([*PROGRAM, "serve", *options], env=environment, capture_output=True, check=False)
        assert str(done.returncode) in codes
