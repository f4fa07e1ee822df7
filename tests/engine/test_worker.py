"""The engine in a process of its own: real processes, real signals; what dies is told at once and comes back."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
from array import array
from collections.abc import Coroutine
from pathlib import Path
from time import monotonic, sleep
from typing import Any, TypeVar

import pytest
from conftest import golden
from scripted import count_up
from scripted_workshop import ABORT, EXCEPTION, KILLED, SEGFAULT, recipe

from llamacli import launch
from llamacli.config import Settings
from llamacli.engine.protocol import PARAMS, Frames, Recipe, packed, packed_delta, packed_params, unpacked_delta
from llamacli.engine.sequence import Alternative, Delta, FinishReason, Logprobs, SamplingParams, Usage
from llamacli.engine.supervisor import PAUSE_AT, EngineProcess, Stream
from llamacli.errors import EngineCrashed, InputTooLong, ModelError, ResourceError, UsageError
from llamacli.launch import ServeOptions
from llamacli.models import store
from llamacli.models.store import ModelFile
from llamacli.prompt import Message, PromptBuilder

T = TypeVar("T")
TEN = SamplingParams(max_tokens=10)
ENDLESS = SamplingParams()
GREEDY = SamplingParams(temperature=0, max_tokens=48)


def run(test: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(test, 30))


def tiny(tmp_path: Path, **options: Any) -> Recipe:
    return launch.serving(Settings(model="tiny", threads=1), store.tiny(), None, ServeOptions(**options))


async def read(stream: Stream) -> list[Delta]:
    return [delta async for deltas in stream for delta in deltas]


async def first_of(stream: Stream) -> list[Delta]:
    return await anext(aiter(stream))


def alone(prompt: list[int], n: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(count_up(tuple(tokens)))
    return tokens[len(prompt) :]


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [delta.token for delta in deltas if delta.token is not None]


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


async def until(condition: Any) -> None:
    """The process tells its state with every step; there is no event to wait for."""
    while not condition():
        await asyncio.sleep(0.002)


def is_alive(pid: int) -> bool:
    """A process that has ended and was not waited for counts as dead: nobody may do that for an orphan."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, encoding="ascii").stdout
    return bool(state.strip()) and not state.startswith("Z")


def n_open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


# -- frames --


def test_messages_come_out_of_the_bytes_however_they_are_cut() -> None:
    messages: list[Any] = [(1, "a"), [], ("ü" * 5000, b"\0", None), {3: b"x"}]
    stream = b"".join(map(packed, messages))
    for size in (1, 3, 4, 1000, len(stream)):
        frames = Frames()
        assert [m for at in range(0, len(stream), size) for m in frames.feed(stream[at : at + size])] == messages


def test_a_frame_of_absurd_length_is_refused_before_it_is_waited_for() -> None:
    with pytest.raises(ConnectionError):
        Frames().feed(b"\xff\xff\xff\xff")


@pytest.mark.parametrize(
    "delta",
    [
        Delta(7, "text", 5),
        Delta(7, "", None, None, FinishReason.STOP, Usage(1, 2, 3)),
        Delta(7, "x", 5, Logprobs(5, -0.5, (Alternative(5, -0.5), Alternative(6, -1.5)))),
        Delta(7, "\ud800", 5, Logprobs(5, 0.0, ()), FinishReason.CONTEXT, Usage(0, 0, 0)),
    ],
)
def test_a_delta_arrives_as_it_was(delta: Delta) -> None:
    (values,) = Frames().feed(packed(packed_delta(delta, 7)))
    assert unpacked_delta(values) == delta


def test_sampling_parameters_arrive_as_they_were() -> None:
    params = SamplingParams(
        temperature=0.1, stop=("a", "b"), logit_bias={5: -1.0}, seed=9, logprobs=3, grammar="root ::= x"
    )
    (values,) = Frames().feed(packed(packed_params(params)))
    assert SamplingParams(**dict(zip(PARAMS, values, strict=True))) == params


