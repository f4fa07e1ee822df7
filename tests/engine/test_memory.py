"""Will it fit? The plan against what llama.cpp itself reports, and the advice against the plan."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacli.engine.memory import check, device_room, gpu_layers_that_fit, largest_context, plan
from llamacli.errors import ResourceError
from llamacli.gguf import Header, Tensor, read_header
from llamacli.gguf_header import TENSOR_TYPES

TINY = Path(__file__).parents[2] / "models" / "tiny-llama2-chat.Q8_0.gguf"
MIB, GIB = 1 << 20, 1 << 30


def llama(
    n_layer: int, n_embd: int, n_head: int, n_head_kv: int, n_ff: int, type_name: str = "Q4_K", *, tied: bool = False
) -> Header:
    """A header of Llama 2's shape, all matrices in one type."""
    n_embd_kv = n_embd // n_head * n_head_kv
    shapes = {"token_embd.weight": (n_embd, 32000), "output_norm.weight": (n_embd,)}
    if not tied:
        shapes["output.weight"] = (n_embd, 32000)
    for i in range(n_layer):
        for name in ("attn_norm", "ffn_norm"):
            shapes[f"blk.{i}.{name}.weight"] = (n_embd,)
        for name in ("attn_q", "attn_output"):
            shapes[f"blk.{i}.{name}.weight"] = (n_embd, n_embd)
        for name in ("attn_k", "attn_v"):
            shapes[f"blk.{i}.{name}.weight"] = (n_embd, n_embd_kv)
        for name in ("ffn_gate", "ffn_up"):
            shapes[f"blk.{i}.{name}.weight"] = (n_embd, n_ff)
        shapes[f"blk.{i}.ffn_down.weight"] = (n_ff, n_embd)
    metadata = {"block_count": n_layer, "embedding_length": n_embd, "feed_forward_length": n_ff, "vocab_size": 32000}
    metadata |= {"attention.head_count": n_head, "attention.head_count_kv": n_head_kv}
    tensors = tuple(_tensor(name, shape, type_name) for name, shape in shapes.items())
    size = sum(tensor.n_bytes for tensor in tensors)
    return Header(
        path=Path("llama-2.Q4_K.gguf"),
        version=3,
        metadata={"general.architecture": "llama"} | {f"llama.{key}": value for key, value in metadata.items()},
        tensors=tensors,
        file_size=size,
        expected_size=size,
        data_offset=0,
        alignment=32,
    )


