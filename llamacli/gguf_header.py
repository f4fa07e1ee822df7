"""What the header of a GGUF file says, and the sizes that follow from it. Knows nothing of how it is read.

Format: docs/gguf.md of ggml-org/ggml.
"""

import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

from llamacli.errors import ModelError, UsageError

Scalar = int | float | str

# GGUF value types: id -> struct code. 8 is a string, 9 an array of any of the others.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
U64 = struct.Struct("<Q")
FALLBACK_CONTEXT = 4096  # tokens
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_MAX_LAYERS = 512  # llama.cpp's LLAMA_MAX_LAYERS: no list of one number per layer is longer

# fmt: off
# enum ggml_type (ggml.h) and its blocks (ggml-common.h): id -> name, elements per block, bytes per block.
TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 22: ("IQ2_S", 256, 82),
    18: ("IQ3_XXS", 256, 98), 21: ("IQ3_S", 256, 110), 19: ("IQ1_S", 256, 50), 29: ("IQ1_M", 256, 56),
    20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
}

# enum llama_ftype (llama.h), by number; None is no longer in use.
_FILE_TYPES = (
    "F32", "F16", "Q4_0", "Q4_1", None, None, None, "Q8_0", "Q5_0", "Q5_1", "Q2_K",
    "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K",
    "IQ2_XXS", "IQ2_XS", "Q2_K_S", "IQ3_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ3_M", "IQ2_S", "IQ2_M",
    "IQ4_XS", "IQ1_M", "BF16", None, None, None, "TQ1_0", "TQ2_0", "MXFP4_MOE", "NVFP4", "Q1_0", "Q2_0",
)
# fmt: on
_FILE_TYPE_GUESSED = 1024

