"""The house keeps its own rules: imports go down only, third parties have one home, start-up stays light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from llamacli.errors import LlamacliError
from llamacli.models import store

PACKAGE = Path(__file__).parents[1] / "llamacli"

# From the ground up. A room may import rooms on lower floors, and those on its own floor that stand before it.
FLOORS = [
    ["errors", "__init__"],
    ["database", "config", "machine", "gguf_header", "gguf"],
    ["engine.recall", "prompt", "conversation", "engine.sequence", "engine.detokenizer"],
    ["engine.lookup", "sessions.session", "sessions.archive"],
    [
        *("schema.gbnf", "schema.numbers", "schema.text", "schema.values", "schema.merging", "schema.checking"),
        *("schema.keywords", "schema.grammar", "schema.reading", "schema.closing", "schema.form", "schema.holding"),
    ],
    ["models.catalog", "models.reference", "models.store", "models.notes", "models.checksum"],
    [
        "models.hub",
        "models.resolve",
        "models.partial",
        "models.lock",
        "models.ranges",
        "models.transfer",
        "models.pull",
    ],
    ["engine.kv", "engine.model", "engine.memory", "engine.bindings", "models.facts"],
    ["engine.prefix_file", "engine.prefix_store", "engine.prefixes"],
    ["engine.draft_model", "engine.speculation"],
    ["engine.scheduler", "engine.sampling", "engine.devices", "engine.llama"],
    ["engine.embedding", "engine.engine", "engine.protocol", "engine.life", "engine.worker", "engine.supervisor"],
    [
        *("rates", "together", "splitting", "mapreduce", "stored_prefixes", "tuning", "tuning_file"),
        *("choices", "guessing", "placing", "sizing", "launch", "tuner", "diagnosis", "problems"),
    ],
    [
        *("bench.plan", "bench.figures", "bench.children", "bench.high_level"),
        *("bench.ours", "bench.rivals", "bench.course"),
    ],
    ["remote.address", "remote.post", "remote.events", "remote.answer"],
    [
        *("documents.document", "documents.decoding", "documents.pdf", "documents.page", "documents.opening"),
        *("documents.ignoring", "documents.folder", "documents.fetching", "documents.reading"),
    ],
    ["server.presence", "server.ledger", "server.usage", "server.keys", "server.keyring", "server.accounts"],
    [
        "server.failure",
        "server.fields",
        "server.exchange",
        "server.turn",
        "server.answer",
        "server.ask",
        "server.tools",
        "server.trace",
    ],
    ["server.log", "server.metrics", "server.service", "server.access", "server.gate", "server.answering"],
    ["server.about", "server.contract", "server.openai", "server.embeddings", "server.connection", "server.listen"],
    ["server.absent", "server.recording", "server.matching", "server.standin", "server.simulation", "server.script"],
    [
        *("server.recorder", "server.replay", "server.upstream", "server.rules", "server.replies"),
        *("server.stage", "server.rehearsal"),
        *("server.schemas", "server.description", "server.samples", "server.site", "server.app"),
    ],
    ["presets.preset", "presets.library"],
    ["batch.lines", "batch.template", "batch.output", "batch.request", "batch.work"],
    [
        *("commands.terminal", "commands.table", "commands.progress", "commands.pace"),
        *("commands.options", "commands.obtain"),
    ],
    [
        *("commands.deliver", "commands.question", "commands.journal"),
        *("commands.local", "commands.remote", "commands.attach", "commands.parts"),
        *("commands.slash", "commands.resident", "commands.face", "commands.rendering", "commands.editor"),
        *("commands.reading", "commands.minutes", "commands.talk"),
    ],
    [
        *("commands.config", "commands.tokenize", "commands.doctor", "commands.keys", "commands.cache"),
        *("commands.logs", "commands.embed", "commands.tune", "commands.bench"),
        *("commands.ready_file", "commands.rehearsal", "commands.presets"),
        *("commands.run", "commands.chat", "commands.batch", "commands.models", "commands.serve"),
    ],
    ["commands.testing_options", "commands.app_stored", "commands.app_chat", "commands.app_serve", "commands.app"],
    ["__main__"],
    ["testing.api", "testing.process", "testing.plugin"],
]
EMPTY = [
    *("schema.__init__", "models.__init__", "engine.__init__", "remote.__init__", "server.__init__"),
    *("documents.__init__", "presets.__init__", "batch.__init__", "bench.__init__", "commands.__init__"),
    *("sessions.__init__", "testing.__init__"),
]
# A third-party library's only home.
HOMES = {
    "llama_cpp": ["engine.bindings", "bench.high_level"],  # the latter is a program of its own
    "numpy": ["engine.llama", "engine.embedding"],
    "jinja2": ["prompt"],
    "jsonschema": ["schema.checking"],
    "platformdirs": ["config"],
    "sqlite3": ["database"],
    "prometheus_client": ["server.metrics"],
    "uvicorn": ["server.listen"],
    "httptools": ["server.connection"],
    "uvloop": ["commands.serve"],
    "typer": [
        *("commands.testing_options", "commands.options", "commands.app_stored", "commands.app_chat"),
        *("commands.app_serve", "commands.app"),
    ],
    "rich": ["commands.progress", "commands.pace", "commands.table", "commands.rendering"],
    "markdown_it": ["commands.rendering"],
    "prompt_toolkit": ["commands.editor"],
    "huggingface_hub": ["models.hub"],
    "httpx2": ["models.hub"],
    "pytest": ["testing.plugin"],
    "truststore": ["models.ranges", "documents.fetching"],
    "charset_normalizer": ["documents.decoding"],
    "pypdf": ["documents.pdf"],
    "trafilatura": ["documents.page"],
    "lxml": ["documents.page"],
}
HEIGHT = {room: (floor, place) for floor, rooms in enumerate(FLOORS) for place, room in enumerate(rooms)}


def room_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


ROOMS = {room_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def for_types_only(tree: ast.Module) -> set[ast.AST]:
    """What stands under `if TYPE_CHECKING:` is not imported when the program runs."""
    blocks = (n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    return {inner for block in blocks for inner in ast.walk(block)}


def imports_of(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    tree = ast.parse(path.read_text("utf-8"))
    skipped = for_types_only(tree)
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def rooms_imported(path: Path) -> set[str]:
    ours = {name.removeprefix("llamacli.") for name in imports_of(path) if name.startswith("llamacli.")}
    return {name for name in ours if name in HEIGHT}


def test_every_room_has_its_floor() -> None:
    assert sorted(ROOMS) == sorted([*HEIGHT, *EMPTY])


@pytest.mark.parametrize("room", HEIGHT)
def test_imports_go_down_only(room: str) -> None:
    above = {other for other in rooms_imported(ROOMS[room]) if HEIGHT[other] >= HEIGHT[room]}
    assert not above, f"{room} imports what stands above or beside it: {above}"


def test_scheduler_and_llama_never_meet_but_in_the_engine() -> None:
    assert "engine.llama" not in rooms_imported(ROOMS["engine.scheduler"])
    assert "engine.scheduler" not in rooms_imported(ROOMS["engine.llama"])
    assert "engine.llama" not in rooms_imported(ROOMS["engine.engine"])


@pytest.mark.parametrize("library", HOMES)
def test_a_third_party_library_has_one_home(library: str) -> None:
    users = [room for room, path in ROOMS.items() if any(n.split(".")[0] == library for n in imports_of(path))]
    assert set(users) <= set(HOMES[library])


@pytest.mark.parametrize("room", ROOMS)
def test_a_file_opens_by_saying_what_it_is_for(room: str) -> None:
    assert ast.get_docstring(ast.parse(ROOMS[room].read_text("utf-8")))


def seen_after(what: str, *arguments: str, **variables: str) -> list[str]:
    """The words of a Python list, in a process that ran the program with these arguments and environment variables."""
    code = (
        "import gc, os, sys\n"
        "out = os.dup(1)\n"
        f"sys.argv = ['llamacli', *{list(arguments)!r}]\n"
        "os._exit = lambda code: sys.exit(code)\n"
        "import llamacli.__main__ as program\n"
        "searches = lambda: sum(each['collections'] for each in gc.get_stats())\n"
        "before = searches()\n"
        "try: program.main()\n"
        f"finally: os.write(out, ' '.join(map(str, ['SEEN', *{what}])).encode())\n"
    )
    with TemporaryDirectory() as home:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"LLAMACLI_HOME": home} | variables,
            capture_output=True,
            encoding="utf-8",
            stdin=subprocess.DEVNULL,
            check=True,
        )
    return done.stdout.rpartition("SEEN")[2].split()


def loaded_by(*arguments: str, **variables: str) -> set[str]:
    """The modules in a process that ran the program with these arguments and environment variables."""
    return set(seen_after("sys.modules", *arguments, **variables))


HEAVY = {
    "llama_cpp",
    "numpy",
    "jinja2",
    "huggingface_hub",
    "rich",
    "pydantic",
    "platformdirs",
    "asyncio",
    "fastapi",
    "sqlite3",
    "charset_normalizer",
    "pypdf",
    "trafilatura",
    "prompt_toolkit",
}


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], ["run", "--help"], ["keys", "create", "--help"], ["chat", "--help"]]
)
def test_version_and_help_load_nothing_heavy(arguments: list[str]) -> None:
    loaded = loaded_by(*arguments)
    assert not HEAVY & loaded
    assert not {name for name in loaded if name.startswith("llamacli.engine")}


def test_a_plain_run_loads_the_bindings_light_and_nothing_it_does_not_use(tmp_path: Path) -> None:
    loaded = loaded_by("-m", "tiny", "-n", "1", "hi", LLAMACLI_HOME=str(tmp_path))
    assert "llama_cpp.llama_cpp" in loaded
    assert not loaded & {"llamacli.engine.prefixes", "llamacli.engine.prefix_store"}, "the prompt is short"
    assert not loaded & {"llamacli.tuning", "llamacli.tuning_file"}, "nothing was measured"
    assert not loaded & {"numpy", "jinja2", "llama_cpp.llama", "huggingface_hub", "rich", "pydantic", "asyncio"}
    assert not {name for name in loaded if name.startswith(("llamacli.documents", "llamacli.presets"))}


# What an answer to a short prompt takes: whoever adds to it makes every answer start later.
PLAIN = {
    *("commands.app", "commands.app_chat", "commands.app_serve", "commands.app_stored"),
    *("commands.options", "commands.testing_options"),
    *("commands.run", "commands.question", "commands.deliver", "commands.obtain", "commands.local"),
    "commands.journal",
    *("commands.terminal", "errors", "config", "launch", "machine", "gguf", "gguf_header", "prompt"),
    *("models.catalog", "models.reference", "models.store", "models.notes", "models.checksum"),
    *("engine.bindings", "engine.devices", "engine.memory", "engine.llama", "engine.model", "engine.sampling"),
    *("engine.sequence", "engine.kv", "engine.scheduler", "engine.engine", "engine.detokenizer", "engine.recall"),
    *("engine.lookup", "engine.speculation"),
    *("choices", "guessing", "placing", "sizing", "stored_prefixes", "__main__", "commands", "models", "engine"),
}
PLAIN_THIRD_PARTIES = {
    *("typer", "annotated_doc", "shellingham"),  # typer and what it needs
    *("llama_cpp", "typing_extensions"),
    "platformdirs",  # where LLAMACLI_HOME is not set
}


def test_a_plain_run_loads_what_it_uses_and_nothing_else(tmp_path: Path) -> None:
    loaded = loaded_by("-m", str(store.bundled()), "-n", "1", "--no-log", "hi", LLAMACLI_HOME=str(tmp_path))
    ours = {name.removeprefix("llamacli.") for name in loaded if name.startswith("llamacli.")}
    assert ours - PLAIN == set()
    third_parties = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    assert third_parties - PLAIN_THIRD_PARTIES <= {"llamacli", "__main__", "_distutils_hack"}
    assert "llama_cpp.llama_cpp" in loaded and "llama_cpp.llama" not in loaded, "the bindings come light"
    assert not loaded & {"asyncio", "tomllib"}, "no catalogue is read for a path"


def test_a_plain_run_does_not_look_for_garbage_while_it_starts(tmp_path: Path) -> None:
    home = str(tmp_path)
    assert seen_after("[searches() - before]", "-m", "tiny", "-n", "1", "hi", LLAMACLI_HOME=home) == ["0"]


@pytest.mark.parametrize(("name", "built"), [("run", ["run"]), ("keys", ["keys"]), ("--version", [])])
def test_only_the_command_that_is_called_gets_its_parser(name: str, built: list[str]) -> None:
    code = (
        "import sys, typer.main\nfrom llamacli.commands import app\n"
        f"app.leave_only({name!r})\nprint(*typer.main.get_command(app.app).commands)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.split() == built


def test_every_error_knows_its_exit_code_and_its_http_status() -> None:
    codes = {each.__name__: each.exit_code for each in LlamacliError.__subclasses__()}
    assert codes == {
        "UsageError": 2,
        "InputTooLong": 4,
        "ModelError": 5,
        "ResourceError": 6,
        "SchemaError": 7,
        "RemoteError": 8,
        "EngineError": 1,
    }
    assert all(400 <= each.http_status < 600 for each in LlamacliError.__subclasses__())
