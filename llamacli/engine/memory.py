"""Will it fit? What a model and its context take in memory, told from the header before anything native is loaded.

Weights and KV cache are exact: the tensor table, and a row of keys and of values per layer and cell. The compute
buffer is the peak of ggml's graph allocator. Its formula was fitted to what llama.cpp 0c1e57098 reports (a model
with no_alloc, flash attention on) for Llama shapes from 7 million to 70 billion parameters, micro-batches of 128 to
2,048 tokens and contexts up to 32,768. It is at most 0.4 MiB short of that, and with a quantized cache up to 9 %
over it. For each token of a micro-batch, in f32:
- in the feed-forward part of a layer three rows of n_ff (gate, up, their product) and four of n_embd, beside the
  attention mask (f16, one number per cell of the cache);
- at the output a row of n_vocab for each token whose logits are wanted, and two rows of n_embd.
The larger of the two is the buffer. A CPU also keeps the activations once more in the type of the weights.

Memory-mapped weights are page cache. They count all the same: without room for them every token reads them from
disk again. Repacked weights are a copy, and the kernel may then drop the mapped ones, so they too count once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from llamacli.errors import ResourceError
from llamacli.gguf import Header

MIN_ROWS = 32
MAX_ROWS = 512  # of a step: more costs memory and gains nothing on a CPU
MAX_GUESSED = 24  # rows of a step for guessed tokens, all sequences together
CELLS = 256  # llama.cpp makes the context a multiple of this many tokens
DEVICE_MARGIN = 1 << 30  # left free on a GPU, as by llama.cpp's own fitting (fit_params_target in common.h)
_LIBRARY_BYTES = 16 << 20  # llama.cpp's code, vocabulary and graphs
_F32 = 4

# Bits per weight, rounded up, from the published files of Llama 2 7B and 70B.
_QUANTIZATIONS = {"Q8_0": 8.51, "Q6_K": 6.6, "Q5_K_M": 5.7, "Q4_K_M": 4.9, "Q3_K_M": 4.0, "Q2_K": 3.4}
_SMALLEST_MODEL = 256 << 20  # nothing useful is smaller


@dataclass(frozen=True)
class Share:
    """What lies in one kind of memory, in bytes."""

    weights: int
    kv: int
    compute: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute


@dataclass(frozen=True)
class MemoryPlan:
    """A model, a context, and what they take in the machine's memory (`host`) and on the GPU (`device`).

    `gpu_layers` counts as llama.cpp does, the output first, then the layers from the last to the first; 0 is none,
    -1 is all. `n_outputs` is the number of rows of a batch that may want logits. Of several GPUs each has a compute
    buffer.
    """

    header: Header
    n_ctx: int
    n_ubatch: int = 512
    type_k: str = "f16"
    type_v: str = "f16"
    gpu_layers: int = 0
    n_outputs: int = 1
    n_devices: int = 1

    @property
    def _n_placed(self) -> int:
        """Layers on the device, the output among them."""
        n_all = self.header.n_layer + 1
        return n_all if self.gpu_layers < 0 else min(self.gpu_layers, n_all)

    @property
    def n_cells(self) -> int:
        return max(1, -(-self.n_ctx // CELLS)) * CELLS

    @property
    def n_device_layers(self) -> int:
        """Repeating layers on the device."""
        return max(self._n_placed - 1, 0)

    @property
    def host(self) -> Share:
        n_layers = self.header.n_layer - self.n_device_layers
        if n_layers:
            converted = self._n_tokens * self.header.n_ff * 2
            compute = self._graph_bytes(with_output=not self._n_placed) + converted
        else:
            compute = self._n_tokens * self.header.n_embd * _F32 + self._mask_bytes
        logits = self.n_outputs * self.header.n_vocab * _F32
        weights = self.header.weight_bytes - self._moved_bytes
        return Share(weights, self._kv_bytes(n_layers), compute + logits + _LIBRARY_BYTES)

    @property
    def device(self) -> Share:
        if not self._n_placed:
            return Share(0, 0, 0)
        compute = self._graph_bytes(with_output=True)
        if self.n_device_layers < self.header.n_layer:
            # Prompts are computed on the device throughout; weights that live in host memory visit it.
            compute += max((tensor.n_bytes for tensor in self.header.tensors), default=0)
        weights = self._moved_bytes + self._tied_bytes
        return Share(weights, self._kv_bytes(self.n_device_layers), compute * self.n_devices)

    @property
    def total(self) -> int:
        return self.host.total + self.device.total

    @property
    def _n_tokens(self) -> int:
        """The largest micro-batch, as llama.cpp cuts it to the context."""
        return min(self.n_ubatch, self.n_cells)

    @property
    def _mask_bytes(self) -> int:
        return self._n_tokens * self.n_cells * 2

    def _graph_bytes(self, *, with_output: bool) -> int:
        row = self.header.n_embd * _F32
        layer = self._n_tokens * (3 * self.header.n_ff * _F32 + 4 * row) + self._mask_bytes
        n_rows = min(self.n_outputs, self._n_tokens) if with_output else 0
        return max(layer, n_rows * (self.header.n_vocab * _F32 + row) + self._n_tokens * 2 * row)

    def _kv_bytes(self, n_layers: int) -> int:
        per_layer = self.header.kv_bytes_per_token(self.type_k, self.type_v) // max(1, self.header.n_layer)
        return self.n_cells * per_layer * n_layers

    @property
    def _moved_bytes(self) -> int:
        """Weights that are on the device and no longer in host memory."""
        n_layer = self.header.n_layer
        first = n_layer + 1 - self._n_placed
        return sum(tensor.n_bytes for tensor in self.header.tensors if _place(tensor.name, n_layer) >= first)

    @property
    def _tied_bytes(self) -> int:
        """Where a model has no output matrix the embeddings serve as one, and both memories hold them."""
        sizes = {tensor.name: tensor.n_bytes for tensor in self.header.tensors}
        return 0 if "output.weight" in sizes else sizes.get("token_embd.weight", 0)


def plan(
    header: Header,
    n_ctx: int,
    *,
    n_ubatch: int = 512,
    type_k: str = "f16",
    type_v: str = "f16",
    gpu_layers: int = 0,
    n_outputs: int = 1,
) -> MemoryPlan:
    return MemoryPlan(header, n_ctx, n_ubatch, type_k, type_v, gpu_layers, n_outputs)


def check(plan: MemoryPlan, usable_bytes: int) -> None:
    """Raises ResourceError when the plan's host share is more than `usable_bytes`, and says what would fit."""
    host = plan.host
    if host.total <= usable_bytes:
        return
    raise ResourceError(
        f"{plan.header.path.name} with a context of {plan.n_ctx:,} tokens needs {_at_least(host.total)} of memory "
        f"({_at_least(host.weights)} weights, {_at_least(host.kv)} context, {_at_least(host.compute)} work space), "
        f"{_at_most(usable_bytes)} can be used here. {_what_fits(plan, usable_bytes)}"
    )


