"""From settings to a running engine: weights, context, slots, each with what was chosen for this machine and job.

Every choice is recorded with its reason, for `--json` and `-v`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamacli import choices, guessing, machine, sizing, stored_prefixes
from llamacli.choices import Choice as Choice
from llamacli.config import PREFIXES, Settings
from llamacli.engine import memory
from llamacli.errors import ModelError, ResourceError, UsageError
from llamacli.gguf import Header, read_model
from llamacli.models import checksum
from llamacli.models.notes import Notes
from llamacli.models.store import ModelFile
from llamacli.placing import place
from llamacli.prompt import Message, Prompt, PromptBuilder

if TYPE_CHECKING:
    from llamacli.engine.embedding import Embedder
    from llamacli.engine.engine import Engine
    from llamacli.engine.llama import LlamaWeights
    from llamacli.engine.prefixes import Prefixes
    from llamacli.engine.protocol import Recipe
    from llamacli.engine.speculation import Speculation
    from llamacli.engine.worker import Workshop
    from llamacli.tuning import Chosen, OneAnswer, Rates

FIRST_ANSWER = 256  # cells put by for an answer of unknown length; the cache grows when they are used up
MAX_BATCH = memory.MAX_ROWS
MAX_GUESSED = memory.MAX_GUESSED
MIN_BATCH = memory.MIN_ROWS
STEP_SECONDS = 0.25  # what the streams of others wait for a long prompt
MAX_SERVED = 128  # slots of a server: llama.cpp has 256 in all, and half of them hold kept prefixes
MIN_SERVED = 256  # tokens of a prompt that a server keeps on the disk: many a server sees a new short one each second
MIN_PREFIXES = 8  # finished answers that a server keeps in the cache, for the next turn of a conversation
NOT_REWRITTEN = "rewritten weights cannot be loaded"
EMBEDDED_TOGETHER = 16  # texts of a command line, where nobody waits for one of them

Notice = Callable[[str], None]  # one line for the user, on stderr


@dataclass(slots=True)
class Launch:
    """A model on its way to an engine. Built by `prepare`, loaded by `load`, started by `start`."""

    file: ModelFile
    header: Header
    settings: Settings
    n_limit: int
    notes: Notes | None = None
    choices: dict[str, Choice] = field(default_factory=dict)
    max_cells: int = 0  # how far the KV cache may grow; set by `load`
    device: str = "CPU"
    layers: int = 0  # on a GPU; -1 is all of them
    n_devices: int = 1
    device_bytes: int | None = None  # what the GPUs have for us, where we chose what goes there; set by `place`
    weights: LlamaWeights | None = None
    draft: guessing.Draft | None = None
    draft_bytes: int = 0  # of memory that it takes; set by guessing.claim()
    speculation: Speculation | None = None
    rates: Rates | None = None  # what `tune` has measured of this model on this machine
    chosen: Chosen | None = None  # by those rates
    flash_attention: bool | None = None  # as llama.cpp likes

    @property
    def guesses(self) -> dict[str, int] | None:
        """Tokens computed on the chance that they come next, and those that did; None where nothing is guessed."""
        if self.speculation is None:
            return None
        return {"guessed": self.speculation.n_guessed, "right": self.speculation.n_right}


def prepare(
    settings: Settings,
    file: ModelFile,
    notice: Notice,
    notes: Notes | None = None,
    draft: ModelFile | None = None,
) -> Launch:
    """Read the model's header. Nothing native is loaded. Raises ModelError.

    notes   what is known of the file, its checksum above all; without them it is computed anew
    draft   a smaller model that is to write ahead
    """
    header = read_model(file.path)
    launch = Launch(file, header, settings, sizing.limit(header, settings, notice), notes)
    if draft is not None:
        launch.draft = guessing.draft_of(draft, header)
    return launch


def load(launch: Launch, notice: Notice, expected: OneAnswer | None = None) -> LlamaWeights:
    """Load the weights. Takes from 50 ms (mapped, in the page cache) to many seconds.

    expected   what is to be read and written with them, where that is known already; else see settle()

    Raises ResourceError when they cannot fit, ModelError with llama.cpp's own reason, or UsageError where a GPU is
    required in vain.
    """
    from llamacli.engine.devices import gpu_devices
    from llamacli.engine.llama import LlamaWeights, LoadOptions

    checksum.check(launch.file, launch.notes)
    layers = launch.layers = place(launch, gpu_devices(), machine.gpus(), notice)
    launch.max_cells = sizing.max_cells(launch, layers)
    choices.recall(launch)
    launch.flash_attention = launch.rates.flash_attention if launch.rates else None
    # Rewriting the weights for this CPU makes decoding faster, but costs seconds of loading: wrong for one answer.
    launch.choices["repack"] = Choice(False, "a single answer: loading would take longer than it saves")
    if expected is not None and launch.rates is not None:
        launch.weights = _rewritten(launch, expected)
    if launch.weights is None:
        launch.weights = LlamaWeights(launch.file.path, LoadOptions(gpu_layers=layers))
    return launch.weights


def _rewritten(launch: Launch, job: OneAnswer) -> LlamaWeights | None:
    """Rewritten weights where they pay; None where they do not, or where there turns out to be no memory for them."""
    from llamacli.engine.llama import LlamaWeights, LoadOptions

    if not choices.pays_for_one(launch, job):
        return None
    try:
        return LlamaWeights(launch.file.path, LoadOptions(gpu_layers=launch.layers, repack=True))
    except ModelError as error:  # a limit of which the system's free memory says nothing: ulimit -v
        choices.pays_for_one(launch, job, f"{NOT_REWRITTEN}: {error}")
        return None


def settle(
    launch: Launch,
    n_prompt: int,
    n_answer: int | None = None,
    held: Callable[[bool], int] = lambda rewritten: 0,
) -> None:
    """Choose for this prompt by what was measured. Where rewritten weights pay, load those: that takes seconds.

    n_answer   tokens that will be written; None: as many as the settings allow, or what is usual
    held       tokens of the prompt that are on the disk, computed with rewritten weights or with those of the file

    The vocabulary of the weights that were loaded before stays in use, and they stay mapped.
    """
    if launch.rates is None:
        return
    from llamacli.tuning import USUAL_ANSWER, OneAnswer

    n_answer = min(n_answer or launch.settings.max_tokens or USUAL_ANSWER, launch.n_limit - n_prompt)
    cached = (held(False), held(True)) if launch.rates.rewritten else (0, 0)
    launch.weights = _rewritten(launch, OneAnswer(n_prompt, max(1, n_answer), cached)) or launch.weights


def start(launch: Launch, n_prompt: int, prefixes: Prefixes | None = None) -> Engine:
    """An engine for one sequence, with a context as large as this prompt needs and room to grow.

    Raises ResourceError when memory holds the model but not this prompt.
    """
    from llamacli.engine.engine import Engine
    from llamacli.engine.llama import ContextOptions, LlamaModel

    assert launch.weights is not None
    if n_prompt >= launch.max_cells < launch.n_limit:
        raise ResourceError(
            f"the prompt is {n_prompt:,} tokens; memory has room for a context of {launch.max_cells:,}. "
            "Shorten it, free some memory, or choose a smaller model"
        )
    # Filling the cache with zeros takes 0.25 s for every gigabyte: start small, most answers are short.
    n_answer = min(launch.settings.max_tokens or FIRST_ANSWER, FIRST_ANSWER)
    n_cells = min(n_prompt + n_answer, launch.max_cells)
    if launch.rates is not None and launch.chosen is None:
        from llamacli.tuning import OneAnswer, choose

        launch.chosen = choose(launch.rates, OneAnswer(n_prompt), repack=False)
    n_batch, why_batch = max(MIN_BATCH, n_prompt), f"{n_prompt} tokens of prompt"
    if launch.chosen is not None:
        launch.choices["flash_attention"] = Choice(launch.flash_attention, launch.chosen.why["flash_attention"])
        if n_batch > launch.chosen.batch:
            n_batch, why_batch = launch.chosen.batch, launch.chosen.why["batch"]
    n_batch = min(n_batch, MAX_BATCH)
    threads, threads_batch = choices.threads(launch)
    launch.choices |= {
        "context_start": Choice(n_cells, f"{n_prompt} tokens of prompt and {n_answer} for the answer; grows"),
        "batch": Choice(n_batch, why_batch),
        "kv_type": Choice(launch.settings.kv_type, "--kv-type"),
    }
    speculation = guessing.speculation(launch, n_slots=1, learns=False)
    kv = launch.settings.kv_type
    options = ContextOptions(
        n_cells=n_cells,
        n_batch=n_batch,
        threads=threads,
        threads_batch=threads_batch,
        type_k=kv,
        type_v=kv,
        flash_attention=launch.flash_attention,
        n_guessed=0 if speculation is None else MAX_GUESSED,
    )
    return Engine(
        LlamaModel(launch.weights, options),
        n_limit=launch.n_limit,
        max_cells=launch.max_cells,
        step_seconds=None,
        prefixes=prefixes,
        speculation=speculation,
    )


def embedder(launch: Launch, notice: Notice) -> Embedder:
    """Load the weights for texts that are to become vectors, short ones several at once. Raises as load() does."""
    from llamacli.engine.embedding import Embedder

    weights = load(launch, notice)
    _, threads = choices.threads(launch)
    return Embedder(weights, limit=launch.n_limit, threads=threads, together=EMBEDDED_TOGETHER)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What a server wants of its engine beside the settings.

    slots          sequences that are computed at once
    repack         rewrite the weights for this CPU; None: where that makes many sequences faster, and memory has room
    guess          the same where nothing was measured; None: by the file's number format, and if memory has room
    is_alike       an answer is the same to the last bit whatever was asked before it: no prefix of another one is used,
                   and no step is cut by the clock
    contexts       full contexts that the cache has cells for; None: one for each slot
    prefixes       finished answers that are kept in it; None: as many as slots, 8 at least
    step_seconds   what the streams of others wait for a long prompt; None: as long as it takes
    """

    slots: int = 4
    repack: bool | None = None
    guess: bool | None = None
    is_alike: bool = False
    contexts: int | None = None
    prefixes: int | None = None
    step_seconds: float | None = STEP_SECONDS

    def __post_init__(self) -> None:
        if not 1 <= self.slots <= MAX_SERVED:
            raise UsageError(f"--slots must be between 1 and {MAX_SERVED}, not {self.slots}")


