"""Prefixes on disk: what was computed once is not computed again, and whatever is wrong with a file is a miss.

With the scripted model, whose next token depends on every token before it: a wrong cell would show.
"""

from __future__ import annotations

import os
import random
import stat
import struct
import time
import zlib
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
from scripted import ScriptedModel, count_up

from llamacli.engine import prefix_store
from llamacli.engine.engine import Engine
from llamacli.engine.prefix_file import PIECE, Damaged, PrefixFile
from llamacli.engine.prefix_store import MAX_CHAIN, PrefixStore
from llamacli.engine.prefixes import Prefixes
from llamacli.engine.sequence import Delta, SamplingParams

MODEL = bytes(range(32))
FOUR = SamplingParams(max_tokens=4)
DOCUMENT = [1 + i * 7 % 200 for i in range(150)]
FIRST, SECOND = [*DOCUMENT, 3, 4, 5], [*DOCUMENT, 6, 7, 8, 9]


def engine_with(
    directory: Path,
    *,
    fingerprint: bytes = MODEL,
    budget: int | None = None,
    n_cells: int = 2048,
    n_slots: int = 4,
    n_batch: int = 512,
) -> Engine:
    """A new process, as far as the store can tell."""
    model = ScriptedModel(n_cells=n_cells, n_slots=n_slots, n_batch=n_batch)
    return Engine(model, prefixes=Prefixes(PrefixStore(directory, fingerprint, budget=budget, label="scripted")))


def save(engine: Engine) -> None:
    assert engine.prefixes is not None
    for _ in engine.prefixes.save(engine.kv, engine.model):
        pass


def asked(directory: Path, prompt: list[int], **options: object) -> int:
    """Ask a new engine, check its answer, let it save. Returns the tokens that it did not have to compute."""
    engine = engine_with(directory, **options)  # type: ignore[arg-type]
    n_cached = checked(list(engine.generate(prompt, FOUR)), prompt)
    save(engine)
    return n_cached


def checked(deltas: list[Delta], prompt: list[int]) -> int:
    tokens = list(prompt)
    for _ in range(4):
        tokens.append(count_up(tuple(tokens)))
    assert [delta.token for delta in deltas] == tokens[len(prompt) :]
    usage = deltas[-1].usage
    assert usage is not None and usage.prompt_tokens == len(prompt)
    return usage.cached_tokens


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.kv"), key=lambda path: path.stat().st_size)


# -- hits -------------------------------------------------------------------------------------------------------


def test_a_prompt_seen_before_is_not_computed_at_all(tmp_path: Path) -> None:
    assert asked(tmp_path, FIRST) == 0
    engine = engine_with(tmp_path)
    assert checked(list(engine.generate(FIRST, FOUR)), FIRST) == len(FIRST)
    assert isinstance(engine.model, ScriptedModel)
    assert [batch[0][2] for batch in engine.model.batches] == [1, 1, 1], "only the answer's own tokens"


def test_a_second_question_about_a_document_computes_only_the_question(tmp_path: Path) -> None:
    asked(tmp_path, FIRST)
    assert asked(tmp_path, SECOND) == len(DOCUMENT)
    small, large = files(tmp_path)
    assert PrefixFile(small).title.start == len(DOCUMENT), "what they share is on the disk once"
    assert PrefixFile(large).title.start == 0
    assert asked(tmp_path, SECOND) == len(SECOND)


def test_a_conversation_goes_on_where_it_was_for_as_many_turns_as_it_likes(tmp_path: Path) -> None:
    prompt = list(DOCUMENT)
    asked(tmp_path, prompt)
    for turn in range(2 * MAX_CHAIN):
        longer = [*prompt, *(10 + turn + i for i in range(20))]
        assert asked(tmp_path, longer) == len(prompt)
        prompt = longer


def test_a_longer_stored_prompt_serves_its_own_beginnings(tmp_path: Path) -> None:
    asked(tmp_path, FIRST)
    beginning = FIRST[: PIECE + 10]
    assert asked(tmp_path, beginning) == len(beginning) - 1, "its own logits are not known"
    assert asked(tmp_path, beginning) == len(beginning)


