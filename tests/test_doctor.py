"""The doctor: what it says of a machine, a library, models and settings that are broken, and that it says it at all."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamacli import diagnosis, machine, problems
from llamacli.commands.doctor import as_lines, as_object
from llamacli.diagnosis import Bindings, Disk, Gpus, Memory, Processor, Threads
from llamacli.engine.devices import Device
from llamacli.machine import Cores, Gpu
from llamacli.models import store
from llamacli.problems import Problem

DOCTOR = [sys.executable, "-m", "llamacli", "doctor"]
NVIDIA = Gpu("nvidia", "NVIDIA H100", Path("/dev/nvidia0"))
CUDA = Device("CUDA0", "NVIDIA H100", "GPU", "CUDA", 40 << 30, 80 << 30)
TWO_CORES = Threads(logical=2, affinity=2, physical=2, cgroup_limit=None, best=2, used=2, load=0.0, variables={})

Run = Callable[..., subprocess.CompletedProcess[str]]


def tree(root: Path, files: dict[str, str]) -> Path:
    """What a Linux kernel would show, below `root`."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def configured(tmp_path: Path, content: str = "", **environ: str) -> diagnosis.Configuration:
    file = tree(tmp_path, {"config.toml": content}) / "config.toml"
    return diagnosis.read_configuration(environ, file)


def models_directory(environment: dict[str, str]) -> Path:
    directory = Path(environment["LLAMACLI_HOME"], "data", "models")
    directory.mkdir(parents=True)
    return directory


def told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.stderr == ""
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def about(answer: dict[str, Any], word: str) -> dict[str, str]:
    """The one problem that mentions `word`."""
    (problem,) = [problem for problem in answer["problems"] if word in problem["what"]]
    assert set(problem) == {"severity", "what", "remedy"} and problem["remedy"]
    return dict(problem)


# The program