def serving(
    settings: Settings,
    file: ModelFile,
    cache: Path | None,
    options: ServeOptions,
    draft: ModelFile | None = None,
) -> Recipe:
    """How a child process makes the engine of a server. See supervisor.EngineProcess.

    cache   where what is known of the file is noted; None keeps no notes
    draft   a smaller model that is to write ahead

    Raises ModelError for a file that is no model, before any process is started.
    """
    from llamacli.engine.protocol import Recipe

    prepare(settings, file, lambda _: None, None, draft)  # the child will say what there is to say
    return Recipe(
        "llamacli.launch:workshop",
        {
            "settings": asdict(settings),
            "file": _as_plain(file),
            "draft": _as_plain(draft) if draft else None,
            "cache": str(cache) if cache else None,
            "options": asdict(options),
        },
    )


def _as_plain(file: ModelFile) -> dict[str, Any]:
    return asdict(file) | {"path": str(file.path)}


def _from_plain(values: dict[str, Any]) -> ModelFile:
    return ModelFile(**values | {"path": Path(values["path"])})


def workshop(
    settings: dict[str, Any],
    file: dict[str, Any],
    draft: dict[str, Any] | None,
    cache: str | None,
    options: dict[str, Any],
    notice: Notice,
    *,
    usable: int | None = None,
) -> Workshop:
    """In the child: load the model and make the engine of a server. Raises as load() does.

    usable   bytes of memory; by default as many as the machine has to give
    """
    from llamacli.engine.embedding import Embedder
    from llamacli.engine.protocol import ModelFacts
    from llamacli.engine.recall import Recall
    from llamacli.engine.worker import Workshop

    wanted = ServeOptions(**options)
    model = _from_plain(file)
    notes = Notes(Path(cache)) if cache else None
    launch = prepare(Settings(**settings), model, notice, notes, _from_plain(draft) if draft else None)
    engine = serve(launch, wanted, notice, usable=machine.memory().usable if usable is None else usable)
    assert launch.weights is not None
    if cache and not wanted.is_alike:
        engine.prefixes = stored_prefixes.of(launch, Path(cache, PREFIXES), least=MIN_SERVED)
    recall = Recall(0) if wanted.is_alike else Recall()
    builder = PromptBuilder(launch.header, launch.weights.vocabulary, known=model.format, recall=recall)
    facts = ModelFacts(
        name=launch.file.name,
        path=str(launch.file.path),
        n_vocab=engine.model.n_vocab,
        n_limit=engine.n_limit,
        n_cells=engine.model.n_cells,
        slots=wanted.slots,
        format=str(builder.format),
        device=launch.device,
        choices={name: (choice.value, choice.why) for name, choice in launch.choices.items()},
    )

    def encode(question: str | list[Message]) -> Prompt:
        return builder.continued(question) if isinstance(question, str) else builder.build(question)

    embedder = Embedder(launch.weights, limit=engine.n_limit, threads=choices.threads(launch)[1])
    return Workshop(engine, encode, facts, embedder, recall)


