"""Settings: which source wins, what each may be, and what is said of one that is wrong."""

import io
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacli import config
from llamacli.commands.config import show
from llamacli.config import Resolved, Settings, Source
from llamacli.errors import UsageError

PLACES = config.directories({"LLAMACLI_HOME": "/somewhere"})
ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def resolve(path: Path | None = None, environ: dict[str, str] | None = None, **flags: object) -> Resolved:
    return config.resolve(flags, environ or {}, path)


def refusal(path: Path | None = None, environ: dict[str, str] | None = None, **flags: object) -> str:
    with pytest.raises(UsageError) as caught:
        resolve(path, environ, **flags)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


# Which source wins


def test_without_any_source_everything_is_the_default() -> None:
    resolved = resolve()
    assert resolved.settings == Settings()
    assert set(resolved.sources.values()) == {Source("default")}


def test_flag_beats_environment_beats_file_beats_default(file: Path) -> None:
    file.write_text("seed = 1\ntop_k = 1\nthreads = 1\n")
    environ = {"LLAMACLI_SEED": "2", "LLAMACLI_TOP_K": "2"}
    resolved = resolve(file, environ, seed=3)
    settings = resolved.settings
    assert (settings.seed, settings.top_k, settings.threads, settings.max_tokens) == (3, 2, 1, None)
    assert resolved.sources["seed"] == Source("flag", "--seed")
    assert resolved.sources["top_k"] == Source("environment", "LLAMACLI_TOP_K")
    assert resolved.sources["threads"] == Source("file", str(file))
    assert resolved.sources["max_tokens"] == Source("default")


def test_every_setting_has_a_value_a_source_a_rule_and_a_help_text() -> None:
    names = {each.name for each in fields(Settings)}
    assert names == set(resolve().sources) == set(config.RULES)
    assert all(rule.help_text for rule in config.RULES.values())


@pytest.mark.parametrize("name", [each.name for each in fields(Settings) if each.default is not None])
def test_every_default_keeps_its_own_rule(name: str) -> None:
    default = getattr(Settings(), name)
    accepted = config.check(name, default)
    assert accepted == default
    assert type(accepted) is type(default)


def test_a_flag_that_was_not_given_gives_way(file: Path) -> None:
    file.write_text("quiet = true\n")
    assert resolve(file, quiet=None).settings.quiet is True


def test_a_flag_can_switch_off_what_the_file_switched_on(file: Path) -> None:
    file.write_text("quiet = true\n")
    assert resolve(file, quiet=False).settings.quiet is False


def test_an_empty_variable_counts_as_not_given(file: Path) -> None:
    file.write_text('model = "13b-chat"\n')
    resolved = resolve(file, {"LLAMACLI_MODEL": "", "LLAMACLI_SEED": ""})
    assert resolved.settings.model == "13b-chat"
    assert resolved.settings.seed is None


def test_an_empty_system_prompt_overrides_that_of_the_file(file: Path) -> None:
    file.write_text('system = "Be brief."\n')
    assert resolve(file, system="").settings.system == ""


def test_a_wrong_value_is_an_error_even_where_a_stronger_source_wins() -> None:
    assert "LLAMACLI_SEED" in refusal(environ={"LLAMACLI_SEED": "soon"}, seed=1)


# Names


def test_an_unknown_flag_is_a_programming_error() -> None:
    with pytest.raises(TypeError, match="temprature"):
        resolve(temprature=1.0)
    with pytest.raises(TypeError, match="temprature"):
        config.check("temprature", 1.0)


@pytest.mark.parametrize(
    ("written", "meant"),
    [("temprature", "temperature"), ("max-tokens", "max_tokens"), ("Top_P", "top_p"), ("modle", "model")],
)
def test_a_misspelt_key_names_the_nearest_right_one(file: Path, written: str, meant: str) -> None:
    file.write_text(f"{written} = 1\n")
    assert refusal(file) == f"unknown setting '{written}' in {file}; did you mean {meant}?"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("LLAMACLI_TEMPRATURE", "LLAMACLI_TEMPERATURE"),
        ("LLAMACLI_model", "LLAMACLI_MODEL"),
        ("LLAMACLI_HOMES", "LLAMACLI_HOME"),
        ("LLAMACLI_APIKEY", "LLAMACLI_API_KEY"),
        ("LLAMACLI_GPULAYERS", "LLAMACLI_GPU_LAYERS"),
    ],
)
def test_a_misspelt_variable_names_the_nearest_right_one(written: str, meant: str) -> None:
    message = refusal(environ={written: "1"})
    assert message == f"unknown environment variable '{written}'; did you mean {meant}?"