# -- answers --


def test_sixteen_at_once_answer_as_each_does_alone(tmp_path: Path, builder: PromptBuilder) -> None:
    conversations = [each.messages for each in golden()]
    asked = [conversations[i % len(conversations)] for i in range(16)]

    async def test() -> None:
        async with EngineProcess(tiny(tmp_path, slots=8)) as engine:
            prompts = [await engine.encode(messages) for messages in asked]
            assert [p.tokens for p in prompts] == [builder.build(messages).tokens for messages in asked]
            alone = [text_of(await read(engine.submit(p.tokens, GREEDY, trim=p.trim))) for p in prompts]
            streams = [engine.submit(p.tokens, GREEDY, trim=p.trim) for p in prompts]
            together = [text_of(deltas) for deltas in await asyncio.gather(*map(read, streams))]
            assert together == alone
            assert engine.stats.load.waiting == engine.stats.load.slots_busy == 0

    run(test())


def test_the_golden_answers_come_out_of_the_process(tmp_path: Path) -> None:
    async def test() -> None:
        async with EngineProcess(tiny(tmp_path)) as engine:
            for case in golden()[:3]:
                prompt = await engine.encode(case.messages)
                stream = engine.submit(prompt.tokens, SamplingParams(temperature=0, max_tokens=200), trim=prompt.trim)
                assert text_of(await read(stream)).startswith(case.answer.strip())

    run(test())


def test_log_probabilities_bring_the_bytes_of_the_tokens_they_name(tmp_path: Path, builder: PromptBuilder) -> None:
    async def test() -> None:
        async with EngineProcess(tiny(tmp_path)) as engine:
            prompt = await engine.encode("Llama 2 is")
            params = SamplingParams(temperature=0, max_tokens=4, logprobs=5)
            for delta in await read(engine.submit(prompt.tokens, params)):
                assert delta.logprobs is not None
                for token, _ in delta.logprobs.top:
                    assert engine.piece(token) == builder.tokenizer.detokenize(array("i", [token]))

    run(test())


def test_what_is_wrong_with_a_request_is_raised_for_it_alone() -> None:
    async def test() -> None:
        async with EngineProcess(recipe(n_limit=100)) as engine:
            good = engine.submit([1, 5, 6], TEN)
            with pytest.raises(InputTooLong, match="100 tokens; the context holds 100"):
                await read(engine.submit([5] * 100, TEN))
            with pytest.raises(UsageError, match="empty"):
                await read(engine.submit([], TEN))
            assert tokens_of(await read(good)) == alone([1, 5, 6], 10)

    run(test())


def test_who_still_waits_when_the_server_goes_has_not_begun() -> None:
    async def test() -> None:
        async with EngineProcess(recipe(slots=1, row_seconds=0.01)) as engine:
            streams = [engine.submit([5] * 20, TEN) for _ in range(2)]
            await until(lambda: engine.stats.load.slots_busy)
            await engine.stop(0)
            ends = [[delta async for deltas in stream for delta in deltas][-1].finish_reason for stream in streams]
            assert ends == [FinishReason.CANCELLED] * 2
            assert [stream.has_begun for stream in streams] == [True, False]

    run(test())


def test_a_prompt_is_encoded_while_a_batch_computes() -> None:
    async def test() -> None:
        async with EngineProcess(recipe(row_seconds=0.01, n_batch=64)) as engine:
            stream = engine.submit([5] * 300, TEN)
            await until(lambda: engine.stats.load.slots_busy)
            before = engine.stats.load.prefill_tokens
            for _ in range(5):
                assert list((await engine.encode("hi")).tokens) == [104, 105]
            assert engine.stats.load.prefill_tokens == before  # of the same batch
            stream.cancel()

    run(test())


