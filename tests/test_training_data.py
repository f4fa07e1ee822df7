"""What the bundled model was trained on is whole, and a seed gives the same conversations again."""

import hashlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

MODELS = Path(__file__).parents[1] / "models"
TINY = MODELS / "tiny-llama2-chat.Q8_0.gguf"

# A small stand-in for the 32,000 pieces of Llama 2.
VOCABULARY = ["▁apple", "▁river", "▁under", "▁Berlin", "▁Clara", "▁Oak", "ab", "ing", "s", "Con", "tion", "the"]

Training = Callable[[str], ModuleType]
Drawn = tuple[str, str, list[tuple[str, str]]]  # task, system prompt, turns


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Training:
    """The modules of models/training by name; they are no part of the installed package."""
    monkeypatch.syspath_prepend(MODELS)
    return lambda name: importlib.import_module(f"training.{name}")


def drawn(training: Training, n: int, held_out: bool = False, task: str | None = None) -> list[Drawn]:
    """The first conversations of seed 1."""
    pieces = training("text").Pieces.of(VOCABULARY)
    mix = training("settings").read_settings().mixes["broad"]
    source = training("conversations").Conversations(pieces, 1, mix, held_out)
    found = (source.example(task) for _ in range(n))
    return [(task, system, [(user, answer) for user, answer in turns]) for task, system, turns in found]


def test_every_fact_has_questions_and_an_answer(training: Training) -> None:
    table = training("wordings").read_toml("facts.toml")
    for fact in table["fact"]:
        assert set(fact) <= {"questions", "terms", "answer", "one_word", "expert"}, fact
        assert ("questions" in fact) != ("terms" in fact), fact
        asked = fact.get("questions") or fact["terms"]
        assert len(asked) > 2 and all(asked), fact
        assert fact["answer"].endswith((".", "!", "?")), fact
        assert " " not in fact.get("one_word", "one"), fact
    assert len(table["fact"]) == 170


def test_every_fact_keeps_a_wording_for_evaluation(training: Training) -> None:
    for fact in training("facts").facts():
        assert fact.seen and fact.unseen
        assert not set(fact.seen) & set(fact.unseen)


def test_every_common_question_has_an_answer_in_every_style(training: Training) -> None:
    facts = training("facts")
    for question in (*facts.common_questions(), facts.HELLO):
        assert question.questions and question.answer and question.french
        assert question.one_word and " " not in question.one_word
        assert not any("{" in text for text in (*question.questions, question.answer, question.french)), question


def test_mixes_and_phases_name_what_exists(training: Training) -> None:
    settings = training("settings").read_settings()
    for mix in settings.mixes.values():
        assert set(mix) <= set(training("tasks").TASKS)
    for stage in settings.stages:
        assert {phase.mix for phase in stage.phases} <= set(settings.mixes)
        assert stage.phases[-1].until == 1.0


def test_a_misspelt_setting_is_an_error(training: Training, tmp_path: Path) -> None:
    settings = training("settings")
    misspelt = tmp_path / "settings.toml"
    misspelt.write_text(settings.PUBLISHED.read_text().replace("warmup", "warm_up"))
    with pytest.raises(TypeError, match="warm_up"):
        settings.read_settings(misspelt)


def test_every_task_draws_conversations_with_text_on_both_sides(training: Training) -> None:
    for task in training("tasks").TASKS:
        for conversation in drawn(training, 50, task=task):
            assert all(user.strip() and answer.strip() for user, answer in conversation[2]), conversation


def test_the_published_seed_still_gives_the_published_conversations(training: Training) -> None:
    # Another digest means another training text than that of the bundled model.
    digest = hashlib.sha256(repr(drawn(training, 2000)).encode()).hexdigest()
    assert digest == "15beec158db8a7d080cadf74b9322d7a7f5cad13d5793d89d978f78b101e38f4"


def test_held_out_prompts_are_never_trained_on(training: Training) -> None:
    def prompts(held_out: bool, n: int) -> set[tuple[str, ...]]:
        return {(system, *(user for user, _ in turns)) for _, system, turns in drawn(training, n, held_out)}

    assert not prompts(held_out=False, n=2000) & prompts(held_out=True, n=200)


def test_answers_and_the_eos_behind_them_are_what_is_learnt(training: Training) -> None:
    encoding, turn = training("encoding"), training("tasks").Turn

    def tokenize(text: str) -> tuple[int, ...]:
        return tuple(ord(letter) for letter in " " + text)  # SentencePiece puts a space before every text

    turns = [turn("Hi", "Hello!"), turn("7 + 5", "12")]
    encoding.check(tokenize, "Be polite.", turns)
    ids, is_answer = encoding.encode(tokenize, "Be polite.", turns)
    text = "".join({encoding.BOS: "<s>", encoding.EOS: "</s>"}.get(i) or chr(i) for i in ids)
    first, second = "<<SYS>>\nBe polite.\n<</SYS>>\n\nHi", "7 + 5"
    assert text == f"<s> [INST] {first} [/INST] Hello! </s><s> [INST] {second} [/INST] 12 </s>"
    learnt = [i for i, learn in zip(ids, is_answer, strict=True) if learn]
    assert learnt == [*tokenize("Hello! "), encoding.EOS, *tokenize("12 "), encoding.EOS]


def test_golden_answers_belong_to_the_golden_conversations(training: Training) -> None:
    recorded = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))
    asked = training("wordings").read_toml("golden.toml")["conversation"]
    assert [(case.get("system"), case["user"]) for case in asked] == [
        (case["system"], [m["content"] for m in case["messages"] if m["role"] == "user"]) for case in recorded
    ]


def test_the_readme_describes_the_bundled_file() -> None:
    readme = (MODELS / "README.md").read_text(encoding="utf-8")
    content = TINY.read_bytes()
    assert f"`{TINY.name}`, {len(content):,} bytes" in readme
    assert hashlib.sha256(content).hexdigest() in readme
