"""Keys, limits and usage: what the server may rely on, over real SQLite files, processes and threads."""

from __future__ import annotations

import os
import queue
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llamacli.errors import LlamacliError, ResourceError, UsageError
from llamacli.server import keys
from llamacli.server.accounts import Accounts
from llamacli.server.gate import Gate, Pass
from llamacli.server.keyring import KeyRing
from llamacli.server.keys import COMMAND_LINE, NO_KEY, Key
from llamacli.server.ledger import Ledger
from llamacli.server.log import Record
from llamacli.server.usage import Counts, Usage, day_of, last_used, report

NOON = 1_735_646_400.0  # 2024-12-31 12:00 UTC
DAY = 86_400.0
LONG = 3600.0  # a period in which the thread of Accounts does nothing


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "ledger.sqlite3"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger(path) as opened:
        yield opened


def created(ledger: Ledger, name: str, *, now: float = NOON, rpm: int | None = None) -> tuple[Key, str]:
    with keys.created(ledger, name, now=now, rpm=rpm) as made:
        pass
    return made


def accounts(path: Path, *, given: tuple[str, ...] = (), period: float = LONG, clock: Clock | None = None) -> Accounts:
    return Accounts(path, given=given, clock=clock or Clock(), report=pytest.fail, period=period)


def until(holds: Callable[[], bool]) -> None:
    """Wait for another thread; five seconds mean that it will never be."""
    deadline = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process of its own, which says when it is ready and goes on when it is told to."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")


# -- keys in the ledger -----------------------------------------------------------------------------------------


def test_only_a_hash_of_a_key_is_kept(ledger: Ledger, path: Path) -> None:
    key, text = created(ledger, "me")
    secret = text.removeprefix(f"llk_{key.id}_")
    assert text.startswith("llk_") and len(secret) == 43  # 32 bytes in base64
    kept = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert key.digest in kept and secret.encode() not in kept
    assert repr(key.digest) not in repr(key)


def test_a_key_that_could_not_be_shown_is_not_created(ledger: Ledger) -> None:
    with pytest.raises(BrokenPipeError), keys.created(ledger, "me", now=NOON):
        raise BrokenPipeError
    assert keys.every(ledger) == []
    created(ledger, "me")


def test_names_are_unique_in_any_case_until_the_key_is_revoked(ledger: Ledger) -> None:
    first, _ = created(ledger, "Zoë")
    for same in ("zoë", "ZOË", "Zoe\u0308"):
        with pytest.raises(UsageError, match="there is a key 'Zoë' already"):
            created(ledger, same)
    keys.revoke(ledger, "zoë", now=NOON + 1)
    second, _ = created(ledger, "zoë", now=NOON + 2)
    assert keys.find(keys.every(ledger), "Zoë") == second and first.id != second.id


@pytest.mark.parametrize("name", ["", " me", "a\nb", "\x1b[31mred", "x" * 65, "-", "Command Line", "\ud800"])
def test_a_name_that_would_mislead_is_refused(name: str, ledger: Ledger) -> None:
    with pytest.raises(UsageError, match="--name"):
        created(ledger, name)


def test_a_name_cannot_be_another_key_s_id(ledger: Ledger) -> None:
    key, _ = created(ledger, "me")
    with pytest.raises(UsageError, match="is the id of the key 'me'"):
        created(ledger, key.id.upper())


@pytest.mark.parametrize("limit", [{"rpm": 0}, {"rpm": 100_001}, {"tokens_per_day": -1}, {"tokens_per_day": 10**16}])
def test_limits_out_of_range_are_refused_with_the_range(limit: dict[str, int], ledger: Ledger) -> None:
    with pytest.raises(UsageError, match="between 1 and 1"):
        with keys.created(ledger, "me", now=NOON, **limit):
            pass


def test_a_key_is_revoked_by_name_or_id_and_only_once(ledger: Ledger) -> None:
    one, _ = created(ledger, "one")
    created(ledger, "two", now=NOON + 0.5)
    assert keys.revoke(ledger, one.id, now=NOON + 1)[0].revoked == NOON + 1
    again, is_new = keys.revoke(ledger, "ONE", now=NOON + 9)
    assert (again.revoked, is_new) == (NOON + 1, False)
    assert [key.revoked for key in keys.every(ledger)] == [NOON + 1, None]
    with pytest.raises(UsageError, match="no key 'tow'; did you mean 'two'"):
        keys.revoke(ledger, "tow", now=NOON)


