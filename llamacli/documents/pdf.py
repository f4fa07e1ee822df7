"""The text of a PDF. The only room that knows pypdf, which comes with the extra `documents`."""

from __future__ import annotations

import io
import logging
from typing import TYPE_CHECKING

from llamacli.documents.document import Document, Teller, check_size
from llamacli.errors import LlamacliError, UsageError

if TYPE_CHECKING:
    from pypdf import PdfReader

INSTALL = "pip install 'llamacli[documents]'"
MAX_FILE = 256 << 20  # bytes; most of a large PDF are pictures
MAX_PAGES = 10_000


class NotInstalled(UsageError):
    """The extra is missing."""


def is_pdf(head: bytes) -> bool:
    """The header may stand anywhere in the first 1,024 bytes (PDF 32000-1:2008, Annex H.3.4.1)."""
    return b"%PDF-" in head[:1024] and b"<html" not in head[:1024].lower()


def read(raw: bytes, name: str, teller: Teller) -> Document:
    """All pages' text. Raises UsageError for one that has none, is encrypted or damaged; InputTooLong."""
    try:
        import pypdf
    except ImportError:
        raise NotInstalled(f"{name} is a PDF, which takes one thing more to read: {INSTALL}") from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL + 1)  # what it says of a page would stand among our lines
    try:
        reader = pypdf.PdfReader(io.BytesIO(raw))
        if reader.is_encrypted and not reader.decrypt(""):  # many are, with no password, only to forbid printing
            raise UsageError(f"{name} is encrypted: take its password off, as with `qpdf --decrypt`, and try again")
        return _of_pages(reader, name, teller)
    except (LlamacliError, MemoryError):
        raise
    except pypdf.errors.DependencyError:
        raise NotInstalled(f"{name} is encrypted, which takes one thing more to read: {INSTALL}") from None
    except Exception as error:  # whatever a damaged file does to its reader
        said = " ".join(str(error).split())[:120]
        raise UsageError(f"{name} is damaged, or no PDF ({type(error).__name__}: {said})") from None


def _of_pages(reader: PdfReader, name: str, teller: Teller) -> Document:
    texts: list[str] = []
    size = 0
    n_pages = len(reader.pages)
    if n_pages > MAX_PAGES:
        raise UsageError(f"{name} has {n_pages:,} pages; {MAX_PAGES:,} are read: give the part that matters")
    for page in reader.pages:
        texts.append(page.extract_text().strip())
        size += len(texts[-1])
        check_size(size, name)
    found = [text for text in texts if text]
    if not found:
        raise UsageError(
            f"{name} has no text on its {_pages(n_pages)}: they may be scanned; make text of them, as with "
            "`ocrmypdf`, and try again"
        )
    if len(found) < n_pages:
        teller.say(f"{name}: {n_pages - len(found):,} of its {_pages(n_pages)} have no text")
    return Document(name, "\n\n".join(found), "pdf")


def _pages(n: int) -> str:
    return "1 page" if n == 1 else f"{n:,} pages"
