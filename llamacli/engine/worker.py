"""The engine's process: steps while there is work, and hears what the server's process wants meanwhile.

Three threads. The main one owns the engine. A second one reads the socket, so that a cancel can stop a running
prefill and a prompt is tokenized while a batch computes; the third tokenizes what is long. The process ends with
its socket, and never outlives the process that started it.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import socket
import sys
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from queue import SimpleQueue
from time import monotonic, sleep
from typing import Any

from llamacli.engine.embedding import Embedder
from llamacli.engine.engine import Engine
from llamacli.engine.protocol import (
    Ask,
    Channel,
    ModelFacts,
    Recipe,
    Tell,
    packed_delta,
    unpacked_params,
)
from llamacli.engine.recall import Recall, spelling
from llamacli.engine.sequence import Delta, FinishReason, Sequence
from llamacli.errors import InputTooLong, LlamacliError, UsageError
from llamacli.prompt import LONGEST_PIECE, Message, Prompt

LONG_TEXT = 1 << 14  # characters; from here on tokenizing takes milliseconds, which commands should not wait for
SAVE_SECONDS = 1.5  # that prompts which are on their way to the disk get at the end: life.EXIT_SECONDS is more
SWITCH_SECONDS = 0.001  # a thread that computes in Python lets the others in after this long
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

Question = str | list[Message]  # a text to be continued, or a conversation
Command = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Workshop:
    """What a recipe's factory returns.

    encode      a text or a conversation to a prompt, called from any thread while the engine works
    embedder    None where no embeddings are made
    recall      is told the answers of conversations; it is for `encode` to ask it
    """

    engine: Engine
    encode: Callable[[Question], Prompt]
    facts: ModelFacts
    embedder: Embedder | None = None
    recall: Recall = field(default_factory=Recall)


@dataclass(slots=True)
class _Embedding:
    """Texts that are being embedded."""

    number: int
    steps: Iterator[bytes | None]
    n_tokens: int
    vectors: list[bytes] = field(default_factory=list)


class Worker:
    """Runs an engine for the other side of a channel."""

    def __init__(self, channel: Channel, workshop: Workshop) -> None:
        self._channel = channel
        self._engine = workshop.engine
        self._facts = workshop.facts
        self._encode = workshop.encode
        self._embedder = workshop.embedder
        self._recall = workshop.recall
        self._said: dict[int, list[str]] = {}  # by sequence id: the text of answers to conversations
        self._embeddings: deque[_Embedding] = deque()  # the first one is being computed
        self._inbox: SimpleQueue[list[Command]] = SimpleQueue()
        self._long_texts: SimpleQueue[Command] = SimpleQueue()
        self._sequences: dict[int, Sequence] = {}  # by request id
        self._requests: dict[int, int] = {}  # sequence id → request id
        self._awaited: set[int] = set()  # embeddings that somebody waits for
        self._waiting: set[int] = set()  # requests of which nothing has been computed so far
        self._leaving: set[int] = set()  # requests whose cancel has been heard, but not yet obeyed
        self._refusals: list[tuple[int, str, str]] = []
        self._told: set[int] = set()  # tokens whose bytes the other side knows

    def run(self) -> None:
        """Until the process ends."""
        for task in (self._hear, self._encode_long_texts):
            threading.Thread(target=_ending_the_process, args=(task,), daemon=True).start()
        self._channel.send((Tell.READY, asdict(self._facts)))
        engine = self._engine
        while True:
            is_idle = not engine.has_work and not self._embeddings
            if is_idle and engine.save_some() and self._inbox.empty():
                continue
            commands = list(self._commands(wait=is_idle))
            self._obey(commands)
            if engine.has_work or commands:
                self._report(engine.step() if engine.has_work else [])
            if self._embeddings:
                self._embed(self._embeddings[0])

    # -- the engine's thread --

    def _commands(self, *, wait: bool) -> Iterable[Command]:
        """All that came since the last step; with `wait`, at least one."""
        if wait:
            yield from self._inbox.get()
        while not self._inbox.empty():
            yield from self._inbox.get()

    def _obey(self, commands: Iterable[Command]) -> None:
        for ask, request, *rest in commands:
            if ask == Ask.ADD:
                self._add(request, *rest)
                continue
            if ask == Ask.EMBED:
                self._begin_embedding(request, *rest)
                continue
            sequence = self._sequences.get(request)
            if sequence is None:  # it has ended meanwhile, or is an embedding
                self._leaving.discard(request)
                continue
            if ask == Ask.CANCEL:
                self._engine.cancel(sequence)
                self._forget(sequence)
            elif ask == Ask.PAUSE:
                self._engine.pause(sequence)
            elif ask == Ask.RESUME:
                self._engine.resume(sequence)

    def _add(self, request: int, prompt: bytes, values: tuple[Any, ...], trim: bool, is_stored: bool) -> None:
        try:
            params = unpacked_params(values)
            sequence = self._engine.add(array("i", prompt), params, trim=trim, is_stored=is_stored)
        except LlamacliError as error:
            self._refusals.append((request, type(error).__name__, str(error)))
            return
        self._sequences[request] = sequence
        self._waiting.add(request)
        self._requests[sequence.id] = request
        if trim:
            self._said[sequence.id] = []

    def _begin_embedding(self, number: int, texts: list[array[int]]) -> None:
        assert self._embedder is not None
        self._embeddings.append(_Embedding(number, self._embedder.vectors(texts), sum(map(len, texts))))

    def _embed(self, wanted: _Embedding) -> None:
        """One step of an embedding, between the steps of answers."""
        if wanted.number not in self._awaited:
            self._embeddings.popleft()
            return
        try:
            vector = next(wanted.steps, b"")
        except LlamacliError as error:
            self._channel.send((Tell.NOT_ENCODED, wanted.number, type(error).__name__, str(error)))
            self._end_embedding(wanted)
            return
        if vector:
            wanted.vectors.append(vector)
        elif vector is not None:
            self._channel.send((Tell.EMBEDDED, wanted.number, wanted.vectors, wanted.n_tokens))
            self._end_embedding(wanted)

    def _end_embedding(self, wanted: _Embedding) -> None:
        self._embeddings.popleft()
        self._awaited.discard(wanted.number)

    def _forget(self, sequence: Sequence) -> None:
        request = self._requests.pop(sequence.id)
        del self._sequences[request]
        self._waiting.discard(request)
        self._said.pop(sequence.id, None)
        self._leaving.discard(request)

    def _report(self, deltas: list[Delta]) -> None:
        """One frame for the step."""
        told = [packed_delta(delta, self._requests[delta.sequence_id]) for delta in deltas]
        pieces = self._new_pieces(deltas)
        begun = [request for request in self._waiting if self._sequences[request].slot is not None]
        self._waiting.difference_update(begun)
        for delta in deltas:
            if delta.sequence_id in self._said:
                self._said[delta.sequence_id].append(delta.text)
            if delta.finish_reason is not None:
                sequence = self._sequences[self._requests[delta.sequence_id]]
                if delta.finish_reason is not FinishReason.FAILED:
                    self._remember(sequence)
                self._forget(sequence)
        refusals, self._refusals = self._refusals, []
        self._channel.send((Tell.STEP, told, pieces, refusals, tuple(self._engine.load), begun))

    def _remember(self, sequence: Sequence) -> None:
        """A conversation may go on from this answer."""
        text = "".join(self._said.get(sequence.id, ()))
        tokens = spelling(text, sequence.tokens[sequence.n_prompt :], self._engine.model.piece) if text else None
        if tokens is not None:
            self._recall.note(sequence.tokens[: sequence.n_prompt], tokens, text)

    def _new_pieces(self, deltas: list[Delta]) -> dict[int, bytes]:
        """The bytes of tokens that log probabilities name: the other side has no vocabulary."""
        pieces = {}
        for delta in deltas:
            if delta.logprobs is not None:
                for token in (delta.logprobs.token, *(each.token for each in delta.logprobs.top)):
                    if token not in self._told:
                        self._told.add(token)
                        pieces[token] = self._engine.model.piece(token)
        return pieces

    # -- the threads that hear --

    def _hear(self) -> None:
        while True:
            try:
                commands = self._channel.receive()
            except (EOFError, ConnectionError):
                self._wait_for_the_disk()
                raise
            for question in [each for each in commands if each[0] == Ask.ENCODE]:
                commands.remove(question)
                if _n_characters(question[2]) < LONG_TEXT:
                    self._answer(question)
                else:
                    self._long_texts.put(question)
            for question in [each for each in commands if each[0] == Ask.EMBED]:
                commands.remove(question)
                self._awaited.add(question[1])
                self._long_texts.put(question)
            self._awaited.difference_update(each[1] for each in commands if each[0] == Ask.CANCEL)
            if commands:
                cancelled = {each[1] for each in commands if each[0] == Ask.CANCEL}.intersection(self._sequences)
                self._leaving |= cancelled
                self._inbox.put(commands)
                if cancelled:
                    self._stop_what_nobody_waits_for()

    def _wait_for_the_disk(self) -> None:
        """The end of the last answers' prompts may just be written. What is being computed is not waited for."""
        prefixes, deadline = self._engine.prefixes, monotonic() + SAVE_SECONDS
        while prefixes is not None and prefixes.owes and not self._engine.has_work and monotonic() < deadline:
            sleep(0.01)

    def _stop_what_nobody_waits_for(self) -> None:
        """Abort the running batch if all whose rows are in it have been cancelled: it would be computed in vain."""
        computed = {request for request, sequence in list(self._sequences.items()) if sequence.slot is not None}
        if computed and computed <= self._leaving:
            self._engine.abort()

    def _encode_long_texts(self) -> None:
        while True:
            self._answer(self._long_texts.get())

    def _answer(self, question: Command) -> None:
        ask, number, asked = question
        try:
            if ask == Ask.EMBED:
                self._inbox.put([(Ask.EMBED, number, self._tokens_to_embed(asked))])
                return
            prompt = self._encoded(asked)
        except LlamacliError as error:
            self._awaited.discard(number)
            self._channel.send((Tell.NOT_ENCODED, number, type(error).__name__, str(error)))
        else:
            self._channel.send((Tell.ENCODED, number, prompt.tokens.tobytes(), str(prompt.format), prompt.trim))

    def _tokens_to_embed(self, texts: list[str | bytes]) -> list[array[int]]:
        """Raises UsageError or InputTooLong."""
        if self._embedder is None:
            raise UsageError("this server makes no embeddings")
        limit = self._embedder.limit
        for i, text in enumerate(texts):
            if len(text) > limit * LONGEST_PIECE:
                raise InputTooLong(f"input {i} is far longer than the {limit:,} tokens an embedding is made of")
        tokens = [self._encode(text).tokens if isinstance(text, str) else array("i", text) for text in texts]
        self._embedder.check(tokens)
        return tokens

    def _encoded(self, asked: str | list[tuple[str, str]]) -> Prompt:
        """Raises InputTooLong for what leaves no room for an answer, far too long texts before they are tokenized."""
        limit = self._facts.n_limit
        n_characters = _n_characters(asked)
        if n_characters > limit * LONGEST_PIECE:
            raise _too_long(f"{n_characters:,} characters", limit)
        prompt = self._encode(asked if isinstance(asked, str) else [Message(*each) for each in asked])
        if len(prompt.tokens) >= limit:
            raise _too_long(f"{len(prompt.tokens):,} tokens", limit)
        return prompt


