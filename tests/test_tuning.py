"""From made-up rates to settings: which job gets which, and why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llamacli.tuning import Attention, ManyAnswers, OneAnswer, Rates, Weights, choose

# About what a 7B Q4_K_M file showed on two cores: rewritten it loads late, writes fast, and reads slowly.
STORED = Weights(
    load=0.05,
    threads={1: 0.3, 2: 0.16},
    threads_batch={1: 1.5, 2: 0.8},
    steps={1: 0.16, 2: 0.2, 4: 0.26, 8: 0.36, 16: 0.5, 32: 0.8, 128: 2.8, 512: 11.0},
)
REWRITTEN = Weights(
    load=3.0,
    threads={1: 0.2, 2: 0.115},
    threads_batch={1: 2.6, 2: 1.4},
    steps={1: 0.115, 2: 0.17, 4: 0.3, 8: 0.5, 16: 0.85, 32: 1.4, 128: 5.1, 512: 20.0},
)
RATES = Rates(STORED, REWRITTEN)


def test_a_step_between_two_that_were_measured_takes_a_time_between() -> None:
    assert STORED.step(1) == 0.16
    assert STORED.step(8) == 0.36
    assert STORED.step(6) == pytest.approx(0.31)
    assert STORED.step(1024) == pytest.approx(22.0)


def test_a_prompt_is_read_in_whole_batches_and_a_rest() -> None:
    assert STORED.batch == 512
    assert STORED.read(512) == pytest.approx(11.0)
    assert STORED.read(512 + 512 + 32) == pytest.approx(22.8)
    assert STORED.read(0) == 0


def test_the_batch_is_the_one_that_reads_fastest_and_the_larger_of_equals() -> None:
    assert replace(STORED, steps={1: 0.1, 128: 2.0, 256: 4.1, 512: 10.0}).batch == 256
    assert replace(STORED, steps={1: 0.1, 128: 2.0}).batch == 512, "nothing larger was measured: as ever"
    assert replace(STORED, steps={1: 0.1, 32: 0.2}).batch == 512


def test_a_short_answer_is_not_worth_rewriting_the_weights_and_a_long_one_is() -> None:
    assert choose(RATES, OneAnswer(14, 20)).repack is False
    assert choose(RATES, OneAnswer(14, 500)).repack is True
    assert choose(RATES, OneAnswer(2000, 500)).repack is False, "reading takes longer than writing gains"


def test_a_one_liner_and_a_server_get_what_each_is_faster_with() -> None:
    assert choose(RATES, OneAnswer(14, 500)).repack is True
    assert choose(RATES, ManyAnswers(8)).repack is False


def test_the_other_way_round_with_a_file_that_reads_faster_rewritten() -> None:
    quick = replace(REWRITTEN, steps={rows: seconds / 2 for rows, seconds in STORED.steps.items()})
    rates = Rates(STORED, quick)
    assert choose(rates, OneAnswer(14, 10)).repack is False, "it would load longer than it takes to answer"
    assert choose(rates, ManyAnswers(8)).repack is True


def test_slots_decide_which_order_a_server_wants() -> None:
    brief = ManyAnswers(1, n_prompt=16)
    assert choose(RATES, brief).repack is True
    assert choose(RATES, replace(brief, slots=8)).repack is False


def test_what_is_on_disk_already_need_not_be_read() -> None:
    job = OneAnswer(1000, 200)
    assert choose(RATES, job).repack is False
    assert choose(RATES, replace(job, cached=(0, 995))).repack is True
    assert choose(RATES, replace(job, n_answer=20, cached=(995, 0))).repack is False


def test_a_gain_that_is_hardly_one_is_not_worth_twice_the_memory() -> None:
    slightly = replace(STORED, steps={rows: 0.97 * seconds for rows, seconds in STORED.steps.items()})
    assert choose(Rates(STORED, slightly), ManyAnswers(4)).repack is False


def test_the_reason_has_the_numbers_of_both() -> None:
    why = choose(RATES, OneAnswer(32, 500)).why["repack"]
    assert "load 0.05 s + 32 tokens read 0.80 s + 500 written 80.00 s = 80.85 s" in why
    assert "load 3.00 s + 32 tokens read 1.40 s + 500 written 57.50 s = 61.90 s" in why
    assert "tokens/s with 8 at once" in choose(RATES, ManyAnswers(8)).why["repack"]


def test_weights_that_cannot_be_rewritten_are_not_and_the_reason_says_what_was_lost() -> None:
    job = OneAnswer(14, 500)
    chosen = choose(RATES, job, "no room for a second copy")
    assert chosen.repack is False
    assert "no room for a second copy" in chosen.why["repack"] and "rewritten" in chosen.why["repack"]
    assert choose(Rates(STORED, why_not="llama.cpp has no other order"), job).why["repack"].startswith("llama.cpp has")


def test_what_was_set_is_not_chosen_again_but_goes_with_its_own_rates() -> None:
    chosen = choose(RATES, ManyAnswers(8), repack=True)
    assert (chosen.repack, chosen.why["repack"]) == (True, "as set")
    assert "115 ms with 2" in chosen.why["threads"]
    assert choose(Rates(STORED), ManyAnswers(8), repack=True).repack is True


def test_threads_are_chosen_apart_for_one_row_and_for_many() -> None:
    weights = replace(STORED, threads={4: 0.1, 8: 0.099, 16: 0.2}, threads_batch={4: 2.0, 8: 1.1, 16: 0.9})
    chosen = choose(Rates(weights), OneAnswer(14))
    assert (chosen.threads, chosen.threads_batch) == (4, 16), "of equals the fewer threads"


@pytest.mark.parametrize(("step", "flash_attention"), [(0.05, None), (0.104, None), (0.2, False)])
def test_flash_attention_is_left_where_it_costs_time(step: float, flash_attention: bool | None) -> None:
    attention = Attention(depth=512, flash_read=5.0, flash_step=step, plain_read=5.0, plain_step=0.1)
    chosen = choose(Rates(STORED, attention=attention), OneAnswer(14))
    assert chosen.flash_attention is flash_attention
    assert choose(Rates(STORED, attention=attention), ManyAnswers(4)).flash_attention is None, "that was not measured"
    assert "after 512 tokens" in chosen.why["flash_attention"]


def test_every_choice_has_its_reason() -> None:
    why = choose(RATES, OneAnswer(14)).why
    assert set(why) == {"repack", "threads", "threads_batch", "batch", "flash_attention"}
    assert all(why.values())


def test_on_a_busy_machine_only_what_is_plainly_better_is_believed() -> None:
    weights = replace(STORED, threads={1: 0.1, 2: 0.11}, threads_batch={1: 1.0, 2: 5.0}, steps={1: 0.1, 64: 1, 512: 9})
    slightly = replace(weights, steps={1: 0.085, 64: 0.85, 512: 7.6})
    attention = Attention(depth=512, flash_read=5.0, flash_step=0.12, plain_read=5.0, plain_step=0.1)
    quiet = Rates(weights, slightly, attention=attention, cores=2, others=0.05)
    busy = replace(quiet, others=0.6)
    job = OneAnswer(1, 100)
    first, second = choose(quiet, job), choose(busy, job)
    assert (first.repack, first.threads, first.threads_batch, first.batch, first.flash_attention) == (
        True,
        1,
        1,
        64,
        False,
    )
    assert (second.repack, second.threads, second.threads_batch, second.batch, second.flash_attention) == (
        False,
        2,
        2,
        512,
        None,
    )
    assert "busy" in second.why["threads"]
    much = replace(weights, steps={1: 0.05, 64: 0.5, 512: 4.0})
    assert choose(replace(busy, rewritten=much), job).repack is True