def test_a_key_that_resembles_nothing_lists_what_there_is(file: Path) -> None:
    file.write_text("[zzz]\nmodel = 'tiny'\n")
    message = refusal(file)
    assert "unknown setting 'zzz'" in message
    assert all(each.name in message for each in fields(Settings))


def test_variables_that_are_no_settings_are_left_alone() -> None:
    others = {
        "LLAMACLI_HOME": "/somewhere",
        "LLAMACLI_API_KEY": "secret",
        "LLAMA_CPP_LIB_PATH": "/lib",
        "_LLAMACLI_COMPLETE": "complete_bash",
        "PATH": "/bin",
    }
    assert resolve(environ=others) == resolve()


# Values


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("temperature", 0.0, 2.0),
        ("top_p", 0.0, 1.0),
        ("min_p", 0.0, 1.0),
        ("repeat_penalty", 1e-9, 2.0),
        ("top_k", 0, 10**6),
        ("seed", 0, 2**32 - 2),
        ("ctx_size", 64, 10**6),
        ("max_tokens", 1, 10**9),
        ("threads", 1, 512),
    ],
)
def test_a_range_includes_its_ends(name: str, low: float, high: float) -> None:
    assert config.check(name, low) == low
    assert config.check(name, high) == high


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("temperature", -0.1, "between 0 and 2"),
        ("temperature", 5, "between 0 and 2"),
        ("temperature", float("nan"), "between 0 and 2"),
        ("temperature", float("inf"), "between 0 and 2"),
        ("temperature", "1", "a number between 0 and 2"),
        ("temperature", True, "a number between 0 and 2"),
        ("top_p", 1.01, "between 0 and 1"),
        ("min_p", -1, "between 0 and 1"),
        ("top_k", -1, "between 0 and 2147483647"),
        ("top_k", 1.0, "a whole number, between 0 and 2147483647"),
        ("repeat_penalty", 0, "above 0 and at most 2"),
        ("repeat_penalty", 2.1, "above 0 and at most 2"),
        ("seed", -1, "between 0 and 4294967294"),
        ("seed", 0xFFFFFFFF, "between 0 and 4294967294"),
        ("seed", False, "a whole number, between 0 and 4294967294"),
        ("ctx_size", 63, "64 or more"),
        ("max_tokens", 0, "1 or more"),
        ("threads", 513, "between 1 and 512"),
        ("threads", 0, "between 1 and 512"),
        ("gpu_layers", "some", "auto, all or a number of layers"),
        ("gpu_layers", -1, "auto, all or a number of layers"),
        ("gpu_layers", True, "auto, all or a number of layers"),
        ("gpu_layers", 2**31, "auto, all or a number of layers"),
        ("on_overflow", "cut", "error, head, tail, middle or map-reduce"),
        ("on_overflow", ["head"], "error, head, tail, middle or map-reduce"),
        ("quiet", 1, "true or false"),
        ("quiet", "yes", "true or false"),
        ("model", "", "a name or a path"),
        ("model", 7, "text"),
        ("model", "a\0b", "text without NUL characters"),
        ("system", "caf\udce9", "text in UTF-8"),
    ],
)
def test_a_value_out_of_range_or_of_the_wrong_type_is_refused(name: str, value: object, allowed: str) -> None:
    with pytest.raises(UsageError) as caught:
        config.check(name, value)
    shown = str(value).lower() if isinstance(value, bool) else repr(value)
    assert str(caught.value) == f"{name} must be {allowed}, not {shown}"


def test_a_refused_flag_is_named_as_the_user_wrote_it() -> None:
    assert refusal(temperature=5) == "--temperature must be between 0 and 2, not 5"
    assert refusal(ctx_size=63) == "--ctx-size must be 64 or more, not 63"


