"""Asks a GGUF file through llama.cpp: the accuracy on held-out conversations, and the golden answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import numpy as np

from .conversations import held_out_set
from .encoding import BOS, EOS, encode, prompt
from .tasks import Turn
from .vocabulary import Vocabulary
from .wordings import read_toml

CONTEXT = 1024
HELD_OUT_SEED = 777
GOLDEN_LIMIT = 128  # tokens of an answer
ACCURACY_LIMIT = 160
SHOWN_PER_TASK = 3  # wrong answers


class Score(NamedTuple):
    """A row of the accuracy table."""

    right: int
    asked: int
    ended: int  # answers that ended with EOS


class GreedyModel:
    """A GGUF file that always answers with the most likely token."""

    def __init__(self, path: Path, threads: int):
        self.vocabulary = Vocabulary(path)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = CONTEXT
        params.n_threads = params.n_threads_batch = threads
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        context = llama_cpp.llama_init_from_model(model, params)
        if context is None:
            raise ValueError(f"llama.cpp cannot run {path}")
        self._context = context

    def answer(self, system: str, turns: Sequence[Turn], limit: int) -> tuple[str, bool]:
        """The answer to the last user text, and whether it ended; earlier turns have given answers."""
        *earlier, last = turns
        tokenize = self.vocabulary.tokenize
        ids = encode(tokenize, system, earlier).ids
        ids += [BOS, *tokenize(prompt(last.user, "" if earlier else system))]
        answer, ended = self._continue(ids, limit)
        return self.vocabulary.detokenize(answer).strip(), ended

    def _continue(self, ids: list[int], limit: int) -> tuple[list[int], bool]:
        """The next tokens, at most `limit`, and whether EOS came behind them."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        found: list[int] = []
        while len(found) < limit:
            tokens = (llama_cpp.llama_token * len(ids))(*ids)
            if llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(tokens, len(ids))):
                raise RuntimeError(f"llama_decode failed on {len(ids):,} tokens")
            logits = llama_cpp.llama_get_logits_ith(self._context, -1)
            best = int(np.ctypeslib.as_array(logits, (self.vocabulary.size,)).argmax())
            if best == EOS:
                return found, True
            found.append(best)
            ids = [best]
        return found, False


def accuracy(model: GreedyModel, per_task: int) -> dict[str, Score]:
    """By task: how many held-out conversations got exactly the expected last answer. Prints each row."""
    table = {}
    for task, cases in held_out_set(model.vocabulary.pieces, per_task, HELD_OUT_SEED).items():
        n_right = n_ended = n_shown = 0
        for conversation in cases[:per_task]:
            asked = conversation.turns[-1]
            expected = asked.answer.strip()
            answer, ended = model.answer(conversation.system, conversation.turns, ACCURACY_LIMIT)
            n_ended += ended
            n_right += ended and answer == expected
            if answer != expected and n_shown < SHOWN_PER_TASK:
                n_shown += 1
                print(f"    {task}: {asked.user!r} -> {answer!r}, expected {expected!r}")
        table[task] = Score(n_right, len(cases[:per_task]), n_ended)
        print(f"{task:28} {n_right:4}/{table[task].asked}  ended with EOS {n_ended}", flush=True)
    return table


def golden_answers(model: GreedyModel) -> list[dict[str, Any]]:
    """The conversations of golden.toml with their greedy answers, as golden.json records them."""
    return [
        _golden_case(model, conversation.get("system", ""), conversation["user"])
        for conversation in read_toml("golden.toml")["conversation"]
    ]


def _golden_case(model: GreedyModel, system: str, user_texts: list[str]) -> dict[str, Any]:
    turns: list[Turn] = []
    messages = []
    for user in user_texts:
        answer, ended = model.answer(system, [*turns, Turn(user, "")], GOLDEN_LIMIT)
        turns.append(Turn(user, answer))
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return {"system": system or None, "messages": messages[:-1], "greedy": answer, "ended": ended}
