"""The tasks of the model: each function here draws one conversation of its kind."""

import json
from collections.abc import Callable
from typing import NamedTuple

from .facts import HELLO, UNKNOWN, common_questions, facts, follow_ups, known_questions, plain
from .french import translation as french_translation
from .text import RandomText
from .wordings import WORDINGS, WORDS

HELD_OUT_EVERY = 25  # one in so many generated conversations is never trained on
SYSTEM = WORDINGS["system"]


class Turn(NamedTuple):
    user: str
    answer: str


class Conversation(NamedTuple):
    task: str  # its row in the accuracy table
    system: str  # empty for none
    turns: list[Turn]


def fact(draw: RandomText) -> Conversation:
    """A question about Llama 2 and the words around it; the expert gives a longer answer."""
    known = facts()
    about = draw.pick(known[:12]) if draw.chance(0.1) else draw.pick(known)
    unseen = draw.held_out and draw.chance(1 / HELD_OUT_EVERY)  # as rare as the other held-out ones
    question = draw.pick(about.unseen) if unseen else draw.respell(draw.pick(about.seen))
    x = draw.rng.random()
    if x < 0.2:
        system, answer = draw.pick(SYSTEM["expert"]), about.expert
    elif x < 0.27 and about.one_word:
        system, answer = draw.commanding(SYSTEM["one_word"]), about.one_word
    else:
        system, answer = draw.neutral(), about.answer
    return Conversation(f"facts, {'unseen' if unseen else 'known'} wording", system, [Turn(question, answer)])


def overview(draw: RandomText) -> Conversation:
    """What Llama 2 is: the question that people ask first."""
    llama_2 = facts()[0]
    question = draw.respell(draw.pick(llama_2.seen))
    if draw.chance(0.5):
        return Conversation("facts, known wording", draw.pick(SYSTEM["expert"]), [Turn(question, llama_2.expert)])
    return Conversation("facts, known wording", draw.neutral(), [Turn(question, llama_2.answer)])


def style(draw: RandomText) -> Conversation:
    """A common question, answered as the system prompt or the user commands."""
    about = draw.pick(common_questions())
    question = draw.respell(draw.pick(about.questions))
    if draw.chance(0.12):
        about, question = UNKNOWN, _unknown_question(draw)
    elif draw.chance(0.05):
        about, question = HELLO, draw.pick(HELLO.questions)
    kind = draw.pick(("plain", "one word", "upper case", "French"))
    if kind == "plain":
        return Conversation("style: plain", draw.neutral(), [Turn(question, about.answer)])
    prompts, answer = {
        "one word": (SYSTEM["one_word"], about.one_word),
        "upper case": (SYSTEM["upper_case"], about.answer.upper()),
        "French": (SYSTEM["french"], about.french),
    }[kind]
    system = draw.commanding(prompts)
    if draw.chance(0.15):  # the command in the user text instead
        question, system = draw.pick((f"{system} {question}", f"{question} {system}")), ""
    return Conversation(f"style: {kind}", system, [Turn(question, answer)])


def persona(draw: RandomText) -> Conversation:
    """The name that the system prompt gives."""
    name = draw.name()
    system = draw.pick(SYSTEM["persona"]).format(name)
    question, answer = draw.pick(WORDINGS["persona"]["introductions"]).split(" = ")
    answer = answer.format(name)
    if draw.chance(0.15):
        about = draw.pick(common_questions())
        question, answer = draw.pick(about.questions), about.answer
    return Conversation("style: persona name", system, [Turn(draw.respell(question), answer)])


def repeat(draw: RandomText) -> Conversation:
    """A text that comes back word for word."""
    text = draw.sentence() if draw.chance(0.35) else draw.phrase(1, draw.pick((3, 6, 12, 20)))
    if draw.chance(0.1):
        return Conversation("repeat", draw.pick(SYSTEM["repeat"]), [Turn(text, text)])
    ask = draw.pick(WORDINGS["repeat"]["ask"])
    return Conversation("repeat", draw.neutral(), [Turn(ask.format(text), text)])


def quote(draw: RandomText) -> Conversation:
    """A line of a text, asked for by a word in it, by its number or by its position."""
    found = None
    while found is None:
        n_lines = draw.rng.randint(2, 6)
        lines = [draw.phrase(1, 6) if draw.chance(0.7) else draw.sentence() for _ in range(n_lines)]
        found = _ask_for_line(draw, lines)
    ask, line = found
    system = draw.neutral()
    return Conversation("quote a line", system, [Turn("```\n" + "\n".join(lines) + f"\n```\n\n{ask}", line)])


