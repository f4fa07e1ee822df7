"""`@NAME`: the package's presets and the user's own, in pipes, with files, and in every way that they can be wrong."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PROGRAM, Run
from hypothesis import given
from hypothesis import strategies as st
from test_pipes import on_a_terminal, one_line

from llamacli.errors import UsageError
from llamacli.mapreduce import sewn
from llamacli.presets.library import BUILT_IN, library
from llamacli.presets.preset import filled, places

GREEDY = ("--temperature", "0")
CARD = "name: Ada\nage: 36\ncity: London\ncolour: blue\n"
OURS = ("commit-message", "explain", "mindmap", "summarise", "translate")
Write = Callable[[str], Path]


@pytest.fixture
def write(environment: dict[str, str]) -> Write:
    """Writes the user's presets file."""

    def presets(text: str) -> Path:
        path = Path(environment["LLAMACLI_HOME"]) / "presets.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return presets


def shown(llamacli: Run, *arguments: str, text: str = "", **options: Any) -> str:
    """The prompt that the model gets."""
    done = llamacli(*arguments, "--show-prompt", "-n", "1", input=text, **options)
    assert done.returncode == 0, done.stderr
    return str(done.stderr).partition("[INST] ")[2].partition(" [/INST]")[0]


# -- the package's ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_each_answers_in_a_pipe_and_about_a_file(name: str, llamacli: Run, tmp_path: Path) -> None:
    more = ["--to", "French"] if name == "translate" else []
    (tmp_path / "a.txt").write_text(CARD)
    piped = llamacli(f"@{name}", *more, *GREEDY, "-n", "30", input=CARD)
    assert piped.returncode == 0 and piped.stdout.strip() and piped.stderr == ""
    filed = llamacli(*GREEDY, "-f", str(tmp_path / "a.txt"), f"@{name}", *more, "-n", "30")
    assert (filed.stdout, filed.stderr) == (piped.stdout, "")


def test_a_translation_is_one(llamacli: Run) -> None:
    assert llamacli("@translate", "--to", "French", *GREEDY, input="The cat is black.").stdout == "Le chat est noir.\n"
    said = llamacli("@translate", *GREEDY, "--to=French", "The cat is black.")
    assert (said.stdout, said.stderr) == ("Le chat est noir.\n", "")


def test_the_text_stands_first_and_what_is_said_beside_it_last(llamacli: Run, tmp_path: Path) -> None:
    task = "Translate the text above to formal German. Answer with the translation only."
    asked = shown(llamacli, "@translate", "--to", "formal German", "Keep the keys", text=CARD)
    assert asked == f"```\n{CARD}```\n\n{task}\nKeep the keys"
    (tmp_path / "a").write_text("from a file")
    both = shown(llamacli, "-f", "a", "@translate", "--to", "formal German", text=CARD, cwd=tmp_path)
    assert both == f"```\n==> a <==\nfrom a file\n\n==> standard input <==\n{CARD}```\n\n{task}"
    assert shown(llamacli, "@explain", "A pipe").startswith("```\nA pipe\n```\n\nExplain what is above to someone")


def test_a_choice_stands_for_its_text(llamacli: Run) -> None:
    outline, mermaid = (shown(llamacli, "@mindmap", "--format", each, text=CARD) for each in ("outline", "mermaid"))
    assert "nested Markdown list" in outline and "Mermaid diagram" in mermaid
    assert outline == shown(llamacli, "@mindmap", text=CARD)


def test_defaults_lose_to_flags_and_to_nothing_else(llamacli: Run, environment: dict[str, str]) -> None:
    environment |= {"LLAMACLI_TEMPERATURE": "1.5", "LLAMACLI_TOP_K": "7"}
    record = json.loads(llamacli("@explain", "--json", "-n", "1", input=CARD).stdout)
    assert (record["sampling"]["temperature"], record["sampling"]["top_k"]) == (0.3, 7)
    record = json.loads(llamacli("@explain", "--json", "-n", "1", "--temperature", "0", input=CARD).stdout)
    assert record["sampling"]["temperature"] == 0


