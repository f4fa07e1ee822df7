"""From settings to a running engine: which file, will it fit, where it computes, with how many threads.

Every choice is recorded with its reason, for `--json` and `-v`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamacli import machine, stored_prefixes
from llamacli.config import PREFIXES, Settings
from llamacli.engine import memory
from llamacli.engine.bindings import VERSION
from llamacli.errors import ModelError, ResourceError, UsageError
from llamacli.gguf import Header, read_model
from llamacli.machine import Gpu
from llamacli.models import checksum
from llamacli.models.notes import Notes
from llamacli.models.store import ModelFile
from llamacli.prompt import Message, Prompt, PromptBuilder

if TYPE_CHECKING:
    from llamacli.engine.devices import Device
    from llamacli.engine.draft_model import DraftModel
    from llamacli.engine.engine import Engine
    from llamacli.engine.llama import LlamaWeights
    from llamacli.engine.prefixes import Prefixes
    from llamacli.engine.protocol import Recipe
    from llamacli.engine.speculation import Speculation
    from llamacli.engine.worker import Workshop

FALLBACK_CONTEXT = 4096  # tokens, for a file that does not say what it was trained with
FIRST_ANSWER = 256  # cells put by for an answer of unknown length; the cache grows when they are used up
MAX_BATCH = 512  # rows of a step: more costs memory and gains nothing on a CPU
MIN_BATCH = 32
DRAFT_CONTEXTS = 4
MAX_GUESSED = 24  # rows of a step for guessed tokens, all sequences together
STEP_SECONDS = 0.25  # what the streams of others wait for a long prompt
MAX_SERVED = 128  # slots of a server: llama.cpp has 256 in all, and half of them hold kept prefixes
MIN_SERVED = 256  # tokens of a prompt that a server keeps on the disk: many a server sees a new short one each second
MIN_PREFIXES = 8  # finished answers that a server keeps in the cache, for the next turn of a conversation
GPU_BUILD = (
    "rebuild the bindings for it: CMAKE_ARGS=-DGGML_{backend}=on "
    "pip install --force-reinstall --no-cache-dir llama-cpp-python=={version}"
)
BACKENDS = {"nvidia": "CUDA", "amd": "HIP", "intel": "VULKAN", "apple": "METAL"}

Notice = Callable[[str], None]  # one line for the user, on stderr


@dataclass(frozen=True, slots=True)
class Choice:
    """A setting that was chosen for this machine and this job."""

    value: object
    why: str


@dataclass(frozen=True, slots=True)
class Draft:
    """The smaller model that is to write ahead."""

    file: ModelFile
    header: Header


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
    weights: LlamaWeights | None = None
    draft: Draft | None = None
    speculation: Speculation | None = None

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
    launch = Launch(file, header, settings, _limit(header, settings, notice), notes)
    if draft is not None:
        launch.draft = Draft(draft, _of_one_vocabulary(read_model(draft.path), header))
    return launch


def _of_one_vocabulary(draft: Header, header: Header) -> Header:
    if draft.vocabulary != header.vocabulary:
        raise ModelError(
            f"{draft.path.name} cannot write ahead for {header.path.name}: its vocabulary is another one. "
            "Choose a --draft-model of the same family"
        )
    return draft


def load(launch: Launch, notice: Notice) -> LlamaWeights:
    """Load the weights. Takes from 50 ms (mapped, in the page cache) to many seconds.

    Raises ResourceError when they cannot fit, ModelError with llama.cpp's own reason, or UsageError where a GPU is
    required in vain.
    """
    from llamacli.engine.devices import gpu_devices
    from llamacli.engine.llama import LlamaWeights, LoadOptions

    checksum.check(launch.file, launch.notes)
    layers = place(launch, gpu_devices(), machine.gpus(), notice)
    launch.max_cells = _max_cells(launch, layers)
    # Rewriting the weights for this CPU makes decoding faster, but costs seconds of loading: wrong for one answer.
    launch.choices["repack"] = Choice(False, "a single answer: loading would take longer than it saves")
    launch.weights = LlamaWeights(launch.file.path, LoadOptions(gpu_layers=layers, repack=False))
    return launch.weights


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
    n_batch = min(max(MIN_BATCH, n_prompt), MAX_BATCH)
    threads, why = _threads(launch.settings)
    launch.choices |= {
        "threads": Choice(threads, why),
        "context_start": Choice(n_cells, f"{n_prompt} tokens of prompt and {n_answer} for the answer; grows"),
        "batch": Choice(n_batch, f"{n_prompt} tokens of prompt"),
        "kv_type": Choice(launch.settings.kv_type, "--kv-type"),
    }
    speculation = _speculation(launch, n_slots=1, learns=False)
    kv = launch.settings.kv_type
    options = ContextOptions(
        n_cells=n_cells,
        n_batch=n_batch,
        threads=threads,
        threads_batch=threads,
        type_k=kv,
        type_v=kv,
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


def _speculation(launch: Launch, *, n_slots: int, learns: bool, is_alike: bool = False) -> Speculation | None:
    """What guesses tokens, if anything is to.

    learns     from the time that steps take, for answers that need not be repeatable
    is_alike   an answer is the same to the last bit whatever is computed beside it
    """
    if launch.settings.no_speculation or is_alike:
        why = "an answer must not depend on its company" if is_alike else "--no-speculation"
        launch.choices["speculation"] = Choice("off", why)
        return None
    from llamacli.engine.speculation import ON_CPU, ON_GPU, Speculation, StepCosts

    names, why = "prompt lookup", "guesses from the text so far"
    draft_model = None
    if launch.draft is not None:
        draft_model = _draft_model(launch, launch.draft, n_slots)
        names, why = "prompt lookup, draft model", f"{why} and from {launch.draft.file.name}"
    launch.choices["speculation"] = Choice(names, f"{why}; steps are timed" if learns else why)
    costs = StepCosts(ON_CPU if launch.device == "CPU" else ON_GPU, learns=learns)
    launch.speculation = Speculation(costs, draft_model)
    return launch.speculation


def _draft_model(launch: Launch, draft: Draft, n_slots: int) -> DraftModel:
    from llamacli.engine.draft_model import DraftModel
    from llamacli.engine.llama import ContextOptions, LlamaModel, LlamaWeights, LoadOptions

    checksum.check(draft.file, launch.notes)
    layers = 0 if launch.device == "CPU" else -1
    threads, _ = _threads(launch.settings)
    options = ContextOptions(
        n_cells=_draft_cells(launch, draft, n_slots),
        n_slots=n_slots,
        n_batch=MAX_BATCH,
        threads=threads,
        threads_batch=threads,
    )
    model = LlamaModel(LlamaWeights(draft.file.path, LoadOptions(gpu_layers=layers)), options)
    # Both read all their weights for a token: that is what a step of one row takes.
    cost = draft.header.weight_bytes / launch.header.weight_bytes
    return DraftModel(model, cost=cost, n_limit=draft.header.context_length)


def _draft_cells(launch: Launch, draft: Draft, n_slots: int) -> int:
    """A few full contexts: who finds none does without guesses."""
    limit = min(launch.n_limit, draft.header.context_length or launch.n_limit)
    return -(-limit * min(n_slots, DRAFT_CONTEXTS) // memory.CELLS) * memory.CELLS


def _draft_bytes(launch: Launch, n_slots: int) -> int:
    """What the smaller model takes of the machine's memory."""
    if launch.draft is None:
        return 0
    n_cells = _draft_cells(launch, launch.draft, n_slots)
    return memory.plan(launch.draft.header, n_cells, n_ubatch=MAX_BATCH, n_outputs=n_slots).host.total


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What a server wants of its engine beside the settings.

    slots          sequences that are computed at once
    repack         rewrite the weights for this CPU; None: where that makes many sequences faster, and memory has room
    is_alike       an answer is the same to the last bit whatever was asked before it: no prefix of another one is used,
                   and no step is cut by the clock
    contexts       full contexts that the cache has cells for; None: one for each slot
    prefixes       finished answers that are kept in it; None: as many as slots, 8 at least
    step_seconds   what the streams of others wait for a long prompt; None: as long as it takes
    """

    slots: int = 4
    repack: bool | None = None
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

    embedder = Embedder(launch.weights, limit=engine.n_limit, threads=_threads(launch.settings)[0])
    return Workshop(engine, encode, facts, embedder, recall)


def serve(launch: Launch, options: ServeOptions, notice: Notice, *, usable: int) -> Engine:
    """Load the weights and make an engine for many sequences at once. Raises as load() does."""
    from llamacli.engine.devices import gpu_devices
    from llamacli.engine.engine import Engine
    from llamacli.engine.llama import ContextOptions, LlamaModel, LlamaWeights, LoadOptions

    checksum.check(launch.file, launch.notes)
    layers = place(launch, gpu_devices(), machine.gpus(), notice)
    draft_bytes = _draft_bytes(launch, options.slots)
    usable -= draft_bytes
    prefixes = max(MIN_PREFIXES, options.slots) if options.prefixes is None else options.prefixes
    n_slots = options.slots + prefixes
    _check(launch, layers, MAX_BATCH, n_slots, usable, draft_bytes)
    n_cells = _served_cells(launch, options.contexts or options.slots, n_slots, layers, usable, notice)
    repack, why = _repack(launch, options, n_cells, n_slots, layers, usable)
    threads, why_threads = _threads(launch.settings)
    step_seconds = None if options.is_alike else options.step_seconds
    launch.choices |= {
        "slots": Choice(options.slots, f"sequences at once; {n_slots - options.slots} finished ones are kept beside"),
        "repack": Choice(repack, why),
        "threads": Choice(threads, why_threads),
        "batch": Choice(MAX_BATCH, _why_batch(step_seconds)),
        "kv_type": Choice(launch.settings.kv_type, "--kv-type"),
    }
    launch.weights = LlamaWeights(launch.file.path, LoadOptions(gpu_layers=layers, repack=repack))
    speculation = _speculation(launch, n_slots=options.slots, learns=True, is_alike=options.is_alike)
    launch.choices["rewritten"] = Choice(launch.weights.is_rewritten, "weights in this CPU's order round otherwise")
    context = ContextOptions(
        n_cells=n_cells,
        n_slots=n_slots,
        n_batch=MAX_BATCH,
        threads=threads,
        threads_batch=threads,
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


def _why_batch(step_seconds: float | None) -> str:
    return "nobody waits for a stream" if step_seconds is None else f"prompts get {step_seconds:g} s of a step"


def _served_cells(launch: Launch, contexts: int, n_slots: int, layers: int, usable: int, notice: Notice) -> int:
    """Cells of the cache: a full context for each slot, or what memory allows. It is shared, so that need not hurt."""
    header, limit, kv = launch.header, launch.n_limit, launch.settings.kv_type
    wanted = -(-limit * contexts // memory.CELLS) * memory.CELLS
    n_cells = memory.largest_context(
        header,
        usable,
        wanted,
        n_ubatch=MAX_BATCH,
        gpu_layers=layers,
        n_outputs=n_slots + MAX_GUESSED,
        type_k=kv,
        type_v=kv,
    )
    n_cells = max(n_cells, memory.CELLS)
    room = f"{usable / 2**30:.1f} GiB of memory can be used"
    why = f"{contexts} x {limit:,} tokens" if n_cells >= wanted else f"{room}; {contexts} x {limit:,} tokens need more"
    launch.choices["cells"] = Choice(n_cells, why)
    if n_cells < limit:
        notice(f"a sequence can hold {n_cells:,} tokens instead of {limit:,}: {room}")
        launch.choices["context_limit"] = Choice(n_cells, room)
        launch.n_limit = n_cells
    return n_cells


def _repack(
    launch: Launch, options: ServeOptions, n_cells: int, n_slots: int, layers: int, usable: int
) -> tuple[bool, str]:
    """Whether to rewrite the weights, and why.

    llama.cpp reads most formats faster in an order of its own. For batches of K- and I-quants it has kernels that take
    them as they are in the file, and rewriting switches those off: prompts took twice as long then, on two CPU cores.
    """
    if options.repack is not None:
        return options.repack, "as set"
    kind = launch.header.main_type
    if kind.endswith("_K") or (kind.startswith("IQ") and kind != "IQ4_NL"):
        return False, f"batches are computed faster from {kind} as it is in the file"
    # While it loads, a repacked model is in memory twice: as it is in the file, and as the CPU likes it.
    host = _plan(launch, n_cells, layers, MAX_BATCH, n_slots).host
    if host.total + host.weights > usable:
        return False, f"a second copy of the weights does not fit: {usable / 2**30:.1f} GiB of memory can be used"
    return True, "a server loads once; memory holds a second copy of the weights"


def _plan(launch: Launch, n_cells: int, layers: int, n_batch: int, n_slots: int) -> memory.MemoryPlan:
    kv = launch.settings.kv_type
    return memory.plan(
        launch.header,
        n_cells,
        n_ubatch=n_batch,
        gpu_layers=layers,
        n_outputs=n_slots + MAX_GUESSED,
        type_k=kv,
        type_v=kv,
    )


def _check(launch: Launch, layers: int, n_batch: int, n_slots: int, usable: int, draft_bytes: int) -> None:
    """Raises ResourceError where not even a short context fits into what the smaller model leaves; says whose fault."""
    smallest = _plan(launch, min(launch.n_limit, memory.CELLS), layers, n_batch, n_slots)
    memory.check(smallest, usable + draft_bytes)
    if launch.draft is not None and smallest.host.total > usable:
        room = (usable + draft_bytes - smallest.host.total) / 2**30
        raise ResourceError(
            f"{launch.draft.file.name} needs {draft_bytes / 2**30:.1f} GiB of memory to write ahead; beside "
            f"{launch.file.name} there is room for {room:.1f}. Choose a smaller --draft-model, or do without"
        )


def _threads(settings: Settings) -> tuple[int, str]:
    if settings.threads:
        return settings.threads, "as set"
    cores = machine.usable_cores()
    limit = "" if cores.cgroup_limit is None else f", CPU time of {cores.cgroup_limit:g}"
    return cores.threads, f"{cores.physical} cores{limit}"


def _max_cells(launch: Launch, layers: int) -> int:
    """How far the KV cache may grow: to the limit, or as far as memory goes."""
    header, limit, kv = launch.header, launch.n_limit, launch.settings.kv_type
    draft_bytes = _draft_bytes(launch, 1)
    usable = machine.memory().usable - draft_bytes
    _check(launch, layers, MIN_BATCH, 1, usable, draft_bytes)
    blocks = -(-limit // memory.CELLS)
    largest = memory.largest_context(
        header,
        usable,
        blocks * memory.CELLS,
        gpu_layers=layers,
        n_outputs=1 + MAX_GUESSED,
        type_k=kv,
        type_v=kv,
    )
    if largest < limit:
        launch.choices["context_limit"] = Choice(largest, f"{usable / 2**30:.1f} GiB of memory can be used")
    return min(max(largest, memory.CELLS), limit)


def _limit(header: Header, settings: Settings, notice: Notice) -> int:
    """Tokens that a sequence may hold: the wish, or what the model was trained with."""
    trained = header.context_length or FALLBACK_CONTEXT
    if settings.ctx_size is None:
        return trained
    if settings.ctx_size > trained:
        notice(f"--ctx-size {settings.ctx_size:,} is more than this model was trained with; using {trained:,}")
    return min(settings.ctx_size, trained)


def place(launch: Launch, devices: Sequence[Device], present: Sequence[Gpu], notice: Notice) -> int:
    """How many layers go to a GPU; -1 is all of them.

    devices   GPUs that this build of llama.cpp can use
    present   GPUs that the operating system shows

    Raises UsageError where a GPU is required and cannot be had.
    """
    if not devices:
        return _without_gpu(launch, present, notice)
    wish = launch.settings.gpu_layers
    n_all = launch.header.n_layer + 1  # the output layer counts as one
    layers, why = _layers(launch, devices, wish, n_all)
    launch.choices["gpu_layers"] = Choice(layers, why)
    if layers == 0:
        if launch.settings.require_gpu:
            raise UsageError(f"--require-gpu, but no layer can be placed on the GPU: {why}")
        if wish != "0":
            notice(f"running on the CPU: {why}, not enough for one layer")
        return 0
    launch.device = f"{devices[0].description or devices[0].name} ({layers}/{n_all} layers)"
    if layers < n_all and wish == "auto":
        notice(f"{layers} of {n_all} layers on the GPU, the others on the CPU: {why}")
    return -1 if layers == n_all else layers


def _layers(launch: Launch, devices: Sequence[Device], wish: str, n_all: int) -> tuple[int, str]:
    if wish == "all":
        return n_all, "as set"
    if wish != "auto":
        return min(int(wish), n_all), "as set"
    free, kv = sum(device.free for device in devices), launch.settings.kv_type
    layers = memory.gpu_layers_that_fit(launch.header, free, launch.n_limit, type_k=kv, type_v=kv)
    return min(layers, n_all), f"{free / 2**30:.1f} GiB of GPU memory are free"


def _without_gpu(launch: Launch, present: Sequence[Gpu], notice: Notice) -> int:
    settings = launch.settings
    launch.choices["gpu_layers"] = Choice(0, "this build of llama.cpp has no GPU backend")
    backend = BACKENDS.get(present[0].vendor, "VULKAN") if present else "CUDA"
    remedy = GPU_BUILD.format(backend=backend, version=VERSION)
    if settings.require_gpu:
        raise UsageError(f"--require-gpu, but this build of llama.cpp can use none: {remedy}")
    if present and settings.gpu_layers != "0":
        notice(f"running on the CPU: {present[0].name} is here, but this build of llama.cpp cannot use it; {remedy}")
    elif settings.gpu_layers not in ("auto", "0"):
        notice(f"running on the CPU: --gpu-layers {settings.gpu_layers} has no effect, this build has no GPU backend")
    return 0
