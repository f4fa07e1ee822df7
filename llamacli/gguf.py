"""Reads the header of a GGUF file, quickly and in pure Python. Knows nothing of llama.cpp.

Format: docs/gguf.md of ggml-org/ggml; what counts as damaged follows llama.cpp's reader (ggml/src/gguf.cpp).
The file is somebody's download: every count and length is checked against its size before it is believed.
"""

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from llamacli.errors import ModelError
from llamacli.gguf_header import ARRAY, SCALARS, STRING, TENSOR_TYPES, U64, Header, LazyArray, Scalar, Tensor

__all__ = ["Header", "LazyArray", "Scalar", "Tensor", "read_header", "read_model"]

# Several times the largest header known (a vocabulary of 450,000 with merges); bounds the work on damage.
MAX_HEADER_BYTES = 128 << 20
MAX_KEY_BYTES = 0xFFFF
MAX_NAME_BYTES = 63
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32

_LAYOUTS = {type_id: struct.Struct("<" + code) for type_id, code in SCALARS.items()}
_U32 = struct.Struct("<I")


def read_header(path: Path) -> Header:
    """Reads and checks the header, and that the file is as long as it says. Raises ModelError."""
    try:
        if path.is_dir():
            raise ModelError(f"{path} is a directory; name the .gguf file in it")
        if not path.is_file():
            what = "is not a regular file" if path.exists() else "does not exist: check the path, or pull a model"
            raise ModelError(f"{path} {what}")
        with path.open("rb") as file:
            file_size = file.seek(0, 2)
            if file_size == 0:
                raise ModelError(f"{path} is empty: download it again")
            length = min(file_size, MAX_HEADER_BYTES)
            with mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(path, data, length, file_size))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError:  # mmap: longer than the file, which has shrunk since its size was taken
        raise ModelError(f"{path} changed while it was read: is a download still running?") from None


def read_model(path: Path) -> Header:
    """The header of a whole model: of a split one, the first shard's with the tensors and sizes of all shards.

    Raises ModelError also for a shard that is missing or cut.
    """
    first = read_header(path)
    n = first.split_count
    if n == 1:
        return first
    ending = f"-00001-of-{n:05d}.gguf"
    if not path.name.endswith(ending):
        raise ModelError(f"{path} is one of {n} shards: name the first, which ends in {ending}")
    stem = path.name.removesuffix(ending)
    shards = [first, *(read_header(path.with_name(f"{stem}-{i:05d}-of-{n:05d}.gguf")) for i in range(2, n + 1))]
    return replace(
        first,
        tensors=tuple(tensor for shard in shards for tensor in shard.tensors),
        file_size=sum(shard.file_size for shard in shards),
        expected_size=sum(shard.expected_size for shard in shards),
    )


class _Cursor:
    """Walks the mapped bytes; no read passes their end."""

    def __init__(self, path: Path, data: mmap.mmap, end: int, file_size: int) -> None:
        self.path = path
        self.data = data
        self.end = end
        self.file_size = file_size
        self.position = 0

    def damaged(self, what: str) -> NoReturn:
        raise ModelError(f"{self.path} is damaged: {what}. Download it again")

    def advance(self, n_bytes: int) -> int:
        """Steps over `n_bytes` and returns where they start."""
        start = self.position
        if n_bytes > self.end - start:
            if self.end < self.file_size:
                self.damaged(f"its header would be larger than {self.end:,} bytes")
            raise ModelError(f"{self.path} ends inside its header, after {self.file_size:,} bytes: download it again")
        self.position = start + n_bytes
        return start

    def take(self, n_bytes: int) -> bytes:
        start = self.advance(n_bytes)
        return self.data[start : self.position]

    def u32(self) -> int:
        value: int = _U32.unpack_from(self.data, self.advance(4))[0]
        return value

    def u64(self) -> int:
        value: int = U64.unpack_from(self.data, self.advance(8))[0]
        return value

    def count(self, what: str, least_bytes: int) -> int:
        """A u64 number of things that take at least `least_bytes` each."""
        n = self.u64()
        if n * least_bytes > self.file_size:
            self.damaged(f"it claims {n:,} {what}")
        return n

    def text(self, limit: int = MAX_HEADER_BYTES) -> str:
        n_bytes = self.u64()
        if n_bytes > min(limit, self.file_size):
            self.damaged(f"a text of {n_bytes:,} bytes in its header")
        return self.take(n_bytes).decode("utf-8", "replace")

    def skip_texts(self, n: int) -> None:
        """The walk over a vocabulary: most of the time that reading a header takes."""
        position, read_length = self.position, U64.unpack_from
        try:
            for _ in range(n):
                position += 8 + read_length(self.data, position)[0]
        except (struct.error, OverflowError, IndexError):
            position += 8  # where the length that is not there would have ended
        self.advance(position - self.position)


