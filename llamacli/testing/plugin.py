"""The pytest plugin: the fixture `llama2_api`. Every pytest of this environment loads it, so it imports late."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from llamacli.testing.api import Llama2Api

INI = "llama2_api"
_RUNNING = pytest.StashKey["Llama2Api"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        INI,
        "what answers behind the fixture llama2_api: tiny (the model that comes with llamacli), none (only what tests "
        "put ready), a recording (*.jsonl), or the path of a .gguf file",
        default="tiny",
    )


@pytest.fixture(scope="session")
def llama2_api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llama2Api]:
    """A running server of the Llama 2 API and OpenAI's, as it was at its start before each test."""
    from llamacli.testing.process import running

    source = str(request.config.getini(INI))
    with running(source, request.config.rootpath, tmp_path_factory.mktemp("llama2_api")) as api:
        request.config.stash[_RUNNING] = api
        try:
            yield api
        finally:
            del request.config.stash[_RUNNING]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    api = item.config.stash.get(_RUNNING, None)
    if api is not None and INI in getattr(item, "fixturenames", ()):
        api.reset()
