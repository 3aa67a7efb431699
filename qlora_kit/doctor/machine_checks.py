"""Checks of versions, GPU, compiler, disk, memory and the Hub. compute_checks.py checks computations.

Each check returns its measurement, or raises CheckFailed or CheckSkipped. `device` is the device that the user requested: auto,
cuda or cpu. Packages are imported inside the checks, so that a missing package fails its check alone.
"""

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
from qlora_kit.doctor.run_checks import CheckFailed, CheckSkipped
from qlora_kit.model.hub import go_offline_if_unreachable, model_folder
from qlora_kit.model.weight_files import WHOLE, weight_files
from qlora_kit.planning.shape import KNOWN_CONFIGS, read_shape
from qlora_kit.shipped import REQUIREMENTS

OLDEST_PYTHON = (3, 11)
WRITTEN_MIB = 64
SLOWEST_MIB_PER_SECOND = 10.0  # a checkpoint of the default settings, 171 MiB, would take 17 s
FREE_GIB = 1.0  # the adapter, its three checkpoints and their optimizer states: 0.61 GiB with the default settings
MEMORY_GIB = 1.0  # of the embedded model's training

INSTALL_COMPILER = "sudo apt install gcc python3-dev"
OTHER_DISK = "use a folder on another disk: --output_dir DIR"
MOVE_CACHE = "export HF_HOME=a folder on a disk with more space"


def python_version() -> str:
    """Check the version of Python, and that its system has the locks of files that a run takes."""
    found = platform.python_version()
    if sys.platform == "win32":
        raise CheckFailed(f"{found} on Windows, where no run can begin", "use Linux, such as WSL: wsl --install")
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        raise CheckFailed(f"{found}, needs {oldest} or newer", f"python{oldest} -m venv .venv, then install the packages again")
    return f"{found}, {sys.executable}"


def read_requirements(path: Path = REQUIREMENTS) -> dict[str, str]:
    """Return name -> line of requirements.txt, in pip's form: `rich` -> `rich>=13.9`.

    Raises:
        CheckFailed: the file is missing or cannot be read.
    """
    from packaging.requirements import Requirement

    try:
        lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
        return {Requirement(line).name: line for line in lines if line}
    except (OSError, ValueError) as error:
        raise CheckFailed(f"{path} cannot be read ({error})", "git checkout requirements.txt") from None


def reinstall(package: str) -> str:
    """Return the command that replaces a package, for example a torch that was built for a CPU."""
    return f"pip install --force-reinstall --no-deps '{read_requirements()[package]}'"


def package_version(requirement: str) -> str:
    """Check that a package is installed in an allowed version."""
    from packaging.requirements import Requirement

    required = Requirement(requirement)
    bounds = requirement.removeprefix(required.name)
    install = f"pip install '{requirement}'"
    try:
        found = version(required.name)
    except PackageNotFoundError:
        raise CheckFailed(f"not installed, needs {bounds}", install) from None
    if not required.specifier.contains(found, prereleases=True):
        raise CheckFailed(f"{found}, needs {bounds}", install)
    return f"{found}, within {bounds}"


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver, or None if no driver answers."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(found.split()), None)


def gpu(device: str) -> str:
    """Check that torch can use the GPU; tell a CPU build, a hidden GPU and a missing driver apart."""
    import torch

    if device == "cpu":
        raise CheckSkipped("left out by --device cpu")
    driver, built = driver_version(), torch.version.cuda
    what = f"torch {torch.__version__} is a CPU build" if built is None else f"torch is built for CUDA {built}"
    installed = f"although the NVIDIA driver {driver} is installed"
    if built is None and driver:
        raise CheckFailed(f"{what}, {installed}", reinstall("torch"))
    if torch.cuda.is_available():
        return _describe_gpu(driver)
    no_driver = f"{what}, and no NVIDIA driver answers"
    if driver is None and device == "auto":
        raise CheckSkipped(f"{no_driver}: runs compute on the CPU")
    if driver is None:
        raise CheckFailed(no_driver, "install the NVIDIA driver, or train with --set training.device=cpu")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        raise CheckFailed(f"{what}, but CUDA_VISIBLE_DEVICES hides the GPU", "unset CUDA_VISIBLE_DEVICES")
    fix = "run nvidia-smi: if it prints an older CUDA version than torch's, update the driver"
    raise CheckFailed(f"{what}, and finds no GPU, {installed}", fix)


def _describe_gpu(driver: str | None) -> str:
    import torch

    torch.ones(1, device="cuda").add_(1).item()  # fails on a GPU for which this build has no kernels
    free, total = torch.cuda.mem_get_info()
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return (
        f"{torch.cuda.get_device_name()}, {free / GIB:.2f} of {total / GIB:.2f} GiB free, compute capability {capability}, "
        f"driver {driver or 'of unknown version'}, torch built for CUDA {torch.version.cuda}"
    )


