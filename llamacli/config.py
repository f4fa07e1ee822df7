"""Settings, and where each came from: flag, else environment, else config file, else default.

Knows no command line library: a flag is a setting's name with a typed value, None when it was not given.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from llamacli.errors import UsageError

PREFIX = "LLAMACLI_"
PREFIXES, TUNING = "prefixes", "tuning"  # in the cache directory
SESSIONS = "sessions.sqlite3"  # in the data directory
# Variables of ours that are no settings: one says where the config file is, the others are secrets.
OTHER_VARIABLES = ("LLAMACLI_HOME", "LLAMACLI_API_KEY", "LLAMACLI_UPSTREAM_KEY")

_BOOLEANS = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}


@dataclass(frozen=True)
class Rule:
    """What one setting may be.

    `accept` takes a typed value (of a flag or of the file) and returns it as the setting's own type; its
    ValueError completes the sentence "temperature must be ...". `read` makes a typed value of a variable's
    text; its ValueError means that the text is none, and `accept` then says what is allowed.
    """

    help_text: str
    accept: Callable[[object], object]
    read: Callable[[str], object] = str


def text(help_text: str, *, is_reference: bool = False) -> dict[str, Rule]:
    """Any text. A reference may be a file's name, which need not be UTF-8, but is never empty."""

    def accept(value: object) -> str:
        if not isinstance(value, str):
            raise ValueError("text")
        if "\0" in value:
            raise ValueError("text without NUL characters")
        if is_reference and not value:
            raise ValueError("a name or a path")
        # os.environ and sys.argv hold the bytes that are not UTF-8 as lone surrogates.
        if not is_reference and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("text in UTF-8")
        return value

    return {"rule": Rule(help_text, accept)}


def choice(help_text: str, *choices: str) -> dict[str, Rule]:
    def accept(value: object) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{', '.join(choices[:-1])} or {choices[-1]}")
        return value

    return {"rule": Rule(help_text, accept)}


