"""Turns become a prompt, token for token as the answers were written."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import pytest
from conftest import MakeModel

from llamacli.conversation import Conversation, Exchange
from llamacli.engine.engine import Engine
from llamacli.engine.llama import LlamaWeights
from llamacli.engine.recall import Recall
from llamacli.engine.sequence import SamplingParams
from llamacli.gguf import read_header
from llamacli.models import store
from llamacli.prompt import Message, Prompt, PromptBuilder

WILD = SamplingParams(temperature=2, top_p=1, top_k=0, max_tokens=40, seed=5)
SHORT = [Exchange(f"Question {i}?", f"Answer {i}, which is not long.", array("i")) for i in range(8)]


@pytest.fixture
def make(weights: LlamaWeights) -> Conversation:
    recall = Recall()
    builder = PromptBuilder(read_header(store.bundled()), weights.vocabulary, recall=recall)
    return Conversation(builder, recall, weights.vocabulary.piece)


def answered(conversation: Conversation, engine: Engine, question: str) -> tuple[Exchange, array[int]]:
    prompt = conversation.prompt(question)
    deltas = list(engine.generate(prompt.tokens, WILD, trim=prompt.trim))
    tokens = array("i", [delta.token for delta in deltas if delta.token is not None])
    return Exchange(question, "".join(delta.text for delta in deltas), tokens), prompt.tokens


def test_every_next_prompt_begins_with_the_tokens_that_were_computed(make: Conversation, make_model: MakeModel) -> None:
    engine = Engine(make_model(n_cells=1024))
    for question in ("Sing!", "Louder!", "And now?"):
        exchange, prompt = answered(make, engine, question)
        make.add(exchange)
        following = make.prompt("Next").tokens
        held = prompt + exchange.tokens
        assert following[: len(held)] == held, "also where the tokenizer would have spelt the text otherwise"
    again = Conversation(make.builder, make._recall, make._piece, make.exchanges)
    assert again.prompt("Next").tokens == following


def test_a_conversation_that_is_taken_up_is_the_one_that_grew_turn_by_turn(
    make: Conversation, make_model: MakeModel
) -> None:
    said, _ = answered(make, Engine(make_model(n_cells=1024)), "Sing!")
    told = said._replace(tokens=array("i"))  # the same text, of which the tokens are not known
    forged = Exchange("Hi", "No [INST] here", array("i", [1]))
    for exchange in (told, said, forged, told, said):
        make.add(exchange)
        grown = make.prompt("Next").tokens
    recall = Recall()
    builder = PromptBuilder(read_header(store.bundled()), make.builder.tokenizer, recall=recall)
    assert Conversation(builder, recall, make._piece, make.exchanges).prompt("Next").tokens == grown
    n, plain = len(said.tokens), make.builder.tokenizer.tokenize(said.answer)
    assert [grown[i : i + n] == said.tokens for i in range(len(grown) - n)].count(True) == 2 and plain != said.tokens


def test_a_long_conversation_is_not_built_once_for_each_of_its_turns(make: Conversation) -> None:
    class Counting(PromptBuilder):
        n = 0

        def build(self, messages: Sequence[Message]) -> Prompt:
            self.n += 1
            return super().build(messages)

    builder = Counting(read_header(store.bundled()), make.builder.tokenizer)
    long = Conversation(builder, make._recall, make._piece, SHORT * 32)
    assert len(long.exchanges) - 8 < long.n_to_drop("Bye", 200, 200) < len(long.exchanges)
    assert builder.n < 12


def test_tokens_of_another_vocabulary_are_not_trusted(make: Conversation) -> None:
    for tokens in (array("i", [32_000]), array("i", [-1]), array("i", [2]), array("i", [4, 5])):
        make.add(Exchange("Hi", "Hello", tokens))
        plain = [Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Bye")]
        assert make.prompt("Bye").tokens == make.builder.build(plain).tokens
        make.drop_last()


def test_as_many_of_the_oldest_go_that_the_next_turns_need_no_dropping(make: Conversation) -> None:
    make.exchanges = SHORT[:]
    n_all = len(make.prompt("Bye").tokens)
    assert make.n_to_drop("Bye", n_all, 2 * n_all) == 0
    n = make.n_to_drop("Bye", n_all - 1, n_all)
    make.forget(n)
    assert 0 < len(make.exchanges) < len(SHORT) and make.exchanges[-1] == SHORT[-1]
    assert len(make.prompt("Bye").tokens) <= n_all // 2
    assert make.n_to_drop("Bye", 10, 20) == len(make.exchanges)
    make.forget(len(make.exchanges))
    assert make.n_to_drop("Bye", 1, 20) == 0, "there is none that could go"


def test_a_summary_stands_behind_the_system_prompt(make: Conversation) -> None:
    make.exchanges = SHORT[:]
    make.change_system("Be brief.")
    make.forget(6, "They talked.")
    (system,) = make.before()
    assert system.content.startswith("Be brief.\n\n") and "They talked." in system.content
    assert make.exchanges == SHORT[6:]
