"""`embed`: vectors for pipes. That they are the server's own numbers is tested beside the server's."""

from __future__ import annotations

import json
import math

import pytest
from conftest import Run

TEXTS = ["Llama 2 is a language model", "3 + 4 = 7", "word " * 300, "Llama 2 is a model of language"]


def numbers(line: str) -> list[float]:
    found: list[float] = json.loads(line)
    return found


def product(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def test_a_text_becomes_one_array_on_one_line(llamacli: Run) -> None:
    done = llamacli("embed", TEXTS[0])
    assert (done.stderr, done.returncode, done.stdout.count("\n")) == ("", 0, 1)
    vector = numbers(done.stdout)
    assert len(vector) == 160 and math.isclose(product(vector, vector), 1, rel_tol=1e-5)
    assert (
        llamacli("embed", input=TEXTS[0] + "\n").stdout == llamacli("embed", "-", input=TEXTS[0]).stdout == done.stdout
    )


def test_each_line_becomes_a_vector_that_company_changes_in_its_last_digits_only(llamacli: Run) -> None:
    done = llamacli("embed", "--lines", input="\r\n".join(TEXTS) + "\r\n")
    vectors = [numbers(line) for line in done.stdout.splitlines()]
    assert len(vectors) == len(TEXTS)
    for text, vector in zip(TEXTS, vectors, strict=True):
        assert vector == pytest.approx(numbers(llamacli("embed", text).stdout), abs=1e-4)
    assert product(vectors[0], vectors[3]) > product(vectors[0], vectors[1])


def test_a_vector_that_is_not_normalized_points_the_same_way(llamacli: Run) -> None:
    unit, mean = (numbers(llamacli("embed", *each, TEXTS[0]).stdout) for each in ((), ("--no-normalize",)))
    length = math.sqrt(product(mean, mean))
    assert length > 2
    assert [x / length for x in mean] == pytest.approx(unit, abs=1e-6)


def test_json_counts_dimensions_and_tokens(llamacli: Run) -> None:
    record = json.loads(llamacli("embed", "--json", "--lines", input="a llama\nanother").stdout)
    n = sum(int(llamacli("tokenize", "--count", text).stdout) + 1 for text in ("a llama", "another"))  # and BOS
    assert record["usage"] == {"prompt_tokens": n, "total_tokens": n}
    assert (record["model"], record["dimensions"], record["normalized"]) == ("tiny", 160, True)
    assert [len(vector) for vector in record["embeddings"]] == [160, 160]


@pytest.mark.parametrize(
    ("arguments", "text", "code", "said"),
    [
        (["--lines"], f"short\n{'word ' * 1100}\n", 4, "line 2 is 1,102 tokens; an embedding is made of 1,024 at most"),
        ([], "word " * 60_000, 4, "the text is far longer than the 1,024 tokens"),
        (["--lines"], "a\n\nb\n", 2, "line 2 is empty"),
        ([], " \n", 2, "the text is empty"),
        (["--lines", "a text"], "", 2, "--lines is for text on stdin"),
        (["-q", "-v", "a text"], "", 2, "contradict each other"),
        (["--gpu-layers", "0", "--require-gpu", "a text"], "", 2, "contradict each other"),
    ],
)
def test_what_cannot_be_embedded_is_one_line_and_no_vector(
    arguments: list[str], text: str, code: int, said: str, llamacli: Run
) -> None:
    done = llamacli("embed", *arguments, input=text)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1)
    assert said in done.stderr


@pytest.mark.parametrize("arguments", [[], ["--lines"], [" "]])
def test_nothing_is_found_to_be_nothing_before_a_model_is_looked_for(arguments: list[str], llamacli: Run) -> None:
    done = llamacli("embed", "-m", "./none.gguf", *arguments, input="")
    assert (done.returncode, done.stdout) == (2, "") and " is empty" in done.stderr
