"""A one-liner over llama_cpp.Llama at its defaults: what startup.py compares with. MODEL PROMPT N_TOKENS."""

import sys
from collections.abc import Iterator
from typing import Any, cast

from llama_cpp import Llama


def main() -> None:
    path, prompt, n_tokens = sys.argv[1:]
    llama = Llama(path, verbose=False)
    answer = llama.create_completion(prompt, max_tokens=int(n_tokens), temperature=0.0, stream=True)
    for piece in cast(Iterator[Any], answer):
        print(piece["choices"][0]["text"], end="", flush=True)


if __name__ == "__main__":
    main()
