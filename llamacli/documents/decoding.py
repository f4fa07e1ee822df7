"""Bytes of unknown encoding as text, or what they are instead. The only room that knows charset_normalizer."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass

from llamacli.errors import UsageError

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins as UTF-16's does
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# What is in use. Left to choose among all that Python has, the detector takes short texts for the strangest of them.
_USUAL = [
    *("cp1252", "cp1250", "cp1251", "koi8_r", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp874"),
    *("cp932", "euc_jp", "iso2022_jp", "gb18030", "big5", "cp949"),
]
_LATIN = ("cp1250", "cp1254", "cp1257")
# Short texts in Western languages are the same bytes in several Latin code pages: theirs is cp1252.
_WESTERN = set("äöüÄÖÜßéèêëÉÈÊàâáãåÀÂÁÅçÇîïíìóòôõøÓØúùûÚñÑæÆœŒ¿¡«»€£°§·²³½©\xa0")
_WESTERN |= set(b"\x82\x84\x85\x91\x92\x93\x94\x96\x97".decode("cp1252"))  # quotation marks and dashes
_ESCAPES = ("unicode-escape", "raw-unicode-escape")  # Python's own: what they make of a text may be no text
_SAMPLE = 1 << 18  # bytes that a guess looks at
_KINDS = (
    (b"\x89PNG\r\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"PK\x03\x04", "a ZIP archive, as .docx and .xlsx files are"),
    (b"\xd0\xcf\x11\xe0", "an old Office file"),
    (b"\x1f\x8b", "compressed with gzip"),
    (b"BZh", "compressed with bzip2"),
    (b"\xfd7zXZ", "compressed with xz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (b"\x7fELF", "a program"),
    (b"GGUF", "a model file"),
    (b"SQLite format 3", "an SQLite database"),
    (b"OggS", "an audio file"),
    (b"ID3", "an audio file"),
    (b"RIFF", "an audio, video or image file"),
    (b"%PDF-", "a PDF"),
)
_META = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w-]{1,40})""", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, slots=True)
class Decoded:
    """`doubt` says what a reader should know of it; None where nothing was guessed."""

    text: str
    doubt: str | None = None


def decode(raw: bytes, name: str, charset: str | None = None) -> Decoded:
    """The text that these bytes are: by their byte order mark, as UTF-8, as they are said to be, or by a guess.

    charset   what a server or a page says of itself

    Raises UsageError, which names the file, for bytes that are no text.
    """
    for bom, codec in _BOMS:
        if raw.startswith(bom):
            return _strictly_or_not(raw[len(bom) :], codec)
    if 0 in raw[:_SAMPLE]:
        wide = _utf_16(raw)
        if wide is None:
            raise _binary(raw, name)
        return Decoded(raw.decode(wide, "replace"), f"has no byte order mark; it was read as {wide.upper()}")
    for claimed in ("utf-8", charset):
        if claimed is not None and (text := _attempt(raw, claimed)) is not None:
            return Decoded(text)
    loose = raw.decode("utf-8", "replace")
    n_bad = loose.count("\ufffd")
    if sum(character > "\x7f" for character in loose[:_SAMPLE]) > 10 * n_bad:
        return _strictly_or_not(raw, "utf-8")
    guess = _guess(raw[:_SAMPLE])
    if guess is None or 0 in raw:
        raise _binary(raw, name)
    text = raw.decode(guess, "replace")
    bad = f", {text.count(chr(0xFFFD)):,} characters of it not" if "\ufffd" in text else ""
    return Decoded(text, f"is not UTF-8; it was read as {guess}{bad}")


def page_charset(raw: bytes) -> str | None:
    """What an HTML page says of its own encoding."""
    found = _META.search(raw[:2048])
    return found[1].decode() if found else None


def is_binary(head: bytes) -> bool:
    """Whether a file that begins so need not be read to its end to see that it is no text."""
    if any(head.startswith(bom) for bom, _ in _BOMS):
        return False
    return 0 in head and _utf_16(head) is None


def _attempt(raw: bytes, codec: str) -> str | None:
    try:
        if codecs.lookup(codec).name in _ESCAPES:
            return None
        text = raw.decode(codec)
    except (UnicodeDecodeError, LookupError, ValueError):
        return None
    return text if isinstance(text, str) else None


def _strictly_or_not(raw: bytes, codec: str) -> Decoded:
    text = raw.decode(codec, "replace")
    n_bad = text.count("\ufffd") - raw.count("\ufffd".encode(codec))
    if n_bad <= 0:
        return Decoded(text)
    return Decoded(text, f"is not valid {codec.upper()}; U+FFFD stands for what could not be read ({n_bad:,} times)")


def _utf_16(raw: bytes) -> str | None:
    """UTF-16 of mostly Latin text has a zero in every other place, always on the same side."""
    sample = raw[: _SAMPLE & ~1]
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    for zeros, others, codec in ((odd, even, "utf-16-le"), (even, odd, "utf-16-be")):
        if zeros > len(sample) // 4 and others == 0:
            text = sample.decode(codec, "replace")
            if sum(character.isprintable() or character.isspace() for character in text) > 0.95 * len(text):
                return codec
    return None


def _guess(sample: bytes) -> str | None:
    from charset_normalizer import from_bytes

    best = from_bytes(sample, cp_isolation=_USUAL).best()
    if best is None:
        return None
    if best.encoding in _LATIN and set(sample.decode("cp1252", "replace")) - _ASCII <= _WESTERN:
        return "cp1252"
    return str(best.encoding)


_ASCII = {chr(code) for code in range(128)}


def _binary(raw: bytes, name: str) -> UsageError:
    kind = next((kind for magic, kind in _KINDS if raw.startswith(magic)), "binary")
    return UsageError(f"{name} is {kind}: only text, HTML and PDF can be read")
