"""llama_cpp.Llama at its defaults, as a process of its own: one answer, or measurements on demand.

    python -m llamacli.bench.high_level once MODEL THREADS PROMPT N_TOKENS
    python -m llamacli.bench.high_level ask MODEL THREADS N_CTX    then lines of JSON: {"prompt": 512, "n": 1}

THREADS 0 is as many as it takes by itself.

An answer to such a line has the seconds of loading, of the prompt, and of each token after the first. Nothing but this
file imports the whole llama_cpp package.
"""

from __future__ import annotations

import json
import os
import sys
from time import perf_counter
from typing import Any

from llama_cpp import Llama


def main() -> None:
    mode, path, threads, *rest = sys.argv[1:]
    n_threads = int(threads) or None
    if mode == "once":
        _answer_once(path, n_threads, rest[0], int(rest[1]))
        return
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the package may print is no answer of ours
    started = perf_counter()
    llama = Llama(path, n_ctx=int(rest[0]), n_threads=n_threads, n_threads_batch=n_threads, verbose=False)
    loaded = perf_counter() - started
    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps({"load": loaded} | _measured(llama, question["prompt"], question["n"])), file=out, flush=True)


def _answer_once(path: str, n_threads: int | None, prompt: str, n_tokens: int) -> None:
    llama = Llama(path, n_threads=n_threads, n_threads_batch=n_threads, verbose=False)
    pieces: Any = llama.create_completion(prompt, max_tokens=n_tokens, temperature=0.0, stream=True)
    for piece in pieces:
        print(piece["choices"][0]["text"], end="", flush=True)


def _measured(llama: Any, n_prompt: int, n: int) -> dict[str, Any]:
    """It may end its answer early, and gives no text for a part of a character: tokens are counted, not assumed."""
    llama.reset()  # else it would go on from the prompt before, where the two agree
    prompt = [llama.token_bos(), *range(1000, 999 + n_prompt)]
    started = perf_counter()
    pieces: Any = llama.create_completion(prompt, max_tokens=1 + n, temperature=0.0, stream=True)
    next(pieces)
    first, before = perf_counter(), llama.n_tokens
    for _ in pieces:
        pass
    n_more = llama.n_tokens - before
    return {
        "prefill": first - started,
        "per_token": (perf_counter() - first) / n_more if n_more > 0 else None,
    }


if __name__ == "__main__":
    main()
