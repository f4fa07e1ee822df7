"""Answers on a screen: whatever the screen and however they come, what is there at last is the answer, set once."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import pyte
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamacli.commands.rendering import Setting, complete, markdown

PARTS = [
    "A paragraph with **bold** words and `code` in it, which is longer than one line of a small screen by far.",
    "1. one\n2. two\n\n3. three, after a blank line\n\n   and a paragraph of it",
    "- a\n- b\n  - c",
    "```python\ndef f():\n\n    return 1 < 2\n```",
    "| name | age |\n|---|---|\n| Ada | 36 |",
    "# Title",
    "#include <stdio.h> is not HTML, nor is <b>this</b>\nand a line stays a line",
    "wide: 日本語の文字 and 👩‍👩‍👧 ❤️ é",
]


class Window:
    """A screen of its own, on which everything that scrolls away is remembered."""

    def __init__(self, columns: int = 40, lines: int = 12) -> None:
        self.size = os.terminal_size((columns, lines))
        self.screen = pyte.HistoryScreen(columns, lines, history=5000, ratio=0.5)
        self._stream = pyte.Stream(self.screen)
        self.writes: list[str] = []

    def write(self, text: str) -> None:
        self.writes.append(text)
        self._stream.feed(text.replace("\n", "\r\n"))

    @property
    def lines(self) -> list[str]:
        above = ["".join(line[x].data for x in range(self.size.columns)) for line in self.screen.history.top]
        shown = [line.rstrip() for line in [*above, *self.screen.display]]
        while shown and not shown[-1]:
            shown.pop()
        return shown

    def answer(self, pieces: Sequence[str], *, sets: bool = True) -> list[str]:
        setting = Setting(self.write, lambda: self.size, sets=sets)
        for piece in pieces:
            setting.feed(piece)
        setting.end()
        return self.lines


def set_alone(parts: Sequence[str], columns: int) -> list[str]:
    """What a window of endless height shows of them."""
    window = Window(columns, 400)
    window.write("\n\n".join(markdown(part, columns) for part in parts))
    return window.lines


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=5),
    st.integers(20, 100),
    st.lists(st.integers(1, 30), min_size=1, max_size=20),
)
def test_what_is_on_the_screen_at_last_is_each_part_set_once(parts: list[str], columns: int, cuts: list[int]) -> None:
    text, pieces, i = "\n\n".join(parts), [], 0
    while text:
        n = cuts[i % len(cuts)]
        pieces.append(text[:n])
        text, i = text[n:], i + 1
    whole = "\n\n".join(parts)
    expected, rest = [], whole
    while (end := complete(rest + "\n")) and end < len(rest):
        expected.append(rest[:end].strip("\n"))
        rest = rest[end:]
    assert Window(columns, 120).answer(pieces) == set_alone([*expected, rest.strip("\n")], columns)


def test_an_answer_longer_than_the_screen_is_set_from_its_beginning() -> None:
    window = Window(40, 8)
    text = "\n\n".join(f"Paragraph **{i}** has a few words." for i in range(30))
    shown = window.answer([text[i : i + 3] for i in range(0, len(text), 3)])
    assert shown == [line for i in range(30) for line in (f"Paragraph {i} has a few words.", "")][:-1]


def test_a_part_longer_than_the_screen_stays_as_it_came_and_nothing_is_lost() -> None:
    window = Window(40, 6)
    code = "```\n" + "\n".join(f"line {i}" for i in range(20)) + "\n```"
    shown = window.answer(["Before **it**.\n\n", *code.splitlines(keepends=True), "\n\nAfter **it**."])
    assert shown == ["Before it.", "", *code.splitlines(), "", "After it."]


def test_a_window_that_changes_its_size_in_the_middle_costs_only_the_setting_of_that_part() -> None:
    window = Window(40, 12)
    setting = Setting(window.write, lambda: window.size, sets=True)
    setting.feed("One **two**")
    window.size = os.terminal_size((60, 12))
    window.screen.resize(12, 60)
    setting.feed(" three.\n\nFour **five**.")
    setting.end()
    assert window.lines == ["One **two** three.", "", "Four five."]


def test_nothing_that_was_said_is_left_out() -> None:
    said = [
        "<b>bold</b>",
        "<!-- note -->",
        "![a picture](http://x.y/z.png)",
        "[1]: http://x.y",
        "[bold]",
        ":smile:",
        "1 < 2",
        "&lt;b&gt;",
    ]
    for text in said:
        shown = " ".join(Window(70, 20).answer([f"So {text} it is"]))
        assert all(word in shown for word in re.findall(r"[\w:/.<]+", text)), shown


@pytest.mark.parametrize("sets", [True, False])
def test_control_characters_of_the_model_do_nothing(sets: bool) -> None:
    window = Window(60, 12)
    shown = window.answer(["Hello\x1b[2J\x1b]0;title\x07 \x9b31m\u202e there\r!\n\n`\x1b[1m`"], sets=sets)
    assert shown[0] == "Hello^[[2J^[]0;title^G <U+009B>31m<U+202E> there^M!"
    shown = Window(60, 12).answer(["&#x202e;a&rlm;b&#13;c&#27;d"], sets=sets)
    assert shown == ["&#x202e;a&rlm;b&#13;c&#27;d"]
    written = "".join(window.writes)
    assert "\x1b]" not in written and "\x1b[2J" not in written and "\x9b" not in written


def test_without_setting_a_text_stays_as_it_came_but_for_the_windows_edge() -> None:
    window = Window(20, 12)
    assert window.answer(["**bold** and more words\n\n\n- x\n"], sets=False) == [
        "**bold** and more w",
        "ords",
        "",
        "",
        "- x",
    ]
    assert not any("\x1b" in text for text in window.writes)


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("a\nb\n", 0),
        ("a\nb\n\n", 5),
        ("```\na\n\nb\n", 0),
        ("````\n```\n\n````\n\n", 16),
        ("- a\n\n", 0),
        ("- a\n\n- b\n\n", 0),
        ("- a\n\n  more\n\nb\n", 13),
        ("- a\n\nnext", 0),
        ("- a\n\nnext\n", 5),
    ],
)
def test_a_part_is_complete_when_nothing_can_belong_to_it_any_more(text: str, end: int) -> None:
    assert complete(text) == end
