"""What a user calls a model, taken apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamacli.errors import ModelError
from llamacli.models.reference import parse

CHAT = "TheBloke/Llama-2-7B-Chat-GGUF"


@pytest.mark.parametrize("text", ["7b-chat", "7B-Chat", "llama2", "7b-chat:Q4_K_M", "7b-chat:q4_k_m"])
def test_a_name_means_one_published_file(text: str) -> None:
    found = parse(text)
    assert (found.repo_id, found.filename, found.quantization) == (CHAT, "llama-2-7b-chat.Q4_K_M.gguf", "Q4_K_M")
    assert found.revision and found.is_llama2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/repo", ("org/repo", None, None, None)),
        ("org/repo:q5_k_m", ("org/repo", None, None, "Q5_K_M")),
        ("org/repo@v1.0:Q8_0", ("org/repo", "v1.0", None, "Q8_0")),
        ("org/repo@main", ("org/repo", "main", None, None)),
        ("org/my-repo.v2/file.gguf", ("org/my-repo.v2", None, "file.gguf", None)),
        ("org/repo/sub/dir/file.gguf", ("org/repo", None, "sub/dir/file.gguf", None)),
        (f"org/repo@{'a' * 40}/file.gguf", ("org/repo", "a" * 40, "file.gguf", None)),
    ],
)
def test_a_repository_with_what_is_wanted_of_it(text: str, expected: tuple[str | None, ...]) -> None:
    found = parse(text)
    assert (found.repo_id, found.revision, found.filename, found.quantization) == expected


@pytest.mark.parametrize(
    "text",
    ["model.gguf", "./model.gguf", "../x/model.gguf", "/models/x.gguf", "~/x.gguf", "models/x.gguf", "/a/b/c.gguf"],
)
def test_a_path_is_a_path(text: str) -> None:
    assert parse(text).path == Path(text).expanduser()


def test_a_file_that_is_there_is_meant_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "repo").mkdir(parents=True)
    (tmp_path / "org" / "repo" / "file.gguf").touch()
    (tmp_path / "strange").touch()
    assert parse("org/repo/file.gguf").path == Path("org/repo/file.gguf")
    assert parse("strange").path == Path("strange")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("7b-caht", "did you mean 7b-chat"),
        ("13b-chta:Q8_0", "did you mean 13b-chat"),
        ("lama2", "did you mean 7b-chat"),
        ("xyzzy", "there are 7b-chat, 7b,"),
        ("7b-chat:", "after the colon comes a quantization"),
        ("7b-chat:../x", "after the colon comes a quantization"),
        ("7b-chat:Q4 K", "after the colon comes a quantization"),
        ("~no-such-user/x.gguf", "no such user"),
    ],
)
def test_what_nothing_is_called_names_the_nearest(text: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        parse(text)


@pytest.mark.parametrize(("text", "is_so"), [("org/Llama2-7B-GGUF", True), ("org/mistral-GGUF", False)])
def test_llama_2_is_known_by_its_repository_s_name(text: str, is_so: bool) -> None:
    assert parse(text).is_llama2 is is_so