def test_a_refused_variable_is_named_with_its_value() -> None:
    message = refusal(environ={"LLAMACLI_TOP_P": "most"})
    assert message == "LLAMACLI_TOP_P must be a number between 0 and 1, not 'most'"


def test_a_refused_key_is_named_with_its_file(file: Path) -> None:
    file.write_text("threads = true\n")
    assert refusal(file) == f"threads in {file} must be a whole number, between 1 and 512, not true"


@pytest.mark.parametrize("written", ["nan", "inf", "-inf", "1e999"])
def test_what_is_not_finite_is_refused_wherever_it_is_written(file: Path, written: str) -> None:
    assert "between 0 and 2" in refusal(environ={"LLAMACLI_TEMPERATURE": written})
    file.write_text(f"temperature = {written}\n")
    assert "between 0 and 2" in refusal(file)


def test_a_whole_number_is_a_number_and_becomes_one(file: Path) -> None:
    file.write_text("temperature = 1\n")
    assert isinstance(resolve(file).settings.temperature, float)


@pytest.mark.parametrize("written", ["1", "true", "Yes", "on"])
def test_what_is_true_in_the_environment(written: str) -> None:
    assert resolve(environ={"LLAMACLI_OFFLINE": written}).settings.offline is True


@pytest.mark.parametrize("written", ["0", "FALSE", "no", "off"])
def test_what_is_false_in_the_environment(file: Path, written: str) -> None:
    file.write_text("offline = true\n")
    assert resolve(file, {"LLAMACLI_OFFLINE": written}).settings.offline is False


@pytest.mark.parametrize("written", ["2", "maybe", "truee", " "])
def test_what_is_no_boolean_in_the_environment(written: str) -> None:
    message = refusal(environ={"LLAMACLI_OFFLINE": written})
    assert message == f"LLAMACLI_OFFLINE must be true or false, not {written!r}"


@pytest.mark.parametrize(("written", "value"), [("20", "20"), ('"20"', "20"), ('"all"', "all"), ("0", "0")])
def test_gpu_layers_may_be_a_number_in_the_file(file: Path, written: str, value: str) -> None:
    file.write_text(f"gpu_layers = {written}\n")
    assert resolve(file).settings.gpu_layers == value


def test_a_model_may_be_a_file_whose_name_is_not_utf_8() -> None:
    path = os.fsdecode(b"/models/caf\xe9.gguf")
    assert resolve(environ={"LLAMACLI_MODEL": path}).settings.model == path


@given(name=st.sampled_from(sorted(config.RULES)), value=ANY_VALUE)
def test_any_value_is_either_accepted_for_good_or_refused_in_one_line(name: str, value: object) -> None:
    try:
        accepted = config.check(name, value)
    except UsageError as error:
        assert len(str(error).splitlines()) == 1
        assert len(str(error)) < 200
    else:
        assert config.check(name, accepted) == accepted


@given(name=st.sampled_from(sorted(config.RULES)), written=st.text(min_size=1))
def test_any_variable_is_either_accepted_or_refused_in_one_line(name: str, written: str) -> None:
    variable = config.variable_name(name)
    try:
        resolved = resolve(environ={variable: written})
    except UsageError as error:
        assert str(error).startswith(f"{variable} must be ")
        assert len(str(error).splitlines()) == 1
    else:
        assert resolved.sources[name] == Source("environment", variable)


# The file


def test_an_absent_file_is_an_empty_one(file: Path) -> None:
    assert resolve(file) == resolve()


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"cannot read the config file {tmp_path}: Is a directory"


@pytest.mark.parametrize(
    "content",
    [
        b"seed = 1\nseed\n",
        b"seed = 1\nmodel = 'a\0b'\n",
        b"seed = 1\nmodel = 'caf\xe9'\n",
        b"\nseed = 1\n\0\n",
    ],
)
def test_a_broken_file_is_named_with_the_line(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    message = refusal(file)
    assert str(file) in message
    assert f"at line {3 if content.startswith(bytes([10])) else 2}" in message


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 100_000, "0x" + "f" * 5000, "[0x" + "f" * 5000 + "]"])
def test_a_value_beyond_all_measure_is_one_line(file: Path, value: str) -> None:
    file.write_text(f"seed = {value}\n")
    message = refusal(file)
    assert str(file) in message
    assert len(message.splitlines()) == 1


