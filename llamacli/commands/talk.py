"""A conversation that goes on: one model that stays loaded, the turns so far, and what a chat can do with them.

Shows nothing and reads nothing itself: that is its face's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from llamacli import launch as launching
from llamacli.commands import question as asking
from llamacli.commands.deliver import EXIT_CUT
from llamacli.commands.face import Face, Said
from llamacli.commands.journal import in_context, known_as, say_who_goes_on
from llamacli.commands.minutes import Minutes
from llamacli.commands.obtain import models_in, obtain, obtain_draft
from llamacli.commands.question import RunOptions
from llamacli.commands.reading import documents_at
from llamacli.commands.resident import Resident
from llamacli.commands.terminal import Notices
from llamacli.config import Directories, Settings
from llamacli.conversation import Conversation, Exchange
from llamacli.engine.sequence import FinishReason, SamplingParams, draw_seed
from llamacli.errors import EngineError, InputTooLong, LlamacliError, UsageError
from llamacli.launch import Launch
from llamacli.models.notes import Notes
from llamacli.models.store import ModelFile
from llamacli.prompt import Format, Message, format_of, room_for_answer, with_document
from llamacli.sessions.session import Session, Turn

SUMMARISE = "Summarise this conversation in a few sentences. Keep names, numbers and what was decided."
SUMMARY_SHARE = 8  # a summary takes this part of the context at most


class Talk:
    """Begins to load the model at once.

    turns        of the conversation, as far as the model is to see them
    unanswered   the last question, where it has no answer
    exit_code    3 once an answer was cut by the context
    """

    def __init__(
        self,
        settings: Settings,
        options: RunOptions,
        file: ModelFile,
        face: Face,
        minutes: Minutes,
        notices: Notices,
        notes: Notes,
        places: Directories,
    ) -> None:
        self.settings = settings
        self.file = file
        self.minutes = minutes
        self.turns: list[Turn] = []
        self.unanswered: Turn | None = None
        self.exit_code = 0
        self._options = options
        self._face = face
        self._notices = notices
        self._notes = notes
        self._places = places
        self._documents: list[tuple[str, str]] = []  # put before the next question: name and text
        self._conversation: Conversation | None = None
        self._n_tokens = 0
        self._n_cached = 0
        self._news: list[str] = []  # of the engine's thread: said when nobody types
        self._resident = self._begun(file)

    # -- the model --

    def _begun(self, file: ModelFile) -> Resident:
        """Raises UsageError for a model that cannot converse."""
        launch = self._launch(file, self._notices.say)
        if format_of(launch.header, file.format) is Format.COMPLETION:
            raise UsageError(
                f"{file.name} is a base model: it continues texts and cannot converse; llamacli run does that"
            )
        return Resident(launch, self._news.append, self._places.prefixes)

    def _launch(self, file: ModelFile, notice: Callable[[str], None]) -> Launch:
        draft = obtain_draft(self.settings, models_in(self._places), self._notes, self._notices)
        return launching.prepare(self.settings, file, notice, self._notes, draft)

    @property
    def is_hopeless(self) -> bool:
        """The model cannot be loaded: nothing will ever be answered."""
        return self._resident.has_failed

    def _ready(self) -> Conversation:
        """Waits for the model. Raises LlamacliError where it cannot be loaded."""
        if self._resident.is_closed:  # Ctrl-C has come between two models
            self._conversation, self._resident = None, self._begun(self.file)
        self._resident.wait()
        while self._news:
            self._notices.say(self._news.pop(0))
        return self._made()

    def _made(self) -> Conversation:
        """Of the turns, once for each model and session."""
        if self._conversation is None:
            builder = self._resident.wait()
            self._conversation = Conversation(
                builder,
                self._resident.recall,
                self._resident.piece,
                [Exchange(turn.question, turn.answer or "", turn.tokens) for turn in self.turns],
                system=self.settings.system,
                summary=self.minutes.session.summary,
            )
            self._n_tokens = self._conversation.n_tokens
        return self._conversation

    def change_model(self, name: str) -> None:
        """Raises LlamacliError, and goes on with the model that was there."""
        before, settings = self.file, replace(self.settings, model=name)
        file = obtain(settings, models_in(self._places), self._notes, self._notices)
        launch = self._launch(file, lambda _: None)  # what is wrong with it is said now
        if format_of(launch.header, file.format) is Format.COMPLETION:
            raise UsageError(f"{file.name} is a base model: it continues texts and cannot converse")
        self._conversation = None
        try:
            self._resident.close()  # two of them may not fit into memory
            self._resident, self.file = self._begun(file), file
            self._ready()
        except BaseException:
            self._conversation, self.file = None, before
            self._resident.close(waits=False)
            self._resident = self._begun(before)
            raise
        self.settings = settings
        self.minutes.change(model=known_as(file))
        self._notices.say(f"{file.name} goes on")

    # -- asking --

    def ask(self, text: str) -> None:
        """Answer a question, with the files that were put before it. Raises LlamacliError."""
        if not text.strip():
            raise UsageError("there is no question")
        self._ask(self._with_documents(text))
        self._documents = []

    def again(self, text: str | None = None) -> None:
        """Answer the last question once more, or another one in its place."""
        if self.unanswered is not None:
            lost, self.unanswered = self.unanswered, None
            self._replace(lost, text or lost.question, self.settings.seed, lambda: self._give_up(lost))
            return
        if not self.turns:
            raise UsageError("nothing was asked so far")
        conversation = self._ready()
        old, exchange = self.turns.pop(), conversation.drop_last()

        def put_back() -> None:
            self.turns.append(old)
            conversation.add(exchange)
            if self.unanswered is not None:
                self.minutes.withdrawn(self.unanswered)
                self.unanswered = None
                self._notices.say("the question and the answer that were there stay")

        if text is None and self.settings.temperature == 0:
            self._notices.say("at --temperature 0 the answer is the same again")
        seed = self.settings.seed if text is not None else draw_seed()  # the same seed would give the same answer
        self._replace(old, text or old.question, seed, put_back)

    def _replace(self, old: Turn, text: str, seed: int | None, put_back: Callable[[], None]) -> None:
        last = self.turns[-1] if self.turns else None
        try:
            self._ask(text, seed)
        finally:
            if self.turns and self.turns[-1] is not last:
                self.minutes.withdrawn(old)
            else:
                put_back()

    def _give_up(self, lost: Turn) -> None:
        """A question without an answer was asked again, and has none again; or was not even sent."""
        if self.unanswered is None:
            self.unanswered = lost
        else:
            self.minutes.withdrawn(lost)

    @property
    def last_question(self) -> str:
        if self.unanswered is not None:
            return self.unanswered.question
        return self.turns[-1].question if self.turns else ""

    def _with_documents(self, text: str) -> str:
        """Each file with its name, in a fence; then the question."""
        return "".join(f"{name}:\n{with_document(content, '')}" for name, content in self._documents) + text

    def _ask(self, text: str, seed: int | None = None) -> None:
        conversation = self._ready()
        self._make_room(conversation, text)
        turn = self.minutes.asked(text, known_as(self.file))
        self.unanswered = turn
        seed = self.settings.seed if seed is None else seed
        params = replace(asking.sampling(self.settings, self._options), seed=draw_seed() if seed is None else seed)
        said = self._answered(conversation, text, params)
        end = said.end
        assert end is not None and end.usage is not None and end.finish_reason is not None
        if end.finish_reason is FinishReason.FAILED:
            raise EngineError("llama.cpp failed in the middle of the answer; please report this with `llamacli doctor`")
        is_stopped = end.finish_reason is FinishReason.CANCELLED
        if is_stopped and not said.text.strip():
            self._notices.say("stopped before there was an answer: /retry asks again")
        else:
            self._keep(conversation, turn, said, params)
        if end.finish_reason is FinishReason.CONTEXT:
            self.exit_code = EXIT_CUT
            self._notices.say(
                f"the answer was cut: prompt and answer have filled the context of {self._resident.limit:,} tokens"
            )
        if is_stopped and not self._face.is_asked:
            raise KeyboardInterrupt

    def _answered(self, conversation: Conversation, text: str, params: SamplingParams) -> Said:
        return self._face.answer(self._resident.ask(conversation.prompt(text), params), self._resident)

    def _keep(self, conversation: Conversation, turn: Turn, said: Said, params: SamplingParams) -> None:
        end, text = said.end, said.text.strip("\n")
        assert end is not None and end.usage is not None
        turn = replace(
            turn,
            answer=text,
            tokens=said.tokens,
            answered=time.time(),
            finish_reason=str(end.finish_reason),
            prompt_tokens=end.usage.prompt_tokens,
            completion_tokens=end.usage.completion_tokens,
            cached_tokens=end.usage.cached_tokens,
            seed=params.seed,
        )
        self.unanswered = None
        self.turns.append(turn)
        conversation.add(Exchange(turn.question, text, said.tokens))
        self.minutes.answered(turn)  # last: Ctrl-C costs no answer then
        self._n_tokens = end.usage.prompt_tokens + end.usage.completion_tokens
        self._n_cached = end.usage.cached_tokens
        self._notices.detail(
            f"{end.usage.prompt_tokens:,} tokens of prompt, {end.usage.cached_tokens:,} of them were there; "
            f"{end.usage.completion_tokens:,} of answer"
        )

    # -- room --

    def _make_room(self, conversation: Conversation, text: str) -> None:
        """Leave out the oldest turns if they must go, as the user has chosen. Raises InputTooLong."""
        limit = self._resident.limit
        room = limit - room_for_answer(limit, self.settings.max_tokens)
        n_alone = len(conversation.builder.build([*conversation.before(), Message("user", text)]).tokens)
        if n_alone >= limit:
            raise InputTooLong(
                f"the question alone is {n_alone:,} tokens; the context holds {limit:,}, the answer included. "
                "Shorten it"
            )
        n = conversation.n_to_drop(text, room, limit)
        if not n:
            return
        n_tokens, chosen = len(conversation.prompt(text).tokens), self.settings.when_full
        turns = "oldest turn" if n == 1 else f"{n} oldest turns"
        if chosen == "ask":
            state = f"the context is full: {n_tokens:,} tokens with this, and {room:,} fit beside an answer"
            if not self._face.is_asked:
                raise InputTooLong(f"{state}. Say --when-full drop or summarise, or begin a new one with /clear")
            letter = self._face.choose(f"{state}. Drop the {turns}, summarise, or send nothing?", "dsn")
            if letter == "n":
                raise UsageError("nothing was sent: /clear begins a new conversation, /tokens shows this one")
            chosen = {"d": "drop", "s": "summarise"}[letter]
        summary = self._summary(conversation, n) if chosen == "summarise" else None
        conversation.forget(n, summary)
        self.minutes.begins_behind(self.turns[n - 1], conversation.summary)
        del self.turns[:n]
        self._notices.say(
            f"the context is full: the {turns} {'is' if n == 1 else 'are'} left out from now on"
            + (f", in short: {summary}" if summary else "")
        )

    def _summary(self, conversation: Conversation, n: int) -> str | None:
        """What was said in the oldest turns, by the model itself. None, and a notice, if that does not fit."""
        limit = self._resident.limit
        parts = [f"Before: {conversation.summary}"] if conversation.summary else []
        parts += [f"User: {each.question}\nAssistant: {each.answer}" for each in conversation.exchanges[:n]]
        prompt = conversation.builder.build([Message("user", with_document("\n\n".join(parts), SUMMARISE))])
        if len(prompt.tokens) + limit // SUMMARY_SHARE > limit:
            self._notices.say("the oldest turns are too long to be summarised: they are dropped")
            return None
        params = replace(
            asking.sampling(self.settings, self._options), seed=draw_seed(), max_tokens=limit // SUMMARY_SHARE, stop=()
        )
        reply, said = self._resident.ask(prompt, params), Said()
        try:
            while said.end is None:
                said.add(reply.get())
        except KeyboardInterrupt:
            self._resident.stop(reply)
            raise
        return " ".join(said.text.split()) or None

    # -- what else a chat can do --

    def attach(self, place: str) -> str:
        """Put a file before the next question. Returns what to say of it. Raises as documents_at() does."""
        found = documents_at(place, self._notices, is_offline=self.settings.offline)
        tokenize = self._ready().builder.tokenizer.tokenize
        n_tokens = sum(len(tokenize(each.text)) for each in found)
        names = [Path(place).name] if len(found) == 1 else [each.name for each in found]
        self._documents += [(name, each.text.rstrip("\n")) for name, each in zip(names, found, strict=True)]
        n_files = f" ({len(found):,} files)" if len(found) > 1 else ""
        return f"{place}{n_files}: {n_tokens:,} tokens, before your next question"

    def change_system(self, system: str | None) -> None:
        self.settings = replace(self.settings, system=system)
        self.minutes.change(system=system)
        if self._conversation is not None:
            self._conversation.change_system(system)

    def clear(self) -> None:
        """Begin a new conversation with the same model and system prompt."""
        self.turn_to(Session(model=known_as(self.file), system=self.settings.system), [])

    def turn_to(self, session: Session, turns: list[Turn]) -> None:
        """Go on with another conversation. What is computed of this one goes to the disk, if it is kept at all."""
        if self.minutes.session.id:
            self._resident.save()
        say_who_goes_on(session, self.file, turns, self._notices)
        self.minutes.turn_to(replace(session, model=known_as(self.file)))
        self.take_up(session, turns)

    def take_up(self, session: Session, turns: list[Turn]) -> None:
        self.turns = in_context(session, turns)
        self.unanswered = turns[-1] if turns and turns[-1].answer is None else None
        self.settings = replace(self.settings, system=session.system)
        self._conversation, self._n_tokens, self._n_cached = None, 0, 0
        self._documents = []

    def status(self) -> str:
        """One line: model, how full the context is, session."""
        if self._resident.has_failed:
            return f"{self.file.name} cannot be loaded"
        if not self._resident.is_ready:
            return f"loading {self.file.name} ..."
        with suppress(LlamacliError):  # it is said when something is asked
            self._made()
        files = f"  |  {len(self._documents)} files attached" if self._documents else ""
        name = self.minutes.session.name
        named = f"  |  {name}" if name else ""
        return f"{self.file.name}  |  {self._n_tokens:,} of {self._resident.limit:,} tokens{named}{files}  |  /help"

    def counts(self) -> str:
        """What the conversation takes of the context."""
        conversation, limit = self._ready(), self._resident.limit
        room = limit - room_for_answer(limit, self.settings.max_tokens)
        system = self.settings.system
        n_system = len(conversation.builder.tokenizer.tokenize(system)) if system else 0
        turns = "1 turn" if len(self.turns) == 1 else f"{len(self.turns)} turns"
        beside = f", a system prompt of {n_system:,}" if system else ""
        beside += ", a summary" if conversation.summary else ""
        return (
            f"{self._n_tokens:,} of {limit:,} tokens: {turns}{beside}; "
            f"{max(0, room - self._n_tokens):,} are left for your next question, {limit - room:,} for its answer. "
            f"Of the last prompt {self._n_cached:,} tokens needed no computing"
        )

    def leave(self) -> None:
        """Store what is computed, for whoever goes on with this session. Ctrl-C does without."""
        self.minutes.end()
        if self.minutes.session.id and self._resident.is_ready:
            self._resident.save().wait()
