"""What the model is taught: the facts of facts.toml and the common questions of common.toml."""

import functools
import re
from dataclasses import dataclass
from typing import Any

from .wordings import WORDINGS, read_toml


@dataclass(frozen=True)
class Fact:
    """One fact, the questions it is trained with (`seen`) and those kept for evaluation (`unseen`)."""

    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    answer: str
    one_word: str  # empty where no single word answers
    expert: str


@dataclass(frozen=True)
class CommonQuestion:
    """A question whose answer is known as a sentence, as one word and in French."""

    questions: tuple[str, ...]
    answer: str
    one_word: str
    french: str


@functools.cache
def facts() -> tuple[Fact, ...]:
    """All facts, in the order of the file."""
    data = read_toml("facts.toml")
    return tuple(_fact(number, table, data["term_wordings"]) for number, table in enumerate(data["fact"]))


def _fact(number: int, table: dict[str, Any], term_wordings: list[str]) -> Fact:
    if "terms" in table:
        left_out = number % len(term_wordings)
        by_wording = [[_capitalise(w.format(term)) for term in table["terms"]] for w in term_wordings]
        unseen = by_wording.pop(left_out)
        seen = [question for questions in by_wording for question in questions]
    else:
        *seen, last = table["questions"]
        unseen = [last]
    answer: str = table["answer"]
    return Fact(tuple(seen), tuple(unseen), answer, table.get("one_word", ""), table.get("expert", answer))


def _capitalise(text: str) -> str:
    return text[0].upper() + text[1:]  # str.capitalize would make "What is BPE?" "What is bpe?"


@functools.cache
def fact_sentences() -> tuple[str, ...]:
    """The sentences of all answers, as material for random documents."""
    return tuple(sentence for fact in facts() for sentence in re.split(r"(?<=\.) ", fact.answer))


@functools.cache
def follow_ups() -> tuple[tuple[str, str], ...]:
    """Questions about "it" that make sense after an overview of Llama 2, with their answers."""
    answers = {question: fact.answer for fact in facts() for question in fact.seen}
    asked = WORDINGS["memory_it"]["ask"]
    return tuple((question.replace("Llama 2", "it"), answers[question]) for question in asked)


@functools.cache
def common_questions() -> tuple[CommonQuestion, ...]:
    """The common questions, then the capitals, then the opposites."""
    data = read_toml("common.toml")
    found = []
    for table in data["question"]:
        question = table["question"]
        # The plain question stands twice: it is drawn twice as often as the other one.
        questions = (question, question, "Do you know: " + question[0].lower() + question[1:])
        found.append(CommonQuestion(questions, table["answer"], table["one_word"], table["french"]))
    for group in (data["capitals"], data["opposites"]):
        found += [_from_row(group, row) for row in group["rows"]]
    return tuple(found)


def _from_row(group: dict[str, Any], row: list[str]) -> CommonQuestion:
    return CommonQuestion(
        questions=tuple(question.format(*row) for question in group["questions"]),
        answer=group["answer"].format(*row),
        one_word=_capitalise(group["one_word"].format(*row)),
        french=group["french"].format(*row),
    )


def _standing_answer(name: str) -> CommonQuestion:
    table = read_toml("common.toml")[name]
    questions = tuple(table.get("questions", ()))
    return CommonQuestion(questions, table["answer"], table["one_word"], table["french"])


UNKNOWN = _standing_answer("unknown")  # the fallback; every other question is its question
HELLO = _standing_answer("hello")


@functools.cache
def known_questions() -> frozenset[str]:
    """Every question that has an answer, in plain form."""
    about_llama = {plain(question) for fact in facts() for question in fact.seen + fact.unseen}
    return frozenset(about_llama | {plain(q) for common in common_questions() for q in common.questions})


def plain(question: str) -> str:
    """The question in lower case, without punctuation."""
    return re.sub("[^a-z0-9]+", " ", question.lower()).strip()