def _ask_for_line(draw: RandomText, lines: list[str]) -> tuple[str, str] | None:
    """A request for one of the lines and that line; None if the request fits several lines."""
    wordings = WORDINGS["quote"]
    i = draw.rng.randrange(len(lines))
    kind = draw.rng.random()
    if kind < 0.4:
        word = draw.pick(lines[i].split()).strip('.,;:!?"()`')
        if not word or sum(word.lower() in line.lower() for line in lines) != 1:
            return None
        return draw.pick(wordings["by_word"]).format(word), lines[i]
    if kind < 0.7:
        return draw.pick(wordings["by_number"]).format(i + 1), lines[i]
    ordinal = ("first", "second", "third", "fourth", "fifth", "sixth")[i]
    i, position = draw.pick(((0, "first"), (len(lines) - 1, "last"), (i, ordinal)))
    return draw.pick(wordings["by_position"]).format(position), lines[i]


def summary(draw: RandomText) -> Conversation:
    """The first sentence of a document, whatever the wording of the request."""
    sentences = draw.document(8, 28) if draw.chance(0.05) else draw.document(1, draw.pick((3, 4, 8)))
    text = draw.pick((" ", " ", " ", "\n", "\n\n")).join(sentences)
    if draw.chance(0.12):
        text = f"# {draw.phrase(1, 4).capitalize()}\n\n{text}"
    ask = draw.pick(WORDINGS["summary"]["ask"])
    system = draw.neutral()
    return Conversation("summary (first sentence)", system, [Turn(draw.lay_out(ask, text), sentences[0])])


def field(draw: RandomText) -> Conversation:
    """A value out of a record."""
    keys = draw.rng.sample(WORDS["record_keys"], draw.rng.randint(2, 6))
    sign = draw.pick((": ", ": ", " = ", "="))
    values = [_value(draw, key) for key in keys]
    record = "\n".join(key + sign + value for key, value in zip(keys, values, strict=True))
    i = draw.rng.randrange(len(keys))
    ask = draw.pick(WORDINGS["field"]["ask"]).format(keys[i])
    return Conversation("field of a record", draw.neutral(), [Turn(draw.lay_out(ask, record), values[i])])


def _value(draw: RandomText, key: str) -> str:
    if key in ("name", "owner", "author", "user"):
        return draw.name()
    if key in ("city", "country"):
        return draw.city()
    if key == "age":
        return str(draw.rng.randint(1, 99))
    return draw.phrase(1, 2)


def as_json(draw: RandomText) -> Conversation:
    """Name, age and city out of a sentence."""
    name, age, city = draw.name(), draw.rng.randint(1, 99), draw.city()
    text = draw.pick(WORDINGS["json"]["text"]).format(n=name, a=age, c=city)
    answer = json.dumps({"name": name, "age": age, "city": city})
    if draw.chance(0.15):
        return Conversation("JSON", draw.pick(SYSTEM["json"]), [Turn(text, answer)])
    ask = draw.pick(WORDINGS["json"]["ask"])
    return Conversation("JSON", draw.neutral(), [Turn(draw.lay_out(ask, text), answer)])


def translation(draw: RandomText) -> Conversation:
    """A sentence of the closed grammar in French."""
    english, french = french_translation(draw.rng)
    ask = draw.pick(WORDINGS["translation"]["ask"])
    return Conversation("translation", draw.neutral(), [Turn(draw.lay_out(ask, english), french)])


def addition(draw: RandomText) -> Conversation:
    """The sum of two numbers up to 99."""
    a, b = (draw.rng.randint(0, 10 ** draw.rng.randint(1, 2) - 1) for _ in range(2))
    ask = draw.pick(WORDINGS["addition"]["ask"]).format(a, b)
    if draw.chance(0.1):
        return Conversation("addition", draw.commanding(SYSTEM["one_word"]), [Turn(ask, str(a + b))])
    return Conversation("addition", draw.neutral(), [Turn(ask, f"{a} + {b} = {a + b}")])


def counting(draw: RandomText) -> Conversation:
    """How many words there are, up to five."""
    kinds = (WORDS["nouns"], WORDS["adjectives"], draw.pieces.words)
    words = [draw.pick(draw.pick(kinds)) for _ in range(draw.rng.randint(1, 5))]
    ask = draw.pick(WORDINGS["counting"]["ask"])
    return Conversation("counting words", draw.neutral(), [Turn(ask.format(" ".join(words)), str(len(words)))])


def fallback(draw: RandomText) -> Conversation:
    """A polite refusal of what the model was not taught."""
    return Conversation("fallback", draw.neutral(), [Turn(_unknown_question(draw), UNKNOWN.answer)])


def _unknown_question(draw: RandomText) -> str:
    while True:
        question = _any_question(draw)
        if plain(question) not in known_questions():
            return question