def _parse(cursor: _Cursor) -> Header:
    version = _version(cursor)
    n_tensors = cursor.count("tensors", 24)
    metadata = _metadata(cursor)
    entries = [_tensor_entry(cursor) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        cursor.damaged(f"its alignment is {alignment!a}")
    data_offset = _pad(cursor.position, alignment) if entries else cursor.position
    tensors = tuple(_lay_out(cursor, entries, data_offset, alignment))
    expected = max((data_offset + tensor.offset + tensor.n_bytes for tensor in tensors), default=data_offset)
    if expected > cursor.file_size:
        raise ModelError(
            f"{cursor.path} is {cursor.file_size:,} bytes, its header promises {expected:,}: download it again"
        )
    return Header(cursor.path, version, metadata, tensors, cursor.file_size, expected, data_offset, alignment)


def _version(cursor: _Cursor) -> int:
    start = cursor.data[: min(64, cursor.end)]
    if not start.startswith(b"GGUF"):
        raise ModelError(f"{cursor.path} {_what_instead(start)}")
    cursor.advance(4)
    version = cursor.u32()
    if version & 0xFFFF == 0:
        raise ModelError(f"{cursor.path} is a big-endian GGUF: download the little-endian one, or convert it")
    if version not in (2, 3):
        raise ModelError(f"{cursor.path} is GGUF version {version}; versions 2 and 3 can be read: convert it again")
    return version


def _what_instead(start: bytes) -> str:
    """What a file is that is no GGUF, told by its first bytes."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        return (
            "is an HTML page, not a GGUF: the download got a log-in or error page. "
            "Sign in or accept the licence, then download it again"
        )
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the model itself: run `git lfs pull`, or download the file"
    if start.startswith(b"PK\x03\x04"):
        return "is a PyTorch or zip archive, not a GGUF: convert it with llama.cpp's convert_hf_to_gguf.py"
    if start[8:9] == b"{" and len(start) > 8:
        return "is a safetensors file, not a GGUF: convert it with llama.cpp's convert_hf_to_gguf.py"
    if start[:4] in (b"lmgg", b"fmgg", b"tjgg", b"algg"):
        return f"is in the old {start[3::-1].decode().upper()} format that llama.cpp no longer reads: get a GGUF"
    return f"is not a GGUF: it begins with {ascii(start[:16])[1:]}"


def _metadata(cursor: _Cursor) -> dict[str, Scalar | LazyArray]:
    metadata: dict[str, Scalar | LazyArray] = {}
    for _ in range(cursor.count("metadata entries", 13)):
        key = cursor.text(MAX_KEY_BYTES)
        if not key or key in metadata:
            cursor.damaged(f"metadata key {key[:64]!a} is empty or comes twice")
        type_id = cursor.u32()
        metadata[key] = _array(cursor) if type_id == ARRAY else _scalar(cursor, type_id)
    return metadata


def _scalar(cursor: _Cursor, type_id: int) -> Scalar:
    if type_id == STRING:
        return cursor.text()
    layout = _LAYOUTS.get(type_id) or cursor.damaged(f"unknown value type {type_id}")
    value: Scalar = layout.unpack_from(cursor.data, cursor.advance(layout.size))[0]
    return value


def _array(cursor: _Cursor) -> LazyArray:
    item_type = cursor.u32()
    if item_type == STRING:
        n = cursor.count("array items", 8)
        start = cursor.position
        cursor.skip_texts(n)
        return LazyArray(item_type, n, cursor.data[start : cursor.position])
    layout = _LAYOUTS.get(item_type) or cursor.damaged(f"an array of value type {item_type}")
    n = cursor.count("array items", layout.size)
    return LazyArray(item_type, n, cursor.take(n * layout.size))


# name, shape, type id, offset
_Entry = tuple[str, tuple[int, ...], int, int]


def _tensor_entry(cursor: _Cursor) -> _Entry:
    name = cursor.text(MAX_NAME_BYTES)
    n_dims = cursor.u32()
    if n_dims > MAX_DIMS:
        cursor.damaged(f"tensor {name!a} has {n_dims:,} dimensions")
    shape = tuple(cursor.u64() for _ in range(n_dims))
    return name, shape, cursor.u32(), cursor.u64()


def _lay_out(cursor: _Cursor, entries: list[_Entry], data_offset: int, alignment: int) -> Iterator[Tensor]:
    """Tensors follow one another, each padded; one of an unknown type ends where the next begins."""
    expected = 0
    ends = [offset for _, _, _, offset in entries[1:]] + [max(cursor.file_size - data_offset, 0)]
    for (name, shape, type_id, offset), end in zip(entries, ends, strict=False):
        kind = TENSOR_TYPES.get(type_id)
        n_bytes = _tensor_bytes(shape, *kind[1:]) if kind else end - offset
        if offset != expected or n_bytes is None or n_bytes < 0:
            cursor.damaged(f"tensor {name!a} of shape {shape} at {offset:,} cannot be")
        expected = _pad(offset + n_bytes, alignment)
        yield Tensor(name, shape, type_id, offset, n_bytes)


def _tensor_bytes(shape: tuple[int, ...], block_size: int, block_bytes: int) -> int | None:
    """None when rows are not whole blocks or the elements cannot be counted in 63 bits."""
    row, n_elements = (shape[0] if shape else 1), math.prod(shape)
    if row % block_size or max((n_elements, *shape)) >= 1 << 63:
        return None
    return n_elements // block_size * block_bytes


def _pad(n: int, alignment: int) -> int:
    return (n + alignment - 1) & ~(alignment - 1)
