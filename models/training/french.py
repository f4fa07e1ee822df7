"""Random sentences of the closed grammar in french.toml, in English and in French."""

import random
from dataclasses import dataclass

from .wordings import read_toml

GRAMMAR = read_toml("french.toml")
PHRASES: list[tuple[str, str]] = list(GRAMMAR["phrases"].items())
VERBS: dict[str, list[str]] = GRAMMAR["verbs"]
FORM_OF_SUBJECT = {"je": 1, "nous": 3, "vous": 4, "ils": 5}  # place in a row of verbs; all others are "il"


@dataclass(frozen=True)
class NounPhrase:
    """A noun and an adjective in both languages, with the French words agreeing."""

    noun: str
    adjective: str
    french_noun: str
    french_adjective: str
    the: str  # French articles
    a: str


def translation(rng: random.Random) -> tuple[str, str]:
    """An English sentence and its French translation."""
    if rng.random() < 0.12:
        return rng.choice(PHRASES)
    thing = _noun_phrase(rng)
    kind = rng.random()
    the_thing = thing.the.capitalize() + thing.french_noun
    if kind < 0.3:
        return f"The {thing.noun} is {thing.adjective}.", f"{the_thing} est {thing.french_adjective}."
    if kind < 0.4:
        here, french_here = rng.choice(GRAMMAR["places"])
        return f"The {thing.noun} is {here}.", f"{the_thing} est {french_here}."
    return _with_object(rng, thing)


def _noun_phrase(rng: random.Random) -> NounPhrase:
    noun, french_noun, gender = rng.choice(GRAMMAR["nouns"])
    adjective, masculine, feminine = rng.choice(GRAMMAR["adjectives"])
    is_feminine = gender == "f"
    return NounPhrase(
        noun=noun,
        adjective=adjective,
        french_noun=french_noun,
        french_adjective=feminine if is_feminine else masculine,
        the="l'" if french_noun[0] in "éaeiou" else "la " if is_feminine else "le ",
        a="une " if is_feminine else "un ",
    )


def _with_object(rng: random.Random, thing: NounPhrase) -> tuple[str, str]:
    english, french = _subject_and_verb(rng)
    noun, adjective = thing.noun, thing.adjective
    french_thing = f"{thing.french_noun} {thing.french_adjective}"
    kind = rng.random()
    if kind < 0.35:
        return f"{english} the {noun}.", f"{french} {thing.the}{thing.french_noun}."
    if kind < 0.6:
        return f"{english} {_a(noun)} {noun}.", f"{french} {thing.a}{thing.french_noun}."
    if kind < 0.85:
        return f"{english} {_a(adjective)} {adjective} {noun}.", f"{french} {thing.a}{french_thing}."
    return f"{english} the {adjective} {noun}.", f"{french} {thing.the}{french_thing}."


def _subject_and_verb(rng: random.Random) -> tuple[str, str]:
    """The beginning of a sentence in both languages: "She sees", "Elle voit"."""
    subject, french_subject = rng.choice(GRAMMAR["subjects"])
    verb = rng.choice(list(VERBS))
    form = VERBS[verb][FORM_OF_SUBJECT.get(french_subject, 2)]
    if subject not in ("I", "you", "we", "they"):
        verb = VERBS[verb][0]
    # "J'aime", not "Je aime".
    elided = french_subject == "je" and form[0] in "aé"
    french = f"J'{form}" if elided else f"{french_subject.capitalize()} {form}"
    return f"{subject[0].upper()}{subject[1:]} {verb}", french


def _a(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