def largest_context(
    header: Header,
    usable_bytes: int,
    limit: int,
    *,
    n_ubatch: int = 512,
    type_k: str = "f16",
    type_v: str = "f16",
    gpu_layers: int = 0,
    n_outputs: int = 1,
    n_devices: int = 1,
    device_bytes: int | None = None,
) -> int:
    """The longest context up to `limit` that fits: a multiple of 256, 0 when none does.

    device_bytes   what must hold the device's share; None: it holds whatever comes
    """
    smallest = MemoryPlan(header, CELLS, n_ubatch, type_k, type_v, gpu_layers, n_outputs, n_devices)
    return _largest_context(smallest, usable_bytes, limit, device_bytes)


def device_room(free_bytes: int, n_devices: int = 1) -> int:
    """Bytes that GPUs have for us. A gibibyte of each stays free for what else uses it, on small ones an eighth."""
    return free_bytes - min(DEVICE_MARGIN * n_devices, free_bytes // 8)


def gpu_layers_that_fit(
    header: Header,
    free_device_bytes: int,
    n_ctx: int,
    *,
    n_ubatch: int = 512,
    type_k: str = "f16",
    type_v: str = "f16",
    n_outputs: int = 1,
    n_devices: int = 1,
) -> int:
    """Layers for GPUs with so much free memory together; n_layer + 1 is everything, the output among it."""
    room = device_room(free_device_bytes, n_devices)
    on_host = MemoryPlan(header, n_ctx, n_ubatch, type_k, type_v, 0, n_outputs, n_devices)

    def fits(gpu_layers: int) -> bool:
        return replace(on_host, gpu_layers=gpu_layers).device.total <= room

    everything = header.n_layer + 1
    # Asked first: without weights on the host there is no room needed for their visits.
    return everything if fits(everything) else _last(fits, everything - 1)


def _largest_context(plan: MemoryPlan, usable_bytes: int, limit: int, device_bytes: int | None = None) -> int:
    def fits(blocks: int) -> bool:
        longer = replace(plan, n_ctx=blocks * CELLS)
        return longer.host.total <= usable_bytes and (device_bytes is None or longer.device.total <= device_bytes)

    return _last(fits, limit // CELLS) * CELLS


def _last(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits, 0 when not even 1 does. What fits n also fits n - 1."""
    least = 0
    while least < most:
        middle = (least + most + 1) // 2
        if fits(middle):
            least = middle
        else:
            most = middle - 1
    return least


def _place(name: str, n_layer: int) -> int:
    """The layer a tensor belongs to. The output comes after the last; the embeddings are always on the host."""
    if name.startswith("output"):
        return n_layer
    number = name.removeprefix("blk.").partition(".")[0]
    return int(number) if number.isdecimal() else -1


def _what_fits(plan: MemoryPlan, usable_bytes: int) -> str:
    n_ctx = _largest_context(plan, usable_bytes, plan.n_ctx)
    if n_ctx:
        return f"-c {n_ctx} fits; a smaller quantization or model leaves more room."
    offers = [offer for name, bits in _QUANTIZATIONS.items() if (offer := _offer(plan, usable_bytes, name, bits))]
    if offers:
        comfortable = min(plan.n_ctx, 2048)
        n_ctx, n_bytes, name = next((offer for offer in offers if offer[0] >= comfortable), offers[0])
        return f"Its {name} (about {_at_least(n_bytes)}) fits with -c {n_ctx}."
    shortest = replace(plan, n_ctx=CELLS).host
    room = usable_bytes - (shortest.total - shortest.weights)
    if room < _SMALLEST_MODEL:
        return "Free some memory first."
    return f"Choose a smaller model: up to {_at_most(room)} of weights fit with -c {CELLS}."


def _offer(plan: MemoryPlan, usable_bytes: int, name: str, bits: float) -> tuple[int, int, str] | None:
    """Longest context, size and name of another quantization of the same model, if it is smaller and fits."""
    n_bytes = int(plan.header.n_parameters * bits / 8)
    saved = plan.header.weight_bytes - n_bytes
    if saved <= 0:
        return None
    # Of the weights on a GPU none are saved here.
    saved = saved * plan.host.weights // plan.header.weight_bytes
    n_ctx = _largest_context(plan, usable_bytes + saved, plan.n_ctx)
    return (n_ctx, n_bytes, name) if n_ctx else None


def _at_least(n_bytes: int) -> str:
    return _human(n_bytes, math.ceil)


def _at_most(n_bytes: int) -> str:
    return _human(n_bytes, math.floor)


def _human(n_bytes: int, whole: Callable[[float], int]) -> str:
    """Needs are rounded up and what there is down, so that the two never look equal."""
    if n_bytes >= 1 << 30:
        return f"{whole(n_bytes / (1 << 30) * 10) / 10:,.1f} GiB"
    return f"{whole(n_bytes / (1 << 20)):,} MiB"
