"""Models are found again without the network: pulled ones, plain files, and the Hugging Face cache."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from llamacli.errors import ModelError
from llamacli.models import checksum, store
from llamacli.models.notes import Notes
from llamacli.models.store import ModelFile, NotHere, Places, Record

COMMIT, OTHER = "a" * 40, "b" * 40
CHAT = "TheBloke/Llama-2-7B-Chat-GGUF"
CHAT_FILE = "llama-2-7b-chat.Q4_K_M.gguf"


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path / "models", tmp_path / "hub")


def pulled(places: Places, repo_id: str, filename: str, commit: str = COMMIT, content: bytes = b"GGUF") -> Path:
    path = store.target(places.models, repo_id, commit, filename)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    store.write_record(path, Record(repo_id, filename, [commit], len(content), sha256, f"{repo_id}/{filename}"))
    return path


def hub_cached(places: Places, repo_id: str, filename: str, commit: str = COMMIT, content: bytes = b"GGUF") -> Path:
    """As huggingface_hub lays it out."""
    assert places.hub_cache is not None
    repository = places.hub_cache / f"models--{repo_id.replace('/', '--')}"
    blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    path = repository / "snapshots" / commit / filename
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(blob, path.parent))
    return path


def test_nothing_is_here_but_the_bundled_model(places: Places) -> None:
    assert [file.name for file in store.on_this_machine(places)] == ["tiny"]
    with pytest.raises(NotHere, match="llamacli pull 7b-chat downloads it"):
        store.find("7b-chat", places)


def test_a_pulled_model_is_found_by_every_name_that_means_it(places: Places) -> None:
    path = pulled(places, CHAT, CHAT_FILE)
    for name in ("7b-chat", "7b-chat:q4_k_m", CHAT, f"{CHAT}:Q4_K_M", f"{CHAT}/{CHAT_FILE}", f"{CHAT}@{COMMIT}"):
        found = store.find(name, places)
        assert (found.path, found.name, found.revision, found.format) == (path, name, COMMIT, "llama-2")
    for name in ("7b-chat:Q5_K_M", "13b-chat", f"{CHAT}@{OTHER}:Q4_K_M"):
        with pytest.raises(NotHere):
            store.find(name, places)


def test_a_file_in_the_directory_is_found_by_its_published_name(places: Places) -> None:
    places.models.mkdir()
    (places.models / CHAT_FILE).write_bytes(b"GGUF")
    assert store.find("7b-chat", places).path == places.models / CHAT_FILE
    assert [file.name for file in store.on_this_machine(places)] == ["tiny", "7b-chat"]


def test_the_hugging_face_cache_is_read_where_it_is(places: Places) -> None:
    path = hub_cached(places, CHAT, CHAT_FILE)
    found = store.find("7b-chat", places)
    assert (found.path, found.home, found.sha256) == (path, "hub cache", hashlib.sha256(b"GGUF").hexdigest())
    assert store.find(f"{CHAT}@{COMMIT}/{CHAT_FILE}", places).path == path
    assert "7b-chat" in [file.name for file in store.on_this_machine(places)]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "~/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x", "HF_HOME": "/y"}, "/y/hub"),
        ({"HF_HOME": "/y", "HF_HUB_CACHE": "/z"}, "/z"),
    ],
)
def test_the_cache_is_looked_for_where_its_owner_has_it(variables: dict[str, str], expected: str) -> None:
    assert store.hub_cache(variables) == Path(expected).expanduser()


def test_a_file_without_a_record_is_not_a_model(places: Places) -> None:
    path = pulled(places, CHAT, CHAT_FILE)
    record = path.with_name(path.name + ".json")
    for content in ("", "{}", '{"version": 2}', "[]", json.dumps({"version": 1, "repo_id": CHAT})):
        record.write_text(content)
        with pytest.raises(NotHere):
            store.find("7b-chat", places)


def test_the_model_that_was_pulled_last_is_meant_where_no_revision_is_said(places: Places) -> None:
    old, new = pulled(places, "org/m", "m.Q8_0.gguf"), pulled(places, "org/m", "m.Q8_0.gguf", OTHER, b"GGUF2")
    os.utime(old, (1, 1))
    assert store.find("org/m:Q8_0", places).path == new
    assert store.find(f"org/m@{COMMIT}:Q8_0", places).path == old


def test_shards_are_one_model_and_projectors_are_none(places: Places) -> None:
    first = pulled(places, "org/m", "m.Q8_0-00001-of-00002.gguf")
    pulled(places, "org/m", "m.Q8_0-00002-of-00002.gguf", content=b"more")
    pulled(places, "org/m", "mmproj-f16.gguf")
    files = store.on_this_machine(places)
    assert [file.path for file in files[1:]] == [first]
    assert files[1].size == 8


@pytest.mark.parametrize(
    ("filename", "quantization", "is_so"),
    [
        ("llama-2-7b-chat.Q4_K_M.gguf", "Q4_K_M", True),
        ("Llama-2-7b-chat-hf-bf16-q4_k.gguf", "Q4_K", True),
        ("llama.Q4_K_M.gguf", "Q4_K", False),
        ("llama.IQ4_XS.gguf", "Q4_XS", False),
        ("q4_0/llama.Q8_0.gguf", "Q4_0", False),
        ("llama-2-70b-chat.Q8_0.gguf-split-a", "Q8_0", True),
    ],
)
def test_a_quantization_is_a_whole_word_of_the_file_s_name(filename: str, quantization: str, is_so: bool) -> None:
    assert store.has_quantization(filename, quantization) is is_so


# -- checksums ---------------------------------------------------------------------------------------------------


def test_a_file_that_is_not_the_published_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"damaged")
    file = ModelFile("x", path, hashlib.sha256(b"whole").hexdigest(), "pulled")
    with pytest.raises(ModelError, match=r"is damaged.*llamacli rm x, then pull it again"):
        checksum.check(file, Notes(tmp_path / "cache"))
    path.write_bytes(b"whole")
    checksum.check(file, Notes(tmp_path / "cache"))


def test_a_checksum_is_computed_once_for_as_long_as_the_file_stays(tmp_path: Path) -> None:
    path, notes = tmp_path / "x.gguf", Notes(tmp_path / "cache")
    path.write_bytes(b"one")
    first = checksum.sha256(path, notes)
    notes.add(path, sha256="f" * 64)  # what a second look would not find
    assert checksum.sha256(path, notes) == "f" * 64
    path.write_bytes(b"another")
    assert checksum.sha256(path, notes) == hashlib.sha256(b"another").hexdigest() != first


def test_a_cache_that_cannot_be_used_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"one")
    (tmp_path / "cache").write_text("a file where a directory should be")
    notes = Notes(tmp_path / "cache")
    notes.use(path)
    assert checksum.sha256(path, notes) == hashlib.sha256(b"one").hexdigest()
    assert notes.last_used(path) is None


def test_the_bundled_model_says_how_to_mend_it(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"x")
    with pytest.raises(ModelError, match="install llamacli again"):
        checksum.check(replace(store.tiny(), path=path), None)
