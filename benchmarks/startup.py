"""What a process takes: until it ends (--version, --help), until the first byte of an answer, and of memory.

    python -m benchmarks.startup --model tiny
    LLAMA_CPP_BIN=llama.cpp/build/bin python -m benchmarks.startup --model 7b

Every side gets the same prompt of 14 tokens without a template, draws the likeliest tokens, reads nothing from
stdin and writes into a pipe. The model file is in the page cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from benchmarks import one_liner
from benchmarks.inputs import Inputs, inputs, parser
from benchmarks.sideways import Row, against_each, at_most_more, at_most_times, in_turn, load_average, report
from llamacli.engine import memory
from llamacli.gguf import read_header

PROMPT = "[INST] Tell me about llama2 [/INST]"
N_TOKENS = "4"
MORE_THAN_PYTHON = at_most_more(120, "ms")

PYTHON = "python -c pass"
LLAMACLI = "llamacli"
LLAMA = "llama_cpp.Llama at its defaults"
COMPLETION = "llama-completion at its defaults"
COMPLETION_AT_BEST = "llama-completion --no-repack --no-warmup -c 512"
# For a 7B file. With a model of a few megabytes only the programs themselves are compared.
GOALS = {LLAMA: at_most_times(0.35), COMPLETION: at_most_times(0.12), COMPLETION_AT_BEST: at_most_times(1.1)}

Environment = Mapping[str, str]


def main() -> None:
    given = inputs(parser(__doc__).parse_args())
    load = load_average()
    with TemporaryDirectory() as empty:
        environment = _environment(empty)
        rows = _until_the_end(given.n_runs, environment) + _until_the_first_byte(given, environment)
        rows.append(_memory(given, environment))
    print(report(f"{given.subject}, process start", rows, given.n_runs, load))


def _environment(config_home: str) -> Environment:
    """Ours without the user's own settings, which would change what is measured; logs go elsewhere.

    What Python has compiled is kept, as pip does it when it installs.
    """
    ours = ("LLAMACLI_", "PYTHONDONTWRITEBYTECODE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {"XDG_CONFIG_HOME": config_home, "XDG_DATA_HOME": config_home}


def _until_the_end(n_runs: int, environment: Environment) -> list[Row]:
    commands = {
        PYTHON: [sys.executable, "-c", "pass"],
        "llamacli --version": [llamacli(), "--version"],
        "llamacli --help": [llamacli(), "--help"],
    }
    sides = {name: partial(whole_process, command, environment) for name, command in commands.items()}
    times = in_turn(sides, n_runs)
    return [
        Row(what=f"{name}, against {PYTHON}", unit="ms", ours=ours, other=times[PYTHON], goal=MORE_THAN_PYTHON)
        for name, ours in times.items()
        if name != PYTHON
    ]


def _until_the_first_byte(given: Inputs, environment: Environment) -> list[Row]:
    sides: dict[str, Callable[[], float]] = {
        name: partial(first_answer_byte, command, environment, given.path)
        for name, command in _one_liners(given).items()
    }
    times = in_turn(sides, given.n_runs)
    return against_each(LLAMACLI, "first answer byte", "ms", times, GOALS if given.is_large else {})


def _one_liners(given: Inputs) -> dict[str, list[str]]:
    # Without --no-cache the second run would find the first one's work.
    ours = ["-m", given.reference, "-n", N_TOKENS, "--temperature", "0", "--raw", "--no-cache", PROMPT]
    commands = {
        LLAMACLI: [llamacli(), *ours],
        LLAMA: [sys.executable, one_liner.__file__, str(given.path), PROMPT, N_TOKENS],
    }
    if given.tools:
        completion = [given.tool("llama-completion"), "-m", str(given.path), "-n", N_TOKENS, "--temp", "0"]
        completion += ["-no-cnv", "--no-display-prompt", "-p", PROMPT]
        commands[COMPLETION] = completion
        commands[COMPLETION_AT_BEST] = [*completion, "--no-repack", "--no-warmup", "-c", "512"]
    return commands


def _memory(given: Inputs, environment: Environment) -> Row:
    """The most memory of the one-liner, mapped weights included, beside what the weights and the KV cache make."""
    header = read_header(given.path)
    kv = memory.CELLS * header.kv_bytes_per_token("f16", "f16")  # prompt and answer fit into one block
    peak = peak_bytes(_one_liners(given)[LLAMACLI], environment)
    return Row(
        what="peak memory, against the file, 10 % of it, and its KV cache",
        unit="MiB",
        ours=[peak / 2**20],
        other=[(1.1 * header.file_size + kv) / 2**20],
        goal=at_most_times(1) if given.is_large else None,
    )


# A process begins with the peak of whoever starts it: that is a small one.
_PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_bytes(command: Sequence[str], environment: Environment) -> int:
    """The most that a process has had in memory at once, until its end."""
    measured = [sys.executable, "-c", _PEAK, *command]
    done = subprocess.run(measured, env=environment, stdout=subprocess.PIPE, check=True)
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024)


def whole_process(command: Sequence[str], environment: Environment) -> float:
    """Milliseconds from the start of a process to its end."""
    started = perf_counter()
    subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    return 1000 * (perf_counter() - started)


def first_answer_byte(
    command: Sequence[str], environment: Environment, model: Path, stdin: Path = Path(os.devnull)
) -> float:
    """Milliseconds from the start of a process until a byte of its answer has come through the pipe.

    White space does not count: a first token may be a space alone, which llamacli would hold back.
    """
    _bring_into_page_cache(model)
    answer, elapsed = b"", 0.0
    started = perf_counter()
    with (
        stdin.open("rb") as text,
        subprocess.Popen(
            command,
            bufsize=0,
            env=environment,
            stdin=text,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process,
    ):
        assert process.stdout is not None
        while piece := os.read(process.stdout.fileno(), 4096):
            if not elapsed and piece.strip():
                elapsed = 1000 * (perf_counter() - started)
            answer += piece
    if not elapsed or process.returncode != 0:
        raise SystemExit(f"no answer, exit code {process.returncode}: {' '.join(command)}")
    if PROMPT.encode() in answer:
        raise SystemExit(f"the prompt was echoed, so that the answer's first byte is not known: {' '.join(command)}")
    return elapsed


def _bring_into_page_cache(path: Path) -> None:
    """Repacked weights take as much memory again, and the kernel may have dropped the file for them."""
    block = bytearray(1 << 24)
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


def llamacli() -> str:
    """The program as it was installed beside this Python."""
    path = Path(sysconfig.get_path("scripts"), "llamacli")
    if not path.exists():
        raise SystemExit("llamacli is not installed in this environment: pip install -e .[dev]")
    return str(path)


if __name__ == "__main__":
    main()