def test_a_text_that_is_too_long_is_read_in_parts_and_that_is_said(llamacli: Run) -> None:
    text = "\n\n".join(f"Paragraph {i}. The cat is black, and then it goes on." for i in range(60))
    summary = llamacli("@summarise", "-n", "20", "--seed", "1", input=text)
    assert summary.returncode == 0 and "parts, whose answers are combined" in summary.stderr
    done = llamacli("@translate", "--to", "French", "--seed", "1", "--json", input=text)
    record = json.loads(done.stdout)
    assert done.returncode == 0 and record["input"]["parts"] > 2
    assert f"{record['input']['parts']} parts, whose answers follow one another" in done.stderr
    assert record["answer"].count("\n\n") >= record["input"]["parts"] - 1
    refused = llamacli("@summarise", "--on-overflow", "error", input=text)
    assert refused.returncode == 4
    cut = llamacli("@translate", "--to", "French", "--seed", "1", "-n", "2", input=text)
    assert cut.returncode == 0 and "of these answers were cut to fit" in cut.stderr


def test_a_prompt_may_begin_with_the_sign_all_the_same(llamacli: Run) -> None:
    assert "[INST] @foo [/INST]" in llamacli("-n", "1", "--show-prompt", "--", "@foo").stderr
    assert "[INST] @foo and bar [/INST]" in llamacli("-n", "1", "--show-prompt", "@foo and bar").stderr
    assert "@foo" in llamacli("@explain", "-n", "1", "--show-prompt", "--", "@foo").stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["@sumarise"], "unknown preset @sumarise; did you mean @summarise? To prompt with the word: llamacli -- @sum"),
        (["@commit_message", "x"], "did you mean @commit-message?"),
        (["@zzz"], "unknown preset @zzz; there are @summarise, @translate"),
        (["@translate", "hi"], "@translate needs --to (The language"),
        (["@translate", "--to"], "--to needs a value"),
        (["@translate", "--to", " ", "hi"], "--to is empty"),
        (["@translate", "--too", "German", "hi"], "@translate has no option --too; did you mean --to?"),
        (["@mindmap", "--format", "svg", "hi"], "--format must be outline or mermaid, not 'svg'"),
        (["@summarise"], "@summarise needs a text: pipe one in"),
        (["@summarise", "a", "b"], "unexpected extra argument"),
        (["--to", "German", "@translate"], "No such option"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_two(arguments: list[str], said: str, llamacli: Run) -> None:
    done = llamacli(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in one_line(done.stderr)


def test_at_a_terminal_a_text_is_not_waited_for(environment: dict[str, str]) -> None:
    shown, code = on_a_terminal([*PROGRAM, "@summarise"], environment)
    assert code == 2 and "@summarise needs a text" in one_line(shown)


def test_an_argument_that_stands_in_for_an_empty_pipe_is_said(llamacli: Run) -> None:
    done = llamacli("@translate", "--to", "French", *GREEDY, "The cat is black.", input="")
    assert done.stdout == "Le chat est noir.\n"
    assert one_line(done.stderr) == "nothing came on standard input: the argument is taken for the text"


# -- shown --------------------------------------------------------------------------------------------------------


def test_the_list_names_all_of_them(llamacli: Run) -> None:
    listed = llamacli("presets").stdout.splitlines()
    assert [line.split()[0] for line in listed[1:]] == [f"@{name}" for name in OURS]
    records = {each["name"]: each for each in json.loads(llamacli("presets", "--json").stdout)}
    assert records["translate"]["parameters"][0]["option"] == "--to"
    assert records["mindmap"]["parameters"][0]["choices"] == ["outline", "mermaid"]
    assert records["summarise"]["defaults"]["on_overflow"] == "map-reduce"


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_shows_what_a_preset_is(option: str, llamacli: Run) -> None:
    done = llamacli("@translate", option)
    assert (done.returncode, done.stderr) == (0, "")
    for part in (
        "Usage: llamacli @translate",
        "--to TEXT",
        "[required]",
        "Translate the text above to {to}.",
        "built-in",
    ):
        assert part in done.stdout


# -- the user's own -----------------------------------------------------------------------------------------------

REVIEW = """
[review]
description = "Review a change."
prompt = 'Review this as {role}. Answer like {"ok": {{role}}}.'
system = "You speak {language}."
max_tokens = 3
choices = ["good", "bad"]

[review.parameters]
role = "a reader"
language = { description = "Which.", choices = { en = "English", de = "German" } }
"""


def test_ones_own_has_parameters_a_system_prompt_and_a_form(llamacli: Run, write: Write) -> None:
    write(REVIEW)
    prompt = shown(llamacli, "@review", "--language", "de", text="x = 1")
    system = "<<SYS>>\nYou speak German.\n<</SYS>>\n\n"
    assert prompt == system + '```\nx = 1\n```\n\nReview this as a reader. Answer like {"ok": {role}}.'
    assert "Review this as Ann." in shown(llamacli, "@review", "--role=Ann", "--language", "en", "-s", "Be brief.")
    assert llamacli("@review", "--language", "en", input="x = 1").stdout in ("good\n", "bad\n")
    flag = llamacli("@review", "--language", "en", "--choices", "perfect", input="x = 1")
    assert flag.stdout == "perfect\n"
    missing = llamacli("@review", input="x = 1")
    assert missing.returncode == 2 and "@review needs --language (Which)" in one_line(missing.stderr)
    assert "--language en|de" in llamacli("@review", "--help").stdout


def test_a_value_is_never_taken_for_a_place_or_for_a_file(llamacli: Run, write: Write) -> None:
    write(
        '[a]\nprompt = "Say {{stdin}} to {{{who}}} of {stdin}"\n[a.parameters]\nwho = "me"\n'
        '[b]\nprompt = "Hello"\nsystem = "{role}"\n[b.parameters]\nrole = "x"\n'
    )
    prompt = shown(llamacli, "@a", "--who", "stdin", text="x = 1")
    assert prompt.replace("\u200b", "") == "Say {stdin} to {stdin} of x = 1"
    prompt = shown(llamacli, "@translate", "--to", "{stdin}", text="x = 1")
    assert prompt.startswith("```\nx = 1\n```") and "x = 1" not in prompt[6 + len("x = 1") :]
    done = llamacli("@b", "--role", "@/etc/passwd", input="x")
    assert done.returncode == 2 and "would begin with @" in one_line(done.stderr)


def test_braces_in_the_way_to_a_system_prompt_are_no_places(tmp_path: Path) -> None:
    path = tmp_path / "{a}" / "presets.toml"
    path.parent.mkdir()
    path.write_text('[b]\nprompt = "Hello"\nsystem = "@s.txt"\n')
    assert library(path)["b"].defaults({}) == {"system": f"@{path.with_name('s.txt')}"}


def test_ones_own_comes_before_the_packages_and_that_is_said(llamacli: Run, write: Write) -> None:
    path = write('[summarise]\nprompt = "Say it in one word."\n')
    done = llamacli("@summarise", "-v", "--show-prompt", "-n", "1", input=CARD)
    assert "Say it in one word. [/INST]" in done.stderr
    assert f"@summarise is your own, of {path}, in place of the built-in one" in done.stderr
    assert "your own" not in llamacli("@summarise", "-n", "1", input=CARD).stderr
    assert str(path) in llamacli("presets").stdout


def test_a_schema_and_a_system_prompt_may_lie_beside_the_presets(llamacli: Run, write: Write, tmp_path: Path) -> None:
    path = write('[card]\nprompt = "Fill it in."\nsystem = "@system.txt"\nschema = "card.json"\nmax_tokens = 40\n')
    path.with_name("system.txt").write_text("Be exact.")
    path.with_name("card.json").write_text('{"type": "object", "properties": {"n": {"type": "integer"}}}')
    assert json.loads(llamacli("@card", input=CARD, cwd=tmp_path).stdout).keys() <= {"n"}
    assert "Be exact." in shown(llamacli, "@card", text=CARD, cwd=tmp_path)
    table = '[card]\nprompt = "Fill."\nmax_tokens = 40\n[card.schema]\ntype = "object"\nrequired = ["k"]\n'
    write(table + 'additionalProperties = false\nproperties = { k = { type = "null" } }\n')
    assert json.loads(llamacli("@card", input=CARD).stdout) == {"k": None}


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("[a]\nprompt = 'x'\n\n[b\n", 4, "not valid TOML"),
        ("[a]\nprompt = 'x'\n[a]\n", 3, "not valid TOML"),
        ("a = 1\n", 1, "a preset is a table"),
        ("\n[a]\n", 2, "prompt is missing"),
        ("[a]\nprompt = ' '\n", 1, "prompt is missing"),
        ("[a]\nprompt = 'x'\ntemprature = 1\n", 3, "did you mean temperature?"),
        ("[a]\nprompt = 'x'\ntemperature = 3\n", 3, "temperature must be between 0 and 2"),
        ("[a]\nprompt = 'x'\ntemperature = true\n", 3, "temperature must be a number"),
        ("[a]\nprompt = 'x'\nneeds_text = 'yes'\n", 3, "needs_text must be true or false"),
        ("[a]\nprompt = 'x'\nstop = 'end'\n", 3, "stop must be a list of texts"),
        ("[a]\nprompt = 'x'\nparts = 'all'\n", 3, "parts must be combined or joined"),
        ("[a]\nprompt = 'x'\nschema = 'n int'\nchoices = 'a,b'\n", 4, "contradict each other"),
        (
            "[b]\nprompt = 'x'\n[a]\nprompt = 'in {langauge}'\n[a.parameters]\nlanguage = 'en'\n",
            4,
            "did you mean language",
        ),
        ("[a]\nprompt = 'in {it}'\n", 2, "write {{it}} for the braces"),
        ("[a]\nprompt = 'x'\n[a.parameters]\nlanguage = 'en'\n", 4, "has a place {language}"),
        ("[a]\nprompt = '{b}'\n[a.parameters.b]\ndefault = 'x'\nchoices = ['y']\n", 4, "none of the choices"),
        ("[a]\nprompt = '{b}'\n[a.parameters.b]\ndefalt = 'x'\n", 4, "did you mean default?"),
        ("[a]\nprompt = '{b}'\nparameters.b = true\n", 3, "must be its default, or a table"),
        ("[a]\nprompt = '{B}'\n[a.parameters]\nB = '1'\n", 4, "small letters"),
        ("['a b']\nprompt = 'x'\n", 1, "a preset's name is made of"),
    ],
)
def test_a_malformed_file_is_exit_code_two_with_line_and_reason(
    text: str, line: int, said: str, llamacli: Run, write: Write
) -> None:
    path = write(text)
    with pytest.raises(UsageError) as refused:
        library(path)
    assert str(path) in str(refused.value) and f"line {line}" in str(refused.value), refused.value
    assert said in str(refused.value)


