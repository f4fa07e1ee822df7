"""What -f can name: real files of all sorts, and a real web server, good and bad."""

from __future__ import annotations

import codecs
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from loopback_web import LoopbackWeb
from papers import encrypted, pdf

from llamacli.documents import decoding, fetching, folder, ignoring, page, reading
from llamacli.documents.document import MAX_TEXT, Document, joined, shown
from llamacli.documents.ignoring import Rules
from llamacli.errors import InputTooLong, RemoteError, UsageError


class Told:
    """Remembers what a reader was told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.detailed: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)

    def detail(self, line: str) -> None:
        self.detailed.append(line)


@pytest.fixture
def told() -> Told:
    return Told()


def read(told: Told, *places: Path | str) -> list[Document]:
    names = [str(place) for place in places]
    reading.check(names, is_offline=False)
    return reading.Reading(told, lambda: "piped").documents(names)


def text_of(told: Told, place: Path | str) -> str:
    (document,) = read(told, place)
    return document.text


# -- text ---------------------------------------------------------------------------------------------------------

FRENCH = "Le café de la gare est fermé à cause de la grève générale; où êtes-vous allés déjeuner ?"
RUSSIAN = "Привет, как дела? Это обычный русский текст о ламах и моделях."  # noqa: RUF001
JAPANESE = "これは日本語のテキストです。モデルについて教えてください。"


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_utf_8_and_what_has_a_byte_order_mark_is_read_as_such(codec: str, tmp_path: Path, told: Told) -> None:
    (tmp_path / "a.txt").write_bytes(f"{FRENCH} {RUSSIAN} 🦙\n".encode(codec))
    assert text_of(told, tmp_path / "a.txt") == f"{FRENCH} {RUSSIAN} 🦙"
    assert told.said == []


@pytest.mark.parametrize(
    ("text", "codec"),
    [
        ("café", "latin-1"),
        ("Größe: “groß” für alle", "cp1252"),
        (FRENCH, "cp1252"),
        ("Zażółć gęślą jaźń, proszę o więcej informacji na temat modeli.", "cp1250"),
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8_r"),
        (JAPANESE, "shift_jis"),
        (JAPANESE, "euc_jp"),
        ("这是一个普通的中文文本，关于语言模型和羊驼。请告诉我更多信息。", "gb18030"),  # noqa: RUF001
        ("plain text from a tool of Windows", "utf-16-le"),
        ("plain text from elsewhere", "utf-16-be"),
    ],
)
def test_another_encoding_is_found_out_and_said(text: str, codec: str, tmp_path: Path, told: Told) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode(codec))
    assert text_of(told, tmp_path / "a.txt") == text
    assert len(told.said) == 1 and "it was read as" in told.said[0] and "a.txt" in told.said[0]


def test_a_broken_character_in_utf_8_does_not_make_another_encoding_of_it(tmp_path: Path, told: Told) -> None:
    (tmp_path / "a.txt").write_bytes(RUSSIAN.encode() + b"\xff" + RUSSIAN.encode())
    assert text_of(told, tmp_path / "a.txt") == f"{RUSSIAN}\ufffd{RUSSIAN}"
    assert "not valid UTF-8" in told.said[0] and "(1 times)" in told.said[0]


@given(st.binary(max_size=300))
def test_any_bytes_are_text_or_refused_by_name(raw: bytes) -> None:
    try:
        assert isinstance(decoding.decode(raw, "x.bin").text, str)
    except UsageError as refused:
        assert str(refused).startswith("x.bin is ")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "PNG image"),
        (b"PK\x03\x04\x14\0\0\0", "ZIP archive"),
        (b"GGUF\x03\0\0\0", "model file"),
        (bytes(range(256)) * 4, "binary"),
    ],
)
def test_a_binary_file_is_refused_by_name(raw: bytes, said: str, tmp_path: Path, told: Told) -> None:
    (tmp_path / "thing").write_bytes(raw)
    with pytest.raises(UsageError, match=rf"thing is .*{said}"):
        read(told, tmp_path / "thing")


# -- several ------------------------------------------------------------------------------------------------------


def test_one_alone_goes_as_it_is_and_several_stand_below_their_names(tmp_path: Path, told: Told) -> None:
    (tmp_path / "b").write_text("second\n\n")
    (tmp_path / "a").write_text("first\n")
    assert joined(read(told, tmp_path / "b")) == "second"
    both = joined(read(told, tmp_path / "b", tmp_path / "a", "-"))
    assert both == f"==> {tmp_path}/b <==\nsecond\n\n==> {tmp_path}/a <==\nfirst\n\n==> standard input <==\npiped"


def test_an_empty_file_is_said_and_nothing_but_empty_ones_is_refused(tmp_path: Path, told: Told) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "full").write_text("text")
    with pytest.raises(UsageError, match="empty is empty"):
        read(told, tmp_path / "empty")
    assert len(read(told, tmp_path / "empty", tmp_path / "full")) == 2
    assert told.said == [f"{tmp_path}/empty is empty"]


def test_a_name_is_shown_harmless(tmp_path: Path, told: Told) -> None:
    name = b"a\n==> b <==\x1b[31m\xe2\x80\xae\xff.txt"
    (Path(os.fsdecode(bytes(tmp_path))) / os.fsdecode(name)).write_text("text")
    (document,) = read(told, tmp_path)
    assert document.name == rf"{tmp_path}/a\n==> b <==\x1b[31m\u202e\xff.txt"


@given(st.text())
def test_every_name_is_shown_on_one_line_that_can_be_encoded(name: str) -> None:
    assert shown(name).encode().decode() == shown(name) and shown(name).isprintable()


# -- what is no file ----------------------------------------------------------------------------------------------


def test_what_does_not_come_to_an_end_is_refused_without_being_opened(tmp_path: Path, told: Told) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
        for place, said in (
            (tmp_path / "pipe", "pipe is a named pipe"),
            (tmp_path / "sock", "sock is a socket"),
            ("/dev/zero", "/dev/zero is a device"),
            (tmp_path / "none", "none cannot be read: No such file"),
            (tmp_path / "pipe/x", "Not a directory"),
            ("x" * 5000, "File name too long"),
            ("", "names no file"),
            ("ftp://example.org/a", "only files and addresses of http"),
        ):
            with pytest.raises(UsageError, match=said):
                read(told, place)
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(UsageError, match="Too many levels of symbolic links"):
        read(told, tmp_path / "round")


def test_a_shell_s_process_substitution_is_read(told: Told) -> None:
    out, into = os.pipe()
    os.write(into, b"from a command\n")
    os.close(into)
    assert text_of(told, f"/dev/fd/{out}") == "from a command"
    os.close(out)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs /proc")
def test_a_file_that_fails_while_it_is_read_is_refused(told: Told) -> None:
    with pytest.raises(UsageError, match="/proc/self/mem cannot be read: Input/output error"):
        read(told, "/proc/self/mem")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, told: Told) -> None:
    (tmp_path / "secret").write_text("text")
    (tmp_path / "secret").chmod(0)
    with pytest.raises(UsageError, match="secret cannot be read: Permission denied"):
        read(told, tmp_path / "secret")


def test_a_file_without_measure_is_not_read_to_its_end(tmp_path: Path, told: Told) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.write(b"text")
        file.seek(MAX_TEXT)
        file.write(b"\n" * 10)
    with pytest.raises(InputTooLong, match="large is more than 16 MiB"):
        read(told, tmp_path / "large")
    half = "word " * (MAX_TEXT // 8)
    (tmp_path / "half").write_text(half)
    with pytest.raises(InputTooLong, match="what -f names is more than 16 MiB"):
        read(told, tmp_path / "half", tmp_path / "half")


# -- directories --------------------------------------------------------------------------------------------------


def tree(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_directory_is_read_in_order_without_what_nobody_reads(tmp_path: Path, told: Told) -> None:
    for name in (
        *("b.txt", "a/z.py", "a/b.py", "c.html~", ".hidden", ".git/config", "node_modules/x.js", "app.min.js"),
        *("package-lock.json", "venv/pyvenv.cfg", "venv/lib.py", "target/CACHEDIR.TAG", "target/out.txt"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "a/photo.jpg").write_bytes(b"\xff\xd8\xff\0\0")
    (tmp_path / "a/empty").touch()
    found = read(told, tmp_path)
    assert [each.name.removeprefix(f"{tmp_path}/") for each in found] == ["a/b.py", "a/z.py", "b.txt"]
    assert told.said == [
        f"{tmp_path}: 3 files were read; left out: 1 binary, 1 empty, 2 hidden, 6 made by a tool (-v names them)"
    ]
    assert f"left out: {tmp_path}/a/photo.jpg (binary)" in told.detailed
    assert joined(found) == joined(read(told, tmp_path)), "the same text every time"


def test_gitignore_counts(tmp_path: Path, told: Told) -> None:
    (tmp_path / ".git").mkdir()
    tree(tmp_path, **{"build/x": "x", "src__build__y": "y", "src__a.log": "a", "src__keep.log": "k", "src__n.txt": "n"})
    (tmp_path / ".gitignore").write_text("# comment\n/build/\n*.log\n!keep.log\n")
    (tmp_path / "src/.gitignore").write_text("n.*\n")
    names = [each.name.removeprefix(f"{tmp_path}/") for each in read(told, tmp_path)]
    assert names == ["src/build/y", "src/keep.log"]
    assert [each.name for each in read(told, tmp_path / "src")] == [
        f"{tmp_path}/src/build/y",
        f"{tmp_path}/src/keep.log",
    ]


@pytest.mark.parametrize(
    ("pattern", "path", "is_directory", "is_left_out"),
    [
        ("*.o", "deep/er/x.o", False, True),
        ("/x.o", "deep/x.o", False, False),
        ("doc/*.txt", "doc/a.txt", False, True),
        ("doc/*.txt", "doc/b/a.txt", False, False),
        ("doc/**/a.txt", "doc/a.txt", False, True),
        ("doc/**/a.txt", "doc/b/c/a.txt", False, True),
        ("**/logs", "a/b/logs", True, True),
        ("abc/**", "abc/d/e", False, True),
        ("tmp/", "tmp", False, False),
        ("tmp/", "a/tmp", True, True),
        ("file[0-9].txt", "file7.txt", False, True),
        ("file[!0-9].txt", "file7.txt", False, False),
        (r"\#odd", "#odd", False, True),
        ("a?c", "abc", False, True),
        ("a?c", "a/c", False, False),
        ("[", "[", False, True),
    ],
)
def test_patterns_mean_what_they_mean_to_git(
    pattern: str, path: str, is_directory: bool, is_left_out: bool, tmp_path: Path
) -> None:
    (tmp_path / ".gitignore").write_text(pattern + "\n")
    rules = Rules().within(tmp_path)
    assert rules.leave_out(tmp_path / path, is_directory=is_directory) is is_left_out


@pytest.mark.parametrize(
    ("pattern", "path"),
    [("*a" * 30 + "b", "a" * 200), ("**/a/" * 20 + "x", "a/" * 100 + "y"), ("**/*a*/" * 9 + "x", "aa/" * 60 + "y")],
)
def test_a_pattern_of_many_stars_takes_no_time(pattern: str, path: str, tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text(pattern + "\n")
    assert not Rules().within(tmp_path).leave_out(tmp_path / path, is_directory=False)


@settings(max_examples=300, deadline=None)
@given(st.text("ab*/", min_size=1, max_size=9), st.text("ab/", min_size=1, max_size=7))
def test_stars_fit_whatever_trying_all_ways_would(glob: str, path: str) -> None:
    assume("***" not in glob and "//" not in glob and not glob.endswith("/"))
    every = re.compile(r"/\*\*\Z|\*\*/|\*+|.").sub(
        lambda match: {"/**": "/.*", "**/": "(?:.*/)?"}.get(match[0], "[^/]*" if match[0][0] == "*" else match[0]), glob
    )
    assume("**/" not in re.sub(r"(^|/)(\*\*/)+", "", glob))
    assert bool(re.fullmatch(ignoring._translated(glob), path)) == bool(re.fullmatch(every, path))


def test_links_in_a_directory_lead_nowhere_so_that_a_loop_ends(tmp_path: Path, told: Told) -> None:
    tree(tmp_path, a__text="text")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "a/same").symlink_to("text")
    (tmp_path / "door").symlink_to("a")
    os.mkfifo(tmp_path / "a/pipe")
    assert [each.text for each in read(told, tmp_path)] == ["text"]
    assert told.said == [f"{tmp_path}: 1 file was read; left out: 3 a link, 1 no file (-v names them)"]
    assert [each.name for each in read(told, tmp_path / "door")] == [f"{tmp_path}/door/text"]


def test_a_directory_of_too_many_files_or_of_none_is_refused(tmp_path: Path, told: Told) -> None:
    with pytest.raises(UsageError, match="there is nothing to read in"):
        read(told, tmp_path)
    for i in range(folder.MAX_FILES + 1):
        (tmp_path / f"{i}.txt").touch()
    with pytest.raises(UsageError, match="holds more than 1,000 files"):
        read(told, tmp_path)


# -- PDF and HTML -------------------------------------------------------------------------------------------------


def test_a_pdf_is_its_pages_text(tmp_path: Path, told: Told) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf("Hello (world)\nsecond line", "Page two"))
    assert text_of(told, tmp_path / "a.pdf") == "Hello (world)\nsecond line\n\nPage two"
    (tmp_path / "partly.pdf").write_bytes(pdf("Text", "", ""))
    assert text_of(told, tmp_path / "partly.pdf") == "Text"
    assert told.said == [f"{tmp_path}/partly.pdf: 2 of its 3 pages have no text"]


def test_a_pdf_that_only_forbids_printing_is_read(tmp_path: Path, told: Told) -> None:
    (tmp_path / "a.pdf").write_bytes(encrypted(pdf("Open to all"), ""))
    assert text_of(told, tmp_path / "a.pdf") == "Open to all"


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (pdf(""), "has no text on its 1 page: they may be scanned"),
        (pdf("", ""), "has no text on its 2 pages"),
        (encrypted(pdf("secret"), "password"), "is encrypted"),
        (encrypted(pdf("secret"), "password", "RC4-128"), "is encrypted"),
        (pdf("text")[:-100], "is damaged"),
        (pdf("text").replace(b"/Pages 2 0 R", b"/Pages 9 0 R"), "is damaged|has no text"),
        (b"%PDF-1.4 and then nothing", "is damaged"),
    ],
)
def test_a_pdf_that_cannot_be_read_says_why(
    raw: bytes, said: str, tmp_path: Path, told: Told, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.pdf").write_bytes(raw)
    with pytest.raises(UsageError, match=f"a.pdf ({said})"):
        read(told, tmp_path / "a.pdf")
    assert capfd.readouterr() == ("", ""), "nothing but our own line"


@given(st.integers(0, 10**6), st.binary(max_size=20))
def test_a_pdf_damaged_anywhere_is_read_or_refused(place: int, junk: bytes) -> None:
    whole = pdf("Some text", "and more")
    at = place % len(whole)
    try:
        from llamacli.documents.pdf import read as read_pdf

        assert read_pdf(whole[:at] + junk + whole[at + len(junk) :], "a.pdf", Told()).kind == "pdf"
    except UsageError as refused:
        assert str(refused).startswith("a.pdf ")


def test_a_page_is_its_main_part(tmp_path: Path, told: Told) -> None:
    from loopback_web import PAGE

    (tmp_path / "a.html").write_text(PAGE)
    text = text_of(told, tmp_path / "a.html")
    assert text.startswith("# Llamas of the Andes\n\nThe llama is a domesticated camelid") and "272 kilograms." in text
    assert not {"Shop", "Copyright", "document.title", "<p>"} & set(text.replace("(", " ").split())
    (tmp_path / "a.htm").write_text("<p>Hello <b>world</b>, ça va?</p>", "utf-8")
    assert text_of(told, tmp_path / "a.htm") == "Hello world, ça va?"
    (tmp_path / "b.htm").write_bytes('<meta charset="windows-1251"><p>Привет</p>'.encode("cp1251"))
    assert text_of(told, tmp_path / "b.htm") == "Привет"
    (tmp_path / "c.html").write_text("<html><body><script>draw()</script></body></html>")
    with pytest.raises(UsageError, match="without text"):
        read(told, tmp_path / "c.html")


def test_what_a_page_begins_with_is_seen_at_once_whatever_comments_stand_before_it() -> None:
    assert page.is_page("\n<?xml version='1.0'?>\n<!-- one --><!-- two -->\n<!DOCTYPE HTML><p>")
    assert not page.is_page("<!-- --> " * 400 + "<p>")
    assert not page.is_page("<p>the text <html>")


def test_a_page_whose_end_would_be_missing_is_refused(tmp_path: Path, told: Told) -> None:
    (tmp_path / "a.html").write_text("<html><body>" + "<ul><li>one more" * 200)
    with pytest.raises(UsageError, match="nested more deeply"):
        read(told, tmp_path / "a.html")


def test_a_large_page_does_not_take_minutes(tmp_path: Path, told: Told) -> None:
    (tmp_path / "a.html").write_text("<html><body>" + "<p>A paragraph with <i>some</i> words.</p>\n" * 30_000)
    began = time.process_time()
    assert text_of(told, tmp_path / "a.html").count("A paragraph with some words.") == 30_000
    assert time.process_time() - began < 10, "trafilatura takes more than a minute for its main part"
    assert "large page" in told.said[0]


# -- the web ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def web() -> Iterator[LoopbackWeb]:
    running = LoopbackWeb()
    yield running
    running.stop()


@pytest.mark.parametrize(
    ("path", "kind", "beginning"),
    [
        ("/page", "html", "# Llamas of the Andes"),
        ("/text", "text", "just a text"),
        ("/bytes", "text", "text of no type"),
        ("/latin", "text", "Grüße, Ñandú"),
        ("/paper", "pdf", "Of paper"),
        ("/packed", "text", "a packed text"),
        ("/packed-twice", "text", "a packed text"),
        ("/moved?token=secret#part", "text", "just a text"),
    ],
)
def test_what_an_address_serves_is_read(path: str, kind: str, beginning: str, web: LoopbackWeb, told: Told) -> None:
    (document,) = read(told, web.url + path)
    assert (document.kind, document.text[: len(beginning)]) == (kind, beginning)
    assert document.name == web.url + path.partition("?")[0] + ("?..." if "?" in path else "")
    assert told.said == []


@pytest.mark.parametrize(
    ("path", "error", "said"),
    [
        ("/gone", RemoteError, "answered 404 Not Found"),
        ("/broken", RemoteError, "answered 500"),
        ("/loop", RemoteError, "in circles"),
        ("/spiral", RemoteError, "in circles, or on more than 10 times"),
        ("/to-file", RemoteError, "sends us to file:///etc/hostname, which is no web address"),
        ("/to-ftp", RemoteError, "sends us to ftp://127.0.0.1:9/x, which is no web address"),
        ("/short", RemoteError, "broke off"),
        ("/image", UsageError, "is image/png: only text"),
        ("/lie", UsageError, "is a PNG image"),
        ("/promise", InputTooLong, "more than 16 MiB"),
        ("/endless", InputTooLong, "more than 16 MiB"),
        ("/bomb", InputTooLong, "more than 16 MiB"),
    ],
)
def test_an_address_that_serves_nothing_good_says_so(
    path: str, error: type[Exception], said: str, web: LoopbackWeb, told: Told
) -> None:
    before = web.n_sent
    with pytest.raises(error, match=said):
        read(told, web.url + path)
    assert web.n_sent - before < 64 << 20, "it was not read to its end"


@pytest.mark.parametrize(
    ("path", "silence", "deadline", "said"),
    [
        ("/silent", 0.3, 60, "nothing came for 0.3 s|has said nothing for 0.3 s"),
        ("/silent", 60, 0.3, "has not come within 0.3 s"),
        ("/drip", 60, 0.3, "has not come within 0.3 s"),
        ("/drip-headers", 60, 0.3, "has not come within 0.3 s"),
    ],
)
def test_a_slow_address_is_mentioned_and_given_up(
    path: str, silence: float, deadline: float, said: str, web: LoopbackWeb, told: Told
) -> None:
    with pytest.raises(RemoteError, match=said):
        fetching.fetch(web.url + path, told, patience=0.1, silence=silence, deadline=deadline)
    assert told.said == [f"waiting for {web.url}{path}"]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://", "is no web address"),
        ("http://[::1", "is no web address"),
        ("http://h:99999/", "is no web address"),
        ("https://h/\x1b[2J\n", r"\\x1b.*is no web address"),
        ("http://me:secret@h:99999/?token=secret", "http://h:99999/ is no web address"),
        ("http://me:sec/secret@h/", "http://h/ is no web address"),
        ("ftp://me:secret@h/a?secret", "ftp://h/a: only files and addresses of http and https"),
        ("http://me:secret@127.0.0.1:9/", r"http://127.0.0.1:9/ must not hold a user name"),
    ],
)
def test_an_address_that_is_none_is_refused_before_anything_is_sent(url: str, said: str, told: Told) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        read(told, url)
    assert "secret" not in str(refused.value)


def test_what_comes_with_a_redirect_is_not_read(web: LoopbackWeb, told: Told) -> None:
    assert text_of(told, web.url + "/fat") == "just a text"
    assert web.n_sent < 64 << 20


def test_a_proxy_s_password_goes_to_the_proxy_alone(
    web: LoopbackWeb, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", web.url.replace("//", "//me:secret@"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert text_of(told, "http://elsewhere.example/") == "just a text"
    proxied, direct = web.headers[-2:]
    assert proxied["Proxy-Authorization"] and direct["Proxy-Authorization"] is None


@pytest.mark.parametrize("codec", ["unicode_escape", "Raw-Unicode-Escape"])
def test_an_encoding_of_python_s_own_is_not_believed(codec: str) -> None:
    text = decoding.decode(b"caf\xe9 \\ud800", "a.txt", codec).text
    assert text == "café \\ud800"


def test_offline_forbids_the_web(web: LoopbackWeb) -> None:
    with pytest.raises(UsageError, match="--offline forbids it"):
        reading.check([web.url + "/text"], is_offline=True)


def test_an_address_in_any_script_is_asked_for(web: LoopbackWeb, told: Told) -> None:
    with pytest.raises(RemoteError):
        read(told, web.url + "/Köln und %C3%A4")
    assert web.asked[-1] == "/K%C3%B6ln%20und%20%C3%A4"


def test_byte_order_marks_are_known(tmp_path: Path) -> None:
    assert not decoding.is_binary(codecs.BOM_UTF16_LE + "a".encode("utf-16-le"))
    assert decoding.is_binary(b"\0\1\2\3")
