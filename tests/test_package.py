"""What an installed llamacli needs is in its wheel: proved outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import golden

CHECKOUT = Path(__file__).parents[1]
ASK = ["-m", "tiny", "--temperature", "0", "Tell me about llama2"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(CHECKOUT)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def clean_environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMACLI_", "PYTHON"))}
    return kept | {"LLAMACLI_HOME": str(home)}


def test_the_wheel_holds_the_package_and_the_tiny_model_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "llamacli/models/bundled/tiny-llama2-chat.Q8_0.gguf" in names
    assert {"llamacli/server/deploy/llamacli.service", "llamacli/presets/builtin.toml"} <= set(names)
    page = {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "llamacli/server/page").rglob("*.*")}
    assert "llamacli/server/page/index.html" in page and page <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"llamacli"}
    packed = {name for name in names if name.endswith(".py")}
    assert packed == {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "llamacli").rglob("*.py")}


def test_the_wheel_answers_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    environment = clean_environment(tmp_path / "home") | {"PYTHONPATH": str(site)}
    where = [sys.executable, "-c", "import llamacli; print(llamacli.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", check=True)
    assert found.stdout.startswith(str(site))
    ask = [sys.executable, "-m", "llamacli", *ASK]
    done = subprocess.run(
        ask, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8"
    )
    assert (done.stdout, done.stderr) == (golden()[0].answer + "\n", "")


@pytest.mark.slow
def test_the_wheel_installs_into_an_empty_environment_and_answers(wheel: Path, tmp_path: Path) -> None:
    """With all its dependencies, llama.cpp compiled if pip has not kept it: minutes."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    binaries = tmp_path / "venv" / "bin"
    environment = clean_environment(tmp_path / "home")
    install = [str(binaries / "pip"), "install", "--quiet", str(wheel)]
    subprocess.run(install, cwd=tmp_path, env=environment, check=True, capture_output=True)
    done = subprocess.run(
        [str(binaries / "llamacli"), *ASK],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
    )
    assert (done.stdout, done.stderr) == (golden()[0].answer + "\n", "")
