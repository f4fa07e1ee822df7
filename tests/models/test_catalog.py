"""The catalogue is whole and agrees with itself."""

from __future__ import annotations

import re

import pytest

from llamacli.models import store
from llamacli.models.catalog import Entry, catalog
from llamacli.prompt import Format

ENTRIES = catalog().entries
# From the smallest to the largest file of one model.
ORDER = ["Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0"]


def test_the_models_that_everybody_asks_for_are_there() -> None:
    sizes = [f"{size}{kind}" for size in ("7b", "13b", "70b") for kind in ("-chat", "")]
    code = [f"codellama-{size}-instruct" for size in ("7b", "13b", "34b")]
    assert {*sizes, *code, "llava-1.5-7b", "tiny"} <= set(catalog().names)


def test_no_name_means_two_models() -> None:
    names = [name for entry in ENTRIES for name in (entry.name, *entry.aliases)]
    assert len(names) == len(set(names)) and all(name == name.lower() for name in names)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_an_entry_is_well_formed(entry: Entry) -> None:
    assert entry.repo_id is None or re.fullmatch(r"[\w.-]+/[\w.-]+", entry.repo_id)
    assert entry.file.count("{}") == 1 and entry.filename("Q8_0").endswith(".gguf")
    assert entry.revision is None or re.fullmatch("[0-9a-f]{40}", entry.revision)
    assert entry.format in set(Format)
    assert entry.licence.url.startswith("https://")
    assert catalog().default(entry) in entry.quantizations
    for name, quantization in entry.quantizations.items():
        assert quantization.name == name and name in ORDER
        assert quantization.sha256 is None or re.fullmatch("[0-9a-f]{64}", quantization.sha256)
        assert quantization.about and quantization.ram == quantization.about + 2_500_000_000


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_more_bits_make_a_larger_file(entry: Entry) -> None:
    sizes = [entry.quantizations[name].about or 0 for name in ORDER if name in entry.quantizations]
    assert sizes == sorted(sizes)
    bits = [8 * size / entry.parameters for size in sizes]
    assert all(2.5 < each < 10 for each in bits)


def test_no_two_files_have_one_checksum() -> None:
    sums = [q.sha256 for entry in ENTRIES for q in entry.quantizations.values() if q.sha256]
    assert len(sums) == len(set(sums))


def test_the_published_figures_are_the_known_ones() -> None:
    default = catalog().find("llama2")
    assert default is not None and default.name == "7b-chat"
    quantization = default.quantizations["Q4_K_M"]
    assert quantization.size == 4_081_004_224
    assert quantization.sha256 == "08a5566d61d7cb6b420c3e4387a39e0078e1f2fe5f055f3a03887385304d4bfa"
    assert default.filename("Q4_K_M") == "llama-2-7b-chat.Q4_K_M.gguf"
    split = catalog().find("70B-Chat")
    assert split is not None and split.quantizations["Q8_0"].parts == ("-split-a", "-split-b")


def test_the_bundled_model_is_the_one_in_the_catalogue() -> None:
    tiny = catalog().find("tiny")
    assert tiny is not None and tiny.repo_id is None
    assert tiny.filename("Q8_0") == store.bundled().name
    assert tiny.quantizations["Q8_0"].size == store.bundled().stat().st_size
    assert tiny.quantizations["Q8_0"].sha256 == store.TINY_SHA256
