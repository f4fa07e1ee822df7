"""The program in the shell's hands: real processes, real pipes, real signals, real exit codes."""

from __future__ import annotations

import json
import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PROGRAM, Golden, Run, golden

from benchmarks import synthetic
from llamacli.models import store

LLAMA2 = "Tell me about llama2"
ANSWER = golden()[0].answer
GREEDY = ("--temperature", "0")
SHELL_PROGRAM = shlex.join(PROGRAM)


def shell(script: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A bash script in which `llamacli` is this program."""
    text = f'llamacli() {{ {SHELL_PROGRAM} "$@"; }}\n{script}'
    return subprocess.run(["bash", "-c", text], capture_output=True, encoding="utf-8", env=environment, timeout=60)


def one_line(stderr: str) -> str:
    """The only line on stderr."""
    assert stderr.startswith("llamacli: ") and stderr.count("\n") == 1 and stderr.endswith("\n"), stderr
    return stderr.removeprefix("llamacli: ").rstrip("\n")


# -- the answer -------------------------------------------------------------------------------------------------


def test_stdout_is_the_answer_and_one_newline_and_stderr_is_empty(llamacli: Run) -> None:
    done = llamacli(*GREEDY, LLAMA2)
    assert (done.stdout, done.stderr, done.returncode) == (ANSWER + "\n", "", 0)


def test_run_is_what_happens_without_a_command(llamacli: Run) -> None:
    assert llamacli("run", *GREEDY, LLAMA2).stdout == llamacli(LLAMA2, *GREEDY).stdout == ANSWER + "\n"


def test_stdin_alone_is_the_prompt_and_so_is_a_dash(llamacli: Run) -> None:
    assert llamacli(*GREEDY, input=LLAMA2 + "\n").stdout == ANSWER + "\n"
    assert llamacli(*GREEDY, "-", input=LLAMA2).stdout == ANSWER + "\n"


@pytest.mark.parametrize("case", [c for c in golden() if c.messages[-1].content.startswith("```")])
def test_a_piped_document_stands_in_a_fence_before_the_instruction(case: Golden, llamacli: Run) -> None:
    _, document, rest = case.messages[-1].content.split("```")
    done = llamacli(*GREEDY, "-n", "128", rest.strip(), input=document.strip("\n") + "\n")
    assert done.stdout.strip() == case.answer


def test_the_document_goes_where_stdin_is_named(llamacli: Run) -> None:
    done = llamacli(*GREEDY, "Repeat: {stdin}", input="hello world\n")
    assert done.stdout == "hello world\n"


def test_a_system_prompt_is_used_and_can_come_from_a_file(llamacli: Run, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("Answer in one word.\n")
    question = "What is the capital of France?"
    assert llamacli(*GREEDY, "-s", "Answer in one word.", question).stdout == "Paris\n"
    assert llamacli(*GREEDY, "-s", f"@{tmp_path}/system.txt", question).stdout == "Paris\n"


def test_no_stream_prints_the_same(llamacli: Run) -> None:
    assert llamacli(*GREEDY, "--no-stream", LLAMA2).stdout == ANSWER + "\n"


def test_the_answer_arrives_while_it_is_written(environment: dict[str, str]) -> None:
    with subprocess.Popen(
        [*PROGRAM, *GREEDY, LLAMA2], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=environment
    ) as process:
        assert process.stdout is not None
        parts = []
        while part := os.read(process.stdout.fileno(), 4096):
            parts.append(part)
    assert b"".join(parts).decode() == ANSWER + "\n"
    assert len(parts) > 5


def test_a_stop_string_and_a_token_limit_end_the_answer_with_exit_code_zero(llamacli: Run) -> None:
    stopped = llamacli(*GREEDY, "--stop", " large", "--stop", "2023", LLAMA2)
    assert (stopped.stdout, stopped.returncode) == ("Llama 2 is a family of open\n", 0)
    limited = llamacli(*GREEDY, "-n", "5", LLAMA2)
    assert limited.returncode == 0
    assert ANSWER.startswith(limited.stdout.strip())


def test_a_seed_repeats_the_answer(llamacli: Run) -> None:
    asked = ("--temperature", "2", "--top-p", "1", "--top-k", "0", "-n", "12", "--raw", "zyx")
    first, second, other = (llamacli("--seed", seed, *asked).stdout for seed in ("0", "0", "1"))
    assert first == second != other


def test_llamacli_dash_dash_prompts_with_the_name_of_a_command(llamacli: Run) -> None:
    done = llamacli(*GREEDY, "-n", "3", "--", "doctor")
    assert done.returncode == 0 and done.stdout.count("\n") == 1


def test_json_is_one_object_with_everything_about_the_run(llamacli: Run) -> None:
    done = llamacli(*GREEDY, "--json", "--seed", "7", LLAMA2)
    record = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert record["answer"] == ANSWER
    assert record["finish_reason"] == "stop"
    assert record["usage"] == {"prompt_tokens": 14, "completion_tokens": 79, "cached_tokens": 0}
    assert (record["seed"], record["sampling"]["temperature"]) == (7, 0)
    assert record["model"]["sha256"] == store.TINY_SHA256
    assert record["model"]["template"] == "llama-2"
    assert (record["context_size"], record["device"]) == (1024, "CPU")
    assert record["settings"]["threads"]["value"] == 1
    assert set(record["speculation"]) == {"guessed", "right"}
    assert set(record["timings"]) == {"load_s", "prefill_s", "first_token_s", "decode_tokens_per_s", "total_s"}
    assert record["timings"]["total_s"] >= record["timings"]["first_token_s"] > 0


def test_guesses_speed_up_what_is_copied_and_change_nothing(llamacli: Run) -> None:
    text = "the small red boat went down the river past green hills and quiet farms while old people on the bank talked"
    drawn = ("--json", "--seed", "4", "-n", "150", f"Repeat after me: {' '.join(text.split()[::-1])}")
    record = json.loads(llamacli(*drawn).stdout)
    assert 0 < record["speculation"]["right"] <= record["speculation"]["guessed"]
    without = json.loads(llamacli("--no-speculation", *drawn).stdout)
    assert without["speculation"] is None and without["answer"] == record["answer"]
    assisted = json.loads(llamacli("--draft-model", "tiny", *drawn).stdout)
    assert assisted["answer"] == record["answer"] and "from tiny" in assisted["settings"]["speculation"]["why"]


def test_a_draft_model_of_another_vocabulary_is_refused(llamacli: Run, tmp_path: Path) -> None:
    whole = store.bundled().read_bytes()
    other = tmp_path / "other.gguf"
    other.write_bytes(whole.replace("\u2581the".encode(), "\u2581teh".encode()))
    done = llamacli("--draft-model", str(other), LLAMA2)
    assert (done.returncode, done.stdout) == (5, "") and "vocabulary" in one_line(done.stderr)
    assert llamacli("--draft-model", "no-such", LLAMA2).returncode == 5


def test_show_prompt_shows_text_and_ids_on_stderr(llamacli: Run) -> None:
    done = llamacli(*GREEDY, "--show-prompt", "-n", "1", LLAMA2)
    assert f"[INST] {LLAMA2} [/INST]" in done.stderr
    assert "1 518 25580 29962 24948 592" in done.stderr
    assert "INST" not in done.stdout


# -- what is wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([""], "the prompt is empty"),
        (["  \n"], "the prompt is empty"),
        (["--temperature", "3", "hi"], "--temperature must be between 0 and 2"),
        (["--temperature", "warm", "hi"], "'warm' is not a valid float"),
        (["--top-p", "-0.1", "hi"], "--top-p"),
        (["--seed", "-1", "hi"], "--seed"),
        (["-n", "0", "hi"], "--max-tokens"),
        (["-c", "63", "hi"], "--ctx-size must be 64 or more"),
        (["-c", "64", "-n", "64", "hi"], "leaves no room"),
        (["--gpu-layers", "some", "hi"], "--gpu-layers must be auto, all or a number"),
        (["--on-overflow", "shrug", "hi"], "--on-overflow"),
        (["--stop", "", "hi"], "stop string must not be empty"),
        (["--raw", "-s", "be brief", "hi"], "contradict"),
        (["-q", "-v", "hi"], "contradict"),
        (["--require-gpu", "--gpu-layers", "0", "hi"], "contradict"),
        (["-s", "@/no/such/file", "hi"], "/no/such/file: No such file"),
        (["-s", "@", "hi"], "names no file"),
        (["-s", "@~no-such-user/x", "hi"], "no such user"),
        (["-s", "@/dev/zero", "hi"], "longer than 1024 KiB"),
        (["-s", "@" + "x" * 5000, "hi"], "File name too long"),
        (["--top-k", "9" * 400, "hi"], "--top-k must be between 0 and 2147483647"),
        (["--no-such-option", "hi"], "No such option"),
        (["two", "prompts"], "unexpected extra argument"),
        (["Use {stdin}"], "nothing came on standard input"),
        ([], "nothing came on standard input"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_two(arguments: list[str], said: str, llamacli: Run) -> None:
    done = llamacli(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in one_line(done.stderr)


def truncated(path: Path) -> None:
    path.write_bytes(store.bundled().read_bytes()[:2_000_000])


def wrong_architecture(path: Path) -> None:
    path.write_bytes(store.bundled().read_bytes().replace(b"llama", b"lllll"))


def html(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html>Log in</html>")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (truncated, "is 2,000,000 bytes, its header promises 7,8"),
        (wrong_architecture, "architecture"),
        (html, "HTML page"),
        (Path.touch, "is empty"),
        (Path.mkdir, "is a directory"),
        (lambda path: path.write_bytes(b"\x93NUMPY"), "is not a GGUF"),
        (lambda path: None, "does not exist"),
    ],
)
def test_a_model_that_is_none_is_one_line_with_the_truth_and_exit_code_five(
    make: Callable[[Path], object], said: str, llamacli: Run, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    make(path)
    done = llamacli("-m", str(path), "hi")
    assert (done.returncode, done.stdout) == (5, "")
    assert said in one_line(done.stderr)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_model_file_that_may_not_be_read_is_exit_code_five(llamacli: Run, tmp_path: Path) -> None:
    path = tmp_path / "secret.gguf"
    path.write_bytes(b"GGUF")
    path.chmod(0)
    done = llamacli("-m", str(path), "hi")
    assert done.returncode == 5 and "Permission denied" in one_line(done.stderr)


@pytest.mark.parametrize(
    ("reference", "said"),
    [("x" * 5000 + ".gguf", "File name too long"), ("~no-such-user/x.gguf", "no such user"), (".", "is a directory")],
)
def test_a_path_that_leads_nowhere_is_exit_code_five(reference: str, said: str, llamacli: Run) -> None:
    done = llamacli("-m", reference, "hi")
    assert (done.returncode, done.stdout) == (5, "")
    assert said in one_line(done.stderr)


def test_a_published_name_says_how_to_get_it_and_a_misspelt_one_what_was_meant(llamacli: Run) -> None:
    missing = llamacli("--offline", "-m", "7b-chat", "hi")
    assert missing.returncode == 5 and "llamacli pull 7b-chat" in one_line(missing.stderr)
    misspelt = llamacli("-m", "7b-caht", "hi")
    assert misspelt.returncode == 5 and "did you mean 7b-chat" in one_line(misspelt.stderr)


def test_a_model_larger_than_memory_is_refused_before_it_is_loaded(llamacli: Run, tmp_path: Path) -> None:
    """A sparse file with the header of a 400 GB model: it takes no room on the disk."""
    import numpy as np
    from gguf import GGUFWriter

    path = tmp_path / "huge.gguf"
    writer = GGUFWriter(path, "llama")
    for key, value in {"block_count": 1, "embedding_length": 8192, "feed_forward_length": 8192}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.attention.head_count", 64)
    writer.add_uint32("llama.context_length", 4096)
    writer.add_vocab_size(32000)
    shape = (1 << 25, 8192)
    writer.add_tensor_info("token_embd.weight", shape, np.dtype(np.float16), 2 * shape[0] * shape[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab") as file:
        file.truncate(path.stat().st_size + 2 * shape[0] * shape[1] + 64)
    done = llamacli("-m", str(path), "hi")
    assert done.returncode == 6, done.stderr
    assert "GiB" in one_line(done.stderr)


def test_an_input_that_does_not_fit_is_exit_code_four_with_both_numbers(llamacli: Run) -> None:
    done = llamacli("Summarise", input="word " * 3000)
    assert (done.returncode, done.stdout) == (4, "")
    assert "1,024" in one_line(done.stderr) and "--on-overflow" in done.stderr


def test_an_input_that_may_be_cut_is_cut_and_said_so(llamacli: Run) -> None:
    done = llamacli(*GREEDY, "-n", "5", "--on-overflow", "head", "Summarise", input="word " * 3000)
    assert done.returncode == 0
    assert "tokens; " in one_line(done.stderr) and "were kept" in done.stderr
    record = json.loads(llamacli("-n", "5", "--on-overflow", "tail", "--json", "Sum", input="word " * 3000).stdout)
    assert record["input"]["tokens"] > 3000 > record["input"]["kept"] > 900


def test_an_answer_cut_by_the_context_is_exit_code_three_and_keeps_what_there_is(llamacli: Run) -> None:
    done = llamacli(*GREEDY, "-c", "64", LLAMA2)
    assert done.returncode == 3
    assert ANSWER.startswith(done.stdout.strip()) and len(done.stdout) > 100
    assert "64 tokens" in one_line(done.stderr)


def test_an_input_without_end_is_not_read_to_its_end(environment: dict[str, str]) -> None:
    done = shell("yes | llamacli Summarise", environment)
    assert done.returncode == 4 and "16 MiB" in one_line(done.stderr)


def test_quiet_leaves_only_errors(llamacli: Run) -> None:
    done = llamacli("-q", "-n", "2", "--gpu-layers", "3", "hi")
    assert (done.stderr, done.returncode) == ("", 0)
    assert "no effect" in one_line(llamacli("-n", "2", "--gpu-layers", "3", "hi").stderr)


def test_a_required_gpu_that_is_not_there_is_an_error(llamacli: Run) -> None:
    from llamacli.engine.devices import gpu_devices

    if gpu_devices():
        pytest.skip("this build of llama.cpp has a GPU")
    done = llamacli("--require-gpu", "hi")
    assert done.returncode == 2 and "CMAKE_ARGS" in one_line(done.stderr)


# -- streams ----------------------------------------------------------------------------------------------------


def test_bytes_that_are_no_text_are_replaced_and_said_so(llamacli: Run) -> None:
    done = llamacli("-n", "2", "--show-prompt", "Repeat", encoding=None, input=b"caf\xe9 \x00 \xff end")
    assert done.returncode == 0
    assert "caf\ufffd ^@ \ufffd end".encode() in done.stderr
    assert b"not valid UTF-8" in done.stderr and b"(2 times)" in done.stderr


def test_utf_8_goes_in_and_comes_out(llamacli: Run) -> None:
    shown = llamacli(*GREEDY, "-n", "2", "--show-prompt", "Répète: naïve 🦙").stderr
    assert "Répète: naïve 🦙" in shown


def test_a_locale_without_utf_8_changes_nothing(llamacli: Run, environment: dict[str, str]) -> None:
    plain = environment | {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    french = ("-s", "Answer in French.", *GREEDY, "Hello")
    assert llamacli(*french, env=plain).stdout == llamacli(*french).stdout
    assert (
        "1 518 25580 29962 263 29871 243 162 169 156" in llamacli("-n", "1", "--show-prompt", "a 🦙", env=plain).stderr
    )


def test_utf_16_with_a_byte_order_mark_is_read_as_such(llamacli: Run) -> None:
    done = llamacli(*GREEDY, encoding=None, input=LLAMA2.encode("utf-16"))
    assert done.stdout.decode() == ANSWER + "\n"


def test_a_reader_that_goes_away_ends_us_as_sigpipe_does(environment: dict[str, str]) -> None:
    done = shell(
        f"printf '{LLAMA2}' | llamacli --temperature 0 | head -c 20; echo \":${{PIPESTATUS[1]}}\"", environment
    )
    assert done.stdout == f"{ANSWER[:20]}:141\n"
    assert done.stderr == ""


def test_help_into_a_closed_pipe_is_silent_too(environment: dict[str, str]) -> None:
    done = shell("llamacli run --help | head -1; llamacli config | head -1 >/dev/null", environment)
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("options", ["", "--json", "--no-stream"])
def test_a_full_disk_is_exit_code_six(options: str, environment: dict[str, str]) -> None:
    done = shell(f"llamacli {options} -n 3 hi </dev/null >/dev/full", environment)
    assert done.returncode == 6
    assert "No space left" in one_line(done.stderr)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["--help", "--version", "config", "tokenize hi", "doctor --json"])
def test_a_full_disk_is_said_by_every_command(command: str, environment: dict[str, str]) -> None:
    done = shell(f"llamacli {command} </dev/null >/dev/full", environment)
    assert done.returncode == 6
    assert "No space left" in one_line(done.stderr)


def test_closed_streams_are_survived_or_said(environment: dict[str, str]) -> None:
    closed = shell("llamacli -n 3 hi </dev/null >&-", environment)
    assert closed.returncode == 2 and "standard output is closed" in one_line(closed.stderr)
    for redirections in ("<&-", "</dev/null 2>&-", "<&- 2>&-"):
        done = shell(f"llamacli --temperature 0 '{LLAMA2}' {redirections}", environment)
        assert (done.stdout, done.returncode) == (ANSWER + "\n", 0)


def test_a_silent_stdin_is_mentioned_and_waited_for(environment: dict[str, str]) -> None:
    done = shell(f"{{ sleep 4; printf '{LLAMA2}'; }} | llamacli --temperature 0", environment)
    assert done.stdout == ANSWER + "\n"
    assert "waiting for text on standard input" in one_line(done.stderr)


def test_nothing_but_the_answer_reaches_a_file(environment: dict[str, str], tmp_path: Path) -> None:
    shell(f"llamacli --temperature 0 -v '{LLAMA2}' </dev/null > {tmp_path}/out", environment)
    assert (tmp_path / "out").read_bytes() == ANSWER.encode() + b"\n"


# -- signals ----------------------------------------------------------------------------------------------------


def started(arguments: list[str], environment: dict[str, str], text: str = "") -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [*PROGRAM, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    assert process.stdin is not None
    process.stdin.write(text.encode())
    process.stdin.close()
    return process


ENDLESS = ("--raw", "--temperature", "2", "--top-k", "0", "--top-p", "1", "--seed", "3", "zyx")


def test_ctrl_c_keeps_what_was_printed_and_exits_130(environment: dict[str, str]) -> None:
    with started(list(ENDLESS), environment) as process:
        assert process.stdout is not None and process.stderr is not None
        first = os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(10) == 130
        assert first and (rest or first).endswith(b"\n")
        assert process.stderr.read() == b""


@pytest.mark.parametrize("delay", [0.0, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3])
def test_ctrl_c_at_any_time_is_130_and_no_traceback(delay: float, environment: dict[str, str]) -> None:
    with started(list(ENDLESS), environment) as process:
        # Python itself is not to be interrupted: wait until the program has begun.
        time.sleep(0.05 + delay)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.wait(10) in (130, 0, 3)
        assert b"Traceback" not in process.stderr.read()


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, and enough of them that one thread reads a long prompt for ten seconds or more."""
    path = tmp_path_factory.mktemp("slow") / "slow.gguf"
    synthetic.write(path, synthetic.Shape(n_layer=12, n_embd=1024, n_ff=2816, n_head=16, n_head_kv=16), "slow-chat")
    return path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_heard_in_the_middle_of_a_long_prompt(
    number: signal.Signals, slow_model: Path, environment: dict[str, str]
) -> None:
    with started(["-m", str(slow_model), "--show-prompt", "Sum"], environment, "word " * 3500) as process:
        assert process.stderr is not None and process.stdout is not None
        while b"[/INST]" not in process.stderr.readline():  # shown just before the engine begins to read
            pass
        time.sleep(0.5)
        process.send_signal(number)
        sent = time.monotonic()
        code = process.wait(30)
        assert time.monotonic() - sent < 1, "it has waited for something"
        assert code == (130 if number == signal.SIGINT else -number)
        assert process.stdout.read() == b""
        assert b"Traceback" not in process.stderr.read()


def test_sigterm_ends_it_as_the_shell_expects(environment: dict[str, str]) -> None:
    with started(list(ENDLESS), environment) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM


# -- terminals --------------------------------------------------------------------------------------------------


def on_a_terminal(command: list[str], environment: dict[str, str]) -> tuple[str, int]:
    """Everything that a command shows on a terminal, and its exit code."""
    pid, master = pty.fork()
    if pid == 0:
        os.execvpe(command[0], command, environment)
    shown = b""
    while select.select([master], [], [], 30)[0]:
        try:
            part = os.read(master, 4096)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        shown += part
    os.close(master)
    return shown.decode().replace("\r\n", "\n"), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_terminal_sees_the_answer_without_any_decoration(environment: dict[str, str]) -> None:
    assert on_a_terminal([*PROGRAM, *GREEDY, LLAMA2], environment) == (ANSWER + "\n", 0)


def test_no_prompt_at_a_terminal_is_a_hint_and_no_waiting(environment: dict[str, str]) -> None:
    shown, code = on_a_terminal(PROGRAM, environment)
    assert code == 2
    assert 'llamacli "your question"' in one_line(shown)


NASTY = "\x1b[31mred\x07 \x9b2J \u202etxt.exe tab\tline\nend"
WRITE_NASTY = f"from llamacli.commands.terminal import Answer; a = Answer(); a.write({NASTY!r}); a.end()"


def test_control_characters_are_shown_harmless_on_a_terminal(environment: dict[str, str]) -> None:
    shown, _ = on_a_terminal([sys.executable, "-c", WRITE_NASTY], environment)
    assert shown.expandtabs() == "^[[31mred^G <U+009B>2J <U+202E>txt.exe tab\tline\nend\n".expandtabs()


def test_a_pipe_gets_the_model_s_own_bytes() -> None:
    done = subprocess.run([sys.executable, "-c", WRITE_NASTY], stdout=subprocess.PIPE, check=True)
    assert done.stdout.decode() == NASTY + "\n"


# -- the other commands -----------------------------------------------------------------------------------------


def test_tokenize_lists_ids_and_pieces(llamacli: Run) -> None:
    assert llamacli("tokenize", "Hello [INST]\n").stdout == "15043\t Hello\n518\t [\n25580\tINST\n29962\t]\n13\t\\n\n"
    assert llamacli("tokenize", "--count", input="Hello world").stdout == "2\n"
    record = json.loads(llamacli("tokenize", "--json", "Hello world").stdout)
    assert record == {"count": 2, "tokens": [15043, 3186], "pieces": [" Hello", " world"]}


def test_config_shows_where_a_value_comes_from(llamacli: Run, environment: dict[str, str]) -> None:
    shown = json.loads(llamacli("config", "--json").stdout)
    assert shown["settings"]["model"] == {"value": "tiny", "source": "environment", "from": "LLAMACLI_MODEL"}
    home = Path(environment["LLAMACLI_HOME"])
    home.mkdir()
    (home / "config.toml").write_text("temprature = 0.5\n")
    wrong = llamacli("hi")
    assert wrong.returncode == 2 and "did you mean temperature" in one_line(wrong.stderr)


def test_version_is_the_package_s(llamacli: Run) -> None:
    from llamacli import __version__

    assert llamacli("--version").stdout == f"llamacli {__version__}\n"


@pytest.mark.parametrize("command", ["", "run", "config", "embed", "tokenize", "bench", "doctor", "presets"])
def test_every_help_has_an_example(command: str, llamacli: Run) -> None:
    done = llamacli(*command.split(), "--help")
    assert done.returncode == 0
    assert "Example: " in done.stdout


@pytest.mark.parametrize("command", ["run", "config", "embed", "tokenize", "bench", "doctor", "presets"])
def test_the_example_in_the_help_works_as_printed(command: str, llamacli: Run, environment: dict[str, str]) -> None:
    example = llamacli(command, "--help").stdout.rpartition("Example: ")[2]
    done = shell(" ".join(example.split()) + " </dev/null", environment)
    assert done.returncode == 0 and done.stdout


@pytest.mark.parametrize(
    ("line", "expected"),
    [("llamacli --temp", "--temperature"), ("llamacli -m ti", "tiny"), ("llamacli to", "tokenize")],
)
def test_bash_completes_options_models_and_commands(line: str, expected: str, environment: dict[str, str]) -> None:
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1), "_LLAMACLI_COMPLETE": "complete_bash"}
    done = subprocess.run(PROGRAM, capture_output=True, encoding="utf-8", env=environment | words, timeout=20)
    assert expected in done.stdout.split()
