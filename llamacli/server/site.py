"""The API page of a server: its files, and the HTML with this server's own facts, tables and samples filled in.

The tables come from the OpenAPI description, so that page and description say the same. Nothing is loaded from
elsewhere, and the browser is told to load nothing from elsewhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path

from llamacli import __version__
from llamacli.server import schemas
from llamacli.server.about import About
from llamacli.server.description import HTML, PROBLEMS, operations
from llamacli.server.samples import LANGUAGES, sample
from llamacli.server.schemas import Schema

_PLACE = Path(__file__).parent / "page"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_FORMATS = {
    "llama-2": "Llama 2 chat",
    "vicuna": "Vicuna chat",
    "template": "the file's own template",
    "completion": "none: a base model, which continues a text",
}
HEADERS = (
    (
        "content-security-policy",
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    ),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cache-control", "no-store"),
)


@dataclass(frozen=True, slots=True)
class Asset:
    body: bytes
    content_type: str


def _assets() -> dict[str, Asset]:
    files = [path for path in sorted(_PLACE.iterdir()) if path.suffix in _TYPES]
    return {f"/page/{path.name}": Asset(path.read_bytes(), _TYPES[path.suffix]) for path in files}


ASSETS = _assets()  # path → asset


def page(about: About) -> Asset:
    values = {
        "version": __version__,
        "url": escape(about.url),
        "model": escape(about.model),
        "state": about.state,
        "needs key": str(about.needs_key).lower(),
        "temperature": f"{about.defaults.temperature:g}",
        "max tokens": str(about.defaults.max_tokens or ""),
        "facts": _facts(about),
        "keys": _keys(about),
        "endpoints": _endpoints(about),
        "fields": _fields(about),
        "answer": _properties("GetDataAnswer"),
        "errors": _errors(),
        "tabs": _tabs(),
        "panels": _panels(about),
        "openai curl": _sample("openai-curl", "curl", about),
        "openai python": _sample("openai-python", "Python, with the openai package", about),
    }
    html = re.sub(r"\{\{([a-z ]+)\}\}", lambda match: values[match[1]], _skeleton())
    return Asset(html.encode(), HTML)


@cache
def _skeleton() -> str:
    return (_PLACE / "index.html").read_text("utf-8")


# -- pieces of HTML ---------------------------------------------------------------------------------------------


def _row(heading: str, *cells: tuple[str, str]) -> str:
    """A table row. Cells are (label, HTML); a label is seen where the screen is too narrow for the table's head."""
    return f'<tr><th scope="row">{heading}</th>{"".join(_cell(*each) for each in cells)}</tr>'


def _cell(label: str, html: str) -> str:
    label = f' data-label="{label}"' if label else ""
    return f"<td{label}>{html}</td>" if html else '<td class="nothing">&ndash;</td>'


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _prose(text: str) -> str:
    """Text with `code` in it."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _facts(about: About) -> str:
    known = {
        "Model": about.model,
        "Context": f"{about.context:,} tokens" if about.context else "",
        "Prompts": _FORMATS.get(about.format or "", about.format or ""),
        "Device": about.device or "",
        "At once": f"{about.slots}",
        "Waiting": f"up to {about.queue}",
        "Body": f"up to {_size(about.max_body)}",
        "Key": "needed" if about.needs_key else "not needed",
    }
    return "".join(f"<div><dt>{name}</dt><dd>{escape(what)}</dd></div>" for name, what in known.items() if what)


def _size(n_bytes: int) -> str:
    n_mib, rest = divmod(n_bytes, 1 << 20)
    return f"{n_bytes:,} bytes" if rest else f"{n_mib} MiB"


def _keys(about: About) -> str:
    if about.needs_key:
        return (
            "This server asks for a key. Whoever runs it makes one with <code>llamacli keys create --name NAME</code>."
        )
    return (
        "This server needs no key at present, and takes one all the same. From the first "
        "<code>llamacli keys create --name NAME</code> on it asks for one."
    )


def _endpoints(about: About) -> str:
    rows = []
    for each in operations(about):
        method = f'<span class="method {each.method}">{each.method.upper()}</span>'
        key = "no" if each.is_open or not about.needs_key else "yes"
        rows.append(
            _row(f"{method} {_code(each.path)}", ("", _prose(each.summary)), ("Part of", each.tag), ("Key", key))
        )
    return "".join(rows)


def _fields(about: About) -> str:
    schema = schemas.get_data(about.defaults)
    rows = []
    for name, field in schema["properties"].items():
        needed = ' <span class="needed">required</span>' if name in schema["required"] else ""
        default = _written(field["default"]) if "default" in field else ""
        cells = [
            ("Type", _kinds(field)),
            ("Range", _range(field)),
            ("Default", default),
            ("", _prose(field["description"])),
        ]
        rows.append(_row(_code(name) + needed, *cells))
    return "".join(rows)


def _kinds(field: Schema) -> str:
    if "anyOf" in field:
        kinds = [each.get("type", "object") for each in field["anyOf"]]
    else:
        kinds = field["type"] if isinstance(field["type"], list) else [field["type"]]
    return " or ".join(kind for kind in kinds if kind != "null")


def _range(field: Schema) -> str:
    low, above, high = (field.get(name) for name in ("minimum", "exclusiveMinimum", "maximum"))
    if above is not None:
        return f"above {above}, to {high}"
    if low is None:
        return "not empty" if "pattern" in field else ""
    return f"{low} or more" if high is None else f"{low} to {high:,}"


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _properties(name: str) -> str:
    properties: dict[str, Schema] = schemas.answers()[name]["properties"]
    return "".join(_row(_code(each), ("", _prose(field["description"]))) for each, field in properties.items())


def _errors() -> str:
    return "".join(
        _row(str(status), ("", _prose(each.when)), ("", _prose(each.remedy))) for status, each in PROBLEMS.items()
    )


def _tabs() -> str:
    return "".join(
        f'<button type="button" role="tab" id="tab-{name}" aria-controls="panel-{name}">{title}</button>'
        for name, title in LANGUAGES.items()
    )


def _panels(about: About) -> str:
    return "".join(
        f'<div id="panel-{name}" class="panel" data-tab="tab-{name}"><h3>{title}</h3>'
        f"{_sample(name, 'The whole answer', about)}{_sample(f'{name}-stream', 'Piece by piece', about)}</div>"
        for name, title in LANGUAGES.items()
    )


def _sample(name: str, title: str, about: About) -> str:
    return (
        f'<figure class="sample"><figcaption id="about-{name}">{title}</figcaption>'
        f'<button type="button" class="copy" aria-describedby="about-{name}" hidden>Copy</button>'
        f'<pre tabindex="0" role="region" aria-labelledby="about-{name}">'
        f'<code id="sample-{name}">{escape(sample(name, about))}</code></pre></figure>'
    )