def test_the_program_says_so_in_one_line(llamacli: Run, write: Write) -> None:
    write("[a]\nprompt = 'x'\ntemprature = 1\n")
    for arguments in (["@summarise", "hi"], ["presets"]):
        done = llamacli(*arguments)
        assert done.returncode == 2 and "presets.toml, line 3: in [a], unknown key" in one_line(done.stderr)
    assert llamacli("-n", "1", "hi").returncode == 0, "nobody asked for a preset"
    write("[a]\nprompt = '{model}'\n[a.parameters]\nmodel = 'x'\n")
    taken = llamacli("@a")
    assert taken.returncode == 2 and "--model is an option of run" in one_line(taken.stderr)


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "presets.toml").mkdir()
    with pytest.raises(UsageError, match=r"cannot read the presets in .*: Is a directory"):
        library(tmp_path / "presets.toml")
    (tmp_path / "latin").write_bytes("[a]\nprompt = 'café'\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"not UTF-8 \(at line 2\)"):
        library(tmp_path / "latin")


TOML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    ["description", "prompt", "system", "needs_text", "parameters", "schema", "choices", "stop", "seed"]
)


@given(st.dictionaries(KEYS, TOML_VALUES, max_size=6))
def test_whatever_a_preset_holds_it_is_taken_or_refused(entry: dict[str, Any]) -> None:
    from llamacli.presets.library import _preset, _Wrong

    try:
        _preset("a", entry, BUILT_IN, "here")
    except _Wrong as wrong:
        assert str(wrong)