def c_compiler(device: str) -> str:
    """Check that a C compiler is installed and finds Python.h; Triton needs it on a GPU."""
    import torch

    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang"))), None)
    if device == "cpu" or not torch.cuda.is_available():
        raise CheckSkipped(f"{compiler or 'none'}; not needed without a GPU")
    if compiler is None:
        raise CheckFailed("none found, so Triton cannot build kernels", INSTALL_COMPILER)
    command = [compiler, "-I", sysconfig.get_path("include"), "-x", "c", "-c", "-", "-o", os.devnull]
    source = "#include <Python.h>\nint answer(void) { return 42; }\n"
    done = subprocess.run(command, input=source, capture_output=True, text=True, timeout=60)
    if done.returncode:
        message = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise CheckFailed(f"{compiler} fails ({message})", INSTALL_COMPILER)
    return f"{compiler}, with Python.h"


def _existing(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def disk_speed(folder: Path, slowest: float = SLOWEST_MIB_PER_SECOND) -> str:
    """Check the time to write 64 MiB to the disk of `folder`, which need not exist."""
    place = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            block = os.urandom(MIB)  # random, because some file systems compress
            started = time.perf_counter()
            for _ in range(WRITTEN_MIB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = WRITTEN_MIB / (time.perf_counter() - started)
    except OSError as error:
        raise CheckFailed(f"{place} cannot be written ({error.strerror})", OTHER_DISK) from None
    measured = f"{speed:,.0f} MiB/s in {place}"
    if speed < slowest:
        raise CheckFailed(f"{measured}, less than {slowest:,.0f} MiB/s: each save would wait for the disk", OTHER_DISK)
    return measured


def free_space(folder: Path, needed_gib: float = FREE_GIB) -> str:
    """Check the free space on the disk of `folder`, which need not exist."""
    place = _existing(folder)
    free = shutil.disk_usage(place).free / GIB
    if free < needed_gib:
        fix = f"free {needed_gib - free:.2f} GiB there, or {OTHER_DISK}"
        raise CheckFailed(f"{free:.2f} GiB free in {place}, needs {needed_gib:.2f}", fix)
    return f"{free:.1f} GiB free in {place}"


def host_memory(needed_gib: float = MEMORY_GIB) -> str:
    """Check the memory that is available to programs."""
    import psutil

    memory = psutil.virtual_memory()
    measured = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available"
    if memory.available / GIB < needed_gib:
        raise CheckFailed(f"{measured}, needs {needed_gib:.1f}", "close programs that use much memory: ps aux --sort -rss | head")
    return measured


def hub_answers() -> str:
    """Check that models and data sets can be downloaded."""
    if os.environ.get("HF_HUB_OFFLINE"):
        raise CheckSkipped("HF_HUB_OFFLINE is set: models and data sets come from the cache or from local folders")
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname  # without the password that it may hold
    started = time.perf_counter()
    go_offline_if_unreachable()
    if os.environ.get("HF_HUB_OFFLINE"):
        raise CheckSkipped(f"{host} does not answer: models and data sets come from the cache or from local folders")
    return f"{host} answers in {time.perf_counter() - started:.1f} s"


def default_model() -> str:
    """Check that all files of the default base model are on this machine."""
    model = Config().model
    folder = model_folder(model)
    if folder is None:
        raise CheckSkipped(f"{model.name} is not on this machine: the first run with it downloads {_model_gib():.1f} GiB")
    files = weight_files(folder) if any(folder.glob("*.safetensors*")) else [folder / WHOLE]
    if missing := sum(not path.is_file() for path in files):
        raise CheckSkipped(f"{model.name} lacks {missing} of {len(files)} weight files: the next run downloads them")
    return f"{model.name} in {folder}"


def room_for_model(device: str) -> str:
    """Check that the default base model fits on the disk of the Hub's downloads."""
    import torch
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        return f"not needed: {default_model()}"
    except CheckSkipped:
        if device == "cpu" or not torch.cuda.is_available():
            raise CheckSkipped("the default model needs a GPU") from None
    place = _existing(Path(HF_HUB_CACHE))
    free, needed = shutil.disk_usage(place).free / GIB, _model_gib()
    if free < needed:
        raise CheckFailed(f"{free:.1f} GiB free in {place}, needs {needed:.1f}", MOVE_CACHE)
    return f"{free:.1f} GiB free in {place}, of which the default model takes {needed:.1f}"


def _model_gib() -> float:
    shape = read_shape(KNOWN_CONFIGS[Config().model.name])
    assert shape is not None
    return 2 * shape.parameters() / GIB  # 2 bytes each