@pytest.mark.parametrize("text", ["hi there, ", "hi there, " * 2000])
def test_what_cannot_be_encoded_is_raised_as_it_was(text: str) -> None:
    async def test() -> None:
        async with EngineProcess(recipe(n_limit=100)) as engine:
            with pytest.raises(UsageError, match="ASCII"):
                await engine.encode(text + "ü")
            with pytest.raises(InputTooLong, match="the context holds 100 tokens"):
                await engine.encode([Message("user", text * 10)])
            with pytest.raises(InputTooLong, match=r"30,000 characters"):
                await engine.encode("x" * 30_000)

    run(test())


# -- starting and stopping --


def test_an_error_while_loading_keeps_its_class_and_its_message(tmp_path: Path) -> None:
    model = tmp_path / "gone.gguf"
    model.write_bytes(store.bundled().read_bytes())
    gone = launch.serving(Settings(model=str(model)), ModelFile(str(model), model), None, ServeOptions())
    model.unlink()

    async def start(recipe: Recipe) -> EngineProcess:
        engine = EngineProcess(recipe)
        try:
            await engine.start()
        finally:
            assert engine.pid is None
            assert engine.state == "failed"
            await engine.stop(0)
        return engine

    with pytest.raises(ResourceError, match=r"8\.0 GiB are needed"):
        run(start(recipe(fault="resource")))
    with pytest.raises(ModelError, match=r"gone\.gguf"):
        run(start(gone))
    with pytest.raises(EngineCrashed, match="SIGKILL"):
        run(start(recipe(fault="killed")))
    with pytest.raises(EngineCrashed, match="exit status 1; its last words: ZeroDivisionError: told to"):
        run(start(recipe(fault="exception")))


def test_the_facts_of_the_model_and_the_notices_of_its_loading_reach_this_side(tmp_path: Path) -> None:
    notices: list[str] = []

    async def test() -> None:
        async with EngineProcess(tiny(tmp_path, slots=3)) as engine:
            facts = engine.facts
            assert facts is not None
            assert (facts.name, facts.slots, facts.n_limit, facts.format) == ("tiny", 3, 1024, "llama-2")
            assert facts.n_cells == 3 * 1024
            assert facts.choices["slots"][0] == 3
        async with EngineProcess(recipe(slots=2), notice=notices.append):
            assert notices == ["2 slots"]

    run(test())


def test_stopping_lets_running_answers_finish_and_nobody_in() -> None:
    async def test() -> None:
        engine = EngineProcess(recipe(row_seconds=0.002))
        await engine.start()
        pid = engine.pid
        stream = engine.submit([1, 5, 6], SamplingParams(max_tokens=40))
        await first_of(stream)
        stopping = asyncio.ensure_future(engine.stop(10))
        await asyncio.sleep(0)
        assert engine.state == "draining"
        with pytest.raises(EngineCrashed, match="going down"):
            engine.submit([1], TEN)
        assert (await read(stream))[-1].finish_reason is FinishReason.LENGTH
        await stopping
        assert pid is not None and not is_alive(pid)

    run(test())


def test_what_is_not_finished_in_time_is_cancelled_even_in_the_middle_of_a_batch() -> None:
    async def test() -> None:
        engine = EngineProcess(recipe(row_seconds=0.5))
        await engine.start()
        pid = engine.pid
        stream = engine.submit([5] * 500, ENDLESS)
        began = monotonic()
        await engine.stop(0.1)
        assert monotonic() - began < 1.5
        assert (await read(stream))[-1].finish_reason is FinishReason.CANCELLED
        assert pid is not None and not is_alive(pid)

    run(test())


def test_signals_of_the_terminal_and_of_the_service_manager_are_left_to_the_parent() -> None:
    async def test() -> None:
        async with EngineProcess(recipe()) as engine:
            assert engine.pid is not None
            assert os.getsid(engine.pid) != os.getsid(0)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(engine.pid, number)
            assert tokens_of(await read(engine.submit([1, 5], TEN))) == alone([1, 5], 10)
            assert engine.stats.restarts == 0

    run(test())


