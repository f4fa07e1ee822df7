"""What is chosen for a launch: by what `tune` has measured, or else by rules of thumb. Each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamacli import machine
from llamacli.config import TUNING
from llamacli.engine import memory

if TYPE_CHECKING:
    from llamacli.launch import Launch, ServeOptions
    from llamacli.tuning import OneAnswer


@dataclass(frozen=True, slots=True)
class Choice:
    """A setting that was chosen for this machine and this job."""

    value: object
    why: str


def recall(launch: Launch) -> None:
    """Look for what was measured of this model on this machine. Where nothing ever was, nothing is imported for it."""
    if launch.notes is None:
        return
    why, directory = "nothing was measured", launch.notes.cache / TUNING
    try:
        is_there = directory.is_dir()
    except OSError as error:
        is_there, why = False, f"{directory} cannot be read: {error.strerror}"
    if is_there:
        from llamacli import tuning_file

        found = tuning_file.find(directory, launch.file, launch.settings.kv_type, launch.layers, launch.notes)
        launch.rates, why = found.rates, found.why
    if launch.rates is None:
        why += f"; {how_to_tune(launch)} measures this machine in about a minute"
    launch.choices["tuned"] = Choice(launch.rates is not None, why)


def how_to_tune(launch: Launch) -> str:
    kv = launch.settings.kv_type
    return f"llamacli tune -m {launch.file.name}" + (f" --kv-type {kv}" if kv != "f16" else "")


def pays_for_one(launch: Launch, job: OneAnswer, refused: str = "") -> bool:
    """Choose by the rates, for a program that writes one answer. Returns whether rewritten weights pay.

    refused   why rewritten weights could not be loaded, where that was tried
    """
    from llamacli.tuning import choose

    assert launch.rates is not None
    n_cells = min(job.n_prompt + job.n_answer, launch.n_limit)
    forbidden = refused or _no_second_copy(launch, n_cells, 1, machine.memory().usable)
    launch.chosen = choose(launch.rates, job, forbidden)
    launch.choices["repack"] = Choice(launch.chosen.repack, launch.chosen.why["repack"])
    return launch.chosen.repack


def pays_for_many(
    launch: Launch, options: ServeOptions, n_cells: int, n_slots: int, usable: int, refused: str = ""
) -> tuple[bool, str]:
    """Whether to rewrite the weights, and why. `refused` is as above.

    llama.cpp reads most formats faster in an order of its own. For batches of K- and I-quants it has kernels that take
    them as they are in the file, and rewriting switches those off: prompts took twice as long then, on two CPU cores.
    """
    forbidden = refused or _no_second_copy(launch, n_cells, n_slots, usable)
    if launch.rates is not None:
        from llamacli.tuning import ManyAnswers, choose

        launch.chosen = choose(launch.rates, ManyAnswers(options.slots), forbidden, options.repack)
        return launch.chosen.repack, launch.chosen.why["repack"]
    if options.repack is not None:
        return options.repack, "as set"
    if options.guess is not None:
        return options.guess, "prompts and full batches of most files are computed faster from the file's own order"
    kind = launch.header.main_type
    if kind.endswith("_K") or (kind.startswith("IQ") and kind != "IQ4_NL"):
        return False, f"batches are computed faster from {kind} as it is in the file"
    if forbidden:
        return False, forbidden
    return True, "a server loads once; memory holds a second copy of the weights"


def _no_second_copy(launch: Launch, n_cells: int, n_slots: int, usable: int) -> str:
    """Why memory has no room for rewritten weights; empty where it has.

    While it loads, a repacked model is in memory twice: as it is in the file, and as the CPU likes it.
    """
    kv = launch.settings.kv_type
    host = memory.plan(
        launch.header,
        n_cells,
        n_ubatch=memory.MAX_ROWS,
        gpu_layers=launch.layers,
        n_outputs=n_slots + memory.MAX_GUESSED,
        type_k=kv,
        type_v=kv,
    ).host
    if host.total + host.weights <= usable:
        return ""
    return f"a second copy of the weights does not fit: {usable / 2**30:.1f} GiB of memory can be used"


def threads(launch: Launch) -> tuple[int, int]:
    """Threads for a row alone and for many, noted with their reasons."""
    if launch.settings.threads:
        n, why = launch.settings.threads, "as set"
    elif launch.chosen is not None:
        chosen = launch.chosen
        launch.choices["threads"] = Choice(chosen.threads, chosen.why["threads"])
        launch.choices["threads_batch"] = Choice(chosen.threads_batch, chosen.why["threads_batch"])
        return chosen.threads, chosen.threads_batch
    else:
        cores = machine.usable_cores()
        limit = "" if cores.cgroup_limit is None else f", CPU time of {cores.cgroup_limit:g}"
        n, why = cores.threads, f"{cores.physical} cores{limit}"
    launch.choices["threads"] = Choice(n, why)
    return n, n