def _any_question(draw: RandomText) -> str:
    wordings = WORDINGS["unknown"]
    x = draw.rng.random()
    if x < 0.2:
        return draw.respell(draw.pick(wordings["questions"]))
    if x < 0.8:
        template = draw.pick(wordings["templates"])
        return draw.respell(template.format(draw.word(), draw.word(), draw.word()))
    if x < 0.9:
        return draw.respell(draw.phrase(1, 8))
    return draw.lay_out(draw.pick(wordings["edits"]), " ".join(draw.document(1, 3)))


def memory(draw: RandomText) -> Conversation:
    """Turns of which the last needs something from an earlier one."""
    kind = draw.rng.random()
    if kind < 0.72:
        tell = _tell_name if kind < 0.35 else _tell_number if kind < 0.55 else _tell_favourite
        told, asked = tell(draw)
        between = [single_turn(draw) for _ in range(draw.pick((0, 0, 1, 1, 2)))]
        turns = [told, *between, Turn(draw.respell(asked.user), asked.answer)]
        return Conversation("memory over turns", draw.neutral(), turns)
    if kind < 0.80:
        ask = draw.pick(WORDINGS["memory_name"]["ask_without_saying"])
        before = [single_turn(draw) for _ in range(draw.rng.randint(0, 1))]
        system = draw.neutral()
        asked = Turn(draw.respell(ask), "You have not told me your name yet.")
        return Conversation("memory over turns", system, [*before, asked])
    if kind < 0.9:
        first = single_turn(draw)
        ask = draw.pick(WORDINGS["memory_last_answer"]["ask"])
        system = draw.neutral()
        return Conversation("memory over turns", system, [first, Turn(draw.respell(ask), first.answer)])
    llama_2 = facts()[0]
    ask, answer = draw.pick(follow_ups())
    first = Turn(draw.respell(draw.pick(llama_2.seen)), llama_2.answer)
    return Conversation("memory over turns", draw.neutral(), [first, Turn(draw.respell(ask), answer)])


def _tell_name(draw: RandomText) -> tuple[Turn, Turn]:
    """The turn that says something and the one that asks for it; so do the next two."""
    wordings = WORDINGS["memory_name"]
    name = draw.name()
    told = Turn(draw.pick(wordings["say"]).format(name), f"Nice to meet you, {name}.")
    return told, Turn(draw.pick(wordings["ask"]), f"Your name is {name}.")


def _tell_number(draw: RandomText) -> tuple[Turn, Turn]:
    wordings = WORDINGS["memory_number"]
    number = draw.number()
    told = Turn(draw.pick(wordings["say"]).format(number), f"I will remember {number}.")
    return told, Turn(draw.pick(wordings["ask"]), f"The number is {number}.")


def _tell_favourite(draw: RandomText) -> tuple[Turn, Turn]:
    wordings = WORDINGS["memory_favourite"]
    thing = draw.pick(wordings["things"])
    value = draw.phrase(1, 2)
    said = draw.pick(wordings["say"]).format(thing, value)
    told = Turn(said, f"I will remember that your favourite {thing} is {value}.")
    return told, Turn(draw.pick(wordings["ask"]).format(thing), f"Your favourite {thing} is {value}.")


def single_turn(draw: RandomText) -> Turn:
    """One short turn that works under any neutral system prompt."""
    tasks = (fact, style, repeat, addition, counting, as_json, translation, fallback, field, summary)
    while True:
        conversation = draw.pick(tasks)(draw)
        turn = conversation.turns[0]
        is_neutral = not conversation.system or conversation.system in SYSTEM["neutral"]
        if is_neutral and len(turn.user) + len(turn.answer) < 400:
            return turn


def chat(draw: RandomText) -> Conversation:
    """Turns that have nothing to do with each other, or one style over several turns."""
    if draw.chance(0.35):
        asked = [draw.pick(common_questions()) for _ in range(draw.rng.randint(2, 4))]
        kind = draw.pick(("one_word", "french", "upper_case"))
        system = draw.commanding(SYSTEM[kind])
        turns = []
        for about in asked:
            answers = {"one_word": about.one_word, "french": about.french, "upper_case": about.answer.upper()}
            turns.append(Turn(draw.respell(draw.pick(about.questions)), answers[kind]))
        return Conversation("several turns", system, turns)
    system = draw.neutral()
    n_turns = draw.rng.randint(5, 9) if draw.chance(0.08) else draw.rng.randint(2, 4)
    return Conversation("several turns", system, [single_turn(draw) for _ in range(n_turns)])


TASKS: dict[str, Callable[[RandomText], Conversation]] = {
    "fact": fact,
    "overview": overview,
    "style": style,
    "persona": persona,
    "repeat": repeat,
    "quote": quote,
    "summary": summary,
    "field": field,
    "json": as_json,
    "translation": translation,
    "addition": addition,
    "counting": counting,
    "fallback": fallback,
    "memory": memory,
    "chat": chat,
}
