"""From settings to an engine: how far a context may grow, what is chosen, and what the user is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llamacli import launch as launching
from llamacli import tuning_file
from llamacli.config import TUNING, Settings
from llamacli.engine import memory
from llamacli.errors import ModelError, ResourceError, UsageError
from llamacli.guessing import Draft
from llamacli.launch import Launch, ServeOptions, load, prepare, serve, start
from llamacli.models import store
from llamacli.models.notes import Notes
from llamacli.models.store import ModelFile
from llamacli.tuning import OneAnswer, Rates, Weights

GIB = 1 << 30


def prepared(tmp_path: Path, **settings: object) -> tuple[Launch, list[str]]:
    """A launch of the tiny model, and the list its notices go to."""
    notices: list[str] = []
    chosen = replace(Settings(model="tiny", threads=1), **settings)  # type: ignore[arg-type]
    return prepare(chosen, store.tiny(), notices.append), notices


def test_a_context_larger_than_the_model_was_trained_with_is_cut_and_said(tmp_path: Path) -> None:
    launch, notices = prepared(tmp_path, ctx_size=5000)
    assert launch.n_limit == 1024
    assert "5,000" in notices[0] and "1,024" in notices[0]


def test_a_context_starts_as_large_as_the_prompt_needs(tmp_path: Path) -> None:
    launch, notices = prepared(tmp_path, max_tokens=10)
    load(launch, notices.append)
    engine = start(launch, 14)
    assert (engine.model.n_cells, engine.n_limit) == (256, 1024)
    assert launch.choices["context_start"].value == 24
    engine.close()


def test_a_prompt_that_memory_has_no_room_for_is_refused(tmp_path: Path) -> None:
    launch, notices = prepared(tmp_path)
    load(launch, notices.append)
    launch.max_cells = 256  # as on a machine with little memory left
    with pytest.raises(ResourceError, match="the prompt is 300 tokens; memory has room for a context of 256"):
        start(launch, 300)


def test_a_bundled_model_that_was_changed_is_never_run(tmp_path: Path) -> None:
    damaged = bytearray(store.bundled().read_bytes())
    damaged[-1000] ^= 1
    path = tmp_path / "tiny.gguf"
    path.write_bytes(damaged)
    launch, notices = prepared(tmp_path)
    launch.file = replace(launch.file, path=path)
    with pytest.raises(ModelError, match="sha256"):
        load(launch, notices.append)


def test_a_server_holds_a_full_context_for_each_slot_and_prefixes_beside(tmp_path: Path) -> None:
    launch, notices = prepared(tmp_path, ctx_size=300)
    engine = serve(launch, ServeOptions(slots=3), notices.append, usable=8 * GIB)
    assert (engine.model.n_cells, engine.n_limit) == (1024, 300)  # 3 x 300, in blocks of 256
    assert engine.model.n_slots == 3 + 8
    assert {"slots", "cells", "repack", "threads", "batch"} <= launch.choices.keys()
    assert notices == []
    engine.close()


def test_a_server_with_little_memory_holds_what_fits_and_says_so(tmp_path: Path) -> None:
    launch, notices = prepared(tmp_path)
    n_slots = 2 + 8
    room = memory.plan(launch.header, 768, n_ubatch=512, n_outputs=n_slots + launching.MAX_GUESSED).host.total
    engine = serve(launch, ServeOptions(slots=2), notices.append, usable=room)
    assert (engine.model.n_cells, engine.n_limit) == (768, 768)
    assert len(notices) == 1 and "768 tokens instead of 1,024" in notices[0]
    assert launch.choices["repack"].value is False
    engine.close()


def test_a_server_whose_model_does_not_fit_is_refused(tmp_path: Path) -> None:
    launch, notices = prepared(tmp_path)
    with pytest.raises(ResourceError, match="needs"):
        serve(launch, ServeOptions(), notices.append, usable=1 << 20)


def test_a_draft_model_that_memory_has_no_room_for_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    launch, notices = prepared(tmp_path)
    launch.draft = Draft(launch.file, launch.header)
    with pytest.raises(ResourceError, match=r"tiny needs .* to write ahead; .* --draft-model"):
        serve(launch, ServeOptions(), notices.append, usable=60 << 20)
    with pytest.raises(ResourceError, match=r"context of 256 tokens needs .* 20 MiB can be used"):
        serve(launch, ServeOptions(), notices.append, usable=20 << 20)
    assert launch.weights is None


@pytest.mark.parametrize("repack", [True, False])
def test_a_server_repacks_as_it_is_told(repack: bool, tmp_path: Path) -> None:
    launch, notices = prepared(tmp_path)
    serve(launch, ServeOptions(repack=repack), notices.append, usable=8 * GIB).close()
    assert launch.choices["repack"] == launching.Choice(repack, "as set")


@pytest.mark.parametrize(("type_id", "repack"), [(2, True), (8, True), (12, False), (14, False), (23, False)])
def test_a_server_leaves_weights_as_they_are_where_batches_are_faster_so(
    type_id: int, repack: bool, tmp_path: Path
) -> None:
    launch, notices = prepared(tmp_path)
    tensors = tuple(tensor._replace(type=type_id) for tensor in launch.header.tensors)
    launch.header = replace(launch.header, tensors=tensors)
    serve(launch, ServeOptions(), notices.append, usable=8 * GIB).close()
    assert launch.choices["repack"].value is repack


def test_rewritten_weights_that_do_not_fit_are_not_loaded_however_fast_they_were(tmp_path: Path) -> None:
    steps = {1: 1.0, 512: 10.0}
    stored = Weights(0.1, {1: 1.0}, {1: 1.0}, steps)
    quicker = replace(stored, steps={rows: seconds / 2 for rows, seconds in steps.items()})
    about = tuning_file.subject(store.tiny(), "f16", 0, None)
    tuning_file.write(tmp_path / TUNING, about, Rates(stored, quicker))
    launch, notices = prepared(tmp_path)
    launch.notes = Notes(tmp_path)
    usable = memory.plan(launch.header, 4096, n_ubatch=512, n_outputs=12).host.total
    serve(launch, ServeOptions(), notices.append, usable=usable).close()
    assert launch.choices["repack"].value is False
    assert "a second copy of the weights does not fit" in launch.choices["repack"].why
    assert "measured: " in launch.choices["repack"].why
    serve(launch, ServeOptions(), notices.append, usable=8 * GIB).close()
    assert launch.choices["repack"].value is True


def test_a_cache_that_cannot_be_looked_at_is_no_measurement_and_no_crash(tmp_path: Path) -> None:
    launch, notices = prepared(tmp_path)
    launch.notes = Notes(tmp_path / ("x" * 300))  # longer than a name may be: what a missing permission is for root
    load(launch, notices.append)
    assert launch.rates is None and " cannot be read: File name too long" in launch.choices["tuned"].why


def test_what_is_to_come_may_be_known_before_the_model_loads_or_after(tmp_path: Path) -> None:
    stored = Weights(0.1, {1: 1.0}, {1: 1.0}, {1: 1.0, 512: 10.0})
    quicker = replace(stored, load=20.0, steps={1: 0.5, 512: 10.0})
    about = tuning_file.subject(store.tiny(), "f16", 0, None)
    tuning_file.write(tmp_path / TUNING, about, Rates(stored, quicker))
    for n_answer, repack in ((10, False), (500, True)):
        launch, notices = prepared(tmp_path, max_tokens=n_answer)
        launch.notes = Notes(tmp_path)
        load(launch, notices.append, OneAnswer(10, n_answer))
        assert launch.choices["repack"].value is repack
        launch, notices = prepared(tmp_path, max_tokens=n_answer)
        launch.notes = Notes(tmp_path)
        before = load(launch, notices.append)
        launching.settle(launch, 10)
        assert launch.choices["repack"].value is repack
        assert (launch.weights is not before) is repack
        assert before.vocabulary.tokenize("the vocabulary stays in use")
        start(launch, 10).close()


def test_where_rewritten_weights_cannot_be_loaded_after_all_those_that_are_there_answer(tmp_path: Path) -> None:
    stored = Weights(0.1, {1: 1.0}, {1: 1.0}, {1: 1.0, 512: 10.0})
    quicker = replace(stored, steps={1: 0.5, 512: 10.0})
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(store.bundled().read_bytes())
    launch, notices = prepared(tmp_path, max_tokens=500)
    launch.file, launch.notes = ModelFile("copy", copy), Notes(tmp_path)
    tuning_file.write(tmp_path / TUNING, tuning_file.subject(launch.file, "f16", 0, None), Rates(stored, quicker))
    before = load(launch, notices.append)
    copy.unlink()
    launching.settle(launch, 10)
    assert launch.weights is before
    assert launch.choices["repack"].value is False
    assert launch.choices["repack"].why.startswith("rewritten weights cannot be loaded: ")
    start(launch, 10).close()


@pytest.mark.parametrize("slots", [0, 129])
def test_a_server_takes_as_many_slots_as_llama_cpp_can_hold(slots: int) -> None:
    with pytest.raises(UsageError, match="--slots must be between 1 and 128"):
        ServeOptions(slots=slots)