def test_prompts_that_are_too_short_or_are_not_to_be_stored_leave_nothing(tmp_path: Path) -> None:
    place = tmp_path / "prefixes"
    assert asked(place, DOCUMENT[:63]) == 0
    engine = engine_with(place)
    secret = engine.add(FIRST, FOUR, is_stored=False)
    while not engine.is_idle:
        engine.step()
    save(engine)
    assert secret.n_generated == 4 and not place.exists()
    asked(place, FIRST)
    engine = engine_with(place)
    assert engine.add(FIRST, FOUR, is_stored=False).n_cached == 0
    assert not engine.kv.n_cached_slots


def test_what_the_cache_holds_anyway_is_not_read_from_the_disk(tmp_path: Path) -> None:
    asked(tmp_path, FIRST)
    engine = engine_with(tmp_path)
    for prompt in (FIRST, SECOND, FIRST):
        list(engine.generate(prompt, FOUR))
    assert engine.prefixes is not None and engine.prefixes.n_restored == len(FIRST)


def test_many_at_once_get_their_own_prefixes_and_their_own_answers(tmp_path: Path) -> None:
    chance = random.Random(3)
    prompts = [FIRST, SECOND, DOCUMENT, DOCUMENT[:100], [9, *FIRST], *([n] * 70 for n in range(3, 9))]
    for _ in range(4):
        engine = engine_with(tmp_path, n_cells=1024, n_slots=5, n_batch=64)
        added = {engine.add(prompt, FOUR).id: prompt for prompt in chance.sample(prompts, len(prompts))}
        said: dict[int, list[Delta]] = {number: [] for number in added}
        while not engine.is_idle:
            for delta in engine.step():
                said[delta.sequence_id].append(delta)
        cached = [checked(said[number], prompt) for number, prompt in added.items()]
        save(engine)
        engine.kv.clear()
        assert isinstance(engine.model, ScriptedModel)
        assert (engine.model.n_used, engine.model.n_samplers, engine.kv.n_lent_slots) == (0, 0, 0)
    assert sum(cached) > 500


def test_a_stored_prefix_for_which_there_are_no_cells_is_computed(tmp_path: Path) -> None:
    asked(tmp_path, FIRST)
    longer = FIRST[: PIECE * 2 + 1]  # the last stored piece holds more than is wanted, and more than fits
    assert asked(tmp_path, longer, n_cells=len(longer) + 4) < len(longer)


def test_nobody_loses_a_kept_prefix_for_one_that_does_not_fit(tmp_path: Path) -> None:
    asked(tmp_path, FIRST)
    engine = engine_with(tmp_path, n_cells=256)
    list(engine.generate([5] * 20, FOUR))
    engine.add([7] * 120, SamplingParams(max_tokens=20))
    engine.step()
    engine.add(FIRST, FOUR)
    assert engine.kv.best_cached(array("i", [5] * 20))[1] == 20
    assert engine.prefixes is not None and engine.prefixes.n_restored == 0


# -- misses -----------------------------------------------------------------------------------------------------


def test_a_bit_that_flips_anywhere_in_the_file_is_a_miss(tmp_path: Path) -> None:
    chance = random.Random(1)
    prompt = FIRST[: PIECE + 8]
    asked(tmp_path, prompt)
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    for i in [*range(100), *chance.sample(range(100, len(whole)), 200)]:
        damaged = bytearray(whole)
        damaged[i] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        engine = engine_with(tmp_path)
        assert checked(list(engine.generate(prompt, FOUR)), prompt) == 0, f"byte {i} of {len(whole)}"
        assert not files(tmp_path), "it is no use to anybody"
    asked(tmp_path, prompt)
    assert asked(tmp_path, prompt) == len(prompt), "the place is not spoilt"