def serve(launch: Launch, options: ServeOptions, notice: Notice, *, usable: int) -> Engine:
    """Load the weights and make an engine for many sequences at once. Raises as load() does."""
    from llamacli.engine.devices import gpu_devices
    from llamacli.engine.engine import Engine
    from llamacli.engine.llama import ContextOptions, LlamaModel, LlamaWeights, LoadOptions

    checksum.check(launch.file, launch.notes)
    layers = launch.layers = place(launch, gpu_devices(), machine.gpus(), notice)
    if not options.is_alike:  # what was measured would make it another answer on another day
        choices.recall(launch)
    usable -= guessing.claim(launch, options.slots)
    prefixes = max(MIN_PREFIXES, options.slots) if options.prefixes is None else options.prefixes
    n_slots = options.slots + prefixes
    n_cells = sizing.served_cells(launch, options.contexts or options.slots, n_slots, layers, usable, notice)
    repack, why = choices.pays_for_many(launch, options, n_cells, n_slots, usable)
    try:
        launch.weights = LlamaWeights(launch.file.path, LoadOptions(gpu_layers=layers, repack=repack))
    except ModelError as error:
        if not repack or options.repack:
            raise
        refused = f"{NOT_REWRITTEN}: {error}"
        repack, why = choices.pays_for_many(launch, replace(options, guess=None), n_cells, n_slots, usable, refused)
        launch.weights = LlamaWeights(launch.file.path, LoadOptions(gpu_layers=layers))
    threads, threads_batch = choices.threads(launch)
    n_batch = launch.chosen.batch if launch.chosen else MAX_BATCH
    step_seconds = None if options.is_alike else options.step_seconds
    launch.choices |= {
        "slots": Choice(options.slots, f"sequences at once; {n_slots - options.slots} finished ones are kept beside"),
        "repack": Choice(repack, why),
        "batch": Choice(n_batch, _why_batch(launch, step_seconds)),
        "kv_type": Choice(launch.settings.kv_type, "--kv-type"),
    }
    speculation = guessing.speculation(launch, n_slots=options.slots, learns=True, is_alike=options.is_alike)
    launch.choices["rewritten"] = Choice(launch.weights.is_rewritten, "weights in this CPU's order round otherwise")
    context = ContextOptions(
        n_cells=n_cells,
        n_slots=n_slots,
        n_batch=n_batch,
        threads=threads,
        threads_batch=threads_batch,
        type_k=launch.settings.kv_type,
        type_v=launch.settings.kv_type,
        n_guessed=0 if speculation is None else MAX_GUESSED,
    )
    model = LlamaModel(launch.weights, context)
    return Engine(
        model,
        n_limit=launch.n_limit,
        step_seconds=step_seconds,
        max_running=options.slots,
        keeps=not options.is_alike,
        speculation=speculation,
    )


def _why_batch(launch: Launch, step_seconds: float | None) -> str:
    why = "nobody waits for a stream" if step_seconds is None else f"prompts get {step_seconds:g} s of a step"
    return why if launch.chosen is None else f"{launch.chosen.why['batch']}; {why}"