# -- the file ---------------------------------------------------------------------------------------------------


def test_the_ledger_is_its_owner_s_alone(ledger: Ledger, path: Path) -> None:
    created(ledger, "me")
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    files = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert set(files.values()) == {0o600} and len(files) == 3, files  # with SQLite's -wal and -shm


def test_processes_that_create_the_ledger_at_once_do_not_fight(path: Path) -> None:
    code = """
import sys
from pathlib import Path
from llamacli.server import keys
from llamacli.server.ledger import Ledger
from llamacli.server.usage import Usage
usage = Usage(lambda: 1735646400.0)
print("ready", flush=True)
input()
for i in range(10):
    with Ledger(Path(sys.argv[1])) as ledger:
        with keys.created(ledger, f"{sys.argv[2]} {i}", now=0.0):
            usage.record("k", prompt_tokens=1, is_error=False)
            usage.record("k", completion_tokens=2, is_error=True)
        usage.flush(ledger)
"""
    processes = [python(code, path, i) for i in range(4)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        process.communicate("go\n", timeout=30)
    assert [process.returncode for process in processes] == [0] * 4
    with Ledger(path) as ledger:
        assert len(keys.every(ledger)) == 40
        (line,) = report(ledger, NOON, n_days=1)
    assert line.counts == Counts(80, 40, 40, 80, NOON)


def test_a_ledger_opened_for_the_first_time_by_many_at_once_is_laid_out_once(tmp_path: Path) -> None:
    def opened(path: Path, together: threading.Barrier) -> bool:
        together.wait()
        with Ledger(path) as ledger:
            return keys.every(ledger) == []

    together = threading.Barrier(6)
    with ThreadPoolExecutor(6) as pool:
        for i in range(10):
            tries = [pool.submit(opened, tmp_path / str(i), together) for _ in range(6)]
            assert all(each.result(timeout=20) for each in tries)


def test_a_newer_layout_is_refused_with_both_numbers(path: Path) -> None:
    Ledger(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(UsageError, match="has layout 2, this llamacli knows up to 1"):
        Ledger(path)


def test_a_database_of_another_program_is_left_as_it_is(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE notes (text)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(ResourceError, match="of another program"):
        Ledger(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", [lambda raw: b"not a database at all, " * 400, lambda raw: raw[:5000]])
def test_a_damaged_ledger_is_one_line_that_says_what_to_do(damage: Callable[[bytes], bytes], path: Path) -> None:
    with Ledger(path) as ledger:
        created(ledger, "me")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ResourceError, match=r"is damaged: stop all servers, then") as caught:
        with Ledger(path) as ledger:
            keys.every(ledger)
    assert "\n" not in str(caught.value)


def test_a_ledger_that_another_process_keeps_locked_is_said_to_be(ledger: Ledger, path: Path) -> None:
    with Ledger(path) as other, other.transaction():
        ledger.wait_at_most(0.01)
        with pytest.raises(ResourceError, match="stays locked by another process"):
            created(ledger, "me")
        assert keys.every(ledger) == []  # readers do not wait
    created(ledger, "me")


@pytest.fixture
def not_root() -> Iterator[Path]:
    """A directory, while this process is a user who may not write what is read-only."""
    with tempfile.TemporaryDirectory() as directory:
        is_root = os.geteuid() == 0
        if is_root:
            os.chown(directory, 65534, 65534)
            os.seteuid(65534)
        try:
            yield Path(directory)
        finally:
            if is_root:
                os.seteuid(0)


def test_a_read_only_ledger_is_one_line(not_root: Path) -> None:
    path = not_root / "ledger.sqlite3"
    Ledger(path).close()
    path.chmod(0o400)
    with pytest.raises(ResourceError, match="cannot be written: it is read-only"):
        with Ledger(path) as ledger:
            created(ledger, "me")


def test_a_directory_that_may_not_be_written_is_one_line(not_root: Path) -> None:
    not_root.chmod(0o500)
    with pytest.raises(ResourceError, match="cannot be written: Permission denied"):
        Ledger(not_root / "data" / "ledger.sqlite3")
    not_root.chmod(0o700)


# -- the keys in force ------------------------------------------------------------------------------------------


def ring_of(*known: Key, given: tuple[str, ...] = (), clock: Clock | None = None) -> KeyRing:
    ring = KeyRing(given, Usage(clock or Clock()))
    ring.replace(known)
    return ring


def limited(rpm: int | None = None, tokens_per_day: int | None = None) -> Key:
    return Key("0badcafe", "me", b"", rpm, tokens_per_day)


def test_a_key_opens_and_one_that_differs_anywhere_does_not(ledger: Ledger) -> None:
    (key, text), (other, text_of_other) = created(ledger, "me"), created(ledger, "you")
    ring = ring_of(*keys.every(ledger))
    assert (ring.check(text), ring.check(text_of_other)) == (key, other)
    mixed = text_of_other.replace(other.id, key.id)
    for wrong in ("", "llk_", text[:-1], text + "x", text.upper(), f"llk_{key.id}_", key.id, mixed, "é\ud800\0"):
        assert ring.check(wrong) is None, wrong


def test_a_revoked_key_does_not_open_and_leaves_the_server_closed(ledger: Ledger) -> None:
    assert ring_of().is_open
    _, text = created(ledger, "me")
    keys.revoke(ledger, "me", now=NOON)
    ring = ring_of(*keys.every(ledger))
    assert ring.check(text) is None and not ring.is_open
    ring.replace([])  # nor does a ledger that has vanished open it
    assert not ring.is_open


def test_the_keys_of_the_command_line_have_no_limits_and_close_the_server() -> None:
    ring = ring_of(given=("s3cret", "llk_0badcafe_mine"))
    assert not ring.is_open and ring.check("s3cre") is None
    for text in ("s3cret", "llk_0badcafe_mine"):
        key = ring.check(text)
        assert key is not None and (key.name, key.rpm, key.tokens_per_day) == (COMMAND_LINE, None, None)


@pytest.mark.parametrize("text", ["", "two words", "clé", "a\n"])
def test_a_given_key_that_no_header_can_carry_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(UsageError, match="--api-key must be") as caught:
        ring_of(given=(text,))
    assert not text.strip() or text not in str(caught.value)


# -- limits -----------------------------------------------------------------------------------------------------


def test_no_sixty_seconds_hold_more_requests_than_the_limit() -> None:
    ring, key = ring_of(), limited(rpm=3)
    assert [ring.admit(key, NOON + at) for at in (0, 10, 20)] == [None] * 3
    refusal = ring.admit(key, NOON + 59.5)
    assert refusal is not None and refusal.retry_after == 0.5
    assert refusal.message == "the key 'me' may make 3 requests per minute: try again in 1 s"
    assert ring.admit(key, NOON + 60) is None
    blocked = ring.admit(key, NOON + 60)
    assert blocked is not None and blocked.retry_after == 10


def test_refused_requests_do_not_count_against_the_minute() -> None:
    ring, key = ring_of(), limited(rpm=1)
    assert ring.admit(key, NOON) is None
    assert all(ring.admit(key, NOON + at) for at in range(1, 60))
    assert ring.admit(key, NOON + 60) is None
    ring.withdraw(key, NOON + 60)  # let in, and then refused because the queue was full
    assert ring.admit(key, NOON + 61) is None
    assert ring.admit(key, NOON + 61) is not None


@pytest.mark.parametrize(
    ("status", "prompt_tokens", "counts"), [(429, 0, False), (499, 0, False), (499, 900, True), (200, 1, True)]
)
def test_who_leaves_while_its_prompt_is_read_has_used_its_minute(
    status: int, prompt_tokens: int, counts: bool, path: Path
) -> None:
    """Else a client that hangs up again and again would have all its prompts read."""
    with accounts(path) as booked:
        gate, entry = Gate(booked), Pass(limited(rpm=1))
        gate.admit(entry)
        gate.leave(entry, Record("POST", "/", "t", status, prompt_tokens=prompt_tokens), is_counted=True)
        assert (booked.ring.admit(limited(rpm=1), NOON) is not None) == counts


def test_a_clock_that_is_set_back_locks_nobody_out() -> None:
    ring, key = ring_of(), limited(rpm=1)
    assert ring.admit(key, NOON) is None
    assert ring.admit(key, NOON - 3600) is None


def test_the_minute_of_one_key_is_not_another_s() -> None:
    ring = ring_of()
    assert ring.admit(limited(rpm=1), NOON) is None
    assert ring.admit(Key("12345678", "you", b"", 1), NOON) is None


def test_spent_tokens_shut_a_key_out_until_midnight() -> None:
    clock = Clock(NOON)
    usage = Usage(clock)
    ring, key = KeyRing((), usage), limited(tokens_per_day=100)
    usage.record(key.id, prompt_tokens=60, completion_tokens=39, is_error=False)
    assert ring.admit(key, clock()) is None
    usage.record(key.id, prompt_tokens=0, completion_tokens=1, is_error=False)
    refusal = ring.admit(key, clock())
    assert refusal is not None and refusal.retry_after == 12 * 3600
    assert "has used 100 of its 100 tokens today" in refusal.message
    clock.now += 12 * 3600
    assert ring.admit(key, clock()) is None


def test_a_request_beyond_the_day_s_tokens_does_not_count_against_the_minute() -> None:
    clock = Clock()
    usage = Usage(clock)
    ring, key = KeyRing((), usage), limited(rpm=1, tokens_per_day=1)
    usage.record(key.id, prompt_tokens=1, is_error=False)
    late = NOON + 12 * 3600 - 1
    assert ring.admit(key, late) is not None
    assert ring.admit(key, late + 1) is None


def test_the_day_s_tokens_survive_a_restart_and_count_for_every_server(path: Path) -> None:
    with accounts(path) as first:
        first.usage.record("k", prompt_tokens=2, completion_tokens=3, is_error=False)
    with accounts(path) as second, accounts(path) as third:
        assert second.usage.tokens("k", day_of(NOON)) == 5
        third.usage.record("k", completion_tokens=7, is_error=False)
        third.keep_step()
        second.keep_step()
        assert second.usage.tokens("k", day_of(NOON)) == 12 == third.usage.tokens("k", day_of(NOON))


# -- usage ------------------------------------------------------------------------------------------------------


def test_usage_is_counted_by_key_and_utc_day(path: Path, ledger: Ledger) -> None:
    clock = Clock(NOON + 12 * 3600 - 1)
    usage = Usage(clock)
    usage.record("k", prompt_tokens=10, completion_tokens=5, is_error=False)
    usage.record("k", is_error=True)
    usage.record(NO_KEY, prompt_tokens=1, is_error=False)
    usage.flush(ledger)
    clock.now += 1
    usage.record("k", completion_tokens=2, is_error=False)
    usage.flush(ledger)
    found = {(line.day, line.key_id): line.counts for line in report(ledger, clock(), n_days=2)}
    assert found == {
        ("2024-12-31", "-"): Counts(1, 0, 1, 0, clock() - 1),
        ("2024-12-31", "k"): Counts(2, 1, 10, 5, clock() - 1),
        ("2025-01-01", "k"): Counts(1, 0, 0, 2, clock()),
    }
    assert [line.day for line in report(ledger, clock(), n_days=1)] == ["2025-01-01"]
    assert last_used(ledger) == {"-": clock() - 1, "k": clock()}


def test_a_flush_that_fails_loses_nothing_and_counts_nothing_twice(path: Path, ledger: Ledger) -> None:
    usage = Usage(Clock())
    usage.record("k", prompt_tokens=5, is_error=False)
    with Ledger(path) as other, other.transaction():
        ledger.wait_at_most(0.01)
        with pytest.raises(ResourceError):
            usage.flush(ledger)
    usage.record("k", prompt_tokens=1, is_error=False)
    assert (usage.n_unwritten, usage.tokens("k", day_of(NOON))) == (2, 6)
    usage.flush(ledger)
    usage.flush(ledger)
    assert (usage.n_unwritten, usage.tokens("k", day_of(NOON))) == (0, 6)
    assert report(ledger, NOON, n_days=1)[0].counts == Counts(2, 0, 6, 0, NOON)


def test_the_last_use_is_the_latest_whatever_is_written_last(ledger: Ledger) -> None:
    for now in (NOON, NOON + 5, NOON + 2):
        usage = Usage(Clock(now))
        usage.record("k", is_error=False)
        usage.flush(ledger)
    assert last_used(ledger) == {"k": NOON + 5}


def test_what_is_recorded_while_the_thread_writes_is_written_once(path: Path) -> None:
    with accounts(path, period=0.0005) as running:
        for _ in range(20_000):
            running.usage.record("k", prompt_tokens=1, is_error=False)
    with Ledger(path) as ledger:
        assert report(ledger, NOON, n_days=1)[0].counts.prompt_tokens == 20_000


def test_a_clean_end_writes_the_last_second(path: Path) -> None:
    with accounts(path) as running:
        running.usage.record("k", prompt_tokens=3, is_error=False)
    running.close()  # a second time does nothing
    with Ledger(path) as ledger:
        assert report(ledger, NOON, n_days=1)[0].counts.prompt_tokens == 3


def test_an_end_that_cannot_write_says_how_much_is_lost(path: Path) -> None:
    running = accounts(path)
    running.usage.record("k", is_error=False)
    path.unlink()
    path.mkdir()
    with pytest.raises(ResourceError, match=r"the usage of the last 1 requests is lost: .* cannot be written"):
        running.close()


def test_a_killed_server_keeps_what_was_written_before_its_last_second(path: Path) -> None:
    code = """
import sys
from pathlib import Path
from llamacli.server.accounts import Accounts
running = Accounts(Path(sys.argv[1]), clock=lambda: 1735646400.0, report=print, period=3600)
for _ in range(5):
    running.usage.record("k", prompt_tokens=1, is_error=False)
running.keep_step()
running.usage.record("k", prompt_tokens=1, is_error=False)
print("ready", flush=True)
input()
"""
    process = python(code, path)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    with Ledger(path) as ledger:
        assert report(ledger, NOON, n_days=1)[0].counts.prompt_tokens == 5


# -- a running server -------------------------------------------------------------------------------------------


def test_a_running_server_takes_a_new_key_and_refuses_a_revoked_one(path: Path) -> None:
    with accounts(path, period=0.01) as running, Ledger(path) as elsewhere:
        was_open = running.ring.is_open
        key, text = created(elsewhere, "me")
        until(lambda: running.ring.check(text) == key)
        keys.revoke(elsewhere, "me", now=NOON)
        until(lambda: running.ring.check(text) is None)
        assert (was_open, running.ring.is_open) == (True, False)


def test_a_revoked_key_is_refused_though_usage_cannot_be_written(path: Path) -> None:
    with accounts(path) as running, Ledger(path) as elsewhere, Ledger(path) as writer:
        _, text = created(elsewhere, "me")
        running.keep_step()
        assert running.ring.check(text)
        keys.revoke(elsewhere, "me", now=NOON)
        running.usage.record("k", is_error=False)
        with writer.transaction(), pytest.raises(ResourceError):
            running.keep_step(patience=0.01)
        assert running.ring.check(text) is None


def test_a_server_whose_ledger_is_replaced_says_so_once_and_stays_closed(path: Path) -> None:
    with Ledger(path) as ledger:
        _, text = created(ledger, "me")
    backup = path.read_bytes()
    said: queue.Queue[str] = queue.Queue()
    with Accounts(path, clock=Clock(), report=said.put, period=0.005) as running:
        replaced(path, b"not a database " * 100)
        failure = said.get(timeout=5)
        assert "keys stay as they were" in failure and "is damaged" in failure
        assert running.ring.check(text) is not None
        running.usage.record("k", prompt_tokens=4, is_error=False)
        with pytest.raises(queue.Empty):
            said.get(timeout=0.05)
        replaced(path, b"")
        assert "in step with the ledger again" in said.get(timeout=5)
        assert running.ring.check(text) is None and not running.ring.is_open
    with Ledger(path) as ledger:
        assert report(ledger, NOON, n_days=1)[0].counts.prompt_tokens == 4
    replaced(path, backup)
    with accounts(path) as running:
        assert running.ring.check(text) is not None
    assert said.empty()


def replaced(path: Path, content: bytes) -> None:
    """At one stroke, so that no thread can see a half of it."""
    draft = path.with_name("draft")
    draft.write_bytes(content)
    draft.replace(path)


def test_a_server_does_not_start_on_a_ledger_it_cannot_read(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database " * 100)
    with pytest.raises(LlamacliError, match="is damaged"):
        accounts(path)