def test_damage_to_either_of_two_files_that_belong_together_is_never_used(tmp_path: Path) -> None:
    chance = random.Random(2)
    asked(tmp_path, FIRST)
    asked(tmp_path, SECOND)
    wholes = {path: path.read_bytes() for path in files(tmp_path)}
    for path, whole in wholes.items():
        for _ in range(60):
            for each, content in wholes.items():
                each.write_bytes(content)
            damaged = bytearray(whole)
            damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            n_cached = checked(list(engine_with(tmp_path).generate(SECOND, FOUR)), SECOND)
            assert n_cached in (0, len(DOCUMENT)), "nothing, or what the undamaged one holds"
            assert not path.exists()


def test_a_file_of_any_other_length_is_a_miss(tmp_path: Path) -> None:
    asked(tmp_path, FIRST)
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    for length in [*range(0, 200, 7), *range(200, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert checked(list(engine_with(tmp_path).generate(FIRST, FOUR)), FIRST) == 0
    path.write_bytes(whole + b"\0")
    assert checked(list(engine_with(tmp_path).generate(FIRST, FOUR)), FIRST) == 0


def another_format(path: Path) -> None:
    """As a later version may write it, checksum and all."""
    content = bytearray(path.read_bytes())
    content[8:12] = struct.pack("<I", 2)
    end = len(content) - len(b"".join(PrefixFile(path).piece(i) for i in range(3))) - 4
    content[end : end + 4] = struct.pack("<I", zlib.crc32(content[:end]))
    path.write_bytes(content)


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def somebody_elses(path: Path) -> None:
    if os.geteuid() != 0:
        path.chmod(0)
        return
    os.chown(path, 12345, 12345)


def random_bytes(path: Path) -> None:
    path.write_bytes(random.Random(4).randbytes(5000))


@pytest.mark.parametrize(
    "spoil",
    [another_format, a_directory, a_pipe, a_link_to_nothing, somebody_elses, random_bytes],
    ids=lambda spoil: spoil.__name__,
)
def test_what_is_no_file_of_ours_is_a_miss(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    asked(tmp_path, FIRST)
    (path,) = files(tmp_path)
    spoil(path)
    assert asked(tmp_path, FIRST) == 0
    assert asked(tmp_path, SECOND) in (0, len(DOCUMENT))  # computed, though it may not be written


def test_another_model_library_or_number_format_is_a_miss_and_does_no_harm(tmp_path: Path) -> None:
    other = bytes(31) + b"x"
    asked(tmp_path, FIRST)
    assert asked(tmp_path, FIRST, fingerprint=other) == 0
    assert asked(tmp_path, FIRST, fingerprint=other) == asked(tmp_path, FIRST) == len(FIRST)
    for path in files(tmp_path):  # one under the other's name
        path.rename(path.with_name(path.name.replace(MODEL[:8].hex(), other[:8].hex())))
    assert asked(tmp_path / "elsewhere", FIRST) == 0
    assert asked(tmp_path, FIRST, fingerprint=other[:8] + bytes(24)) == 0


def test_a_file_under_another_prompts_name_is_known_by_its_tokens(tmp_path: Path) -> None:
    asked(tmp_path, FIRST)
    (first,) = files(tmp_path)
    other = [*DOCUMENT[:64], *([5] * 100)]
    asked(tmp_path, other)
    second = next(path for path in files(tmp_path) if path != first)
    content = first.read_bytes()
    first.unlink()
    second.write_bytes(content)
    assert asked(tmp_path, other) == 64


def test_a_directory_that_cannot_be_used_is_a_miss(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        assert asked(place, FIRST) == asked(place, FIRST) == 0


# -- others at the same time ------------------------------------------------------------------------------------


def test_what_is_removed_while_it_is_read_is_read_to_its_end(tmp_path: Path) -> None:
    asked(tmp_path, FIRST)
    found = PrefixStore(tmp_path, MODEL).find(array("i", FIRST))
    assert found is not None
    prefix_store.clear(tmp_path)
    assert b"".join(bytes(piece.state) for piece in found.pieces()) == array("i", FIRST).tobytes()
    assert PrefixStore(tmp_path, MODEL).find(array("i", FIRST)) is None


def test_two_that_write_the_same_prompt_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    engines = [engine_with(tmp_path) for _ in range(2)]
    for engine in engines:
        checked(list(engine.generate(FIRST, FOUR)), FIRST)
    one, two = (engine.prefixes.save(engine.kv, engine.model) for engine in engines if engine.prefixes)
    next(one)
    for _ in two:
        next(one, None)
    for _ in one:
        pass
    assert [path.suffix for path in tmp_path.iterdir()] == [".kv"]
    assert asked(tmp_path, FIRST) == len(FIRST)


def test_a_prefix_that_leaves_the_cache_while_it_is_written_is_given_up(tmp_path: Path) -> None:
    engine = engine_with(tmp_path)
    list(engine.generate(FIRST, FOUR))
    assert engine.prefixes is not None
    saving = engine.prefixes.save(engine.kv, engine.model)
    next(saving)
    engine.kv.clear()
    assert list(saving) == [] and list(tmp_path.iterdir()) == []


def test_a_base_that_has_gone_takes_with_it_what_builds_on_it(tmp_path: Path) -> None:
    asked(tmp_path, FIRST)
    asked(tmp_path, SECOND)
    files(tmp_path)[1].unlink()
    assert asked(tmp_path, SECOND) == 0
    assert asked(tmp_path, SECOND) == len(SECOND)


# -- room -------------------------------------------------------------------------------------------------------


def test_who_was_used_longest_ago_has_to_go_when_the_budget_is_spent(tmp_path: Path) -> None:
    a, b, c = ([n] * 200 for n in (3, 4, 5))
    asked(tmp_path, a)
    budget = int(2.5 * files(tmp_path)[0].stat().st_size)
    asked(tmp_path, b, budget=budget)
    assert asked(tmp_path, a, budget=budget) == 200
    asked(tmp_path, c, budget=budget)
    assert sum(path.stat().st_size for path in files(tmp_path)) <= budget
    assert [asked(tmp_path, each, budget=0) for each in (a, b, c)] == [200, 0, 200]


def test_what_is_larger_than_the_budget_is_not_written_and_removes_nothing(tmp_path: Path) -> None:
    asked(tmp_path, FIRST)
    size = files(tmp_path)[0].stat().st_size
    asked(tmp_path, [7] * 600, budget=size + 100)
    assert len(files(tmp_path)) == 1
    asked(tmp_path, SECOND, budget=size + 100)  # it would have to remove what it builds on
    assert len(files(tmp_path)) == 1


def test_the_default_budget_is_a_twentieth_of_the_free_disk_or_four_gigabytes(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    assert prefix_store.budget_of(tmp_path / "to" / "come", None) == pytest.approx(min(4e9, free / 20), rel=0.05)


def test_only_its_owner_can_read_it(tmp_path: Path) -> None:
    place = tmp_path / "prefixes"
    place.mkdir(mode=0o755)
    asked(place, FIRST)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert stat.S_IMODE(files(place)[0].stat().st_mode) == 0o600


def test_a_draft_whose_writer_died_is_never_read_and_swept_away(tmp_path: Path) -> None:
    asked(tmp_path, FIRST)
    (path,) = files(tmp_path)
    draft = path.with_name(f"{path.name}.1.draft")
    path.rename(draft)
    assert asked(tmp_path, FIRST) == 0
    assert draft.exists(), "its writer may live"
    hours_ago = time.time() - 7200
    os.utime(draft, (hours_ago, hours_ago))
    asked(tmp_path, [7] * 100)
    assert not draft.exists()


def test_entries_are_told_even_of_what_cannot_be_read(tmp_path: Path) -> None:
    asked(tmp_path, FIRST)
    (tmp_path / "x.kv").write_bytes(b"nothing")
    found = {entry.path.name: entry for entry in prefix_store.entries(tmp_path)}
    assert found.pop("x.kv").title is None
    (entry,) = found.values()
    assert entry.title is not None and entry.n_bytes == entry.path.stat().st_size
    assert (entry.title.label, len(entry.title.tokens), entry.title.start) == ("scripted", len(FIRST), 0)
    with pytest.raises(Damaged):
        PrefixFile(tmp_path / "x.kv")
