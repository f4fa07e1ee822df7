"""Files come whole or not at all, over lines that fail in every way: our own transfer against a real HTTP server."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from loopback_hub import Fault, LoopbackHub

from llamacli.errors import ModelError, ResourceError
from llamacli.models import transfer
from llamacli.models.partial import PartialFile
from llamacli.models.ranges import Source
from llamacli.models.transfer import Patience, Piece, Progress, fetch

REPO = "org/model-GGUF"
CONTENT = random.Random(1).randbytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
QUICK = Patience(timeout=0.5, attempts=5, first_delay=0.01, longest_delay=0.05)


def piece(hub: LoopbackHub, content: bytes = CONTENT, name: str = "model.gguf", token: str | None = None) -> Piece:
    sha256 = hub.add(REPO, name, content)
    commit = hub.repositories[REPO].commit
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return Piece(Source(f"{hub.url}/{REPO}/resolve/{commit}/{name}", len(content), headers), sha256)


def part(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def is_clean(target: Path) -> bool:
    return [path.name for path in target.parent.iterdir()] == [target.name]


def test_a_file_comes_whole_and_nothing_else_stays(hub: LoopbackHub, tmp_path: Path) -> None:
    target = tmp_path / "a" / "model.gguf"
    assert fetch([piece(hub)], target) == SHA256
    assert target.read_bytes() == CONTENT and is_clean(target)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(how="cut", after=1_000_000),
        Fault(how="reset", after=1_000_000),
        Fault(how="stall", after=1_000_000, seconds=1.0),
        Fault(how="short", after=1_000_000),
        Fault(status=500),
        Fault(status=502),
        Fault(status=503),
        Fault(status=429, retry_after="0"),
    ],
    ids=lambda fault: fault.how or str(fault.status),
)
@pytest.mark.parametrize("kind", ["body", "resolve"])
def test_what_may_pass_is_waited_for_and_nothing_is_fetched_twice(
    kind: str, fault: Fault, hub: LoopbackHub, tmp_path: Path
) -> None:
    target = tmp_path / "model.gguf"
    if kind == "resolve" and fault.how:
        pytest.skip("a redirect has no body")
    hub.fault(kind, fault)
    assert fetch([piece(hub)], target, patience=QUICK) == SHA256
    assert target.read_bytes() == CONTENT and is_clean(target)
    if fault.how == "cut":
        assert hub.of("body")[1].start == 1_000_000
        assert hub.sent == len(CONTENT)


def test_a_connection_that_is_cut_again_and_again_still_gets_there(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.fault("body", *[Fault(how="cut", after=100_000)] * 25)
    assert fetch([piece(hub)], tmp_path / "model.gguf", patience=QUICK) == SHA256
    assert hub.sent == len(CONTENT)


def test_the_server_s_own_wish_to_wait_is_heard(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.fault("body", Fault(status=429, retry_after="1"))
    seen: list[Progress] = []
    started = time.monotonic()
    fetch([piece(hub)], tmp_path / "model.gguf", seen.append, patience=QUICK)
    assert time.monotonic() - started >= 1
    assert any("429; trying again in 1 s" in each.trouble for each in seen)


def test_a_dead_line_ends_in_an_error_and_the_next_call_goes_on(hub: LoopbackHub, tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    wanted = piece(hub)
    hub.fault("body", Fault(how="cut", after=2_000_000), *[Fault(status=503)] * QUICK.attempts)
    with pytest.raises(ModelError, match=r"503, 5 times in a row. 2.0 MB of 3.0 MB are here"):
        fetch([wanted], target, patience=QUICK)
    assert not target.exists()
    assert fetch([wanted], target, patience=QUICK) == SHA256
    assert hub.of("body")[-1].start == 2_000_000


def test_an_address_that_has_expired_is_asked_for_again(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.fault("body", Fault(how="cut", after=1_000_000), Fault(status=403))
    assert fetch([piece(hub)], tmp_path / "model.gguf", patience=QUICK) == SHA256
    assert len(hub.of("resolve")) == 3


def test_a_server_without_ranges_starts_over_and_is_right(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.has_ranges = False
    hub.fault("body", Fault(how="cut", after=1_000_000))
    target = tmp_path / "model.gguf"
    assert fetch([piece(hub)], target, patience=QUICK) == SHA256
    assert target.read_bytes() == CONTENT


def test_one_wrong_byte_is_found_and_fetched_once_more(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.fault("body", Fault(how="flip", after=1_234_567))
    target = tmp_path / "model.gguf"
    assert fetch([piece(hub)], target) == SHA256
    assert target.read_bytes() == CONTENT


def test_bytes_that_stay_wrong_are_removed_and_refused(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.fault("body", Fault(how="flip", after=1), Fault(how="flip", after=1))
    with pytest.raises(ModelError, match=f"sha256 is .*, not {SHA256}"):
        fetch([piece(hub)], tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_parts_of_two_versions_are_never_mixed(hub: LoopbackHub, tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    hub.fault("body", Fault(how="cut", after=1_000_000), *[Fault(status=503)] * 5)
    with pytest.raises(ModelError):
        fetch([piece(hub)], target, patience=QUICK)
    newer = random.Random(2).randbytes(len(CONTENT))
    fetch([piece(hub, newer)], target, patience=QUICK)
    assert target.read_bytes() == newer
    assert hub.of("body")[-1].start == 0


def test_a_login_page_is_not_taken_for_a_model(hub: LoopbackHub, tmp_path: Path) -> None:
    wanted = piece(hub)
    hub.fault("body", Fault(how="html"))
    with pytest.raises(ModelError, match=r"26 bytes, where 3000000 were announced: a web page\. Is there a login page"):
        fetch([wanted], tmp_path / "model.gguf", patience=QUICK)


def test_a_refusal_is_final(hub: LoopbackHub, tmp_path: Path) -> None:
    wanted = piece(hub)
    hub.fault("resolve", Fault(status=404))
    with pytest.raises(ModelError, match="the server answers 404"):
        fetch([wanted], tmp_path / "model.gguf", patience=QUICK)
    assert len(hub.of("resolve")) == 1


def test_the_token_stays_with_the_origin_that_it_is_for(hub: LoopbackHub, tmp_path: Path) -> None:
    wanted = piece(hub, token="secret")
    hub.fault("body", Fault(how="cut", after=5))
    fetch([wanted], tmp_path / "model.gguf", patience=QUICK)
    assert {seen.token for seen in hub.of("resolve")} == {"secret"}
    assert {seen.token for seen in hub.of("body")} == {None}


def test_raw_parts_are_joined_and_each_is_checked(hub: LoopbackHub, tmp_path: Path) -> None:
    first, second = piece(hub, CONTENT[:1_000_000], "a"), piece(hub, CONTENT[1_000_000:], "b")
    target = tmp_path / "model.gguf"
    assert fetch([first, second], target) == SHA256
    assert target.read_bytes() == CONTENT
    hub.fault("body", Fault(), Fault(how="flip", after=0), Fault(), Fault(how="flip", after=0))
    with pytest.raises(ModelError, match="damaged"):
        fetch([first, second], tmp_path / "other.gguf", n_connections=1)


def test_a_large_file_comes_over_several_connections(hub: LoopbackHub, tmp_path: Path) -> None:
    content = CONTENT * 10
    target = tmp_path / "model.gguf"
    hub.fault("body", Fault(how="cut", after=1_000_000), Fault(how="reset", after=3_000_000))
    assert fetch([piece(hub, content)], target, patience=QUICK, large=1_000_000) == hashlib.sha256(content).hexdigest()
    assert len({seen.start for seen in hub.of("body")}) >= transfer.N_STRETCHES


# -- processes that die ------------------------------------------------------------------------------------------

FETCH = """
import sys
from pathlib import Path
from llamacli.models.ranges import Source
from llamacli.models.transfer import Piece, fetch
url, size, sha256, target = sys.argv[1:]
fetch([Piece(Source(url, int(size), {}), sha256)], Path(target))
"""


def process(wanted: Piece, target: Path) -> subprocess.Popen[bytes]:
    arguments = [wanted.source.url, str(wanted.source.size), str(wanted.sha256), str(target)]
    return subprocess.Popen([sys.executable, "-c", FETCH, *arguments], stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_a_process_that_is_killed_leaves_what_the_next_one_goes_on_with(
    number: signal.Signals, share: float, hub: LoopbackHub, tmp_path: Path
) -> None:
    target = tmp_path / "model.gguf"
    wanted = piece(hub)
    hub.fault("body", Fault(how="slow", seconds=0.005))
    with process(wanted, target) as first:
        while hub.sent < share * len(CONTENT):
            time.sleep(0.002)
        first.send_signal(number)
        first.wait(20)
    assert not target.exists()
    n_kept = sum(stretch.done for stretch in opened(wanted, target).stretches)
    with process(wanted, target) as second:
        assert second.wait(20) == 0
    assert target.read_bytes() == CONTENT and is_clean(target)
    assert n_kept > 0 and hub.of("body")[-1].start == n_kept


def opened(wanted: Piece, target: Path) -> PartialFile:
    partial = transfer._partial([wanted], target)
    partial.close()
    return partial


def test_a_journal_is_not_believed_beyond_the_file(hub: LoopbackHub, tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    wanted = piece(hub)
    hub.fault("body", Fault(how="cut", after=2_000_000), *[Fault(status=503)] * 5)
    with pytest.raises(ModelError):
        fetch([wanted], target, patience=QUICK)
    os.truncate(part(target), 500_000)
    assert fetch([wanted], target, patience=QUICK) == SHA256
    assert hub.of("body")[-1].start == 500_000


def test_a_disk_that_is_full_keeps_what_has_come(hub: LoopbackHub, tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    wanted = piece(hub)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, before[1]))
    try:
        with pytest.raises(ResourceError, match="the disk is full"):
            fetch([wanted], target, patience=QUICK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert part(target).stat().st_size == 1_500_000
    assert fetch([wanted], target, patience=QUICK) == SHA256
    assert hub.of("body")[-1].start >= 1_400_000


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_written_is_said(hub: LoopbackHub, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ModelError, match="cannot be written"):
        fetch([piece(hub)], tmp_path / "model.gguf")