PARENT = """
import asyncio, sys
sys.path.append(sys.argv[1])
from scripted_workshop import recipe
from llamacli.engine.supervisor import EngineProcess
from llamacli.engine.sequence import SamplingParams

async def main():
    engine = EngineProcess(recipe(row_seconds=float(sys.argv[2])))
    await engine.start()
    stream = engine.submit([5] * 400, SamplingParams())
    assert not {"llama_cpp", "numpy", "jinja2"} & set(sys.modules), "this side must stay free of native code"
    print(engine.pid, flush=True)
    await anext(aiter(stream))
    print("talks", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("row_seconds", ["0.001", "1"])
def test_the_child_is_gone_when_its_parent_is_killed(row_seconds: str) -> None:
    """While it answers, and in the middle of a batch of minutes."""
    here = str(Path(__file__).parent)
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, here, row_seconds], stdout=subprocess.PIPE, encoding="ascii"
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        if row_seconds != "1":
            parent.stdout.readline()
        assert is_alive(child)
        parent.kill()
        parent.wait()
        deadline = monotonic() + 2
        while is_alive(child) and monotonic() < deadline:
            sleep(0.005)
        assert not is_alive(child)


# -- dying and coming back --


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (KILLED, "signal SIGKILL"),
        (SEGFAULT, "signal SIGSEGV"),
        (ABORT, "signal SIGABRT"),
        (EXCEPTION, "exit status 1; its last words: ZeroDivisionError: told to"),
    ],
)
def test_when_the_process_dies_all_who_wait_are_told_and_it_comes_back(fault: int, reason: str) -> None:
    async def test() -> None:
        async with EngineProcess(recipe(slots=2, row_seconds=0.001)) as engine:
            before = engine.pid
            assert tokens_of(await read(engine.submit([1, 5], TEN))) == alone([1, 5], 10)
            runs, makes_room = engine.submit([1, 3], ENDLESS), engine.submit([1, 4], ENDLESS)
            await first_of(makes_room)
            deadly, waits = engine.submit([1, fault], TEN), engine.submit([1, 6], TEN)
            makes_room.cancel()
            ends = await asyncio.gather(*map(read, (runs, deadly, waits)), return_exceptions=True)
            assert [type(end) for end in ends] == [EngineCrashed] * 3
            assert reason in str(ends[0])
            await until(lambda: engine.state == "ready")
            assert engine.pid != before and engine.stats.restarts == 1
            assert tokens_of(await read(engine.submit([1, 5], TEN))) == alone([1, 5], 10)
            assert engine.stats.load.decode_tokens >= 18  # those of the first life are not forgotten

    run(test())


def test_a_real_model_killed_under_load_comes_back_by_itself(tmp_path: Path) -> None:
    async def test() -> None:
        async with EngineProcess(tiny(tmp_path, slots=4)) as engine:
            prompt = await engine.encode([Message("user", "Tell me about llama2")])
            expected = text_of(await read(engine.submit(prompt.tokens, GREEDY, trim=True)))
            for number in (signal.SIGKILL, signal.SIGSEGV):
                params = SamplingParams(ignore_eos=True)
                streams = [engine.submit(prompt.tokens, params, trim=True) for _ in range(12)]
                await first_of(streams[0])
                assert engine.pid is not None
                os.kill(engine.pid, number)
                began = monotonic()
                ends = await asyncio.gather(*map(read, streams), return_exceptions=True)
                assert {type(end) for end in ends} == {EngineCrashed}
                assert monotonic() - began < 2
                with pytest.raises(EngineCrashed):
                    engine.submit(prompt.tokens, GREEDY)
                await until(lambda: engine.state == "ready")
                assert text_of(await read(engine.submit(prompt.tokens, GREEDY, trim=True))) == expected

    run(test())


def test_prompts_on_their_way_are_told_too() -> None:
    async def test() -> None:
        async with EngineProcess(recipe()) as engine:
            assert engine.pid is not None
            status = Path(f"/proc/{engine.pid}/stat")
            os.kill(engine.pid, signal.SIGSTOP)
            await until(lambda: status.read_text().rpartition(")")[2].split()[0] == "T")
            asked = asyncio.ensure_future(engine.encode("hi"))
            await asyncio.sleep(0.01)
            os.kill(engine.pid, signal.SIGKILL)
            with pytest.raises(EngineCrashed):
                await asked

    run(test())


@pytest.mark.parametrize("fault", ["killed", "exception", "resource"])
def test_a_process_that_only_ever_dies_is_given_up_with_the_reason(tmp_path: Path, fault: str) -> None:
    async def test() -> None:
        once = str(tmp_path / "once")
        async with EngineProcess(recipe(fault=fault, once=once), backoff_seconds=[0.0, 0.01]) as engine:
            pid = engine.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await until(lambda: engine.state == "failed")
            told = {"killed": "SIGKILL", "exception": "told to", "resource": "8.0 GiB are needed"}
            assert told[fault] in engine.reason
            assert engine.pid != pid
            with pytest.raises(EngineCrashed, match="does not come back"):
                engine.submit([1], TEN)

    run(test())


def test_deaths_between_answers_are_no_reason_to_give_up() -> None:
    async def test() -> None:
        async with EngineProcess(recipe(), backoff_seconds=[0.0]) as engine:
            for _ in range(5):
                assert tokens_of(await read(engine.submit([1, 5], TEN))) == alone([1, 5], 10)
                with pytest.raises(EngineCrashed):
                    await read(engine.submit([1, KILLED], TEN))
                await until(lambda: engine.state == "ready")

    run(test())


def test_deaths_without_a_single_answer_are_no_reason_to_give_up_what_could_be_loaded() -> None:
    async def test() -> None:
        async with EngineProcess(recipe(), backoff_seconds=[0.0]) as engine:
            for _ in range(5):
                with pytest.raises(EngineCrashed):
                    await read(engine.submit([1, KILLED], TEN))
                await until(lambda: engine.state in ("ready", "failed"))
                assert engine.state != "failed", engine.reason

    run(test())


def test_a_process_that_cannot_be_started_now_is_started_later() -> None:
    """While it has no file descriptors left."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def test() -> None:
        async with EngineProcess(recipe(), backoff_seconds=[0.0, 0.01]) as engine:
            n_before = n_open_files()
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (n_before, most[1]))
                with pytest.raises(EngineCrashed):
                    await read(engine.submit([1, KILLED], TEN))
                await until(lambda: engine.stats.restarts > 5)
                assert "Too many open files" in engine.reason
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, most)
            await until(lambda: engine.state == "ready")
            assert tokens_of(await read(engine.submit([1, 5], TEN))) == alone([1, 5], 10)
            assert n_open_files() == n_before

    run(test())


