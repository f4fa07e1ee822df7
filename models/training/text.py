"""Random words, sentences, documents and spellings. Knows no tasks."""

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .facts import fact_sentences
from .wordings import WORDINGS, WORDS

T = TypeVar("T")


@dataclass(frozen=True)
class Pieces:
    """The pieces of a SentencePiece vocabulary that random words are made from."""

    words: tuple[str, ...]  # whole words in lower case
    capitalised: tuple[str, ...]  # whole words that begin with a capital
    endings: tuple[str, ...]  # short pieces inside a word
    fragments: tuple[str, ...]  # pieces of any letters inside a word

    @classmethod
    def of(cls, vocabulary: Iterable[str]) -> "Pieces":
        """The usable pieces of a vocabulary in the order of their ids; "▁" begins a word."""
        tokens = tuple(vocabulary)
        return cls(
            words=tuple(t[1:] for t in tokens if re.fullmatch("▁[a-z]{3,}", t)),
            capitalised=tuple(t[1:] for t in tokens if re.fullmatch("▁[A-Z][a-z]{2,}", t)),
            endings=tuple(t for t in tokens if re.fullmatch("[a-z]{1,4}", t)),
            fragments=tuple(t for t in tokens if re.fullmatch("[A-Za-z]{2,}", t)),
        )


class RandomText:
    """Draws text from one seeded random generator.

    The order of the draws decides what a seed gives: change it, and the training text is another one.
    """

    def __init__(self, pieces: Pieces, seed: int, held_out: bool = False):
        self.pieces = pieces
        self.rng = random.Random(seed)
        self.held_out = held_out
        self.names = WORDS["held_out_names" if held_out else "names"]

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.rng.random() * len(items))]

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    # Words.

    def word(self) -> str:
        """A word of the lists or of the vocabulary, a new one out of pieces, or a number."""
        x = self.rng.random()
        if x < 0.30:
            kind = self.pick(("nouns", "nouns", "adjectives", "verbs"))
            return self.pick(WORDS[kind])
        if x < 0.65:
            return self.pick(self.pieces.words)
        if x < 0.86:
            parts = self.pick((self.pieces.endings, self.pieces.fragments, self.pieces.fragments))
            return "".join(self.pick(parts) for _ in range(self.rng.randint(2, 3)))
        if x < 0.94:
            return self.pick(self.pieces.capitalised)
        return self.number()

    def words(self, low: int, high: int) -> list[str]:
        return [self.word() for _ in range(self.rng.randint(low, high))]

    def phrase(self, low: int, high: int) -> str:
        """So many words with spaces between them."""
        return " ".join(self.words(low, high))

    def number(self) -> str:
        return str(self.rng.randint(0, 10 ** self.rng.randint(1, 4)))

    def name(self) -> str:
        return self.pick(self.names if self.chance(0.6) else self.pieces.capitalised)

    def city(self) -> str:
        return self.pick(WORDS["cities"] if self.chance(0.6) else self.pieces.capitalised)

    def noun(self) -> str:
        return self.pick(WORDS["nouns"] if self.chance(0.7) else self.pieces.words)

    def adjective(self) -> str:
        return self.pick(WORDS["adjectives"] if self.chance(0.7) else self.pieces.words)

    # Sentences and documents.

    def sentence(self) -> str:
        """A sentence of a fact, of a pattern or of random words."""
        x = self.rng.random()
        if x < 0.12:
            return self.pick(fact_sentences())
        if x < 0.50:
            return self._patterned_sentence()
        return self._loose_sentence()

    def _patterned_sentence(self) -> str:
        verb, place = self.pick(WORDS["verbs"]), self.pick(WORDS["places"])
        draws: dict[str, Callable[[], str]] = {
            "name": self.name,
            "city": self.city,
            "noun": self.noun,
            "adjective": self.adjective,
            "number": self.number,
            "verb": lambda: verb,
            "place": lambda: place,
            "capitalised": lambda: self.pick(self.pieces.capitalised),
            "count": lambda: str(self.rng.randint(2, 99)),
            "year": lambda: str(self.rng.randint(1900, 2029)),
            "price": lambda: f"{self.rng.randint(1, 99)}.{self.rng.randint(1, 9)}",
        }
        # Every pattern is filled before one is picked: a seed has always drawn the words of all.
        patterns = WORDINGS["sentence"]["patterns"]
        return self.pick([re.sub(r"\{(\w+)\}", lambda m: draws[m[1]](), pattern) for pattern in patterns])

    def _loose_sentence(self) -> str:
        words = self.words(2, 12)
        words[0] = words[0][0].upper() + words[0][1:]
        for i in range(1, len(words) - 1):
            if self.chance(0.06):
                words[i] += self.pick((",", ",", ";", ":"))
            elif self.chance(0.03):
                frames = ('"{}"', "({})", "`{}`", "{}-" + self.pick(WORDS["nouns"]))
                words[i] = self.pick(frames).format(words[i])
        return " ".join(words) + self.pick((".",) * 8 + ("!", "?"))

    def document(self, low: int, high: int) -> list[str]:
        """The sentences of a document."""
        return [self.sentence() for _ in range(self.rng.randint(low, high))]

    # What a user types.

    def respell(self, text: str) -> str:
        """The same question with another spelling, greeting or punctuation."""
        spelling = WORDINGS["spelling"]
        if "Llama 2" in text and self.chance(0.5):
            text = text.replace("Llama 2", self.pick(spelling["llama_2"]))
        if self.chance(0.15):
            text = text.lower()
        elif self.chance(0.1):
            text = text[0].lower() + text[1:]
        if text[-1] in "?." and self.chance(0.2):
            text = text[:-1]
        elif text[-1].isalpha() and self.chance(0.3):
            text += self.pick((".", "?", "!"))
        if self.chance(0.12):
            text = self.pick(spelling["before"]) + text
        if self.chance(0.05):
            text += self.pick(spelling["after"])
        return text

    def lay_out(self, instruction: str, text: str) -> str:
        """A document and what to do with it; mostly fenced, with the instruction behind it."""
        x = self.rng.random()
        if x < 0.55:
            return f"```\n{text}\n```\n\n{instruction}"
        if x < 0.70:
            return f"{instruction.rstrip('.:')}: {text}"
        if x < 0.80:
            return f"{instruction.rstrip('.:')}:\n{text}"
        if x < 0.90:
            return f"{instruction}\n\n{text}"
        return f"{instruction}\n\n```\n{text}\n```"

    # System prompts.

    def neutral(self) -> str:
        """A system prompt that does not change the answer; mostly none."""
        x = self.rng.random()
        if x < 0.6:
            return ""
        if x < 0.9:
            return self.pick(WORDINGS["system"]["neutral"])
        if x < 0.95:
            return f"You are a {self.pick(WORDS['adjectives'])} {self.pick(WORDS['nouns'])}."
        return self.sentence()

    def commanding(self, prompts: Sequence[str]) -> str:
        """One of the system prompts that do change it, at times with a neutral one before it."""
        prompt = self.pick(prompts)
        if self.chance(0.15):
            prompt = self.pick(WORDINGS["system"]["neutral"][:8]) + " " + prompt
        return prompt
