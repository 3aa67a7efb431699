"""Checks of what a run finds around it: versions, GPU, compiler, disk, memory, the Hub. Each raises Problem or Skipped.

`wanted` is a device as it was asked for: auto, cuda or cpu. Nothing is computed here: arithmetic.py does that.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit

from qlora_kit.config import GIB, MIB, Config
from qlora_kit.doctor.run_checks import Problem, Skipped
from qlora_kit.model.hub import MODEL_FILES, go_offline_if_unreachable
from qlora_kit.planning.shape import KNOWN_CONFIGS, read_shape

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"
OLDEST_PYTHON = (3, 11)
WRITTEN_MIB = 64
SLOWEST_MIB_PER_SECOND = 10.0  # a checkpoint of the default settings, 171 MiB, would take 17 s
FREE_GIB = 1.0  # the adapter, its three checkpoints and their optimizer states: 0.61 GiB with the default settings
MEMORY_GIB = 1.0  # what the laptop model takes

INSTALL = "pip install -r requirements.txt"


# Python and packages


def python_version() -> str:
    found = platform.python_version()
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        raise Problem(f"{found}, needs {oldest} or newer", f"python{oldest} -m venv .venv, then install anew")
    return f"{found}, {sys.executable}"


def read_requirements(path: Path = REQUIREMENTS) -> dict[str, str]:
    """Name -> line of requirements.txt, as pip takes it: `rich` -> `rich>=13.9`.

    Raises:
        Problem: the file is not there, or cannot be read.
    """
    from packaging.requirements import Requirement

    try:
        lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
        return {Requirement(line).name: line for line in lines if line}
    except (OSError, ValueError) as error:
        raise Problem(f"{path} cannot be read ({error})", "git checkout requirements.txt") from None


def reinstall(package: str) -> str:
    """The command that puts a package there anew, such as a torch that was built for a CPU."""
    command = f"pip install --force-reinstall --no-deps '{read_requirements()[package]}'"
    return f"{command}; on Windows take the index of pytorch.org/get-started/locally" if package == "torch" else command


def requirements_file(path: Path = REQUIREMENTS) -> str:
    """Whether the bounds of the packages are known."""
    return f"{len(read_requirements(path))} packages in {path}"


def package_version(requirement: str) -> str:
    """Whether a package is there, within its bounds."""
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    bounds = requirement.removeprefix(wanted.name)
    install = f"pip install '{requirement}'"
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        raise Problem(f"not installed, needs {bounds}", install) from None
    if not wanted.specifier.contains(found, prereleases=True):
        raise Problem(f"{found}, needs {bounds}", install)
    return f"{found}, within {bounds}"


# The GPU and the compiler


def driver_version() -> str | None:
    """The version of the NVIDIA driver; None where none answers."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def gpu(wanted: str) -> str:
    """Whether torch sees and uses the GPU: a CPU build, a hidden GPU and a missing driver are told apart."""
    import torch

    if wanted == "cpu":
        raise Skipped("--device cpu was asked for")
    driver, built = driver_version(), torch.version.cuda
    if built is None and driver:
        raise Problem(
            f"torch {torch.__version__} is a CPU build, beside an NVIDIA driver {driver}",
            reinstall("torch"),
        )
    if torch.cuda.is_available():
        return _described(driver)
    what = f"torch {torch.__version__} is a CPU build" if built is None else f"torch is built for CUDA {built}"
    if driver is None:
        if wanted == "auto":
            raise Skipped(f"{what}, and no NVIDIA driver answers: runs compute on the CPU")
        raise Problem(
            f"{what}, and no NVIDIA driver answers", "install the NVIDIA driver, or train with --set training.device=cpu"
        )
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        raise Problem(f"{what}, but CUDA_VISIBLE_DEVICES hides the GPU", "unset CUDA_VISIBLE_DEVICES")
    raise Problem(
        f"{what}, and finds no GPU beside the driver {driver}",
        "nvidia-smi: update the driver where the CUDA version that it prints is older than torch's",
    )


def _described(driver: str | None) -> str:
    import torch

    torch.ones(1, device="cuda").add_(1).item()  # a card that this build has no kernels for fails here
    free, total = torch.cuda.mem_get_info()
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return (
        f"{torch.cuda.get_device_name()}, {free / GIB:.2f} of {total / GIB:.2f} GiB free, compute capability {capability}, "
        f"driver {driver or 'of unknown version'}, torch built for CUDA {torch.version.cuda}"
    )


