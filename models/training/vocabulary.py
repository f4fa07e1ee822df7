"""The Llama 2 tokenizer, read by llama.cpp out of any GGUF file that holds it."""

import ctypes
import functools
from collections.abc import Iterable
from pathlib import Path

import llama_cpp

from .text import Pieces

MOST_TOKENS = 16384  # of one text
LONGEST_PIECE = 256  # bytes


# Kept for the whole process: llama.cpp calls it at any time.
LOG_NOTHING = llama_cpp.llama_log_callback(lambda level, text, user_data: None)


class Vocabulary:
    """Text to token ids and back. Raises ValueError for a file that llama.cpp cannot read."""

    def __init__(self, path: Path):
        llama_cpp.llama_log_set(LOG_NOTHING, ctypes.c_void_p(0))
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        # The vocabulary lives as long as its model; both are kept until the process ends.
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if model is None:
            raise ValueError(f"{path} is no GGUF file that llama.cpp can read")
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        self._buffer = (llama_cpp.llama_token * MOST_TOKENS)()
        self.size = llama_cpp.llama_vocab_n_tokens(self._vocab)
        texts = (llama_cpp.llama_vocab_get_text(self._vocab, i) for i in range(self.size))
        self.pieces = Pieces.of(text.decode() for text in texts)
        self.tokenize = functools.lru_cache(200_000)(self._tokenize)

    def _tokenize(self, text: str) -> tuple[int, ...]:
        raw = text.encode()
        n = llama_cpp.llama_tokenize(self._vocab, raw, len(raw), self._buffer, MOST_TOKENS, False, False)
        if n < 0:
            raise ValueError(f"a text has {-n:,} tokens; {MOST_TOKENS:,} are the most")
        return tuple(self._buffer[:n])

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of the ids, with a replacement character for broken UTF-8."""
        raw = b""
        buffer = ctypes.create_string_buffer(LONGEST_PIECE)
        for token in ids:
            n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, LONGEST_PIECE, 0, False)
            raw += buffer.raw[:n]
        return raw.decode(errors="replace")
