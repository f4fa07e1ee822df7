"""The code samples of the API page: templates beside the page, filled in with the server's own address.

A line with {{key}} is left out where no key is needed. The templates are programs but for what is in braces.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

from llamacli.server.about import About

_TEMPLATES = Path(__file__).parent / "page" / "samples"
LANGUAGES = {
    "curl": "curl",
    "python": "Python",
    "javascript": "JavaScript",
    "java": "Java",
    "php": "PHP",
    "http": "HTTP",
}
KEY = "YOUR_KEY"  # whoever copies a sample puts theirs here


def sample(name: str, about: About) -> str:
    """A template's program for this server, without a newline at its end."""
    lines = _template(name).splitlines()
    text = "\n".join(line for line in lines if about.needs_key or "{{key}}" not in line)
    values = {
        "url": about.url,
        "host": about.host,
        "key": KEY,
        "any key": KEY if about.needs_key else "none",
        "model": _quoted(about.model),
        "length": str(len(text.partition("\n\n")[2])),  # of what follows the headers of raw HTTP; ASCII, one line
    }
    return re.sub(r"\{\{([a-z ]+)\}\}", lambda match: values[match[1]], text)


def _quoted(name: str) -> str:
    """A string for JSON and Python, also between a shell's single quotes."""
    return json.dumps(name, ensure_ascii=False).replace("'", "\\u0027")


@cache
def _template(name: str) -> str:
    return (_TEMPLATES / f"{name}.txt").read_text("utf-8")