def test_text_goes_through_every_part_of_the_machine_and_the_installation(llamacli: Run) -> None:
    done = llamacli("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    for label in ("llamacli", "python", "bindings", "cpu", "cores", "threads", "memory", "7B Q4_K_M", "gpus", "disk"):
        assert f"\n  {label} " in done.stdout
    assert "checksum right, the default model" in done.stdout
    assert "\x1b" not in done.stdout


def test_json_is_one_object_with_facts_and_problems(llamacli: Run, environment: dict[str, str]) -> None:
    done = llamacli("doctor", "--json")
    answer = told(done)
    assert done.returncode == 0
    assert answer["bindings"]["installed"] == answer["bindings"]["wanted"]
    assert Path(answer["bindings"]["library"]).exists()
    assert answer["configuration"]["file"] == environment["LLAMACLI_HOME"] + "/config.toml"
    assert answer["threads"]["used"] == 1
    assert [fit["name"] for fit in answer["memory"]["fits"]] == ["7B", "13B", "70B"]
    assert isinstance(answer["problems"], list)
    (tiny,) = answer["models"]["files"]
    assert tiny["is_verified"] and tiny["is_default"] and tiny["context_that_fits"] == tiny["context_length"]


def on_a_terminal(environment: dict[str, str]) -> bytes:
    ours, theirs = os.openpty()
    shown = b""
    with subprocess.Popen(DOCTOR, env=environment, stdin=subprocess.DEVNULL, stdout=theirs) as process:
        os.close(theirs)
        with suppress(OSError):  # how Linux says that the other side has closed
            while part := os.read(ours, 1 << 12):
                shown += part
    os.close(ours)
    assert process.returncode == 0
    return shown


def test_colours_are_for_a_terminal_that_wants_them(environment: dict[str, str]) -> None:
    (models_directory(environment) / "empty.gguf").touch()
    assert b"\x1b[33mwarning\x1b[0m: " in on_a_terminal(environment | {"NO_COLOR": ""})
    plain = on_a_terminal(environment | {"NO_COLOR": "1"})
    assert b"warning: " in plain and b"\x1b" not in plain


def test_a_broken_config_file_is_a_finding_among_others(llamacli: Run, environment: dict[str, str]) -> None:
    tree(Path(environment["LLAMACLI_HOME"]), {"config.toml": "temperature = \n"})
    done = llamacli("doctor", "--json")
    answer = told(done)
    assert done.returncode == 2
    assert about(answer, "config.toml")["severity"] == "error"
    assert answer["bindings"]["library"] and answer["models"]["files"]


def test_a_library_that_is_not_there_is_a_finding_among_others(
    llamacli: Run, environment: dict[str, str], tmp_path: Path
) -> None:
    done = llamacli("doctor", "--json", env=environment | {"LLAMA_CPP_LIB_PATH": str(tmp_path)})
    answer = told(done)
    assert done.returncode == 1
    problem = about(answer, "does not load")
    assert problem["severity"] == "error" and "pip install" in problem["remedy"]
    assert answer["gpus"]["devices"] is None
    assert answer["models"]["files"][0]["is_verified"]


def test_a_library_that_kills_its_process_does_not_kill_the_doctor(
    llamacli: Run, environment: dict[str, str], tmp_path: Path
) -> None:
    tree(tmp_path / "llama_cpp", {"__init__.py": "", "llama_cpp.py": "import os\nos.kill(os.getpid(), 4)\n"})
    done = llamacli("doctor", "--json", env=environment | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert "another CPU" in about(told(done), signal.strsignal(signal.SIGILL) or "")["what"]


def test_bindings_that_raise_do_not_end_the_doctor(llamacli: Run, environment: dict[str, str], tmp_path: Path) -> None:
    tree(tmp_path / "llama_cpp", {"__init__.py": "", "llama_cpp.py": "raise AttributeError('no such symbol')\n"})
    done = llamacli("doctor", "--json", env=environment | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert about(told(done), "no such symbol")["severity"] == "error"


def test_bindings_of_another_version_are_a_warning_while_they_work(
    llamacli: Run, environment: dict[str, str], tmp_path: Path
) -> None:
    metadata = "Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 0.0.1\n"
    tree(tmp_path, {"llama_cpp_python-0.0.1.dist-info/METADATA": metadata})
    done = llamacli("doctor", "--json", env=environment | {"PYTHONPATH": str(tmp_path)})
    problem = about(told(done), "0.0.1")
    assert done.returncode == 0
    assert (problem["severity"], problem["remedy"]) == (
        "warning",
        f"pip install llama-cpp-python=={Bindings('').wanted}",
    )


def test_a_default_model_that_is_not_there_is_an_error_only_when_somebody_chose_it(
    llamacli: Run, environment: dict[str, str]
) -> None:
    chosen = llamacli("doctor", "--json", env=environment | {"LLAMACLI_MODEL": "13b-chat"})
    assert chosen.returncode == 5
    assert about(told(chosen), "13b-chat")["severity"] == "error"
    fresh = llamacli("doctor", "--json", env=environment | {"LLAMACLI_MODEL": ""})
    assert fresh.returncode == 0
    problem = about(told(fresh), "7b-chat")
    assert problem["severity"] == "warning" and "llamacli pull 7b-chat" in problem["what"]


def test_a_broken_model_is_an_error_only_when_it_is_the_default(llamacli: Run, environment: dict[str, str]) -> None:
    broken = models_directory(environment) / "\x1b[31mcut.gguf"
    broken.write_bytes(store.bundled().read_bytes()[:-1])
    beside = llamacli("doctor")
    assert beside.returncode == 0
    assert "^[[31mcut" in beside.stdout and "\x1b" not in beside.stdout
    assert "its header promises" in beside.stdout
    default = llamacli("doctor", "--json", env=environment | {"LLAMACLI_MODEL": str(broken)})
    assert default.returncode == 5
    assert about(told(default), "its header promises")["severity"] == "error"


# GPUs


def test_a_gpu_that_the_build_cannot_use_is_told_with_the_way_to_build_for_it(tmp_path: Path) -> None:
    information = "Model: \t\t NVIDIA H100\nDevice Minor: \t 0\n"
    root = tree(tmp_path, {"proc/driver/nvidia/gpus/0000:01:00.0/information": information, "dev/nvidia0": ""})
    (problem,) = problems.of_gpus(Gpus(machine.gpus(root), ("CPU",), ()), require_gpu=False)
    assert problem.severity == "warning"
    assert "NVIDIA H100" in problem.what and "CMAKE_ARGS=-DGGML_CUDA=on" in problem.remedy


def test_a_gpu_that_the_container_was_not_given_needs_no_new_build() -> None:
    (problem,) = problems.of_gpus(Gpus((replace(NVIDIA, device=None),), ("CPU",), ()), require_gpu=False)
    assert "--gpus all" in problem.remedy and "CMAKE_ARGS" not in problem.remedy


def test_a_build_for_gpus_that_sees_none_points_at_the_driver() -> None:
    (problem,) = problems.of_gpus(Gpus((NVIDIA,), ("CUDA", "CPU"), ()), require_gpu=False)
    assert "built for CUDA" in problem.what and "driver" in problem.remedy


def test_a_required_gpu_that_cannot_be_used_is_an_error() -> None:
    for shown in ((), (NVIDIA,)):
        (problem,) = problems.of_gpus(Gpus(shown, ("CPU",), ()), require_gpu=True)
        assert (problem.severity, problem.exit_code) == ("error", 2)


def test_nothing_is_wrong_with_a_gpu_in_use_nor_guessed_while_the_library_does_not_load() -> None:
    assert not [*problems.of_gpus(Gpus((NVIDIA,), ("CUDA", "CPU"), (CUDA,)), require_gpu=True)]
    assert not [*problems.of_gpus(Gpus((NVIDIA,)), require_gpu=True)]


# CPU and threads


def test_a_build_without_what_the_cpu_has_is_called_slow() -> None:
    cpu = Processor("some CPU", ("avx", "avx2", "avx512bw", "avx512f", "fma"))
    (problem,) = problems.of_processor(cpu, Bindings("0.3.36", features=("SSE3", "AVX")))
    assert problem.severity == "warning"
    assert problem.what.startswith("slow build: this CPU has AVX2, AVX512, FMA,")


def test_a_build_that_uses_what_the_cpu_lacks_is_an_error() -> None:
    (problem,) = problems.of_processor(Processor("some CPU", ("avx",)), Bindings("0.3.36", features=("AVX", "AVX2")))
    assert (problem.severity, problem.exit_code) == ("error", 1)
    assert "AVX2" in problem.what and "illegal instruction" in problem.what


def test_a_build_is_not_judged_by_a_cpu_that_cannot_be_read() -> None:
    assert not [*problems.of_processor(Processor("some CPU", ()), Bindings("0.3.36", features=("AVX",)))]
    assert not [*problems.of_processor(Processor("some CPU", ("avx",)), Bindings("0.3.36"))]


def test_threads_follow_the_cgroup_limit_and_the_settings(tmp_path: Path) -> None:
    cores = Cores(logical=8, affinity=8, physical=4, cgroup_limit=1.5)
    assert diagnosis.read_threads(cores, configured(tmp_path), {}).used == 2
    threads = diagnosis.read_threads(cores, configured(tmp_path, "threads = 4\n"), {})
    (problem,) = problems.of_threads(replace(threads, load=0.0))
    assert "4 threads are set, 2 can run at once" in problem.what


def test_other_programs_matter_only_when_they_share_our_cores() -> None:
    (problem,) = problems.of_threads(replace(TWO_CORES, load=1.3))
    assert "load 1.3" in problem.what and "collapse when cores are shared" in problem.what
    assert not [*problems.of_threads(replace(TWO_CORES, load=0.2))]
    assert not [*problems.of_threads(replace(TWO_CORES, logical=16, load=1.3))]
    assert not [*problems.of_threads(replace(TWO_CORES, load=None))]


@pytest.mark.parametrize(
    ("variable", "conflicting", "harmless"),
    [
        ("OMP_NUM_THREADS", "8", "2"),
        ("OMP_THREAD_LIMIT", "1", "2"),
        ("OMP_DYNAMIC", "TRUE", "false"),
        ("GOMP_CPU_AFFINITY", "0", ""),
    ],
)
def test_a_variable_that_changes_the_threads_is_named(
    variable: str, conflicting: str, harmless: str, tmp_path: Path
) -> None:
    def found(value: str) -> list[Problem]:
        environ = {variable: value, "PATH": "/bin"}
        threads = diagnosis.read_threads(Cores(2, 2, 2), configured(tmp_path), environ)
        assert threads.variables == {variable: value}
        return list(problems.of_threads(replace(threads, load=0.0)))

    (problem,) = found(conflicting)
    assert variable in problem.what
    assert found(harmless) == []


# Memory, models, disk


def test_a_containers_memory_limit_decides_what_fits(tmp_path: Path) -> None:
    kernel = {
        "proc/meminfo": f"MemTotal: {64 << 20} kB\nMemAvailable: {60 << 20} kB\n",
        "proc/self/mountinfo": "1 1 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        "proc/self/cgroup": "0::/\n",
    }
    root = tree(tmp_path, kernel)
    roomy = diagnosis.read_memory(machine.memory(root), Gpus(()))
    assert [bool(fit.context) for fit in roomy.fits] == [True, True, True]
    assert not [*problems.of_memory(roomy)]
    tree(root, {"sys/fs/cgroup/memory.max": f"{2 << 30}\n"})
    tight = diagnosis.read_memory(machine.memory(root), Gpus(()))
    assert (tight.usable, [fit.context for fit in tight.fits]) == (2 << 30, [0, 0, 0])
    (problem,) = problems.of_memory(tight)
    assert "2.0 GiB" in problem.what and "raise the container's limit" in problem.remedy


def test_what_does_not_fit_into_memory_may_fit_on_a_gpu() -> None:
    room = machine.Memory(total=4 << 30, available=4 << 30)
    fits = diagnosis.read_memory(room, Gpus((NVIDIA,), ("CUDA", "CPU"), (CUDA,))).fits
    assert all(fit.context for fit in fits)


def test_memory_that_cannot_be_read_is_said_to_be_so(tmp_path: Path) -> None:
    (problem,) = problems.of_memory(diagnosis.read_memory(machine.memory(tmp_path), Gpus(())))
    assert "cannot be read" in problem.what


def test_a_model_too_large_for_memory_is_told_with_its_numbers(tmp_path: Path) -> None:
    model = diagnosis.read_file(store.tiny(), 1 << 20, Gpus(()))
    assert (model.quantization, model.is_verified, model.context_that_fits) == ("Q8_0", True, 0)
    models = diagnosis.Models(tmp_path, (replace(model, is_default=True),))
    (problem,) = problems.of_models(models, configured(tmp_path))
    assert problem.exit_code == 6 and "1 MiB can be used here" in problem.what


def test_a_bundled_model_that_is_damaged_fails_its_checksum(tmp_path: Path) -> None:
    damaged = bytearray(store.bundled().read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "tiny.gguf").write_bytes(damaged)
    file = replace(store.tiny(), path=tmp_path / "tiny.gguf")
    model = diagnosis.read_file(file, 1 << 40, Gpus(()))
    assert model.is_header_whole and not model.is_verified
    (problem,) = problems.of_models(diagnosis.Models(tmp_path, (model,)), configured(tmp_path))
    assert "sha256" in problem.what and problem.remedy.startswith("pip install")


def test_a_split_model_is_one_model(tmp_path: Path) -> None:
    for name in ("big-00001-of-00002.gguf", "big-00002-of-00002.gguf"):
        (tmp_path / name).touch()
    room = Memory(total=1 << 40, available=1 << 40, cgroup_limit=None, usable=1 << 40, fits=())
    models = diagnosis.read_models(store.Places(tmp_path), configured(tmp_path / "home"), room, Gpus(()))
    assert [model.name for model in models.files] == ["tiny", str(tmp_path / "big-00001-of-00002.gguf")]


def test_a_data_directory_that_is_not_made_yet_has_the_room_of_its_disk(tmp_path: Path) -> None:
    disk = diagnosis.read_disk(tmp_path / "not" / "yet")
    assert disk.path == tmp_path and disk.free


def test_a_disk_without_room_for_a_model_is_told() -> None:
    (problem,) = problems.of_disk(Disk(Path("/data"), total=8 << 30, free=1 << 30))
    assert "1.0 GiB are free at /data" in problem.what
    (problem,) = problems.of_disk(Disk(Path("/data")))
    assert "cannot be read" in problem.what


# Settings and the whole


def test_file_and_environment_can_both_be_wrong_at_once(tmp_path: Path) -> None:
    configuration = configured(tmp_path, "modell = 'x'\n", LLAMACLI_THREADS="none")
    in_file, in_environment = problems.of_configuration(configuration)
    assert "modell" in in_file.what and "LLAMACLI_THREADS" in in_environment.what


def test_a_wrong_environment_does_not_hide_what_the_file_says(tmp_path: Path) -> None:
    configuration = configured(tmp_path, "threads = 3\n", LLAMACLI_SEED="x")
    assert configuration.threads == 3


def test_a_machine_that_shows_nothing_is_described_all_the_same(tmp_path: Path) -> None:
    environ = {"LLAMACLI_HOME": str(tmp_path / "home"), "LLAMACLI_MODEL": "tiny"}
    found = diagnosis.examine(environ, root=tmp_path)
    listed = problems.problems(found)
    assert "cannot be read" in as_lines(found, listed)
    assert json.loads(as_object(found, listed))["memory"]["total"] == 0


def test_errors_come_before_warnings_and_without_either_all_is_in_order(tmp_path: Path) -> None:
    environ = {"LLAMACLI_HOME": str(tmp_path), "LLAMACLI_MODEL": "nothing-like-it"}
    found = diagnosis.examine(environ)
    troubled = replace(found, threads=TWO_CORES, disk=Disk(tmp_path, 1, 1), memory=replace(found.memory, fits=()))
    severities = [problem.severity for problem in problems.problems(troubled)]
    assert severities == sorted(severities) and {*severities} == {"error", "warning"}
    assert as_lines(found, []).endswith("\n\neverything is in order\n")
