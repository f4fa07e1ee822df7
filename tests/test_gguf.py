"""The GGUF reader: agrees with the gguf package on whole files, and refuses everything else in one line."""

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFEndian, GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from hypothesis import given, settings
from hypothesis import strategies as st

from llamacli.errors import LlamacliError, ModelError, UsageError
from llamacli.gguf import Header, LazyArray, Scalar, read_header, read_model
from llamacli.gguf_header import KV_TYPES, TENSOR_TYPES

TINY = Path(__file__).parents[1] / "models" / "tiny-llama2-chat.Q8_0.gguf"


def write(
    path: Path, fill: Callable[[GGUFWriter], object] = lambda _: None, endian: GGUFEndian = GGUFEndian.LITTLE
) -> Path:
    """A whole small model of two layers; `fill` adds to its metadata."""
    writer = GGUFWriter(path, "llama", endianess=endian)
    writer.add_name("synthetic")
    writer.add_context_length(2048)
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_token_list(["<unk>", "<s>", "</s>", "<tool>", "hello", "wörld"])
    writer.add_token_types([2, 3, 3, 4, 1, 1])
    fill(writer)
    writer.add_tensor("token_embd.weight", np.zeros((6, 64), np.float16))
    writer.add_tensor("output_norm.weight", np.zeros(64, np.float32))
    writer.add_tensor("blk.0.odd", np.zeros((3, 5), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def patched(source: Path, position: int, new: bytes, target: Path) -> Path:
    content = bytearray(source.read_bytes())
    content[position : position + len(new)] = new
    target.write_bytes(content)
    return target


def header_of(metadata: dict[str, Scalar | LazyArray]) -> Header:
    return Header(Path("m.gguf"), 3, {"general.architecture": "llama"} | metadata, (), 0, 0, 0, 32)


def texts(*items: bytes) -> LazyArray:
    return LazyArray(8, len(items), b"".join(struct.pack("<Q", len(item)) + item for item in items))


def refusal(path: Path) -> str:
    """The message read_header refuses the file with; it names the file and is one line."""
    with pytest.raises(ModelError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.isprintable()
    assert str(path) in message
    return message


def use(header: Header) -> None:
    """Everything a header can be asked; what is missing in it may only be a ModelError."""
    for name in dir(Header):
        if not name.startswith("_") and name not in Header.__dataclass_fields__:
            try:
                value = getattr(header, name)
                if callable(value):
                    value()
            except ModelError as error:
                assert str(error).isprintable()


# --- whole files ---


def test_the_reader_agrees_with_the_gguf_package_on_every_key_and_tensor() -> None:
    header, oracle = read_header(TINY), GGUFReader(TINY)
    for key, value in header.metadata.items():
        expected = oracle.fields[key].contents()
        assert (value.decode() if isinstance(value, LazyArray) else value) == expected
    assert len(header.metadata) == len([key for key in oracle.fields if not key.startswith("GGUF.")])
    assert [
        (tensor.name, list(tensor.shape), tensor.type, header.data_offset + tensor.offset, tensor.n_bytes)
        for tensor in header.tensors
    ] == [(t.name, t.shape.tolist(), int(t.tensor_type), t.data_offset, t.n_bytes) for t in oracle.tensors]


def test_the_tiny_model_is_described_as_it_is() -> None:
    header = read_header(TINY)
    assert (header.architecture, header.name, header.version) == ("llama", "tiny-llama2-chat", 3)
    assert (header.n_layer, header.n_embd, header.n_head, header.n_head_kv, header.n_ff) == (5, 160, 5, 5, 448)
    assert (header.context_length, header.n_vocab, header.quantization) == (1024, 32000, "Q8_0")
    assert (header.tokenizer_model, header.bos_token_id, header.eos_token_id) == ("llama", 1, 2)
    assert header.special_tokens() == ("<s>", "</s>")
    assert header.chat_template is None
    assert header.split_count == 1
    assert header.expected_size == header.file_size == TINY.stat().st_size


def test_the_table_of_tensor_types_is_ggmls() -> None:
    ours = {type_id: (size, n_bytes) for type_id, (_, size, n_bytes) in TENSOR_TYPES.items()}
    for kind in GGMLQuantizationType:
        assert ours[int(kind)] == GGML_QUANT_SIZES[kind]
        assert TENSOR_TYPES[int(kind)][0] == kind.name


@pytest.mark.parametrize("file_type", [kind for kind in LlamaFileType if kind != LlamaFileType.GUESSED])
def test_every_file_type_has_the_name_it_has_on_the_hub(tmp_path: Path, file_type: LlamaFileType) -> None:
    header = read_header(write(tmp_path / "m.gguf", lambda writer: writer.add_file_type(file_type)))
    assert header.quantization == file_type.name.removeprefix("MOSTLY_").removeprefix("ALL_")


@pytest.mark.parametrize("number", [4, 42, 999, -2])
def test_a_file_type_nobody_knows_is_shown_as_its_number(number: int) -> None:
    assert header_of({"general.file_type": number}).quantization == f"file type {number}"


def test_without_a_file_type_the_quantization_is_that_of_most_bytes(tmp_path: Path) -> None:
    assert read_header(write(tmp_path / "m.gguf")).quantization == "F16"


def test_version_2_is_read_like_version_3(tmp_path: Path) -> None:
    whole = write(tmp_path / "3.gguf")
    header = read_header(patched(whole, 4, struct.pack("<I", 2), tmp_path / "2.gguf"))
    assert header.version == 2
    assert header.tensors == read_header(whole).tensors


def test_special_tokens_are_the_control_and_the_user_defined_ones(tmp_path: Path) -> None:
    assert read_header(write(tmp_path / "m.gguf")).special_tokens() == ("<s>", "</s>", "<tool>")


def test_a_list_of_token_types_longer_than_the_vocabulary_is_no_trouble() -> None:
    types = LazyArray(5, 3, struct.pack("<3i", 3, 4, 3))
    header = header_of({"tokenizer.ggml.tokens": texts(b"\xffx", b"y"), "tokenizer.ggml.token_type": types})
    assert header.special_tokens() == ("\N{REPLACEMENT CHARACTER}x", "y")


def test_a_vocabulary_of_numbers_has_no_special_tokens() -> None:
    numbers = LazyArray(5, 1, struct.pack("<i", 3))
    header = header_of({"tokenizer.ggml.tokens": numbers, "tokenizer.ggml.token_type": numbers})
    assert header.special_tokens() == ()


def test_a_model_without_attention_has_no_cache_rows() -> None:
    header = header_of({"llama.block_count": 2, "llama.embedding_length": 64, "llama.attention.head_count": 0})
    assert header.kv_bytes_per_token() == 0


def test_every_kind_of_value_is_read(tmp_path: Path) -> None:
    def fill(writer: GGUFWriter) -> None:
        writer.add_uint8("x.u8", 200)
        writer.add_int8("x.i8", -100)
        writer.add_uint16("x.u16", 60_000)
        writer.add_int16("x.i16", -30_000)
        writer.add_int32("x.i32", -2_000_000_000)
        writer.add_uint64("x.u64", 1 << 63)
        writer.add_int64("x.i64", -(1 << 62))
        writer.add_float32("x.f32", 0.5)
        writer.add_float64("x.f64", 0.1)
        writer.add_bool("x.bool", True)
        writer.add_string("x.text", "naïve 🦙")
        writer.add_array("x.numbers", [1, 2, 3])
        writer.add_array("x.texts", ["a", "", "ü"])

    metadata = read_header(write(tmp_path / "m.gguf", fill)).metadata
    names = ("u8", "i8", "u16", "i16", "i32", "u64", "i64", "f32", "f64", "bool", "text")
    integers = [200, -100, 60_000, -30_000, -2_000_000_000, 1 << 63, -(1 << 62)]
    assert [metadata[f"x.{name}"] for name in names] == [*integers, 0.5, 0.1, True, "naïve 🦙"]
    numbers, words = metadata["x.numbers"], metadata["x.texts"]
    assert isinstance(numbers, LazyArray) and isinstance(words, LazyArray)
    assert (numbers.decode(), words.decode(), list(words.pick([2]))) == ([1, 2, 3], ["a", "", "ü"], ["ü"])


def test_a_text_that_is_not_utf8_is_shown_with_marks_in_its_place(tmp_path: Path) -> None:
    whole = write(tmp_path / "m.gguf")
    position = whole.read_bytes().index(b"synthetic")
    assert read_header(patched(whole, position, b"\xff\xfe", tmp_path / "n.gguf")).name == "��nthetic"


def test_the_size_of_attention_heads_is_taken_from_the_header_when_it_says(tmp_path: Path) -> None:
    def fill(writer: GGUFWriter) -> None:
        writer.add_head_count_kv(2)
        writer.add_key_length(32)

    header = read_header(write(tmp_path / "m.gguf", fill))
    assert (header.n_embd_k_gqa, header.n_embd_v_gqa) == (64, 32)


def test_where_layers_differ_the_largest_counts(tmp_path: Path) -> None:
    header = read_header(write(tmp_path / "m.gguf", lambda writer: writer.add_head_count_kv([1, 4])))
    assert header.n_head_kv == 4


@pytest.mark.parametrize(
    ("n_layer", "n_embd", "n_head", "n_head_kv", "kib"),
    [(32, 4096, 32, 32, (512, 272, 144)), (40, 5120, 40, 40, (800, 425, 225)), (80, 8192, 64, 8, (320, 170, 90))],
    ids=["7B", "13B", "70B"],
)
def test_the_cache_of_llama_2_costs_what_it_is_known_to_cost(
    n_layer: int, n_embd: int, n_head: int, n_head_kv: int, kib: tuple[int, int, int]
) -> None:
    header = header_of(
        {
            "llama.block_count": n_layer,
            "llama.embedding_length": n_embd,
            "llama.attention.head_count": n_head,
            "llama.attention.head_count_kv": n_head_kv,
        }
    )
    assert tuple(header.kv_bytes_per_token(kind, kind) / 1024 for kind in ("f16", "q8_0", "q4_0")) == kib


def test_a_cache_type_that_is_none_is_a_usage_error_naming_those_that_are() -> None:
    with pytest.raises(UsageError, match=", ".join(KV_TYPES)):
        read_header(TINY).kv_bytes_per_token("q9_0")


def test_a_model_without_tensors_is_a_vocabulary_and_is_read(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    header = read_header(path)
    assert (header.tensors, header.expected_size) == ((), 24)


def test_asking_for_what_the_header_lacks_names_the_key(tmp_path: Path) -> None:
    path = tmp_path / "empty.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    with pytest.raises(ModelError, match=r"general\.architecture"):
        _ = read_header(path).n_layer


def test_padding_after_the_last_tensor_is_no_fault(tmp_path: Path) -> None:
    whole = write(tmp_path / "m.gguf")
    whole.write_bytes(whole.read_bytes() + bytes(512))
    assert read_header(whole).file_size >= read_header(whole).expected_size + 512


def test_an_unknown_tensor_type_ends_where_the_next_tensor_begins(tmp_path: Path) -> None:
    whole = write(tmp_path / "m.gguf")
    position = whole.read_bytes().index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16
    tensor = read_header(patched(whole, position, struct.pack("<I", 99), tmp_path / "n.gguf")).tensors[0]
    assert (tensor.type_name, tensor.n_bytes) == ("type 99", 6 * 64 * 2)


def test_reading_brings_in_nothing_heavy() -> None:
    code = "import sys, llamacli.gguf; print({'numpy', 'gguf', 'llama_cpp', 'ctypes', 'asyncio'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


# --- models in several files ---


def write_shard(path: Path, number: int, n_shards: int, architecture: str | None = "llama") -> Path:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    entries = [text("split.no") + struct.pack("<IH", 2, number), text("split.count") + struct.pack("<IH", 2, n_shards)]
    if architecture:
        entries.append(text("general.architecture") + struct.pack("<I", 8) + text(architecture))
    tensor = text(f"blk.{number}.x") + struct.pack("<IQIQ", 1, 8, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(entries)) + b"".join(entries) + tensor
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(32))
    return path


def test_a_shard_is_checked_against_its_own_tensors_only(tmp_path: Path) -> None:
    header = read_header(write_shard(tmp_path / "m-00001-of-00002.gguf", 0, 2))
    assert (header.split_count, header.expected_size) == (2, header.file_size)


def test_a_model_in_shards_has_the_tensors_of_all(tmp_path: Path) -> None:
    first = write_shard(tmp_path / "m-00001-of-00002.gguf", 0, 2)
    write_shard(tmp_path / "m-00002-of-00002.gguf", 1, 2, architecture=None)
    header = read_model(first)
    assert [tensor.name for tensor in header.tensors] == ["blk.0.x", "blk.1.x"]
    assert (header.weight_bytes, header.architecture) == (64, "llama")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    first = write_shard(tmp_path / "m-00001-of-00002.gguf", 0, 2)
    with pytest.raises(ModelError, match=r"m-00002-of-00002\.gguf does not exist"):
        read_model(first)


def test_a_later_shard_asks_for_the_first(tmp_path: Path) -> None:
    second = write_shard(tmp_path / "m-00002-of-00002.gguf", 1, 2, architecture=None)
    with pytest.raises(ModelError, match="name the first"):
        read_model(second)
    with pytest.raises(ModelError, match="name the first"):
        _ = read_header(second).n_layer


# --- what is not a whole GGUF ---


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><title>Sign in</title>", "is an HTML page, not a GGUF"),
        (b"\xef\xbb\xbf\n  <HTML lang=en>", "is an HTML page, not a GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4081004224\n", "is a Git LFS pointer"),
        (b"PK\x03\x04" + bytes(60), "is a PyTorch or zip archive"),
        (b"\x40\x01\x00\x00\x00\x00\x00\x00" + b'{"__metadata__":{}}', "is a safetensors file"),
        (b"tjgg" + struct.pack("<I", 3) + bytes(40), "is in the old GGJT format"),
        (b"lmgg" + bytes(40), "is in the old GGML format"),
        (b"\x1b]0;owned\x07\x00\xff", r"is not a GGUF: it begins with '\x1b]0;owned\x07\x00\xff'"),
        (b"GG", "is not a GGUF: it begins with 'GG'"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "is a big-endian GGUF"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(16), "is GGUF version 1"),
        (b"GGUF" + struct.pack("<I", 4) + bytes(16), "is GGUF version 4"),
        (b"GGUF\x03\x00", "ends inside its header, after 6 bytes"),
    ],
)
def test_what_a_file_really_is_is_said(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert said in refusal(path)


def test_a_big_endian_model_is_refused_as_such(tmp_path: Path) -> None:
    assert "big-endian" in refusal(write(tmp_path / "m.gguf", endian=GGUFEndian.BIG))


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.gguf")


def test_a_directory_is_said_to_be_one(tmp_path: Path) -> None:
    assert "is a directory" in refusal(tmp_path)


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in refusal(tmp_path / "pipe")


def test_a_file_we_may_not_read_is_refused_with_the_systems_words(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    path.chmod(0)
    user = os.geteuid()
    if user == 0:  # root may read everything
        os.seteuid(65534)
    try:
        assert "cannot be read: Permission denied" in refusal(path)
    finally:
        os.seteuid(user)


def test_a_truncated_file_is_refused_with_both_sizes(tmp_path: Path) -> None:
    content = TINY.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(content[:-1234])
    message = refusal(cut)
    assert f"is {len(content) - 1234:,} bytes, its header promises {len(content):,}: download it again" in message


def test_a_file_cut_inside_its_header_is_refused_with_its_size(tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(TINY.read_bytes()[:500_000])
    assert "ends inside its header, after 500,000 bytes: download it again" in refusal(cut)


def test_a_small_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    content = write(tmp_path / "m.gguf").read_bytes()
    expected = read_header(tmp_path / "m.gguf").expected_size
    for length in range(expected):
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        refusal(tmp_path / "cut.gguf")


HUGE = struct.pack("<Q", (1 << 64) - 1)


@pytest.mark.parametrize(
    ("position", "new", "said"),
    [
        (8, HUGE, "it claims 18,446,744,073,709,551,615 tensors"),
        (16, HUGE, "it claims 18,446,744,073,709,551,615 metadata entries"),
        (24, HUGE, "a text of 18,446,744,073,709,551,615 bytes"),
        (24, struct.pack("<Q", 0), "is empty or comes twice"),
        (24 + 8 + len("general.architecture"), struct.pack("<I", 77), "unknown value type 77"),
    ],
)
def test_absurd_numbers_are_called_damage(tmp_path: Path, position: int, new: bytes, said: str) -> None:
    assert said in refusal(patched(write(tmp_path / "m.gguf"), position, new, tmp_path / "n.gguf"))


@pytest.mark.parametrize(
    ("after", "skip", "new", "said"),
    [
        (b"tokenizer.ggml.tokens", 4, struct.pack("<I", 9), "an array of value type 9"),
        (b"tokenizer.ggml.tokens", 8, HUGE, "array items"),
        (b"tokenizer.ggml.tokens", 16, HUGE, "ends inside its header"),
        (b"output_norm.weight", 0, struct.pack("<I", 5), "has 5 dimensions"),
        (b"output_norm.weight", 4, struct.pack("<Q", 1 << 63), "cannot be"),
        (b"token_embd.weight", 4 + 16, struct.pack("<I", 12), "cannot be"),  # Q4_K has 256 elements to a block
        (b"output_norm.weight", 4 + 8 + 4, struct.pack("<Q", 1 << 40), "cannot be"),
        (b"blk.0.odd", 4 + 16, struct.pack("<I", 8), "cannot be"),  # rows of 5 are no blocks of 32
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, after: bytes, skip: int, new: bytes, said: str) -> None:
    whole = write(tmp_path / "m.gguf")
    position = whole.read_bytes().index(after) + len(after) + skip
    assert said in refusal(patched(whole, position, new, tmp_path / "n.gguf"))


def test_a_key_that_comes_twice_is_refused(tmp_path: Path) -> None:
    content = write(tmp_path / "m.gguf").read_bytes()
    (n_entries,) = struct.unpack("<Q", content[16:24])
    again = struct.pack("<Q", 12) + b"general.name" + struct.pack("<IQ", 8, 0)
    twice = content[:16] + struct.pack("<Q", n_entries + 1) + again + content[24:]
    (tmp_path / "twice.gguf").write_bytes(twice)
    assert "'general.name' is empty or comes twice" in refusal(tmp_path / "twice.gguf")


@pytest.mark.parametrize("alignment", [0, 48, "text"])
def test_an_alignment_that_is_no_power_of_two_is_refused(tmp_path: Path, alignment: int | str) -> None:
    def fill(writer: GGUFWriter) -> None:
        if isinstance(alignment, str):
            writer.add_string("general.alignment", alignment)
        else:
            writer.add_uint32("general.alignment", alignment)

    assert "alignment" in refusal(write(tmp_path / "m.gguf", fill))


# --- damage of any kind ---


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


damage = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(["flip", "cut", "insert"]), st.binary(max_size=9)),
    min_size=1,
    max_size=4,
)


def damaged(content: bytes, wounds: list[tuple[float, str, bytes]]) -> bytes:
    for where, kind, new in wounds:
        position = int(where * len(content))
        kept = {"flip": position + len(new), "cut": len(content), "insert": position}[kind]
        content = content[:position] + new + content[kept:]
    return content


def survives(path: Path) -> None:
    try:
        use(read_header(path))
    except LlamacliError as error:
        assert isinstance(error, ModelError)
        assert str(error).isprintable()


@given(wounds=damage)
@settings(max_examples=300, deadline=timedelta(seconds=5))
def test_no_damage_to_a_small_header_is_more_than_a_model_error(
    workshop: Path, wounds: list[tuple[float, str, bytes]]
) -> None:
    whole = workshop / "small.gguf"
    if not whole.exists():
        write(whole)
    path = workshop / "small-damaged.gguf"
    path.write_bytes(damaged(whole.read_bytes(), wounds))
    survives(path)


@given(wounds=damage)
@settings(max_examples=100, deadline=timedelta(seconds=5))
def test_no_damage_to_the_tiny_models_header_is_more_than_a_model_error(
    workshop: Path, wounds: list[tuple[float, str, bytes]]
) -> None:
    with TINY.open("rb") as file:
        content = file.read(read_header(TINY).data_offset)
    path = workshop / "tiny-damaged.gguf"
    path.write_bytes(damaged(content, wounds))
    os.truncate(path, max(path.stat().st_size, TINY.stat().st_size))
    survives(path)