def test_lives_and_streams_leave_no_file_descriptor_and_no_process_behind() -> None:
    async def test() -> None:
        async with EngineProcess(recipe(), backoff_seconds=[0.0]) as engine:
            before = n_open_files()
            for _ in range(3):
                await read(engine.submit([1, 5], TEN))
                with pytest.raises(EngineCrashed):
                    await read(engine.submit([1, SEGFAULT], TEN))
                await until(lambda: engine.state == "ready")
            assert n_open_files() == before
            assert not engine._streams and not engine._questions

    run(test())
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


# -- clients that go, and clients that do not read --


def test_a_cancelled_prompt_gives_its_cells_back_before_its_batch_is_through() -> None:
    async def test() -> None:
        async with EngineProcess(recipe(row_seconds=0.01)) as engine:
            warm = engine.submit([1, 5], TEN)
            await read(warm)
            before = engine.stats.load
            stream = engine.submit([5] * 900, TEN)  # batches of five seconds
            await asyncio.sleep(0.05)
            began = monotonic()
            stream.cancel()
            assert await read(stream) == []
            assert len(await read(engine.submit([1, 6], SamplingParams(max_tokens=1)))) == 1
            assert monotonic() - began < 1
            assert engine.stats.load.prefill_tokens <= before.prefill_tokens + 2
            assert engine.stats.load.cells_used <= before.cells_used + 2

    run(test())


