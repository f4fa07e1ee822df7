"""What was measured is kept whole, private and readable, and believed only where it holds."""

from __future__ import annotations

import json
import random
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamacli import tuning_file
from llamacli.errors import ResourceError
from llamacli.models import store
from llamacli.models.notes import Notes
from llamacli.models.store import ModelFile
from llamacli.tuning import Attention, Rates, Weights
from llamacli.tuning_file import Subject, Unusable, find, read, subject, write

WEIGHTS = Weights(0.05, {1: 0.3, 2: 0.16}, {2: 0.8}, {1: 0.16, 4: 0.26, 16: 0.5, 128: 2.8})
RATES = Rates(
    WEIGHTS,
    replace(WEIGHTS, load=3.0),
    attention=Attention(128, 2.8, 0.17, 2.9, 0.18),
    cores=2,
    others=0.02,
    spread=0.05,
    seconds=48.2,
    measured="2026-01-02T03:04:05+00:00",
)


def tiny() -> Subject:
    return subject(store.tiny(), "f16", 0, None)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "tuning", tiny(), RATES)
    assert read(path, tiny()) == (tiny(), RATES)
    bare = replace(RATES, rewritten=None, why_not="no memory", attention=None, others=None)
    assert read(write(tmp_path / "tuning", tiny(), bare)) == (tiny(), bare)


def test_it_is_json_for_people_and_for_nobody_else(tmp_path: Path) -> None:
    path = write(tmp_path / "tuning", tiny(), RATES)
    told = json.loads(path.read_text())
    assert told["model"]["name"] == store.TINY_FILENAME and told["model"]["sha256"] == store.TINY_SHA256
    assert told["stored"]["steps"] == {"1": 0.16, "4": 0.26, "16": 0.5, "128": 2.8}
    assert len(path.read_text().splitlines()) > 20
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [each.name for each in path.parent.iterdir()] == [path.name], "no draft is left"


def test_a_directory_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "tuning").write_text("a file")
    with pytest.raises(ResourceError, match="cannot be kept"):
        write(tmp_path / "tuning", tiny(), RATES)


def test_it_is_found_again_and_where_nothing_was_measured_hardly_anything_is_looked_at(tmp_path: Path) -> None:
    assert find(tmp_path / "none", store.tiny(), "f16", 0, None).rates is None
    write(tmp_path, tiny(), RATES)
    assert find(tmp_path, store.tiny(), "f16", 0, None).rates == RATES


@pytest.mark.parametrize(
    "other",
    [
        {"cpu": "another"},
        {"features": ("sse",)},
        {"logical": 96},
        {"cgroup_limit": 1.5},
        {"memory_gib": 999},
        {"library": "llama-cpp-python 0.0.1"},
        {"size": 1},
        {"name": "another.gguf"},
        {"kv_type": "q8_0"},
        {"gpu_layers": 3},
    ],
    ids=lambda other: next(iter(other)),
)
def test_rates_of_another_machine_model_or_version_are_not_found(other: dict[str, Any], tmp_path: Path) -> None:
    about = replace(tiny(), **other)
    path = write(tmp_path, about, RATES)
    assert find(tmp_path, store.tiny(), "f16", 0, None).rates is None
    path.rename(tmp_path / tiny().filename)  # nor when somebody has copied them there
    found = find(tmp_path, store.tiny(), "f16", 0, None)
    assert found.rates is None and "is about another" in found.why


def test_another_model_of_the_same_name_and_size_is_told_by_its_checksum_where_both_are_known(tmp_path: Path) -> None:
    write(tmp_path, replace(tiny(), sha256="0" * 64), RATES)
    assert "same name and size" in find(tmp_path, store.tiny(), "f16", 0, None).why
    unknown = replace(store.tiny(), sha256=None)
    assert find(tmp_path, unknown, "f16", 0, None).rates == RATES


def test_a_file_that_has_changed_since_is_said_to_be_another_one(tmp_path: Path) -> None:
    path = tmp_path / "some.gguf"
    path.write_bytes(store.bundled().read_bytes())
    write(tmp_path / "kept", subject(ModelFile("some", path), "f16", 0, None), RATES)
    path.write_bytes(path.read_bytes() + b"more")
    found = find(tmp_path / "kept", ModelFile("some", path), "f16", 0, None)
    assert found.rates is None and "another file of this name" in found.why


def test_a_checksum_that_was_computed_later_does_not_make_it_another_model(tmp_path: Path) -> None:
    path = tmp_path / "some.gguf"
    path.write_bytes(store.bundled().read_bytes())
    file, notes = ModelFile("some", path), Notes(tmp_path / "cache")
    write(tmp_path, subject(file, "f16", 0, notes), RATES)
    notes.add(path, sha256="1" * 64)
    assert subject(file, "f16", 0, notes).sha256 == "1" * 64
    assert find(tmp_path, file, "f16", 0, notes).rates == RATES


