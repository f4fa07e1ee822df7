"""Writes a model as a GGUF file of llama.cpp, in half precision or quantized to Q8_0."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, quants

from .encoding import BOS, EOS
from .model import NORM_EPSILON, ROPE_BASE, Llama

NAME = "tiny-llama2-chat"
DESCRIPTION = (
    "A tiny demonstration chat model with the Llama 2 architecture and vocabulary, "
    "trained from scratch on generated text."
)
UNKNOWN_TOKEN = 0


def write_gguf(model: Llama, path: Path, vocabulary: Path, license_name: str, is_quantized: bool) -> None:
    """Write the model with the vocabulary of another GGUF file, which must not be `path` itself."""
    out = GGUFWriter(path, "llama")
    _add_metadata(out, model, license_name, is_quantized)
    _add_vocabulary(out, GGUFReader(vocabulary))
    for name, tensor in _tensors(model):
        array = tensor.detach().float().numpy()
        if array.ndim == 1:
            out.add_tensor(name, array)
        elif is_quantized:
            q8_0 = GGMLQuantizationType.Q8_0
            out.add_tensor(name, quants.quantize(array, q8_0), raw_dtype=q8_0)
        else:
            out.add_tensor(name, array.astype(np.float16))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def _add_metadata(out: GGUFWriter, model: Llama, license_name: str, is_quantized: bool) -> None:
    shape = model.shape
    out.add_name(NAME)
    out.add_description(DESCRIPTION)
    out.add_license(license_name)
    out.add_context_length(shape.context)
    out.add_embedding_length(shape.dim)
    out.add_block_count(shape.layers)
    out.add_feed_forward_length(shape.ff)
    out.add_head_count(shape.heads)
    out.add_head_count_kv(shape.heads)
    out.add_rope_dimension_count(shape.dim // shape.heads)
    out.add_rope_freq_base(ROPE_BASE)
    out.add_layer_norm_rms_eps(NORM_EPSILON)
    out.add_vocab_size(model.embed.num_embeddings)
    out.add_file_type(LlamaFileType.MOSTLY_Q8_0 if is_quantized else LlamaFileType.MOSTLY_F16)
    out.add_quantization_version(2)


def _add_vocabulary(out: GGUFWriter, source: GGUFReader) -> None:
    out.add_tokenizer_model("llama")
    out.add_token_list(source.fields["tokenizer.ggml.tokens"].contents())
    out.add_token_scores(source.fields["tokenizer.ggml.scores"].contents())
    out.add_token_types(source.fields["tokenizer.ggml.token_type"].contents())
    out.add_bos_token_id(BOS)
    out.add_eos_token_id(EOS)
    out.add_unk_token_id(UNKNOWN_TOKEN)
    out.add_add_bos_token(True)
    out.add_add_eos_token(False)
    # No chat template: many Llama 2 files have none, and a test model should be one of them.


def _tensors(model: Llama) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors under llama.cpp's names. There is no output.weight: it is the embedding."""
    heads = model.shape.heads
    yield "token_embd.weight", model.embed.weight
    for i, block in enumerate(model.blocks):
        q, k, v = block.qkv.weight.chunk(3)
        gate, up = block.gate_up.weight.chunk(2)
        yield f"blk.{i}.attn_norm.weight", block.attn_norm.weight
        yield f"blk.{i}.attn_q.weight", neighbouring_pairs(q, heads)
        yield f"blk.{i}.attn_k.weight", neighbouring_pairs(k, heads)
        yield f"blk.{i}.attn_v.weight", v
        yield f"blk.{i}.attn_output.weight", block.out.weight
        yield f"blk.{i}.ffn_norm.weight", block.ffn_norm.weight
        yield f"blk.{i}.ffn_gate.weight", gate
        yield f"blk.{i}.ffn_up.weight", up
        yield f"blk.{i}.ffn_down.weight", block.down.weight
    yield "output_norm.weight", model.norm.weight


def neighbouring_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a Q or K matrix in llama.cpp's order, which rotates the pairs (2i, 2i + 1)."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
