"""Writes GGUF files with the true tensor shapes and quantization mix of Llama 2 (Q4_K_M) and random weights.

For measuring speed and memory where the real weights are not at hand: file size, loading, prefill and decode cost
what they cost with the real file. The text it generates is noise. The vocabulary is the bundled tiny model's.

    python -m benchmarks.synthetic --model 7b      # 4.1 GB, into the user's cache directory
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, LlamaFileType

from llamacli.config import directories
from llamacli.models import store

N_VOCAB = 32_000
Blocks = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Shape:
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int

    @property
    def n_embd_kv(self) -> int:
        return self.n_embd // self.n_head * self.n_head_kv


SHAPES = {
    "1b": Shape(22, 2048, 5632, 32, 4),
    "7b": Shape(32, 4096, 11008, 32, 32),
}


class Tensor(NamedTuple):
    """`std` is the standard deviation of its weights; those of type F32 are all one."""

    name: str
    type: Type
    shape: tuple[int, ...]
    std: float = 0.02

    @property
    def n_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape)) // block * size


def ensure(name: str, directory: Path) -> Path:
    """The file of a shape in SHAPES; written if it is not there."""
    path = directory / f"synthetic-llama2-{name}.Q4_K_M.gguf"
    if path.exists():
        return path
    n_bytes = sum(tensor.n_bytes for tensor in tensors(SHAPES[name]))
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if n_bytes > free:
        raise SystemExit(f"{path.name} needs {n_bytes / 1e9:.1f} GB; {directory} has {free / 1e9:.1f} GB free")
    print(f"writing {path}: random weights, {n_bytes / 1e9:.1f} GB", file=sys.stderr, flush=True)
    partial = path.with_suffix(".part")
    write(partial, SHAPES[name], f"synthetic-llama2-{name}")
    partial.rename(path)
    return path


def default_directory() -> Path:
    return directories(os.environ).cache / "benchmarks"


def write(path: Path, shape: Shape, name: str) -> None:
    """One tensor in memory at a time. The same shape gives the same bytes."""
    writer = start(path, shape, name)
    rng = np.random.default_rng(0)
    for tensor in tensors(shape):
        writer.write_tensor_data(_weights(tensor, rng))
    writer.close()


def start(path: Path, shape: Shape, name: str) -> GGUFWriter:
    """Write all that stands before the weights. The tensors then go in one by one, in the order of tensors()."""
    writer = GGUFWriter(path, "llama")
    writer.add_name(name)
    _add_shape(writer, shape)
    _add_vocabulary(writer)
    for tensor in tensors(shape):
        float32 = np.dtype(np.float32)  # ignored beside raw_dtype
        writer.add_tensor_info(tensor.name, tensor.shape, float32, tensor.n_bytes, raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def tensors(shape: Shape) -> Iterator[Tensor]:
    """In the file's order."""
    yield Tensor("token_embd.weight", Type.Q4_K, (N_VOCAB, shape.n_embd), std=0.5)
    for layer in range(shape.n_layer):
        yield from _layer(shape, layer)
    yield Tensor("output_norm.weight", Type.F32, (shape.n_embd,))
    yield Tensor("output.weight", Type.Q6_K, (N_VOCAB, shape.n_embd))


def _layer(shape: Shape, layer: int) -> Iterator[Tensor]:
    n_embd, n_ff, block = shape.n_embd, shape.n_ff, f"blk.{layer}."
    mixed = Type.Q6_K if _gets_more_bits(layer, shape.n_layer) else Type.Q4_K
    yield Tensor(block + "attn_norm.weight", Type.F32, (n_embd,))
    yield Tensor(block + "ffn_norm.weight", Type.F32, (n_embd,))
    yield Tensor(block + "attn_q.weight", Type.Q4_K, (n_embd, n_embd))
    yield Tensor(block + "attn_k.weight", Type.Q4_K, (shape.n_embd_kv, n_embd))
    yield Tensor(block + "attn_v.weight", mixed, (shape.n_embd_kv, n_embd))
    yield Tensor(block + "attn_output.weight", Type.Q4_K, (n_embd, n_embd))
    yield Tensor(block + "ffn_gate.weight", Type.Q4_K, (n_ff, n_embd))
    yield Tensor(block + "ffn_up.weight", Type.Q4_K, (n_ff, n_embd))
    yield Tensor(block + "ffn_down.weight", mixed, (n_embd, n_ff))


def _gets_more_bits(layer: int, n_layer: int) -> bool:
    """Q4_K_M keeps attn_v and ffn_down of half the layers at 6 bits (llama-quant.cpp: use_more_bits)."""
    return layer < n_layer // 8 or layer >= 7 * n_layer // 8 or (layer - n_layer // 8) % 3 == 2


def _add_shape(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_vocab_size(N_VOCAB)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.n_embd // shape.n_head)
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_K_M)


def _add_vocabulary(writer: GGUFWriter) -> None:
    fields = GGUFReader(store.bundled()).fields
    writer.add_tokenizer_model("llama")
    writer.add_token_list(fields["tokenizer.ggml.tokens"].contents())
    writer.add_token_scores(fields["tokenizer.ggml.scores"].contents())
    writer.add_token_types(fields["tokenizer.ggml.token_type"].contents())
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _weights(tensor: Tensor, rng: np.random.Generator) -> npt.NDArray[Any]:
    if tensor.type is Type.F32:
        return np.ones(tensor.shape, np.float32)
    quantized = {Type.Q4_K: _q4_k, Type.Q6_K: _q6_k}[tensor.type]
    return quantized(rng, int(np.prod(tensor.shape)) // 256, tensor.std)


def _q4_k(rng: np.random.Generator, n_blocks: int, std: float) -> Blocks:
    """Super-blocks of 256 weights: two float16 scales, 12 bytes of 6-bit scales and minima, 128 bytes of nibbles.

    See block_q4_K in ggml-common.h. A nibble deviates from 7.5 by 4.6 (standard deviation).
    """
    blocks = np.empty((n_blocks, 144), np.uint8)
    blocks[:, 0:2] = _float16_bytes(std / 4.6 / 32)
    blocks[:, 2:4] = _float16_bytes(std / 4.6 * 7.5 / 32)
    blocks[:, 4:] = rng.integers(0, 256, (n_blocks, 140), dtype=np.uint8)
    # Every scale and minimum is 32, so that the weights have mean zero.
    blocks[:, 4:12], blocks[:, 12:16] = 32, 0
    return blocks


def _q6_k(rng: np.random.Generator, n_blocks: int, std: float) -> Blocks:
    """Super-blocks of 256 weights: 192 bytes of 6-bit values, 16 int8 scales, one float16 scale.

    See block_q6_K in ggml-common.h. A value deviates from its mean by 18.5 (standard deviation).
    """
    blocks = rng.integers(0, 256, (n_blocks, 210), dtype=np.uint8)
    blocks[:, 192:208] = 32
    blocks[:, 208:210] = _float16_bytes(std / 18.5 / 32)
    return blocks


def _float16_bytes(value: float) -> Blocks:
    return np.array([value], np.float16).view(np.uint8)


def padded(n_bytes: int) -> int:
    """What lies in the file for so many bytes: the next part begins on an alignment boundary."""
    return -(-n_bytes // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, required=True)
    parser.add_argument("--directory", type=Path, default=default_directory(), help="where to [the user's cache]")
    options = parser.parse_args()
    print(ensure(options.model, options.directory))


if __name__ == "__main__":
    main()
