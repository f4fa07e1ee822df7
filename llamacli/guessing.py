"""What guesses tokens for a launch: the text so far, and a smaller model that writes ahead where there is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamacli import choices
from llamacli.choices import Choice
from llamacli.engine import memory
from llamacli.errors import ModelError, ResourceError
from llamacli.gguf import Header, read_model
from llamacli.models import checksum
from llamacli.models.store import ModelFile

if TYPE_CHECKING:
    from llamacli.engine.draft_model import DraftModel
    from llamacli.engine.speculation import Speculation, StepCosts
    from llamacli.launch import Launch

DRAFT_CONTEXTS = 4  # full ones that the smaller model has room for


@dataclass(frozen=True, slots=True)
class Draft:
    """The smaller model that is to write ahead."""

    file: ModelFile
    header: Header


def draft_of(file: ModelFile, header: Header) -> Draft:
    """Read the smaller model's header. Raises ModelError where its vocabulary is not the other model's."""
    own = read_model(file.path)
    if own.vocabulary != header.vocabulary:
        raise ModelError(
            f"{file.path.name} cannot write ahead for {header.path.name}: its vocabulary is another one. "
            "Choose a --draft-model of the same family"
        )
    return Draft(file, own)


def speculation(launch: Launch, *, n_slots: int, learns: bool, is_alike: bool = False) -> Speculation | None:
    """What guesses tokens, if anything is to. The weights are loaded.

    learns     from the time that steps take, for answers that need not be repeatable
    is_alike   an answer is the same to the last bit whatever is computed beside it
    """
    if launch.settings.no_speculation or is_alike:
        why = "an answer must not depend on its company" if is_alike else "--no-speculation"
        launch.choices["speculation"] = Choice("off", why)
        return None
    from llamacli.engine.speculation import Speculation

    names, why = "prompt lookup", "guesses from the text so far"
    draft_model = None
    if launch.draft is not None:
        draft_model = _draft_model(launch, launch.draft, n_slots)
        names, why = "prompt lookup, draft model", f"{why} and from {launch.draft.file.name}"
    launch.choices["speculation"] = Choice(names, f"{why}; steps are timed" if learns else why)
    launch.speculation = Speculation(_costs(launch, learns=learns), draft_model)
    return launch.speculation


def _costs(launch: Launch, *, learns: bool) -> StepCosts:
    """What a step takes by its rows: as `tune` has measured it, or as a rule of thumb."""
    from llamacli.engine.speculation import ON_CPU, ON_GPU, StepCosts

    rates = launch.rates
    if rates is not None and not rates.is_busy:
        is_rewritten = launch.choices["repack"].value is True
        weights = rates.rewritten if is_rewritten and rates.rewritten else rates.stored
        return StepCosts(weights.steps, learns=learns)
    return StepCosts(ON_CPU if launch.device == "CPU" else ON_GPU, learns=learns)


def _draft_model(launch: Launch, draft: Draft, n_slots: int) -> DraftModel:
    from llamacli.engine.draft_model import DraftModel
    from llamacli.engine.llama import ContextOptions, LlamaModel, LlamaWeights, LoadOptions

    checksum.check(draft.file, launch.notes)
    layers = 0 if launch.device == "CPU" else -1
    threads, threads_batch = choices.threads(launch)
    options = ContextOptions(
        n_cells=_draft_cells(launch, draft, n_slots),
        n_slots=n_slots,
        n_batch=memory.MAX_ROWS,
        threads=threads,
        threads_batch=threads_batch,
    )
    model = LlamaModel(LlamaWeights(draft.file.path, LoadOptions(gpu_layers=layers)), options)
    # Both read all their weights for a token: that is what a step of one row takes.
    cost = draft.header.weight_bytes / launch.header.weight_bytes
    return DraftModel(model, cost=cost, n_limit=draft.header.context_length)


def _draft_cells(launch: Launch, draft: Draft, n_slots: int) -> int:
    """A few full contexts: who finds none does without guesses."""
    limit = min(launch.n_limit, draft.header.context_length or launch.n_limit)
    return -(-limit * min(n_slots, DRAFT_CONTEXTS) // memory.CELLS) * memory.CELLS


def claim(launch: Launch, n_slots: int) -> int:
    """Bytes that the smaller model takes of the machine's memory, noted for check()."""
    if launch.draft is not None:
        n_cells = _draft_cells(launch, launch.draft, n_slots)
        plan = memory.plan(launch.draft.header, n_cells, n_ubatch=memory.MAX_ROWS, n_outputs=n_slots)
        launch.draft_bytes = plan.host.total
    return launch.draft_bytes


def check(launch: Launch, smallest: memory.MemoryPlan, usable: int) -> None:
    """Raises ResourceError where not even a short context fits into what the smaller model leaves; says whose fault.

    usable   bytes that it leaves
    """
    memory.check(smallest, usable + launch.draft_bytes)
    if launch.draft is not None and smallest.host.total > usable:
        room = (usable + launch.draft_bytes - smallest.host.total) / 2**30
        raise ResourceError(
            f"{launch.draft.file.name} needs {launch.draft_bytes / 2**30:.1f} GiB of memory to write ahead; beside "
            f"{launch.file.name} there is room for {room:.1f}. Choose a smaller --draft-model, or do without"
        )
