"""What is measured is what is said: so many rows, so many tokens before them, and nothing left behind."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest
from conftest import MakeModel

from llamacli.engine.llama import LlamaModel, LoadOptions
from llamacli.engine.model import KvFull, Sampler
from llamacli.engine.sequence import Chunk, Logprobs, SamplingParams, Sequence
from llamacli.errors import ModelError, UsageError
from llamacli.models import store
from llamacli.rates import Meter, Timing, load_seconds


class Remembering:
    """A real model that remembers the batches it was given: (slot, start, rows) of each chunk."""

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        self.n_cells, self.n_slots = model.n_cells, model.n_slots
        self.n_batch, self.n_guessed, self.n_vocab = model.n_batch, model.n_guessed, model.n_vocab
        self.seq_rm, self.seq_cp, self.grow = model.seq_rm, model.seq_cp, model.grow
        self.last_logits, self.save, self.restore = model.last_logits, model.save, model.restore
        self.piece, self.is_eog, self.abort, self.close = model.piece, model.is_eog, model.abort, model.close
        self.batches: list[list[tuple[int | None, int, int]]] = []

    def run(self, chunks: list[Chunk]) -> list[int]:
        self.batches.append([(chunk.sequence.slot, chunk.start, chunk.n) for chunk in chunks])
        return self._model.run(chunks)

    def sampler(self, params: SamplingParams, prompt: array[int]) -> Sampler:
        return self._model.sampler(params, prompt)

    def logprobs(self, row: int, token: int, n_top: int) -> Logprobs:
        return self._model.logprobs(row, token, n_top)

    def taken(self) -> list[list[tuple[int | None, int, int]]]:
        batches, self.batches = self.batches, []
        return batches


def test_a_timing_is_its_median_and_how_far_the_repeats_lie_apart() -> None:
    timing = Timing((0.1, 0.5, 0.2)) + Timing((0.2,))
    assert timing.median == 0.2
    assert timing.spread == pytest.approx(2.0)
    assert Timing((0.0,)).spread == 0.0


def test_what_holds_a_step_up_counts_in_the_mean() -> None:
    assert Timing((0.1, 0.1, 0.4)).mean == pytest.approx(0.2)


def test_a_prompt_is_read_in_batches_of_the_size_asked_for_each_time_anew(make_model: MakeModel) -> None:
    model = Remembering(make_model(n_cells=512, n_batch=64))
    timing = Meter(model).prefill(40, batch=16, repeats=2)
    assert len(timing.seconds) == 2 and min(timing.seconds) > 0
    assert model.taken() == 2 * [[(0, 0, 16)], [(0, 16, 16)], [(0, 32, 8)]]


def test_what_stands_before_a_prompt_is_computed_once_and_not_timed(make_model: MakeModel) -> None:
    model = Remembering(make_model(n_cells=512, n_batch=64))
    Meter(model).prefill(8, depth=100, repeats=2)
    assert model.taken() == [[(0, 0, 64)], [(0, 64, 36)], [(0, 100, 8)], [(0, 100, 8)]]


def test_each_stream_has_cells_of_its_own_and_keeps_its_depth(make_model: MakeModel) -> None:
    real = make_model(n_cells=512, n_slots=4, n_batch=64)
    model = Remembering(real)
    timing = Meter(model).decode(3, depth=50, repeats=4)
    assert len(timing.seconds) == 4
    filling, *steps = model.taken()
    assert filling == [(0, 0, 50)]
    assert steps == 4 * [[(0, 50, 1), (1, 50, 1), (2, 50, 1)]]
    assert [real.n_positions(slot) for slot in range(4)] == [50, 50, 50, 0]


def test_streams_do_not_share_cells_as_prompts_do_that_begin_alike(make_model: MakeModel) -> None:
    real = make_model(n_cells=512, n_slots=4, n_batch=64)
    meter = Meter(real)
    meter.decode(3, depth=150)
    other = Sequence(9, range(100, 164))
    other.slot = 3
    with pytest.raises(KvFull):
        real.run([Chunk(other, 0, 64)])  # 3 x 150 of 512 cells are taken


def test_an_answer_grows_by_what_is_drawn_and_is_taken_back(make_model: MakeModel) -> None:
    real = make_model(n_cells=512, n_slots=4, n_batch=64)
    model = Remembering(real)
    timing = Meter(model).answer(2, depth=20, n=3)
    assert len(timing.seconds) == 3 and min(timing.seconds) > 0
    filling, *steps = model.taken()
    assert filling == [(0, 0, 20)]
    assert steps == [[(0, i, 1), (1, i, 1)] for i in (20, 21, 22)]
    assert [real.n_positions(slot) for slot in range(4)] == [20, 20, 0, 0]


def test_fewer_streams_leave_nothing_of_the_others_in_the_cache(make_model: MakeModel) -> None:
    real = make_model(n_cells=512, n_slots=4, n_batch=64)
    meter = Meter(real)
    meter.decode(4, depth=30)
    meter.decode(2, depth=20)
    assert [real.n_positions(slot) for slot in range(4)] == [20, 20, 0, 0]
    meter.decode(1)
    assert [real.n_positions(slot) for slot in range(4)] == [0, 0, 0, 0]
    meter.prefill(60)
    assert [real.n_positions(slot) for slot in range(4)] == [60, 0, 0, 0]


@pytest.mark.parametrize(
    "measure",
    [
        lambda meter: meter.prefill(300),
        lambda meter: meter.prefill(100, depth=200),
        lambda meter: meter.prefill(10, batch=65),
        lambda meter: meter.decode(3),
        lambda meter: meter.decode(2, depth=128),
    ],
)
def test_more_than_there_is_room_for_is_refused(measure: Callable[[Meter], Timing], make_model: MakeModel) -> None:
    with pytest.raises(UsageError, match=r"holds|was given room"):
        measure(Meter(make_model(n_cells=256, n_slots=2, n_batch=64)))


@pytest.mark.parametrize("repack", [True, False])
def test_a_load_is_timed_and_its_memory_given_back(repack: bool) -> None:
    timing = load_seconds(store.bundled(), LoadOptions(repack=repack), repeats=2)
    assert len(timing.seconds) == 2 and min(timing.seconds) > 0


def test_a_file_that_is_no_model_is_an_error_and_no_timing() -> None:
    with pytest.raises(ModelError):
        load_seconds(store.bundled().parent / "README.md", LoadOptions())


@pytest.mark.parametrize("flash_attention", [None, False, True])
def test_threads_change_while_a_model_is_loaded_and_attention_is_as_chosen(
    flash_attention: bool | None, make_model: MakeModel
) -> None:
    model = make_model(n_cells=512, n_slots=2, n_batch=64, flash_attention=flash_attention)
    meter = Meter(model)
    for threads in (1, 2):
        model.set_threads(threads, threads)
        assert meter.decode(2, depth=10, repeats=1).median > 0
    model.grow(1024, 0)
    assert model.n_cells == 1024