def switch(help_text: str) -> dict[str, Rule]:
    def accept(value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError("true or false")
        return value

    def read(written: str) -> bool:
        if written.lower() not in _BOOLEANS:
            raise ValueError(written)
        return _BOOLEANS[written.lower()]

    return {"rule": Rule(help_text, accept, read)}


def number(help_text: str, low: float, high: float, *, is_low_allowed: bool = True) -> dict[str, Rule]:
    span = f"between {low:g} and {high:g}" if is_low_allowed else f"above {low:g} and at most {high:g}"

    def accept(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"a number {span}")
        # NaN is refused here too: it is not between anything.
        if not low <= value <= high or (value == low and not is_low_allowed):
            raise ValueError(span)
        return float(value)

    return {"rule": Rule(help_text, accept, float)}


def whole(help_text: str, low: int, high: int | None = None) -> dict[str, Rule]:
    span = f"{low} or more" if high is None else f"between {low} and {high}"

    def accept(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"a whole number, {span}")
        if value < low or (high is not None and value > high):
            raise ValueError(span)
        return value

    return {"rule": Rule(help_text, accept, int)}


def layers(help_text: str) -> dict[str, Rule]:
    def accept(value: object) -> str:
        if isinstance(value, str) and value in ("auto", "all"):
            return value
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
            value = int(value)
        # llama.cpp's n_gpu_layers is an int32_t.
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            raise ValueError("auto, all or a number of layers")
        return str(value)

    return {"rule": Rule(help_text, accept)}


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def size(help_text: str) -> dict[str, Rule]:
    """Bytes: a whole number, or text such as "4GB" or "500 MB"."""

    def accept(value: object) -> int:
        if isinstance(value, str):
            written = value.strip().upper()
            number, unit = written[:-2].strip(), _UNITS.get(written[-2:])
            if unit is None:
                number, unit = written, 1
            if number.isascii() and number.replace(".", "", 1).isdigit() and len(number) < 16:
                value = int(float(number) * unit)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**60:
            raise ValueError("a size such as 4GB or 500MB (0: none)")
        return value

    return {"rule": Rule(help_text, accept)}


@dataclass(frozen=True)
class Settings:
    """Every setting, its default and its rule; a new line here is a new key, variable and flag."""

    model: str = field(default="7b-chat", metadata=text("The model to run.", is_reference=True))
    system: str | None = field(default=None, metadata=text("The system prompt; @FILE reads it from a file."))
    max_tokens: int | None = field(default=None, metadata=whole("The longest answer, in tokens.", 1))
    temperature: float = field(default=0.6, metadata=number("Randomness; 0 takes the likeliest token.", 0, 2))
    top_p: float = field(
        default=0.9, metadata=number("Sample from the likeliest tokens with this total probability.", 0, 1)
    )
    top_k: int = field(default=40, metadata=whole("Sample from this many likeliest tokens; 0 is all.", 0, 2**31 - 1))
    min_p: float = field(
        default=0.0, metadata=number("Leave out tokens less likely than this share of the likeliest.", 0, 1)
    )
    repeat_penalty: float = field(
        default=1.0, metadata=number("Penalty on repeated tokens; 1 is none.", 0, 2, is_low_allowed=False)
    )
    # The one 32-bit number left out, 0xFFFFFFFF, is LLAMA_DEFAULT_SEED in llama.h: it asks for a random seed.
    seed: int | None = field(default=None, metadata=whole("Seed of the random choices.", 0, 2**32 - 2))
    ctx_size: int | None = field(default=None, metadata=whole("Tokens in the context window.", 64))
    gpu_layers: str = field(default="auto", metadata=layers("Layers to place on the GPU: auto, all or N."))
    require_gpu: bool = field(default=False, metadata=switch("Fail when the model does not run on a GPU."))
    threads: int | None = field(default=None, metadata=whole("CPU threads.", 1, 512))
    on_overflow: str = field(
        default="error",
        metadata=choice("What to keep of an input that does not fit.", "error", "head", "tail", "middle", "map-reduce"),
    )
    offline: bool = field(default=False, metadata=switch("Never use the network."))
    kv_type: str = field(
        default="f16",
        metadata=choice("Number format of the computed context; q8_0 takes half the memory and disk.", "f16", "q8_0"),
    )
    draft_model: str | None = field(
        default=None,
        metadata=text("A smaller model of the same vocabulary that writes ahead of the other.", is_reference=True),
    )
    no_speculation: bool = field(
        default=False, metadata=switch("Do not compute guessed tokens beside those that are known.")
    )
    no_cache: bool = field(default=False, metadata=switch("Neither read nor write computed prefixes on disk."))
    cache_size: int | None = field(
        default=None, metadata=size("What computed prefixes may take on disk, such as 4GB; 0 keeps none.")
    )
    log: bool = field(default=True, metadata=switch("Keep what was asked and answered, for logs and --continue."))
    when_full: str = field(
        default="ask",
        metadata=choice("What `chat` does when its context is full.", "ask", "drop", "summarise"),
    )
    remote: str | None = field(
        default=None, metadata=text("The address of a server that `run` asks instead of a model.")
    )
    remote_timeout: float = field(
        default=600.0,
        metadata=number("Seconds of silence after which a server is given up.", 0, 86400, is_low_allowed=False),
    )
    local: bool = field(default=False, metadata=switch("Compute here, whatever server runs."))
    quiet: bool = field(default=False, metadata=switch("Errors only on stderr."))
    verbose: bool = field(default=False, metadata=switch("More on stderr, llama.cpp's own messages included."))


RULES: Mapping[str, Rule] = {each.name: each.metadata["rule"] for each in fields(Settings)}


@dataclass(frozen=True)
class Source:
    """`detail` is the flag, the preset's or variable's name or the file's path; a default has none."""

    kind: Literal["flag", "preset", "environment", "file", "default"]
    detail: str | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.detail}" if self.detail else self.kind


@dataclass(frozen=True)
class Resolved:
    settings: Settings
    sources: Mapping[str, Source]


@dataclass(frozen=True)
class Directories:
    config: Path
    data: Path
    cache: Path

    @property
    def config_file(self) -> Path:
        return self.config / "config.toml"

    @property
    def models(self) -> Path:
        return self.data / "models"

    @property
    def presets(self) -> Path:
        """The user's own. See presets/library.py."""
        return self.config / "presets.toml"

    @property
    def prefixes(self) -> Path:
        """Where computed prefixes are. See engine/prefix_store.py."""
        return self.cache / PREFIXES

    @property
    def tuning(self) -> Path:
        """Where measured rates are. See tuning_file.py."""
        return self.cache / TUNING

    @property
    def sessions(self) -> Path:
        """The file of all conversations. See sessions/archive.py."""
        return self.data / SESSIONS

    @property
    def run(self) -> Path:
        """Where running servers are found. See server/presence.py."""
        return self.data / "run"


_Found = dict[str, tuple[object, Source]]


def directories(environ: Mapping[str, str]) -> Directories:
    """The platform's own directories, or all of them in LLAMACLI_HOME. None is created here."""
    if home := environ.get("LLAMACLI_HOME"):
        return Directories(Path(home), Path(home, "data"), Path(home, "cache"))
    from platformdirs import PlatformDirs

    platform = PlatformDirs("llamacli", appauthor=False)
    return Directories(platform.user_config_path, platform.user_data_path, platform.user_cache_path)


