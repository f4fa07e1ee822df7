"""`keys` and `usage` in the shell's hands: real processes, real files, real terminals."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest
from conftest import PROGRAM, Run

from llamacli.server.keyring import KeyRing
from llamacli.server.keys import Key, every
from llamacli.server.ledger import FILENAME, Ledger
from llamacli.server.usage import Usage

KEY = re.compile(r"llk_[0-9a-f]{8}_[\w-]{43}")


def ledger_path(environment: dict[str, str]) -> Path:
    return Path(environment["LLAMACLI_HOME"], "data", FILENAME)


def stored(environment: dict[str, str]) -> list[Key]:
    with Ledger(ledger_path(environment)) as ledger:
        return every(ledger)


def shell(script: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    text = f'llamacli() {{ {shlex.join(PROGRAM)} "$@"; }}\n{script}'
    return subprocess.run(["bash", "-c", text], capture_output=True, encoding="utf-8", env=environment, timeout=60)


def one_line(stderr: str) -> str:
    assert stderr.startswith("llamacli: ") and stderr.count("\n") == 1, stderr
    return stderr


def used(environment: dict[str, str], *requests: tuple[str, int, int, bool]) -> None:
    """What a server would have recorded just now: key id, prompt and completion tokens, whether it failed."""
    usage = Usage(time.time)
    for key_id, prompt_tokens, completion_tokens, is_error in requests:
        usage.record(key_id, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, is_error=is_error)
    with Ledger(ledger_path(environment)) as ledger:
        usage.flush(ledger)


def test_the_key_is_alone_on_stdout_and_the_server_takes_it(llamacli: Run, environment: dict[str, str]) -> None:
    done = shell('KEY=$(llamacli keys create --name me) && echo "<$KEY>"', environment)
    text = done.stdout.strip().strip("<>")
    assert KEY.fullmatch(text) and done.returncode == 0
    assert "shown this once" in one_line(done.stderr) and text not in done.stderr
    ring = KeyRing((), Usage(time.time))
    ring.replace(stored(environment))
    found = ring.check(text)
    assert found is not None and found.name == "me"


def test_json_has_the_key_and_its_limits(llamacli: Run) -> None:
    record = json.loads(
        llamacli("keys", "create", "--name", "me", "--rpm", "60", "--tokens-per-day", "9000", "--json").stdout
    )
    assert KEY.fullmatch(record["key"]) and record["key"].split("_")[1] == record["id"]
    assert (record["name"], record["rpm"], record["tokens_per_day"]) == ("me", 60, 9000)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record["created"])
    (listed,) = json.loads(llamacli("keys", "list", "--json").stdout)
    assert listed == {name: value for name, value in record.items() if name != "key"}


@pytest.mark.parametrize("reader", ["> /dev/full", "| exec true 0<&-", ">&-"])
def test_a_key_that_nobody_could_read_is_not_created(reader: str, environment: dict[str, str]) -> None:
    # The reader is gone before the program begins to write.
    done = shell(f"{{ sleep 0.05; llamacli keys create --name me; }} {reader}; exit ${{PIPESTATUS[0]}}", environment)
    assert done.returncode != 0
    assert not ledger_path(environment).exists() or stored(environment) == []


def test_list_shows_limits_and_times_and_never_a_key(llamacli: Run, environment: dict[str, str]) -> None:
    text = llamacli("keys", "create", "--name", "me", "--rpm", "5").stdout.strip()
    llamacli("keys", "create", "--name", "you")
    llamacli("keys", "revoke", "YOU")
    me, you = sorted(stored(environment), key=lambda key: key.name)
    used(environment, (me.id, 1, 1, False))
    heading, first, second = llamacli("keys", "list").stdout.splitlines()
    assert heading.split()[:4] == ["name", "id", "rpm", "tokens/day"]
    minute = r"\d{4}-\d\d-\d\d \d\d:\d\d"
    assert re.fullmatch(rf"me +{me.id} +5 +- +{minute} +{minute} +-", first)
    assert re.fullmatch(rf"you +{you.id} +- +- +{minute} +- +{minute}", second)
    assert {heading.index("id"), first.index(me.id), second.index(you.id)} == {heading.index("id")}
    for shown in (first, llamacli("keys", "list", "--json").stdout):
        assert text not in shown and text.split("_", 2)[2] not in shown and me.digest.hex() not in shown


def test_revoke_says_what_it_did_and_keeps_stdout_empty(llamacli: Run) -> None:
    llamacli("keys", "create", "--name", "laptop")
    wrong = llamacli("keys", "revoke", "labtop")
    assert wrong.returncode == 2 and "did you mean 'laptop'?" in one_line(wrong.stderr)
    done = llamacli("keys", "revoke", "laptop")
    assert (done.returncode, done.stdout) == (0, "") and "is revoked" in one_line(done.stderr)
    again = llamacli("keys", "revoke", "laptop")
    assert (again.returncode, again.stdout) == (0, "") and "was revoked already, at 20" in one_line(again.stderr)


def test_looking_creates_nothing(llamacli: Run, environment: dict[str, str]) -> None:
    assert llamacli("keys", "list", "--json").stdout == llamacli("usage", "--json").stdout == "[]\n"
    listed, counted = llamacli("keys", "list"), llamacli("usage")
    assert listed.stdout == counted.stdout == ""
    assert "keys create --name NAME" in one_line(listed.stderr)
    assert "no requests in the last 30 days" in one_line(counted.stderr)
    unknown = llamacli("keys", "revoke", "me")
    assert unknown.returncode == 2 and "there is no key 'me'" in one_line(unknown.stderr)
    assert not Path(environment["LLAMACLI_HOME"]).exists()


def test_usage_shows_each_key_and_those_without_one(llamacli: Run, environment: dict[str, str]) -> None:
    llamacli("keys", "create", "--name", "me")
    (me,) = stored(environment)
    used(environment, (me.id, 1000, 200, False), (me.id, 0, 0, True), ("-", 3, 4, False), ("command line", 1, 1, False))
    table = llamacli("usage").stdout.splitlines()
    assert [re.split(r"  +", line)[1:] for line in table] == [
        ["key", "id", "requests", "errors", "prompt tokens", "completion tokens"],
        ["-", "-", "1", "0", "3", "4"],
        ["command line", "-", "1", "0", "1", "1"],
        ["me", me.id, "2", "1", "1,000", "200"],
    ]
    assert len({len(line) for line in table}) == 1  # numbers stand to the right
    (record,) = json.loads(llamacli("usage", "--key", "ME", "--days", "1", "--json").stdout)
    assert record.pop("day").startswith("20")
    assert record == {
        "name": "me",
        "id": me.id,
        "requests": 2,
        "errors": 1,
        "prompt_tokens": 1000,
        "completion_tokens": 200,
    }
    (record,) = json.loads(llamacli("usage", "--key", "-", "--json").stdout)
    assert (record["name"], record["id"], record["requests"]) == ("-", None, 1)
    wrong = llamacli("usage", "--key", "mee")
    assert wrong.returncode == 2 and "did you mean 'me'?" in one_line(wrong.stderr)


def test_a_terminal_gets_a_bold_heading_and_a_pipe_does_not(llamacli: Run, environment: dict[str, str]) -> None:
    llamacli("keys", "create", "--name", "me")
    ours, theirs = pty.openpty()
    subprocess.run(
        [*PROGRAM, "keys", "list"], stdout=theirs, stdin=subprocess.DEVNULL, env=environment, check=True, timeout=60
    )
    os.close(theirs)
    shown = os.read(ours, 4096).decode()
    os.close(ours)
    assert shown.startswith("\x1b[1mname  id") and shown.count("\x1b") == 2
    assert "\x1b" not in llamacli("keys", "list").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["keys"], "Missing command"),
        (["keys", "create"], "--name"),
        (["keys", "create", "--name", "x", "--rpm", "0"], "--rpm must be a whole number between 1 and 100,000, not 0"),
        (["keys", "create", "--name", "x", "--rpm", "many"], "--rpm"),
        (["keys", "make"], "make"),
        (["usage", "--days", "0"], "--days must be"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(arguments: list[str], said: str, llamacli: Run) -> None:
    done = llamacli(*arguments)
    assert (done.returncode, done.stdout) == (2, "") and said in one_line(done.stderr)


def test_a_damaged_ledger_is_one_line_and_exit_6(llamacli: Run, environment: dict[str, str]) -> None:
    path = ledger_path(environment)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a database " * 1000)
    for arguments in (["keys", "create", "--name", "me"], ["keys", "list"], ["keys", "revoke", "me"], ["usage"]):
        done = llamacli(*arguments)
        assert (done.returncode, done.stdout) == (6, "") and "is damaged" in one_line(done.stderr)


def test_a_disk_without_room_is_one_line_and_exit_6(environment: dict[str, str]) -> None:
    done = shell("ulimit -f 4; llamacli keys create --name me", environment | {"PYTHONDONTWRITEBYTECODE": "1"})
    assert (done.returncode, done.stdout) == (6, "") and "cannot be written" in one_line(done.stderr)


def test_a_place_that_cannot_be_written_is_one_line_and_exit_6(llamacli: Run, environment: dict[str, str]) -> None:
    home = Path(environment["LLAMACLI_HOME"])
    home.mkdir()
    (home / "data").write_text("a file where the directory should be")
    done = llamacli("keys", "create", "--name", "me")
    assert (done.returncode, done.stdout) == (6, "") and "cannot be written: File exists" in one_line(done.stderr)


def test_the_examples_in_the_help_work_as_printed_one_after_another(environment: dict[str, str], llamacli: Run) -> None:
    for command in ("keys create", "keys list", "usage", "keys revoke", "keys"):
        example = llamacli(*command.split(), "--help").stdout.rpartition("Example: ")[2]
        done = shell(" ".join(example.split()), environment)
        assert done.returncode == 0 and example.startswith(f"llamacli {command}")
