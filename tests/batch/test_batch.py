"""`llamacli batch` as a process: a file of prompts in, a file of answers out, whatever is in it or happens to it."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import PROGRAM, Run, golden

QUESTION = "Tell me about llama2"
ANSWER = golden()[0].answer
GREEDY = ("--temperature", "0")


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def answers(text: str) -> list[dict[str, Any]]:
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def prompts(n: int) -> list[dict[str, Any]]:
    return [{"id": f"q{i}", "prompt": f"What is {i} + {i % 7}?"} for i in range(n)]


def test_answers_come_in_the_order_of_the_input_with_their_ids(llamacli: Run, tmp_path: Path) -> None:
    lines = [
        {"id": "long", "prompt": QUESTION},
        {"id": 7, "prompt": "What is the capital of France?", "system": "Answer in one word."},
        {"prompt": QUESTION, "max_tokens": 3, "metadata": {"row": 1}},
    ]
    source, out = written(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    done = llamacli("batch", str(source), "-o", str(out), *GREEDY)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    found = answers(out.read_text())
    assert [each["id"] for each in found] == ["long", 7, 3]
    assert [each["answer"] for each in found][:2] == [ANSWER, "Paris"]
    assert found[0]["finish_reason"] == "stop" and found[0]["usage"]["completion_tokens"] == 79
    assert found[2]["finish_reason"] == "length" and found[2]["metadata"] == {"row": 1}
    assert ANSWER.startswith(found[2]["answer"])
    assert "3 lines" in done.stderr and "tokens/s" in done.stderr


def test_it_reads_stdin_and_writes_stdout(llamacli: Run) -> None:
    done = llamacli("batch", "-", "-q", *GREEDY, input=json.dumps({"prompt": QUESTION}))
    assert (done.returncode, done.stderr) == (0, "")
    assert [each["answer"] for each in answers(done.stdout)] == [ANSWER]


def test_the_cache_may_take_half_the_memory(llamacli: Run) -> None:
    done = llamacli("batch", "-", "-v", "-n", "4", "--kv-type", "q8_0", input=json.dumps({"prompt": QUESTION}))
    assert done.returncode == 0 and "kv_type = q8_0 (--kv-type)" in done.stderr
    refused = llamacli("batch", "-", "--kv-type", "q9", input=json.dumps({"prompt": QUESTION}))
    assert (refused.returncode, refused.stdout) == (2, "") and "f16 or q8_0, not 'q9'" in refused.stderr


def test_standard_output_is_added_to_and_never_emptied(llamacli: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with out.open("a") as file:
        file.write("before\n")
        file.flush()
        done = llamacli("batch", "-", "-n", "1", input='{"prompt": "hi"}', capture_output=False, stdout=file)
    assert done.returncode == 0
    before, line = out.read_text().splitlines()
    assert before == "before" and json.loads(line)["id"] == 1


def test_a_pipe_is_answered_line_by_line_while_it_is_open(environment: dict[str, str]) -> None:
    command = [*PROGRAM, "batch", "-", "-q", *GREEDY]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, encoding="utf-8"
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for i in range(2):
            process.stdin.write(json.dumps({"id": i, "prompt": "hi", "max_tokens": 2}) + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["id"] == i
        process.stdin.close()
        assert process.wait(30) == 0


FAULTY: list[tuple[str | bytes, str]] = [
    ('{"prompt": "hi"', "not JSON"),
    ("[1]", "not a JSON object"),
    ("{}", "prompt is missing"),
    ('{"prompt": " "}', "the prompt is empty"),
    ('{"prompt": 3}', "prompt must be a string, not 3"),
    ('{"prompt": "hi", "temprature": 1}', "not supported: temprature"),
    ('{"prompt": "hi", "temperature": 3}', "temperature must be between 0 and 2"),
    ('{"prompt": "hi", "system": "a", "system_prompt": "b"}', "given twice"),
    ('{"prompt": "hi", "id": {}}', "id must be a string"),
    ('{"prompt": "\\ud800"}', "surrogate"),
    ('{"prompt": NaN}', "NaN is not allowed"),
    (b'{"prompt": "caf\xe9"}', "not UTF-8: byte 16 is 0xe9"),
    ('{"prompt": "hi", "schema": {"not": {}}}', "schema: #: not not supported"),
    ('{"prompt": "hi", "schema": "a int", "choices": ["a"]}', "contradict"),
    ('{"prompt": "hi", "choices": ["a"], "stop": "b"}', "stop might cut"),
    ("[" * 100_000, "nested too deeply"),
    ('{"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {}}', "url must be"),
    ('{"custom_id": 3, "body": {}}', "custom_id must be a string"),
]


def test_standard_input_that_does_not_block_is_waited_for(environment: dict[str, str]) -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    command = [*PROGRAM, "batch", "-", "-n", "2", "-v"]
    with subprocess.Popen(
        command, env=environment, stdin=reader, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        os.close(reader)
        assert process.stderr is not None and process.stdout is not None
        while b"threads" not in (said := process.stderr.readline()):  # by then it has looked for lines
            assert said
        for line in (b'{"prompt": "hi"}\n', b'{"prompt": "there"}\n'):
            os.write(writer, line)
            assert "answer" in json.loads(process.stdout.readline())
        os.close(writer)
        assert process.wait(60) == 0


def test_what_is_wrong_with_a_line_is_said_with_its_number_and_the_rest_is_done(llamacli: Run, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    good = json.dumps({"prompt": "hi", "max_tokens": 2}).encode()
    raw = [line if isinstance(line, bytes) else line.encode() for line, _ in FAULTY]
    source.write_bytes(b"\xef\xbb\xbf" + b"\n".join([good, b"", *raw, b"  ", good]))
    done = llamacli("batch", str(source))
    assert done.returncode == 9
    first, *failed, last = answers(done.stdout)
    assert "answer" in first and "answer" in last
    assert len(failed) == len(FAULTY)
    for i, (found, (_, reason)) in enumerate(zip(failed, FAULTY, strict=True)):
        assert f"line {i + 3}: " in found["error"]["message"]
        assert reason in found["error"]["message"]
        assert f"line {i + 3}: " in done.stderr
    assert f"{len(FAULTY)} of them failed" in done.stderr.splitlines()[-1]


def test_a_prompt_that_does_not_fit_is_an_error_of_its_line_or_is_cut(llamacli: Run, tmp_path: Path) -> None:
    source = written(
        tmp_path / "in.jsonl", {"prompt": "word " * 3000, "max_tokens": 2}, {"prompt": "hi", "max_tokens": 2}
    )
    done = llamacli("batch", str(source))
    assert done.returncode == 9
    failed, good = answers(done.stdout)
    assert failed["error"]["code"] == 4 and "1,024" in failed["error"]["message"] and failed["line"] == 1
    assert "answer" in good
    cut = llamacli("batch", str(source), "--on-overflow", "tail")
    assert cut.returncode == 0 and len(answers(cut.stdout)) == 2


def test_an_answer_that_the_context_cuts_counts_as_failed_and_stays(llamacli: Run, tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", {"prompt": QUESTION}, {"prompt": "hi", "max_tokens": 1})
    done = llamacli("batch", str(source), "-c", "64", *GREEDY)
    assert done.returncode == 9
    cut, _ = answers(done.stdout)
    assert cut["error"]["code"] == 3 and cut["finish_reason"] == "length" and ANSWER.startswith(cut["answer"])


def test_forms_hold_for_a_line_or_for_all(llamacli: Run, tmp_path: Path) -> None:
    hot = {"temperature": 1.5, "top_k": 0, "top_p": 1, "max_tokens": 30, "prompt": "Who is it?"}
    lines = [
        hot | {"seed": 1},
        hot | {"choices": ["yes", "no"]},
        hot | {"schema": {"type": "array", "items": {"type": "integer"}, "minItems": 2}, "seed": 2},
        hot | {"json_object": True},
    ]
    done = llamacli("batch", str(written(tmp_path / "in.jsonl", *lines)), "--schema", "name, age int")
    assert done.returncode == 0, done.stderr
    first, second, third, fourth = answers(done.stdout)
    assert json.loads(first["answer"]).keys() == {"name", "age"}
    assert second["answer"] in ("yes", "no")
    assert len(json.loads(third["answer"])) >= 2
    assert isinstance(json.loads(fourth["answer"]), dict)
    for each in (first, third, fourth):
        assert each["finish_reason"] == "stop" or each["answer"].endswith(each.get("closed_with", ""))


def test_a_schema_that_is_none_is_an_error_of_its_line(llamacli: Run, tmp_path: Path) -> None:
    broken = {"type": "integer", "allOf": [{"minimum": 1}, {"minimum": "2"}]}
    asked = {"type": "json_schema", "json_schema": {"name": "n", "schema": broken}}
    body = {"messages": [{"role": "user", "content": "hi"}], "response_format": asked}
    source = written(
        tmp_path / "in.jsonl",
        {"prompt": "hi", "schema": broken},
        {"custom_id": "o", "url": "/v1/chat/completions", "body": body},
        {"prompt": "hi"},
    )
    done = llamacli("batch", str(source), "-n", "2")
    ours, openai, good = answers(done.stdout)
    assert done.returncode == 9 and "Traceback" not in done.stderr
    assert ours["error"]["code"] == 2 and "no valid JSON schema" in ours["error"]["message"]
    assert openai["response"]["status_code"] == 400 and good["answer"]


def test_forms_and_the_system_prompt_hold_for_openai_s_lines_that_say_nothing_else(
    llamacli: Run, tmp_path: Path
) -> None:
    ask, own = {"role": "user", "content": QUESTION}, {"role": "system", "content": "Answer in one word."}
    chat, text = {"url": "/v1/chat/completions"}, {"url": "/v1/completions"}
    lines = [
        {"custom_id": "plain", "body": {"messages": [ask]}, **chat},
        {"custom_id": "own", "body": {"messages": [own, ask]}, **chat},
        {"custom_id": "object", "body": {"messages": [ask], "response_format": {"type": "json_object"}}, **chat},
        {"custom_id": "stop", "body": {"messages": [ask], "stop": "x"}, **chat},
        {"custom_id": "text", "body": {"prompt": "Is it?"}, **text},
    ]
    source = written(tmp_path / "in.jsonl", *lines)
    formed = answers(llamacli("batch", str(source), "-n", "40", "--choices", "yes,no").stdout)
    bodies = {each["custom_id"]: each["response"]["body"] for each in formed}
    assert {bodies[name]["choices"][0]["message"]["content"] for name in ("plain", "own")} <= {"yes", "no"}
    assert bodies["text"]["choices"][0]["text"] in ("yes", "no")
    assert bodies["object"]["choices"][0]["message"]["content"].lstrip().startswith("{")
    assert "stop might cut" in bodies["stop"]["error"]["message"]
    counts = []
    for options in ((), ("-s", "You are a helpful and very patient assistant.")):
        found = answers(llamacli("batch", str(source), "-n", "2", *options).stdout)
        counts.append([each["response"]["body"].get("usage", {}).get("prompt_tokens") for each in found])
    without, with_it = counts
    assert with_it[0] > without[0] and with_it[1] == without[1], "only where there is none"
    assert with_it[4] is None, "a text has none"


def test_openai_s_format_is_answered_in_openai_s_format(llamacli: Run, tmp_path: Path) -> None:
    chat = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    envelope = {"method": "POST", "url": "/v1/chat/completions"}
    lines = [
        {"custom_id": "a", "body": chat, **envelope},
        {"custom_id": "b", "body": chat | {"n": 2, "max_tokens": 4, "temperature": 1}, **envelope},
        {"custom_id": "c", "body": chat | {"logit_bias": 3}, **envelope},
        {"custom_id": "d", "method": "POST", "url": "/v1/completions", "body": {"prompt": ["a", "b"], "max_tokens": 2}},
        {"custom_id": "e", "body": chat | {"messages": [{"role": "user", "content": "x " * 3000}]}, **envelope},
        {"custom_id": "f", "body": chat | {"stream": True}, **envelope},
    ]
    done = llamacli("batch", str(written(tmp_path / "in.jsonl", *lines)))
    assert done.returncode == 9
    found = answers(done.stdout)
    assert [each["custom_id"] for each in found] == list("abcdef")
    assert [each["response"]["status_code"] for each in found] == [200, 200, 400, 200, 400, 400]
    assert all(each["error"] is None for each in found)
    first, second, third, fourth, fifth, _ = (each["response"]["body"] for each in found)
    assert first["object"] == "chat.completion" and first["choices"][0]["message"]["content"] == ANSWER
    assert [choice["index"] for choice in second["choices"]] == [0, 1]
    assert "logit_bias" in third["error"]["message"]
    assert [choice["index"] for choice in fourth["choices"]] == [0, 1]
    assert "1,024" in fifth["error"]["message"]


# -- CSV and templates ------------------------------------------------------------------------------------------


def test_a_csv_is_read_with_a_template(llamacli: Run, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    with source.open("w", newline="") as file:
        csv.writer(file).writerows(
            [["id", "text", "n"], ["a", 'hello, "world"\nagain', "1"], ["b", "bye", "2"], ["too", "few"]]
        )
    done = llamacli("batch", str(source), "--template", "Repeat {{{n}}}: {text}", "-n", "1", "-v")
    assert done.returncode == 9
    first, second, third = answers(done.stdout)
    assert (first["id"], second["id"]) == ("a", "b")
    assert third["error"]["message"] == "line 5: 2 cells; there are 3 columns"


def test_a_csv_with_a_prompt_column_needs_no_template_and_jsonl_may_have_one(llamacli: Run) -> None:
    done = llamacli("batch", "-", "--format", "csv", *GREEDY, input=f"prompt\n{QUESTION}\n")
    assert [each["answer"] for each in answers(done.stdout)] == [ANSWER]
    line = json.dumps({"id": "x", "topic": "llama2", "unused": [1]})
    done = llamacli("batch", "-", "--template", "Tell me about {topic}", *GREEDY, input=line)
    assert [(each["id"], each["answer"]) for each in answers(done.stdout)] == [("x", ANSWER)]


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        ("a,b\n1,2\n", ["--format", "csv"], "no column is called prompt"),
        ("a,a\n1,2\n", ["--format", "csv"], "each its own"),
        ("", ["--format", "csv"], "it is empty"),
        ("a,b\n1,2\n", ["--format", "csv", "--template", "{c}"], "--template names c; there are a, b"),
        ("{}", ["--template", "none"], "names no column"),
        ("{}", ["--template", "{a} {"], "character 5 stands alone"),
        ("{}", ["--format", "xml"], "--format must be jsonl or csv"),
        ("{}", ["--slots", "0"], "--slots must be between 1 and 128"),
        ("{}", ["--schema", "a", "--choices", "b"], "contradict"),
        ("{}", ["--resume"], "for a file: name it with -o"),
        ("{}", ["-o", "/no/such/directory/out"], "No such file or directory"),
        ("{}", ["--temperature", "3"], "--temperature must be between"),
    ],
)
def test_wrong_usage_is_one_line_and_nothing_is_loaded(
    text: str, arguments: list[str], said: str, llamacli: Run
) -> None:
    done = llamacli("batch", "-", *arguments, input=text)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and said in done.stderr


# -- the output -------------------------------------------------------------------------------------------------


def test_an_output_that_is_there_is_not_overwritten_unless_forced(llamacli: Run, tmp_path: Path) -> None:
    source, out = written(tmp_path / "in.jsonl", *prompts(2)), written(tmp_path / "out.jsonl", "precious")
    command = ("batch", str(source), "-o", str(out), "-n", "2")
    refused = llamacli(*command)
    assert refused.returncode == 2 and "--resume goes on with it, --force writes it anew" in refused.stderr
    strange = llamacli(*command, "--resume")
    assert strange.returncode == 2 and "is none that a batch has written" in strange.stderr
    out.write_text("precious")
    assert llamacli(*command, "--resume").returncode == 2
    assert out.read_text() == "precious"
    assert llamacli(*command, "--force").returncode == 0
    assert len(answers(out.read_text())) == 2
    assert llamacli("batch", str(source), "-o", str(source)).returncode == 2
    assert len(source.read_text().splitlines()) == 2
    empty = llamacli("batch", "-", "-o", str(out), "--force", "-n", "2", input="")
    assert empty.returncode == 0 and out.read_text() == ""
    assert llamacli(*command).returncode == 0
    broken = llamacli(*command, "--force", "-m", "/no/such.gguf")
    assert broken.returncode == 5
    assert len(answers(out.read_text())) == 2, "a model that is not there costs nothing"


def test_resume_goes_on_where_it_stopped_and_says_so(llamacli: Run, tmp_path: Path) -> None:
    source, out = written(tmp_path / "in.jsonl", *prompts(6)), tmp_path / "out.jsonl"
    command = ("batch", str(source), "-o", str(out), "-n", "3", "--seed", "1")
    assert llamacli(*command).returncode == 0
    whole = out.read_text()
    lines = whole.splitlines(keepends=True)
    out.write_text("".join(lines[:3]) + lines[3][:20])  # cut off in the middle of a line
    done = llamacli(*command, "--resume")
    assert done.returncode == 0 and "6 lines, 3 of them before" in done.stderr
    assert [each["id"] for each in answers(out.read_text())] == [f"q{i}" for i in range(6)]
    assert out.read_text().startswith("".join(lines[:3]))
    again = llamacli(*command, "--resume")
    assert again.returncode == 0 and "done already" in again.stderr
    written(source, *prompts(6)[1:])
    other = llamacli(*command, "--resume")
    assert other.returncode == 2 and "its line 1 answers 'q0', where 'q1' was asked" in other.stderr
    written(source, *prompts(2))
    assert "6 lines and" in llamacli(*command, "--resume").stderr


def test_a_file_is_not_touched_before_it_is_known_to_be_this_input_s(llamacli: Run, tmp_path: Path) -> None:
    source, out = written(tmp_path / "in.jsonl", *prompts(2)), tmp_path / "out.jsonl"
    command = ("batch", str(source), "-o", str(out), "-n", "2")
    other = '{"id": "x", "answer": "precious"}\n{"id": "y", "ans'
    out.write_text(other)
    refused = llamacli(*command, "--resume")
    assert refused.returncode == 2 and "was not written from" in refused.stderr
    assert out.read_text() == other
    whole = '{"id": "q0", "answer": "a"}\n{"id": "q1", "answer": "b"}\n'
    out.write_text(whole + '{"id": "q')
    done = llamacli(*command, "--resume")
    assert done.returncode == 0 and "done already" in done.stderr and out.read_text() == whole
    source.write_text("")
    assert llamacli(*command, "--force").returncode == 0
    assert out.read_text() == "", "an empty input has no answers"


def test_a_resumed_run_still_tells_of_lines_that_failed_before(llamacli: Run, tmp_path: Path) -> None:
    source, out = written(tmp_path / "in.jsonl", "{}", *prompts(2)), tmp_path / "out.jsonl"
    assert llamacli("batch", str(source), "-o", str(out), "-n", "2").returncode == 9
    out.write_text(out.read_text().splitlines(keepends=True)[0])
    assert llamacli("batch", str(source), "-o", str(out), "-n", "2", "--resume").returncode == 9
    assert llamacli("batch", str(source), "-o", str(out), "-n", "2", "--resume").returncode == 9


def begun(command: Sequence[str], out: Path, environment: dict[str, str], n: int) -> subprocess.Popen[str]:
    """A process that has written `n` lines at least."""
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, encoding="utf-8")
    while not out.exists() or out.read_bytes().count(b"\n") < n:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    return process


def test_nothing_is_lost_or_doubled_however_often_it_is_killed(
    llamacli: Run, environment: dict[str, str], tmp_path: Path
) -> None:
    source, out, whole = written(tmp_path / "in.jsonl", *prompts(120)), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    options = ("-n", "12", "--slots", "4", *GREEDY)
    command = [*PROGRAM, "batch", str(source), "-o", str(out), *options, "--resume"]
    for n in (3, 20, 45, 70):
        with begun(command, out, environment, n) as process:
            process.kill()
    assert out.read_bytes().count(b"\n") < 120, "it was killed too late to show anything"
    assert subprocess.run(command, env=environment, capture_output=True, timeout=60).returncode == 0
    assert llamacli("batch", str(source), "-o", str(whole), *options).returncode == 0
    found, wanted = answers(out.read_text()), answers(whole.read_text())
    assert [each["id"] for each in found] == [each["id"] for each in wanted] == [f"q{i}" for i in range(120)]
    same = sum(a["answer"] == b["answer"] for a, b in zip(found, wanted, strict=True))
    assert same >= 110, "who is answered together rounds a little differently, no more"


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(environment: dict[str, str], tmp_path: Path) -> None:
    source, out = written(tmp_path / "in.jsonl", *prompts(300)), tmp_path / "out.jsonl"
    command = [*PROGRAM, "batch", str(source), "-o", str(out), "-n", "30", "--slots", "2"]
    with begun(command, out, environment, 5) as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr is not None
        said = process.stderr.read()
    n_done = len(answers(out.read_text()))
    assert f"interrupted: {n_done} of 300 lines are done; the same command with --resume goes on" in said
    assert "Traceback" not in said


def test_a_pipe_whose_reader_goes_away_ends_it(environment: dict[str, str], tmp_path: Path) -> None:
    source, pipe = written(tmp_path / "in.jsonl", *prompts(60)), tmp_path / "pipe"
    os.mkfifo(pipe)
    command = [*PROGRAM, "batch", str(source), "-o", str(pipe), "-n", "8", "--slots", "1"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        with pipe.open("rb", buffering=0) as reader:
            assert reader.read(1) == b"{"
        assert process.wait(60) == -signal.SIGPIPE
    refused = subprocess.run([*command, "--resume"], env=environment, capture_output=True, timeout=60)
    assert refused.returncode == 2 and b"is no file" in refused.stderr


def test_the_terminal_has_its_cursor_again_when_the_reader_goes_away(
    environment: dict[str, str], tmp_path: Path
) -> None:
    source = written(tmp_path / "in.jsonl", *prompts(60))
    command = [*PROGRAM, "batch", str(source), "-n", "8", "--slots", "1"]
    ours, theirs = os.openpty()
    try:
        with subprocess.Popen(
            command, env=environment | {"TERM": "xterm"}, stdout=subprocess.PIPE, stderr=theirs
        ) as process:
            os.close(theirs)
            assert process.stdout is not None and process.stdout.read(1) == b"{"
            process.stdout.close()
            shown = b""
            with suppress(OSError):  # as the end of a terminal is told
                while part := os.read(ours, 1 << 16):
                    shown += part
            assert process.wait(60) == -signal.SIGPIPE
    finally:
        os.close(ours)
    assert shown.rindex(b"\x1b[?25l") < shown.rindex(b"\x1b[?25h")


def test_two_batches_never_write_one_file(environment: dict[str, str], llamacli: Run, tmp_path: Path) -> None:
    source, out = written(tmp_path / "in.jsonl", *prompts(300)), tmp_path / "out.jsonl"
    command = ["batch", str(source), "-o", str(out), "-n", "30", "--slots", "2"]
    with begun([*PROGRAM, *command], out, environment, 1) as process:
        second = llamacli(*command, "--resume")
        assert second.returncode == 2 and "another llamacli batch is writing" in second.stderr
        process.kill()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_exit_code_six(llamacli: Run) -> None:
    done = llamacli("batch", "-", "-o", "/dev/full", input='{"prompt": "hi", "max_tokens": 2}')
    assert done.returncode == 6 and "No space left" in done.stderr


def test_a_seed_repeats_the_whole_file(llamacli: Run, tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", *prompts(20))
    hot = ("--temperature", "1", "--seed", "7", "-n", "10")
    first, second = (llamacli("batch", str(source), *hot).stdout for _ in range(2))
    assert first == second
    assert all(each["seed"] == 7 for each in answers(first))


def test_the_progress_is_said_on_stderr(llamacli: Run, tmp_path: Path) -> None:
    code = (
        "import time\n"
        "from llamacli.commands import pace\n"
        "from llamacli.commands.terminal import Notices\n"
        "p = pace.Pace('prompts', 4, Notices(), done=1)\n"
        "p._said -= 6; p._started -= 2\n"
        "p.count(n_tokens=100)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stderr.startswith("llamacli: 2 of 4 prompts, 50 tokens/s, 0 min 04 s left")


def test_help_has_an_example_that_works_as_printed(llamacli: Run, environment: dict[str, str]) -> None:
    example = llamacli("batch", "--help").stdout.rpartition("Example: ")[2]
    script = f'llamacli() {{ {sys.executable} -m llamacli "$@"; }}\n{" ".join(example.split())}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, encoding="utf-8", env=environment, cwd=os.sep)
    assert done.returncode == 0 and "answer" in answers(done.stdout)[0]