def config_path(environ: Mapping[str, str]) -> Path:
    return directories(environ).config_file


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def variable_name(name: str) -> str:
    return PREFIX + name.upper()


def resolve(
    flags: Mapping[str, object],
    environ: Mapping[str, str],
    path: Path | None,
    preset: tuple[str, Mapping[str, object]] | None = None,
) -> Resolved:
    """Every setting with its source. Values that lose to a stronger source are checked all the same.

    preset   its name and its defaults, which are stronger than all but flags: it was asked for by name

    A flag that is None and a variable that is empty count as not given; a file that is absent, as empty.
    Raises UsageError for what a user wrote wrong, and TypeError for a flag that is no setting.
    """
    found: _Found = {each.name: (each.default, Source("default")) for each in fields(Settings)}
    found |= _from_file(path) | _from_environment(environ) | _from_preset(preset) | _from_flags(flags)
    values: dict[str, Any] = {name: value for name, (value, _) in found.items()}
    return Resolved(Settings(**values), {name: source for name, (_, source) in found.items()})


def check(name: str, value: object, spelling: str | None = None) -> object:
    """The value as the setting's own type, or a UsageError that names it by `spelling`."""
    if name not in RULES:
        raise TypeError(f"there is no setting {name!r}")
    try:
        return RULES[name].accept(value)
    except ValueError as allowed:
        raise UsageError(f"{spelling or name} must be {allowed}, not {_shown(value)}") from None


def _from_flags(flags: Mapping[str, object]) -> _Found:
    if unknown := flags.keys() - RULES.keys():
        raise TypeError(f"no such settings: {', '.join(sorted(unknown))}")
    return {
        name: (check(name, value, flag_name(name)), Source("flag", flag_name(name)))
        for name, value in flags.items()
        if value is not None
    }


def _from_preset(preset: tuple[str, Mapping[str, object]] | None) -> _Found:
    name, values = preset or ("", {})
    return {
        key: (check(key, value, f"{key} of @{name}"), Source("preset", f"@{name}")) for key, value in values.items()
    }


def _from_environment(environ: Mapping[str, str]) -> _Found:
    variables = {variable_name(name): name for name in RULES}
    for variable in sorted(environ):
        if variable.startswith(PREFIX) and variable not in variables and variable not in OTHER_VARIABLES:
            raise unknown(f"environment variable {variable!r}", variable, [*variables, *OTHER_VARIABLES])
    return {
        name: (check(name, _typed(name, environ[variable]), variable), Source("environment", variable))
        for variable, name in variables.items()
        if environ.get(variable)
    }


def _typed(name: str, written: str) -> object:
    try:
        return RULES[name].read(written)
    except ValueError:
        return written


def _from_file(path: Path | None) -> _Found:
    if path is None:
        return {}
    table = _read_toml(path)
    for key in sorted(table.keys() - RULES.keys()):
        raise unknown(f"setting {key!r} in {path}", key, RULES)
    return {name: (check(name, value, f"{name} in {path}"), Source("file", str(path))) for name, value in table.items()}


def _read_toml(path: Path) -> dict[str, object]:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UsageError(f"cannot read the config file {path}: {error.strerror}") from error
    return parsed_toml(raw, f"config file {path}")


def parsed_toml(raw: bytes, what: str) -> dict[str, object]:
    """Raises UsageError, with the line and the reason, for what is no TOML."""
    import tomllib

    try:
        return tomllib.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UsageError(f"the {what} is not UTF-8 (at line {line}); save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"the {what} is not valid TOML: {error}") from error
    # int refuses more than 4,300 digits, and the parser calls itself once per bracket.
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the {what} holds a number or a nesting beyond all measure") from error


def unknown(what: str, name: str, known: Iterable[str]) -> UsageError:
    """Names the nearest right one. Letter case and hyphens do not count: they are what is mistaken first."""
    import difflib

    spellings = {each.lower(): each for each in known}
    nearest = difflib.get_close_matches(name.lower().replace("-", "_"), spellings, n=1)
    if nearest:
        return UsageError(f"unknown {what}; did you mean {spellings[nearest[0]]}?")
    return UsageError(f"unknown {what}; there are {', '.join(spellings.values())}")


def _shown(value: object) -> str:
    """One line, in the user's own spelling as far as that goes."""
    try:
        written = str(value).lower() if isinstance(value, bool) else repr(value)
    except ValueError:  # an integer of more than 4,300 digits, which TOML allows in hexadecimal
        return "a number that long"
    return written if len(written) <= 60 else f"{written[:57]}..."
