"""What an HTML page says, without its menus. The only room that knows trafilatura and lxml, of `documents`."""

from __future__ import annotations

import logging
import re

from llamacli.documents.document import Document, Teller
from llamacli.documents.pdf import INSTALL, NotInstalled
from llamacli.errors import UsageError

SUFFIXES = (".html", ".htm", ".xhtml")
# A comment ends at the first -->: one that might end at any would be tried in all ways.
_BEGINNING = re.compile(
    r"\s*(<\?xml[^>]*>\s*)?(<!--((?!-->).)*-->\s*)*<(!doctype\s+html|html)\b", re.IGNORECASE | re.DOTALL
)
LARGE = 1 << 20  # characters; trafilatura's time grows with their square
SHORT = 300  # characters of a page in which no main part can be told from the rest


def is_page(text: str) -> bool:
    return _BEGINNING.match(text[:4096]) is not None


def read(html: str, name: str, teller: Teller) -> Document:
    """The text of the page's main part as Markdown; of all of it where none stands out, or where it is large.

    Raises UsageError for a page that says nothing, or that is nested too deeply.
    """
    try:
        import lxml.html
        import trafilatura
    except ImportError:
        raise NotInstalled(f"{name} is an HTML page, which takes one thing more to read: {INSTALL}") from None
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL + 1)
    if not is_page(html):  # part of one: trafilatura takes nothing for HTML that does not say so
        html = f"<html><body>{html}</body></html>"
    parser = lxml.html.HTMLParser()
    parser.feed(html)
    parser.close()
    if any(error.type_name == "ERR_RESOURCE_LIMIT" for error in parser.feed_error_log):  # the rest would be missing
        raise UsageError(f"{name} is nested more deeply than can be read: make text of it, as with `w3m -dump`")
    text = None
    if len(html) <= LARGE:
        text = trafilatura.extract(html, output_format="markdown", favor_recall=True, include_comments=False)
    else:
        teller.say(f"{name} is a large page: all of its text was read, not its main part alone")
    whole = trafilatura.html2txt(html)
    if not text or len(whole) < SHORT or len(text) < len(whole) // 4:
        text = whole
    text = text.strip()
    if not text:
        raise UsageError(f"{name} is an HTML page without text: it may be made by a script that runs in a browser only")
    return Document(name, text, "html")