def test_a_byte_order_mark_and_dos_line_ends_are_no_error(file: Path) -> None:
    file.write_bytes(b'\xef\xbb\xbfmodel = "tiny"\r\nseed = 1\r\n')
    assert resolve(file).settings.model == "tiny"


@given(content=st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_whatever_the_file_holds_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "anything.toml"
    file.write_bytes(content)
    try:
        resolve(file)
    except UsageError as error:
        assert str(file) in str(error)


# Directories


def test_home_holds_everything() -> None:
    places = config.directories({"LLAMACLI_HOME": "/somewhere"})
    assert (places.config, places.data, places.cache) == (
        Path("/somewhere"),
        Path("/somewhere/data"),
        Path("/somewhere/cache"),
    )
    assert config.config_path({"LLAMACLI_HOME": "/somewhere"}) == Path("/somewhere/config.toml")


@pytest.mark.parametrize("environ", [{}, {"LLAMACLI_HOME": ""}])
def test_without_a_home_they_are_the_platforms_own(environ: dict[str, str]) -> None:
    places = config.directories(environ)
    assert all("llamacli" in place.parts for place in (places.config, places.data, places.cache))
    assert config.config_path(environ) == places.config / "config.toml"


def test_importing_and_resolving_loads_nothing_that_is_not_needed() -> None:
    program = (
        "import sys, llamacli.commands.config, llamacli.config as config\n"
        "path = config.config_path({'LLAMACLI_HOME': '/nowhere'})\n"
        "config.resolve({'seed': 1}, {'LLAMACLI_TOP_K': '3'}, path)\n"
        "print(*{'platformdirs', 'tomllib', 'difflib', 'rich', 'typer'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# The `config` command


def shown(resolved: Resolved, as_json: bool = False) -> str:
    stream = io.StringIO()
    show(resolved, PLACES, as_json, stream)
    return stream.getvalue()


def test_each_line_shows_a_value_and_where_it_came_from(file: Path) -> None:
    file.write_text("temperature = 0\n")
    lines = shown(resolve(file, {"LLAMACLI_MODEL": "tiny"}, seed=7, offline=True)).splitlines()
    written = [" ".join(line.split()) for line in lines]
    assert 'model = "tiny" (environment LLAMACLI_MODEL)' in written
    assert f"temperature = 0.0 (file {file})" in written
    assert "seed = 7 (flag --seed)" in written
    assert "offline = true (flag --offline)" in written
    assert "max_tokens = none (default)" in written


def test_the_lines_are_aligned_even_beside_a_long_value() -> None:
    lines = shown(resolve(system="word " * 50)).splitlines()[: len(fields(Settings))]
    assert len({line.index(" = ") for line in lines}) == 1
    assert len({line.index("    (") for line in lines if not line.startswith("system")}) == 1


def test_the_lines_end_with_the_places() -> None:
    assert shown(resolve()).endswith(
        "\n"
        "config file: /somewhere/config.toml    (absent)\n"
        "data:        /somewhere/data\n"
        "cache:       /somewhere/cache\n"
    )


def test_json_is_one_object_with_values_sources_and_places() -> None:
    answer = json.loads(shown(resolve(environ={"LLAMACLI_MODEL": "tiny"}), as_json=True))
    assert answer["config_file"] == "/somewhere/config.toml"
    assert answer["directories"] == {
        "config": "/somewhere",
        "data": "/somewhere/data",
        "cache": "/somewhere/cache",
    }
    assert list(answer["settings"]) == [each.name for each in fields(Settings)]
    assert answer["settings"]["model"] == {"value": "tiny", "source": "environment", "from": "LLAMACLI_MODEL"}
    assert answer["settings"]["seed"] == {"value": None, "source": "default", "from": None}


@pytest.mark.parametrize("as_json", [False, True])
@given(system=st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_what_is_shown_can_be_written_and_holds_no_control_characters(as_json: bool, system: str) -> None:
    resolved = config.resolve({"system": system, "model": "caf\udce9\x1b[31m"}, {}, Path("a\nb\udce9.toml"))
    written = shown(resolved, as_json)
    written.encode("utf-8")
    assert written.replace("\n", "").isprintable()
    assert as_json or len(written.splitlines()) == len(fields(Settings)) + 4