@given(st.text(), st.text())
def test_a_value_is_put_in_once_and_braces_around_it_stay(value: str, around: str) -> None:
    safe = around.replace("{", "{{").replace("}", "}}")
    assert places(safe) == []
    assert filled(f"{safe}{{x}}{safe}", {"x": value}) == f"{around}{value}{around}"


@given(
    st.lists(
        st.tuples(st.text("ab.", min_size=1, max_size=5), st.sampled_from([" ", "\n", "\n\n", "\n \n"])), min_size=1
    )
)
def test_answers_are_sewn_with_the_space_between_their_parts(parts: list[tuple[str, str]]) -> None:
    document = "".join(text + gap for text, gap in parts)
    together = sewn(document, [text + (gap if gap == " " else "") for text, gap in parts], [text for text, _ in parts])
    assert together.split() == document.split()
    assert [gap.count("\n") > 1 for _, gap in parts[:-1]].count(True) == together.count("\n\n")


def test_help_of_a_preset_loads_no_model(environment: dict[str, str]) -> None:
    code = (
        "import sys; sys.argv = ['llamacli', '@mindmap', '--help']\n"
        "import llamacli.__main__ as program\n"
        "try: program.main()\n"
        "finally: print('LOADED', *sys.modules)\n"
    )
    done = subprocess.run([*PROGRAM[:1], "-c", code], capture_output=True, encoding="utf-8", env=environment)
    loaded = done.stdout.rpartition("LOADED")[2].split()
    assert "llamacli.presets.library" in loaded
    assert not {name for name in loaded if name.startswith(("llamacli.engine.llama", "llama_cpp", "rich", "numpy"))}