# What llama.cpp accepts as cache type, as elements and bytes per block.
KV_TYPES = {
    name: next(block for kind, *block in TENSOR_TYPES.values() if kind == name.upper())
    for name in ("f32", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
}


@dataclass(frozen=True)
class LazyArray:
    """A metadata array, kept as the bytes of the file until somebody asks for its items."""

    item_type: int
    n_items: int
    raw: bytes = field(repr=False)

    def __len__(self) -> int:
        return self.n_items

    def decode(self) -> list[Scalar]:
        if self.item_type == STRING:
            return list(self.pick(range(self.n_items)))
        return list(struct.unpack(f"<{self.n_items}{SCALARS[self.item_type]}", self.raw))

    def pick(self, indices: Iterable[int]) -> Iterator[str]:
        """The strings at `indices`, which ascend; the others are stepped over or never reached."""
        if self.item_type != STRING:
            return
        here, start, read_length = 0, 0, U64.unpack_from
        for index in indices:
            for _ in range(index - here):
                start += 8 + read_length(self.raw, start)[0]
            end = start + 8 + read_length(self.raw, start)[0]
            yield self.raw[start + 8 : end].decode("utf-8", "replace")
            here, start = index + 1, end


class Tensor(NamedTuple):
    """`shape` has the fastest dimension first, as in the file; `offset` counts from `data_offset`."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    n_bytes: int

    @property
    def type_name(self) -> str:
        return TENSOR_TYPES[self.type][0] if self.type in TENSOR_TYPES else f"type {self.type}"

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself. Sizes are in bytes.

    `expected_size` is where the last tensor ends: a whole file is at least this long. A shard describes only its
    own tensors. A property that a model cannot be run without raises ModelError when the file lacks it.
    """

    path: Path
    version: int
    metadata: Mapping[str, Scalar | LazyArray] = field(repr=False)
    tensors: tuple[Tensor, ...] = field(repr=False)
    file_size: int
    expected_size: int
    data_offset: int
    alignment: int

    @property
    def architecture(self) -> str:
        return self._text("general.architecture") or self._lacks("general.architecture")

    @property
    def name(self) -> str | None:
        return self._text("general.name")

    @property
    def context_length(self) -> int | None:
        """The context the model was trained with, in tokens."""
        return self._count("context_length")

    @property
    def usual_context(self) -> int:
        """The same; what is usual of Llama 2 where the file does not say it."""
        return self.context_length or FALLBACK_CONTEXT

    @property
    def n_layer(self) -> int:
        return self._needed("block_count")

    @property
    def n_embd(self) -> int:
        return self._needed("embedding_length")

    @property
    def n_head(self) -> int:
        return self._needed("attention.head_count")

    @property
    def n_head_kv(self) -> int:
        n_head_kv = self._count("attention.head_count_kv")
        return self.n_head if n_head_kv is None else n_head_kv

    @property
    def n_ff(self) -> int:
        """Width inside the feed-forward part; four times the embedding, as is usual, where the header is silent."""
        return self._count("feed_forward_length") or 4 * self.n_embd

    @property
    def n_vocab(self) -> int:
        """Counted as llama.cpp does: the vocabulary's tokens; the number in the header only without one."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        return len(tokens) if isinstance(tokens, LazyArray) else self._needed("vocab_size")

    @property
    def vocabulary(self) -> object:
        """Comparable: two models of equal vocabularies mean the same by a token id."""
        return self.metadata.get("tokenizer.ggml.model"), self.metadata.get("tokenizer.ggml.tokens")

    @property
    def n_embd_k_gqa(self) -> int:
        """Width of one token's keys in one layer."""
        return self._head_size("attention.key_length") * self.n_head_kv

    @property
    def n_embd_v_gqa(self) -> int:
        """Width of one token's values in one layer."""
        return self._head_size("attention.value_length") * self.n_head_kv

    @property
    def quantization(self) -> str:
        """As in file names on the hub: "Q4_K_M". Without a file type, the type with most of the bytes."""
        file_type = self.metadata.get("general.file_type")
        if isinstance(file_type, int):
            number = file_type & ~_FILE_TYPE_GUESSED
            return (_FILE_TYPES[number] if 0 <= number < len(_FILE_TYPES) else None) or f"file type {file_type}"
        return self.main_type

    @property
    def main_type(self) -> str:
        """The tensor type with most of the bytes: "Q4_K"."""
        held: dict[str, int] = {}
        for tensor in self.tensors:
            held[tensor.type_name] = held.get(tensor.type_name, 0) + tensor.n_bytes
        return max(held, key=held.__getitem__, default="unknown")

    @property
    def n_parameters(self) -> int:
        return sum(tensor.n_elements for tensor in self.tensors)

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def chat_template(self) -> str | None:
        return self._text("tokenizer.chat_template")

    @property
    def tokenizer_model(self) -> str | None:
        return self._text("tokenizer.ggml.model")

    @property
    def bos_token_id(self) -> int | None:
        return self._integer("tokenizer.ggml.bos_token_id")

    @property
    def eos_token_id(self) -> int | None:
        return self._integer("tokenizer.ggml.eos_token_id")

    @property
    def split_count(self) -> int:
        """Files this model is spread over; 1 when it is whole."""
        return max(1, self._integer("split.count") or 1)

    def special_tokens(self) -> tuple[str, ...]:
        """Texts of the CONTROL and USER_DEFINED tokens, by id. Walks the vocabulary: a few milliseconds."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        types = self.metadata.get("tokenizer.ggml.token_type")
        if not isinstance(tokens, LazyArray) or not isinstance(types, LazyArray):
            return ()
        special = (i for i, kind in enumerate(types.decode()) if kind in (_CONTROL, _USER_DEFINED))
        return tuple(tokens.pick(i for i in special if i < len(tokens)))

    def kv_bytes_per_token(self, type_k: str = "f16", type_v: str = "f16") -> int:
        """What one token costs in the KV cache: a row of keys and a row of values in every layer."""
        row = _kv_row_bytes(self.n_embd_k_gqa, type_k) + _kv_row_bytes(self.n_embd_v_gqa, type_v)
        return self.n_layer * row

    def _head_size(self, key: str) -> int:
        size = self._count(key)
        if size is not None:
            return size
        return self.n_embd // self.n_head if self.n_head else 0

    def _text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None

    def _integer(self, key: str) -> int | None:
        value = self.metadata.get(key)
        return value if isinstance(value, int) else None

    def _count(self, key: str) -> int | None:
        """A hyperparameter of this architecture. Where layers differ, the largest: sizes then err upwards."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, LazyArray) and len(value) <= _MAX_LAYERS:
            value = max((n for n in value.decode() if isinstance(n, int)), default=None)
        return value if isinstance(value, int) and value >= 0 else None

    def _needed(self, key: str) -> int:
        value = self._count(key)
        return value if value is not None else self._lacks(f"{self.architecture}.{key}")

    def _lacks(self, key: str) -> NoReturn:
        if self.split_count > 1:
            raise ModelError(f"{self.path} is one shard of {self.split_count} and has no {key!a}: name the first")
        raise ModelError(f"{self.path} has no {key!a} in its header: it cannot be run as a language model")


def _kv_row_bytes(width: int, kv_type: str) -> int:
    if kv_type not in KV_TYPES:
        raise UsageError(f"there is no KV cache type {kv_type!a}; choose one of {', '.join(KV_TYPES)}")
    block_size, block_bytes = KV_TYPES[kv_type]
    return -(-width // block_size) * block_bytes