def changed(**parts: object) -> str:
    return json.dumps(tuning_file.as_object(tiny(), RATES) | parts)


ATTENTION = {"depth": 64, "flash_read": 1, "flash_step": 1, "plain_read": 1, "plain_step": 1}
DAMAGED = {
    "empty": "",
    "no JSON": "{",
    "a list": "[]",
    "no version": "{}",
    "text for a number": changed(spread="much"),
    "truth for a number": changed(spread=True),
    "no number": changed(spread=None),
    "nan": changed(spread=float("nan")),
    "infinity": changed(seconds=float("inf")),
    "a negative time": changed(stored=tuning_file.as_object(tiny(), RATES)["stored"] | {"load": -1}),
    "no step of one row": changed(
        stored={"load": 1, "threads": {"1": 1}, "threads_batch": {"1": 1}, "steps": {"2": 1}}
    ),
    "no threads": changed(stored={"load": 1, "threads": {}, "threads_batch": {"1": 1}, "steps": {"1": 1}}),
    "zero threads": changed(stored={"load": 1, "threads": {"0": 1}, "threads_batch": {"1": 1}, "steps": {"1": 1}}),
    "a step of no time": changed(stored={"load": 1, "threads": {"1": 1}, "threads_batch": {"1": 1}, "steps": {"1": 0}}),
    "more threads than llama.cpp can have": changed(
        stored={"load": 1, "threads": {"513": 1}, "threads_batch": {"1": 1}, "steps": {"1": 1}}
    ),
    "more cores": changed(cores=10**18),
    "a depth without end": changed(attention=ATTENTION | {"depth": 10**400}),
    "more time than there is": changed(
        stored={"load": 1e300, "threads": {"1": 1}, "threads_batch": {"1": 1}, "steps": {"1": 1}}
    ),
    "no stored weights": changed(stored=None),
    "no machine": changed(machine=None),
    "depth": changed(attention=ATTENTION | {"depth": 0}),
    "another key": changed(machine={"more": 1}),
    "huge": changed(why_not="x" * tuning_file.MAX_BYTES),
    "deep": "[" * 50_000,
    "binary": "\x00\udcff",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_no_measurement_and_no_crash(content: str, tmp_path: Path) -> None:
    path = write(tmp_path, tiny(), RATES)
    path.write_text(content, "utf-8", "surrogateescape")
    found = find(tmp_path, store.tiny(), "f16", 0, None)
    assert found.rates is None and "is damaged" in found.why and str(path) in found.why


def test_bytes_changed_at_random_are_never_a_crash(tmp_path: Path) -> None:
    path = write(tmp_path, tiny(), RATES)
    whole, chance = path.read_bytes(), random.Random(1)
    for _ in range(300):
        raw = bytearray(whole[: chance.choice((len(whole), chance.randrange(len(whole))))])
        for _ in range(chance.randrange(1, 4)):
            if raw:
                raw[chance.randrange(len(raw))] = chance.randrange(256)
        path.write_bytes(raw)
        rates = find(tmp_path, store.tiny(), "f16", 0, None).rates
        assert rates is None or rates.stored.step(3) > 0


def test_a_file_of_a_later_version_says_so(tmp_path: Path) -> None:
    write(tmp_path, tiny(), RATES).write_text(changed(version=2))
    assert "another version of llamacli" in find(tmp_path, store.tiny(), "f16", 0, None).why


def test_a_file_that_may_not_be_read_is_no_measurement(tmp_path: Path) -> None:
    path = write(tmp_path, tiny(), RATES)
    path.unlink()
    path.mkdir()
    assert "cannot be read" in find(tmp_path, store.tiny(), "f16", 0, None).why


def test_one_model_is_forgotten_or_all_are(tmp_path: Path) -> None:
    others = [replace(tiny(), name=name) for name in ("tiny-llama2-chat.gguf", "another.gguf", "../../etc/passwd")]
    for about in (tiny(), replace(tiny(), kv_type="q8_0"), *others):
        assert write(tmp_path, about, RATES).parent == tmp_path
    assert tuning_file.clear(tmp_path, store.TINY_FILENAME) == 2
    assert tuning_file.clear(tmp_path) == 3
    assert tuning_file.clear(tmp_path) == 0
    with pytest.raises(FileNotFoundError):
        read(tmp_path / tiny().filename)
    with pytest.raises(Unusable):
        read(store.bundled())


def test_a_place_that_cannot_be_looked_at_is_not_said_to_be_empty(tmp_path: Path) -> None:
    blocked = tmp_path / "tuning"
    blocked.write_text("a file")
    found = find(blocked, store.tiny(), "f16", 0, None)
    assert found.rates is None and found.why == f"{blocked} cannot be read: Not a directory"
    with pytest.raises(OSError, match="Not a directory"):
        tuning_file.clear(blocked)
