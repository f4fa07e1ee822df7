"""How many tokens a context holds: by the wish, by what the model was trained with, and by memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llamacli import guessing, machine
from llamacli.choices import Choice
from llamacli.config import Settings
from llamacli.engine import memory
from llamacli.gguf import Header

if TYPE_CHECKING:
    from llamacli.launch import Launch, Notice


def served_cells(launch: Launch, contexts: int, n_slots: int, layers: int, usable: int, notice: Notice) -> int:
    """Cells of the cache: a full context for each slot, or what memory allows. It is shared, so that need not hurt."""
    header, limit, kv = launch.header, launch.n_limit, launch.settings.kv_type
    smallest = memory.plan(
        header,
        min(limit, memory.CELLS),
        n_ubatch=memory.MAX_ROWS,
        gpu_layers=layers,
        n_outputs=n_slots + memory.MAX_GUESSED,
        type_k=kv,
        type_v=kv,
    )
    guessing.check(launch, smallest, usable)
    wanted = -(-limit * contexts // memory.CELLS) * memory.CELLS
    n_cells = memory.largest_context(
        header,
        usable,
        wanted,
        n_ubatch=memory.MAX_ROWS,
        gpu_layers=layers,
        n_outputs=n_slots + memory.MAX_GUESSED,
        type_k=kv,
        type_v=kv,
        n_devices=launch.n_devices,
        device_bytes=launch.device_bytes,
    )
    n_cells = max(n_cells, memory.CELLS)
    room = f"{usable / 2**30:.1f} GiB of memory can be used"
    if launch.device_bytes is not None:
        room += f", and {launch.device_bytes / 2**30:.1f} GiB of GPU memory"
    why = f"{contexts} x {limit:,} tokens" if n_cells >= wanted else f"{room}; {contexts} x {limit:,} tokens need more"
    launch.choices["cells"] = Choice(n_cells, why)
    if n_cells < limit:
        notice(f"a sequence can hold {n_cells:,} tokens instead of {limit:,}: {room}")
        launch.choices["context_limit"] = Choice(n_cells, room)
        launch.n_limit = n_cells
    return n_cells


def max_cells(launch: Launch, layers: int) -> int:
    """How far the KV cache may grow: to the limit, or as far as memory goes."""
    header, limit, kv = launch.header, launch.n_limit, launch.settings.kv_type
    usable = machine.memory().usable - guessing.claim(launch, 1)
    smallest = memory.plan(
        header,
        min(limit, memory.CELLS),
        n_ubatch=memory.MIN_ROWS,
        gpu_layers=layers,
        n_outputs=1 + memory.MAX_GUESSED,
        type_k=kv,
        type_v=kv,
    )
    guessing.check(launch, smallest, usable)
    blocks = -(-limit // memory.CELLS)
    largest = memory.largest_context(
        header,
        usable,
        blocks * memory.CELLS,
        gpu_layers=layers,
        n_outputs=1 + memory.MAX_GUESSED,
        type_k=kv,
        type_v=kv,
    )
    if largest < limit:
        launch.choices["context_limit"] = Choice(largest, f"{usable / 2**30:.1f} GiB of memory can be used")
    return min(max(largest, memory.CELLS), limit)


def limit(header: Header, settings: Settings, notice: Notice) -> int:
    """Tokens that a sequence may hold: the wish, or what the model was trained with."""
    trained = header.usual_context
    if settings.ctx_size is None:
        return trained
    if settings.ctx_size > trained:
        notice(f"--ctx-size {settings.ctx_size:,} is more than this model was trained with; using {trained:,}")
    return min(settings.ctx_size, trained)