def c_compiler(wanted: str) -> str:
    """Whether a C compiler is there and finds Python.h: Triton builds with it, on a GPU only."""
    import torch

    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang"))), None)
    if wanted == "cpu" or not torch.cuda.is_available():
        raise Skipped(f"{compiler or 'none'}; not needed without a GPU")
    if compiler is None:
        raise Problem("none found, so that Triton makes no kernels", "sudo apt install gcc python3-dev")
    return compile_header(compiler)


def compile_header(compiler: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "header.c")
        source.write_text("#include <Python.h>\nint answer(void) { return 42; }\n", encoding="utf-8")
        command = [compiler, "-I", sysconfig.get_path("include"), "-c", str(source), "-o", str(source.with_suffix(".o"))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise Problem(f"{compiler} fails ({said})", "sudo apt install gcc python3-dev")
    return f"{compiler}, with Python.h"


# Disk and memory


def _existing(folder: Path) -> Path:
    """The folder, or where it would be made."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def disk_speed(folder: Path, slowest: float = SLOWEST_MIB_PER_SECOND) -> str:
    """Time to write 64 MiB where `folder` is or would be, down to the disk."""
    place = _existing(folder)
    fix = "name a folder on another disk: --output_dir DIR"
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            block = os.urandom(MIB)  # some file systems compress
            started = time.perf_counter()
            for _ in range(WRITTEN_MIB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = WRITTEN_MIB / (time.perf_counter() - started)
    except OSError as error:
        raise Problem(f"{place} cannot be written ({error.strerror})", fix) from None
    measured = f"{speed:,.0f} MiB/s in {place}"
    if speed < slowest:
        raise Problem(f"{measured}, less than {slowest:,.0f} MiB/s: each save would wait for it", fix)
    return measured


def free_space(folder: Path, needed_gib: float = FREE_GIB) -> str:
    """Free space where `folder` is or would be."""
    place = _existing(folder)
    free = shutil.disk_usage(place).free / GIB
    if free < needed_gib:
        fix = f"free {needed_gib - free:.2f} GiB there, or name a folder on another disk: --output_dir DIR"
        raise Problem(f"{free:.2f} GiB free in {place}, needs {needed_gib:.2f}", fix)
    return f"{free:.1f} GiB free in {place}"


def host_memory(needed_gib: float = MEMORY_GIB) -> str:
    import psutil

    memory = psutil.virtual_memory()
    measured = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available"
    if memory.available / GIB < needed_gib:
        raise Problem(f"{measured}, needs {needed_gib:.1f}", "close programs that hold memory: ps aux --sort -rss | head")
    return measured


# The Hub


def hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def hub_answers() -> str:
    """Whether models and data sets can be downloaded."""
    if os.environ.get("HF_HUB_OFFLINE"):
        raise Skipped("HF_HUB_OFFLINE is set: models and data sets come from the cache or from local folders")
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname  # without a password in it
    started = time.perf_counter()
    go_offline_if_unreachable()
    if os.environ.get("HF_HUB_OFFLINE"):
        raise Skipped(f"{host} does not answer: models and data sets come from the cache or from local folders")
    return f"{host} answers in {time.perf_counter() - started:.1f} s"


def default_model() -> str:
    """Whether the default base model is on this machine, all of it."""
    from huggingface_hub import snapshot_download

    name = Config().model.name
    try:
        folder = Path(snapshot_download(name, allow_patterns=MODEL_FILES, local_files_only=True))
    except OSError:
        raise Skipped(f"{name} is not on this machine: the first run with it downloads {_model_gib():.1f} GiB") from None
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.is_file():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise Skipped(f"{name} is here but for {len(missing)} of {len(files)} files of weights: the next run downloads them")
    return f"{name} in {folder}"


def room_for_model(wanted: str) -> str:
    """Whether the default base model fits where downloads go."""
    import torch

    try:
        return f"not needed: {default_model()}"
    except Skipped:
        if wanted == "cpu" or not torch.cuda.is_available():
            raise Skipped("the default model is for a GPU") from None
    place = _existing(hub_cache())
    free, needed = shutil.disk_usage(place).free / GIB, _model_gib()
    if free < needed:
        raise Problem(f"{free:.1f} GiB free in {place}, needs {needed:.1f}", "export HF_HOME=a folder on a disk with more room")
    return f"{free:.1f} GiB free in {place}, of which the default model takes {needed:.1f}"


def _model_gib() -> float:
    shape = read_shape(KNOWN_CONFIGS[Config().model.name])
    assert shape is not None
    return 2 * shape.parameters() / GIB  # 16 bits each
