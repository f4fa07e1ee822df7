"""The measuring: sides take turns, who is hopeless drops out, and time is spent where a choice hangs on it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from llamacli import launch as launching
from llamacli import tuner
from llamacli.config import Settings
from llamacli.errors import ResourceError
from llamacli.machine import Cores
from llamacli.models import store
from llamacli.tuner import race, thread_counts
from llamacli.tuning import Rates

GIB = 1 << 30


class Runners:
    """Sides that take so many seconds, each round anew, and remember who ran."""

    def __init__(self, seconds: dict[tuple[int, int], list[float]]) -> None:
        self.ran: list[tuple[int, int]] = []
        self.sides: dict[tuple[int, int], Callable[[], float]] = {
            name: partial(self._run, name, iter(each)) for name, each in seconds.items()
        }

    def _run(self, name: tuple[int, int], seconds: object) -> float:
        self.ran.append(name)
        took: float = next(seconds)  # type: ignore[call-overload]
        return took


def test_sides_take_turns_in_one_order_and_then_in_the_other() -> None:
    runners = Runners({(0, 0): [1.0] * 9, (0, 1): [2.0] * 9})
    found = race(runners.sides, seconds=9)
    assert runners.ran == [(0, 0), (0, 1), (0, 1), (0, 0), (0, 0), (0, 1)]
    assert {name: len(timing.seconds) for name, timing in found.items()} == {(0, 0): 3, (0, 1): 3}


def test_one_bad_moment_does_not_decide() -> None:
    runners = Runners({(0, 0): [1.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0], (0, 1): [1.2] * 7})
    found = race(runners.sides, seconds=100)
    assert found[0, 0].median < found[0, 1].median


def test_who_is_hopelessly_slower_than_its_group_drops_out() -> None:
    runners = Runners({(0, 1): [1.0] * 9, (0, 2): [1.7] * 9, (0, 4): [3.0] * 9, (1, 1): [5.0] * 9, (1, 2): [5.5] * 9})
    found = race(runners.sides, seconds=90, drops_out=True)
    assert (len(found[0, 4].seconds), len(found[0, 2].seconds)) == (1, 2)
    assert len(found[1, 1].seconds) == len(found[1, 2].seconds) > 2, "slow, but not in its group"


def test_a_race_ends_with_its_time_and_runs_one_round_at_least() -> None:
    runners = Runners({(0, i): [10.0] * 9 for i in range(3)})
    shares: list[float] = []
    race(runners.sides, seconds=5, progress=shares.append)
    assert len(runners.ran) == 3 and shares == [1.0, 1.0, 1.0]
    runners = Runners({(0, 0): [0.001] * 99})
    race(runners.sides, seconds=100)
    assert len(runners.ran) == tuner.MAX_ROUNDS


@pytest.mark.parametrize(
    ("cores", "wanted", "counts"),
    [
        (Cores(logical=16, affinity=16, physical=8), None, [4, 8, 16]),
        (Cores(logical=16, affinity=16, physical=8, cgroup_limit=2.5), None, [1, 3]),
        (Cores(logical=96, affinity=4, physical=2), None, [1, 2, 4]),
        (Cores(logical=1, affinity=1, physical=1), None, [1]),
        (Cores(logical=16, affinity=16, physical=8), 6, [4, 6, 8, 16]),
    ],
)
def test_threads_worth_trying_are_never_more_than_we_may_use(
    cores: Cores, wanted: int | None, counts: list[int]
) -> None:
    assert thread_counts(cores, wanted) == counts


def measured(usable: int = 8 * GIB, **settings: object) -> tuple[Rates, list[float], set[str]]:
    chosen = Settings(model="tiny", **settings)  # type: ignore[arg-type]
    launch = launching.prepare(chosen, store.tiny(), lambda _: None)
    shares, stages = [], set()

    def report(share: float, what: str) -> None:
        shares.append(share)
        stages.add(what)

    return tuner.measure(launch, lambda _: None, report, usable=usable), shares, stages


def test_the_tiny_model_is_measured_in_seconds_and_all_of_it() -> None:
    rates, shares, stages = measured()
    weights = rates.stored
    assert {1, 2, 4, 8, 16, 32, 64, 128} <= set(weights.steps)
    assert list(weights.steps) == sorted(weights.steps)
    assert weights.load > 0 and all(weights.steps.values())
    assert set(weights.threads) == set(weights.threads_batch) <= {1, 2, *range(64)}
    assert rates.attention is not None and rates.attention.depth >= 64
    assert rates.rewritten is not None or rates.why_not
    assert rates.cores and rates.measured and rates.seconds > 0
    assert shares[0] == 0 and shares[-1] == 1 and shares == sorted(shares)
    assert "flash attention" in stages


def test_without_memory_for_a_second_copy_that_half_is_left_out_and_said() -> None:
    rates, _, stages = measured(usable=60 << 20)
    assert rates.rewritten is None
    assert "a second copy of the weights does not fit" in rates.why_not
    assert not any("rewritten" in stage for stage in stages)


def test_without_memory_for_the_model_nothing_is_measured() -> None:
    with pytest.raises(ResourceError, match="needs"):
        measured(usable=1 << 20)


def test_a_quantized_cache_leaves_no_choice_of_attention() -> None:
    rates, _, _ = measured(kv_type="q8_0")
    assert rates.attention is None and rates.flash_attention is None