def test_a_cancel_does_not_disturb_the_company() -> None:
    async def test() -> None:
        async with EngineProcess(recipe(row_seconds=0.0005, n_batch=32)) as engine:
            goes = engine.submit([5] * 300, ENDLESS)
            stays = engine.submit([1, 5, 6], SamplingParams(max_tokens=60))
            first = await first_of(stays)
            goes.cancel()
            assert await read(goes) == []
            assert tokens_of(first + await read(stays)) == alone([1, 5, 6], 60)
            assert engine.stats.load.slots_busy == 0

    run(test())


def test_who_does_not_read_is_paused_while_others_go_on_and_misses_nothing() -> None:
    async def test() -> None:
        async with EngineProcess(recipe(slots=1, n_cells=4096)) as engine:
            slow = engine.submit([1, 7], SamplingParams(max_tokens=900))
            await until(lambda: slow._paused_at is not None)
            # The only slot is free for others.
            for _ in range(3):
                assert tokens_of(await read(engine.submit([1, 5], TEN))) == alone([1, 5], 10)
            assert len(slow._deltas) < PAUSE_AT + 200
            before = engine.stats.load
            assert before.waiting == 1
            assert tokens_of(await read(slow)) == alone([1, 7], 900)
            assert engine.stats.load.prefill_tokens == before.prefill_tokens  # nothing was computed again

    run(test())


def test_who_never_reads_is_cancelled() -> None:
    async def test() -> None:
        async with EngineProcess(recipe(), stall_seconds=0.05) as engine:
            stream = engine.submit([1, 7], ENDLESS)
            await until(lambda: not engine._streams)
            deltas = await read(stream)
            assert deltas[-1].finish_reason is FinishReason.CANCELLED
            assert tokens_of(deltas) == alone([1, 7], len(deltas) - 1)
            await until(lambda: engine.stats.load.waiting == 0)

    run(test())


def test_a_cancel_shows_while_nothing_but_an_embedding_is_computed(tmp_path: Path) -> None:
    async def test() -> None:
        async with EngineProcess(tiny(tmp_path)) as engine:
            embedding = asyncio.ensure_future(engine.embed([[300] * 1000] * 500))
            stream = engine.submit([1, 300], SamplingParams(ignore_eos=True))
            await first_of(stream)
            stream.cancel()
            await until(lambda: engine.stats.load.slots_busy == 0)
            assert not embedding.done()
            embedding.cancel()

    run(test())


def test_cancelling_twice_and_after_the_end_does_nothing() -> None:
    async def test() -> None:
        async with EngineProcess(recipe()) as engine:
            stream = engine.submit([1, 5], TEN)
            deltas = await read(stream)
            assert deltas[-1].usage == Usage(2, 10, 0)
            stream.cancel()
            other = engine.submit([1, 5], TEN)
            other.cancel()
            other.cancel()
            assert await read(other) == []

    run(test())


def test_hundreds_of_clients_that_vanish_leave_nothing_behind() -> None:
    async def test() -> None:
        async with EngineProcess(recipe()) as engine:
            for i in range(300):
                stream = engine.submit([1, 3 + i % 200], ENDLESS)
                if i % 3 == 0:
                    await first_of(stream)
                elif i % 3 == 1:
                    await asyncio.sleep(0)
                stream.cancel()
            assert tokens_of(await read(engine.submit([1, 5], TEN))) == alone([1, 5], 10)
            assert (engine.stats.load.slots_busy, engine.stats.load.waiting) == (0, 0)
            assert not engine._streams

    run(test())


def test_a_missing_model_is_said_before_a_process_is_started(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.gguf"):
        launch.serving(Settings(), ModelFile("none.gguf", tmp_path / "none.gguf"), None, ServeOptions())


def test_the_recipe_is_plain_data(tmp_path: Path) -> None:
    made = tiny(tmp_path)
    assert json.loads(json.dumps(dict(made.options))) == made.options
