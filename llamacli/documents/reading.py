"""What -f names, read: files, directories, web addresses, and standard input among them."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from llamacli.documents import decoding, fetching, page, pdf
from llamacli.documents.document import Document, Teller, check_size, shown
from llamacli.documents.folder import Folder
from llamacli.documents.opening import Opened, kind_of
from llamacli.errors import UsageError

STDIN = "-"
_OTHER_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def check(places: Sequence[str], *, is_offline: bool) -> None:
    """What can be refused before anything is read. Raises UsageError."""
    if places.count(STDIN) > 1:
        raise UsageError("-f - is standard input, which can be read once")
    for place in places:
        if place == STDIN:
            continue
        if fetching.is_address(place):
            fetching.name_of(place)
            if is_offline:
                raise UsageError(f"{fetching.name_of(place)} cannot be had: --offline forbids it")
        elif _OTHER_SCHEME.match(place) and not os.path.lexists(place):
            raise UsageError(
                f"{fetching.without_secrets(place)}: only files and addresses of http and https can be read"
            )
        else:
            kind_of(_path(place))


@dataclass(slots=True)
class Reading:
    """Reads one place after the other.

    stdin   reads it, for the place that is called -
    """

    teller: Teller
    stdin: Callable[[], str]
    _size: int = field(default=0, init=False)

    def documents(self, places: Sequence[str]) -> list[Document]:
        """In the order of the places. Raises UsageError, InputTooLong and RemoteError."""
        found: list[Document] = []
        for place in places:
            if place == STDIN:
                found.append(Document("standard input", self.stdin(), "stdin"))
            elif fetching.is_address(place):
                found.append(self._counted(self._fetched(place)))
            elif stat.S_ISDIR(kind_of(_path(place))):
                found += self._in_folder(_path(place))
            else:
                found.append(self._counted(self._in_file(_path(place))))
        if not any(each.text.strip() for each in found):
            names = ", ".join(each.name for each in found)[:200]
            raise UsageError(f"there is nothing to read: {names} {'is' if len(found) == 1 else 'are'} empty")
        for each in found:
            if not each.text.strip():
                self.teller.say(f"{each.name} is empty")
        return found

    def _counted(self, document: Document) -> Document:
        self._size += len(document.text)
        check_size(self._size, "what -f names")
        return document

    def _fetched(self, url: str) -> Document:
        fetched = fetching.fetch(url, self.teller)
        is_page = fetched.kind in ("text/html", "application/xhtml+xml")
        return self._made(fetched.raw, fetching.name_of(url), charset=fetched.charset, is_page=is_page)

    def _in_file(self, path: Path) -> Document:
        with Opened(path) as opened:
            return self._made(opened.whole(), shown(str(path)), is_page=path.suffix.lower() in page.SUFFIXES)

    def _in_folder(self, path: Path) -> list[Document]:
        """Every file below that can be read. The others are counted, and named for -v."""
        skipped: Counter[str] = Counter()

        def skip(where: Path, why: str) -> None:
            skipped[why] += 1
            self.teller.detail(f"left out: {shown(str(where))} ({why})")

        found: list[Document] = []
        for file in Folder(path, skip).files():
            document = self._worth_reading(file, skip)
            if document is not None:
                found.append(self._counted(document))
        told = ", ".join(f"{n:,} {why}" for why, n in sorted(skipped.items()))
        if not found:
            raise UsageError(
                f"there is nothing to read in {shown(str(path))}" + (f" (left out: {told})" if told else "")
            )
        if told:
            self.teller.say(f"{shown(str(path))}: {_files(len(found))}; left out: {told} (-v names them)")
        return found

    def _worth_reading(self, path: Path, skip: Callable[[Path, str], None]) -> Document | None:
        try:
            with Opened(path) as opened:
                if decoding.is_binary(opened.head) and not pdf.is_pdf(opened.head):
                    skip(path, "binary")
                    return None
            document = self._in_file(path)
        except UsageError as error:
            self.teller.detail(str(error))
            skip(path, f"for want of {pdf.INSTALL}" if isinstance(error, pdf.NotInstalled) else "unreadable")
            return None
        if not document.text.strip():
            skip(path, "empty")
            return None
        return document

    def _made(self, raw: bytes, name: str, *, charset: str | None = None, is_page: bool = False) -> Document:
        if pdf.is_pdf(raw):
            return pdf.read(raw, name, self.teller)
        decoded = decoding.decode(raw, name, charset or (decoding.page_charset(raw) if is_page else None))
        if decoded.doubt is not None:
            self.teller.say(f"{name} {decoded.doubt}")
        if (is_page or page.is_page(decoded.text)) and decoded.text.strip():
            return page.read(decoded.text, name, self.teller)
        return Document(name, decoded.text.rstrip("\r\n"))


def _path(place: str) -> Path:
    """`~` as in a shell, which has no part in --file=~/a.txt. Raises UsageError."""
    if not place or "\0" in place:
        raise UsageError("-f names no file")
    with suppress(RuntimeError):  # there is no such user
        return Path(place).expanduser()
    return Path(place)


def _files(n: int) -> str:
    return "1 file was read" if n == 1 else f"{n:,} files were read"