def _tensor(name: str, shape: tuple[int, ...], type_name: str) -> Tensor:
    wanted = type_name if len(shape) > 1 else "F32"
    type_id = next(key for key, value in TENSOR_TYPES.items() if value[0] == wanted)
    tensor = Tensor(name, shape, type_id, 0, 0)
    _, block_size, block_bytes = TENSOR_TYPES[type_id]
    return tensor._replace(n_bytes=tensor.n_elements // block_size * block_bytes)


LLAMA_7B = llama(32, 4096, 32, 32, 11008)
LLAMA_13B = llama(40, 5120, 40, 40, 13824)
LLAMA_70B = llama(80, 8192, 64, 8, 28672)
MODELS = {"tiny": read_header(TINY), "7B": LLAMA_7B, "13B": LLAMA_13B, "70B": LLAMA_70B}


# --- against llama.cpp ---

REPORT = """
import ctypes, importlib.util, os, sys
spec = importlib.util.find_spec("llama_cpp")
sys.modules["llama_cpp"] = importlib.util.module_from_spec(spec)
import llama_cpp.llama_cpp as C
log = C.llama_log_callback(lambda level, text, _: os.write(1, text))
C.llama_log_set(log, None)
path, n_ctx, n_ubatch, n_outputs = sys.argv[1], *map(int, sys.argv[2:])
params = C.llama_model_default_params()
params.n_gpu_layers, params.use_extra_bufts = 0, False
model = C.llama_model_load_from_file(path.encode(), params)
params = C.llama_context_default_params()
params.n_ctx, params.n_batch, params.n_ubatch, params.n_outputs_max = n_ctx, n_ctx, n_ubatch, n_outputs
params.n_seq_max, params.kv_unified = min(n_outputs, 64), True
C.llama_free(C.llama_init_from_model(model, params))
"""


def reported(n_ctx: int, n_ubatch: int, n_outputs: int) -> dict[str, float]:
    """Bytes of each buffer as llama.cpp logs them for the tiny model; it rounds to a hundredth of a MiB."""
    command = [sys.executable, "-c", REPORT, str(TINY), *map(str, (n_ctx, n_ubatch, n_outputs))]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = re.findall(r"(model|KV|compute|output) +buffer size = +([\d.]+) MiB", result.stdout)
    return {name: float(size) * MIB for name, size in lines}


@pytest.mark.parametrize(
    ("n_ctx", "n_ubatch", "n_outputs"), [(512, 512, 1), (1024, 128, 1), (2048, 512, 512), (4096, 512, 32)]
)
def test_the_plan_is_what_llama_cpp_takes_for_the_tiny_model_and_never_less(
    n_ctx: int, n_ubatch: int, n_outputs: int
) -> None:
    host = plan(MODELS["tiny"], n_ctx, n_ubatch=n_ubatch, n_outputs=n_outputs).host
    buffers = reported(n_ctx, n_ubatch, n_outputs)
    rounding = 0.01 * MIB
    # The output buffer has a row for each sequence, at most 64 here.
    work = buffers["compute"] + buffers["output"]
    assert host.weights == pytest.approx(buffers["model"], abs=rounding)
    assert host.kv == pytest.approx(buffers["KV"], abs=rounding)
    assert work <= host.compute <= work * 1.25 + 24 * MIB + (n_outputs - min(n_outputs, 64)) * 128000


# MiB of the compute buffer that llama.cpp 0c1e57098 reports, flash attention on.
@pytest.mark.parametrize(
    ("model", "n_ctx", "n_ubatch", "n_outputs", "type_k", "compute"),
    [
        ("tiny", 1024, 512, 512, "f16", 63.13),
        ("tiny", 4096, 512, 1, "f16", 7.89),
        ("tiny", 32768, 2048, 8, "f16", 143.55),
        ("7B", 512, 512, 1, "f16", 97.01),
        ("7B", 4096, 128, 1, "f16", 25.13),
        ("7B", 4096, 512, 64, "f16", 100.51),
        ("7B", 4096, 512, 1, "q8_0", 92.59),
        ("7B", 4096, 2048, 2048, "f16", 402.05),
        ("7B", 32768, 512, 1, "f16", 128.51),
        ("13B", 4096, 512, 1, "f16", 125.01),
        ("70B", 4096, 512, 1, "f16", 236.01),
        ("70B", 32768, 512, 1, "f16", 264.01),
    ],
)
def test_work_space_is_what_llama_cpp_reports_and_up_to_a_quarter_more(
    model: str, n_ctx: int, n_ubatch: int, n_outputs: int, type_k: str, compute: float
) -> None:
    host = plan(MODELS[model], n_ctx, n_ubatch=n_ubatch, n_outputs=n_outputs, type_k=type_k, type_v=type_k).host
    logits = n_outputs * 32000 * 4
    assert compute <= (host.compute - logits) / MIB <= compute * 1.25 + 20


def test_the_context_is_rounded_up_as_llama_cpp_does() -> None:
    assert plan(LLAMA_7B, 257).host == plan(LLAMA_7B, 512).host
    assert plan(LLAMA_7B, 1).host.kv == 256 * 512 * 1024


def test_a_quantized_cache_is_smaller() -> None:
    halved = plan(LLAMA_7B, 4096, type_k="q8_0", type_v="q8_0").host.kv
    assert (plan(LLAMA_7B, 4096).host.kv, halved) == (2048 * MIB, 1088 * MIB)


def test_without_a_gpu_everything_is_in_the_machines_memory() -> None:
    whole = plan(LLAMA_7B, 4096)
    assert (whole.device.total, whole.host.weights, whole.total) == (0, LLAMA_7B.weight_bytes, whole.host.total)


# --- what fits ---


def test_a_plan_that_fits_exactly_passes() -> None:
    check(plan(LLAMA_7B, 4096), plan(LLAMA_7B, 4096).host.total)


def refusal(header: Header, n_ctx: int, usable: int) -> str:
    with pytest.raises(ResourceError) as caught:
        check(plan(header, n_ctx), usable)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_a_refusal_names_what_is_needed_what_there_is_and_what_for() -> None:
    message = refusal(LLAMA_7B, 4096, 4 * GIB)
    assert "llama-2.Q4_K.gguf with a context of 4,096 tokens needs 5.7 GiB of memory" in message
    assert "(3.6 GiB weights, 2.0 GiB context, 128 MiB work space), 4.0 GiB can be used here" in message


def test_a_need_just_above_what_there_is_never_looks_equal_to_it() -> None:
    needed = plan(LLAMA_7B, 4096).host.total
    found = re.findall(r"[\d.]+ [GM]iB", refusal(LLAMA_7B, 4096, needed - 1))
    assert found[0] != found[-1]


def test_the_context_a_refusal_offers_fits_and_the_next_does_not() -> None:
    offered = int(re.findall(r"-c (\d+) fits", refusal(LLAMA_7B, 4096, 5 * GIB))[0])
    check(plan(LLAMA_7B, offered), 5 * GIB)
    refusal(LLAMA_7B, offered + 256, 5 * GIB)


@given(
    usable=st.integers(1 * GIB, 160 * GIB), name=st.sampled_from(["7B", "13B", "70B"]), n_ctx=st.integers(64, 40_000)
)
def test_the_quantization_a_refusal_offers_fits_with_the_context_it_names(usable: int, name: str, n_ctx: int) -> None:
    asked = plan(MODELS[name], n_ctx)
    if asked.host.total <= usable:
        check(asked, usable)
        return
    message = refusal(MODELS[name], n_ctx, usable)
    if offer := re.search(r"Its (Q\w+) \(about ([\d.]+) GiB\) fits with -c (\d+)\.", message):
        bits = {"Q3_K_M": 3.91, "Q2_K": 3.36}[offer[1]]  # of TheBloke/Llama-2-7B-Chat-GGUF
        smaller = plan(MODELS[name], int(offer[3])).host
        assert smaller.total - smaller.weights + MODELS[name].n_parameters * bits / 8 <= usable
    else:
        assert re.search(r"-c \d+ fits|of weights fit with -c 256|Free some memory", message)


def test_a_model_far_too_large_is_answered_with_the_size_that_would_do() -> None:
    assert "Choose a smaller model: up to 7.7 GiB of weights fit with -c 256." in refusal(LLAMA_70B, 4096, 8 * GIB)


def test_where_nothing_could_run_a_smaller_model_is_not_offered() -> None:
    assert refusal(LLAMA_7B, 4096, 200 * MIB).endswith("Free some memory first.")


@given(usable=st.integers(0, 16 * GIB), limit=st.integers(0, 20_000))
def test_the_largest_context_fits_and_the_next_is_over_memory_or_limit(usable: int, limit: int) -> None:
    n_ctx = largest_context(LLAMA_7B, usable, limit)
    assert n_ctx % 256 == 0
    assert n_ctx == 0 or plan(LLAMA_7B, n_ctx).host.total <= usable
    assert n_ctx + 256 > limit or plan(LLAMA_7B, n_ctx + 256).host.total > usable


def test_a_quantized_cache_leaves_room_for_a_longer_context() -> None:
    f16 = largest_context(LLAMA_7B, 5 * GIB, 32768)
    q8_0 = largest_context(LLAMA_7B, 5 * GIB, 32768, type_k="q8_0", type_v="q8_0")
    assert 1.7 * f16 < q8_0 <= 2 * f16


# --- GPUs ---


def test_a_large_gpu_takes_every_layer_and_the_output() -> None:
    assert gpu_layers_that_fit(LLAMA_7B, 24 * GIB, 4096) == 33
    assert gpu_layers_that_fit(LLAMA_70B, 141 * GIB, 4096) == 81


def test_a_gpu_without_room_takes_nothing() -> None:
    assert gpu_layers_that_fit(LLAMA_7B, 0, 4096) == 0
    assert gpu_layers_that_fit(LLAMA_70B, 256 * MIB, 4096) == 0


@pytest.mark.parametrize("free", [2, 4, 6])
def test_what_goes_to_a_gpu_fits_beside_the_margin_and_one_layer_more_does_not(free: int) -> None:
    n = gpu_layers_that_fit(LLAMA_7B, free * GIB, 4096)
    room = free * GIB - min(GIB, free * GIB // 8)
    assert 0 < n < 33
    assert plan(LLAMA_7B, 4096, gpu_layers=n).device.total <= room < plan(LLAMA_7B, 4096, gpu_layers=n + 1).device.total


def test_layers_on_the_gpu_leave_the_machines_memory() -> None:
    on_host, split = plan(LLAMA_7B, 4096), plan(LLAMA_7B, 4096, gpu_layers=17)
    assert split.host.weights + split.device.weights == on_host.host.weights
    assert split.host.kv == split.device.kv == on_host.host.kv // 2


def test_with_everything_on_the_gpu_only_the_embeddings_stay_behind() -> None:
    whole = plan(LLAMA_7B, 4096, gpu_layers=33)
    embeddings = next(tensor.n_bytes for tensor in LLAMA_7B.tensors if tensor.name == "token_embd.weight")
    assert (whole.host.weights, whole.host.kv) == (embeddings, 0)
    assert plan(LLAMA_7B, 4096, gpu_layers=99).device == whole.device


def test_all_layers_may_be_said_as_llama_cpp_says_it() -> None:
    assert plan(LLAMA_7B, 4096, gpu_layers=-1).device == plan(LLAMA_7B, 4096, gpu_layers=33).device
    assert plan(LLAMA_7B, 4096, gpu_layers=-1).host.total < GIB
    check(plan(LLAMA_70B, 4096, gpu_layers=-1), 2 * GIB)


def test_several_gpus_keep_a_margin_and_a_compute_buffer_each() -> None:
    one, two = (gpu_layers_that_fit(LLAMA_7B, 5 * GIB, 4096, n_devices=n) for n in (1, 2))
    assert 0 < two < one < 33
    assert device_room(48 * GIB, 2) == 46 * GIB
    assert gpu_layers_that_fit(LLAMA_70B, 48 * GIB, 4096, n_devices=2) == 81


def test_a_context_fits_where_its_cells_are() -> None:
    longest = largest_context(LLAMA_7B, 64 * GIB, 1 << 20, gpu_layers=33, device_bytes=6 * GIB)
    assert plan(LLAMA_7B, longest, gpu_layers=33).device.total <= 6 * GIB
    assert plan(LLAMA_7B, longest + 256, gpu_layers=33).device.total > 6 * GIB
    assert largest_context(LLAMA_7B, 64 * GIB, 1 << 14, gpu_layers=33) == 1 << 14


def test_the_first_layer_for_a_gpu_is_the_output() -> None:
    first = plan(LLAMA_7B, 4096, gpu_layers=1)
    assert first.device.kv == 0
    assert first.device.weights == sum(t.n_bytes for t in LLAMA_7B.tensors if t.name.startswith("output"))


def test_embeddings_that_serve_as_output_are_in_both_memories() -> None:
    tied = llama(2, 256, 4, 4, 512, tied=True)
    embeddings = next(tensor.n_bytes for tensor in tied.tensors if tensor.name == "token_embd.weight")
    whole = plan(tied, 256, gpu_layers=3)
    assert whole.host.weights == embeddings
    assert whole.device.weights == tied.weight_bytes