def _n_characters(asked: str | list[tuple[str, str]]) -> int:
    return len(asked) if isinstance(asked, str) else sum(len(content) for _, content in asked)


def _too_long(size: str, limit: int) -> InputTooLong:
    return InputTooLong(f"the prompt is {size}; the context holds {limit:,} tokens, the answer included")


def _ending_the_process(task: Callable[[], None]) -> None:
    """Run a thread that never ends by itself. The process ends with it: at once, in the middle of a batch too."""
    try:
        task()
    except (EOFError, ConnectionError):
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def _bind_to(parent: int) -> None:
    """End with the process that started this one, however that ends; and leave signals to it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)  # it was faster


def _no_core_dump() -> None:
    """A dump of gigabytes would keep the clients of a dead engine waiting until it is written."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


def _made(recipe: Recipe, notice: Callable[[str], None]) -> Workshop:
    sys.path += recipe.path
    module, _, function = recipe.factory.partition(":")
    workshop = getattr(importlib.import_module(module), function)(notice=notice, **recipe.options)
    assert isinstance(workshop, Workshop)
    return workshop


def main(descriptor: int, parent: int) -> None:
    """descriptor   the socket to the process `parent`; the first frame on it is the recipe"""
    _bind_to(parent)
    _no_core_dump()
    sys.setswitchinterval(SWITCH_SECONDS)
    channel = Channel(socket.socket(fileno=descriptor))
    try:
        recipe = Recipe(*channel.receive())
        try:
            workshop = _made(recipe, lambda line: channel.send((Tell.NOTICE, line)))
        except LlamacliError as error:
            channel.send((Tell.FAILED, type(error).__name__, str(error)))
            return
        Worker(channel, workshop).run()
    except (EOFError, ConnectionError):
        return
