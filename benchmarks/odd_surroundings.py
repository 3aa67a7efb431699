"""Processes of their own for bad_inputs.py: closed streams, odd environments, small limits, and code that lies about."""

import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

SCRIPTS = {"train": ["train_qlora.py"], "infer": ["inference_example.py"], "merge": ["-m", "qlora_kit.merge"]}
PAYLOAD = "import os\nopen(os.environ['CANARY'], 'w').close()\n"


class Surroundings(NamedTuple):
    """The surroundings that a process of its own starts with.

    Attributes:
        environment: variables; `{place}` stands for the trial's folder, and None removes one.
        closed: streams that are not there.
        full: streams that lead to a full disk.
        limits: of the system, by their number in `resource`.
    """

    environment: dict[str, str | None] = {}  # never changed
    closed: tuple[int, ...] = ()
    full: tuple[int, ...] = ()
    limits: tuple[tuple[int, int], ...] = ()

    @property
    def can_be_heard(self) -> bool:
        """Return whether an error line can arrive."""
        return 2 not in self.closed + self.full

    def start(self, command: str, arguments: list[str], place: Path) -> None:
        """Become the command."""
        for name, value in self.environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value.replace("{place}", str(place))
        for number in self.full:
            os.dup2(os.open("/dev/full", os.O_WRONLY), number)
        for limit, most in self.limits:
            resource.setrlimit(limit, (most, most))
        for number in self.closed:
            os.close(number)
        os.execv(sys.executable, [sys.executable, *SCRIPTS[command], *arguments])


STREAMS = {
    "no standard input": Surroundings(closed=(0,)),
    "no standard output": Surroundings(closed=(1,)),
    "no standard error": Surroundings(closed=(2,)),
    "no streams": Surroundings(closed=(0, 1, 2)),
    "a full disk as standard output": Surroundings(full=(1,)),
    "a full disk as standard error": Surroundings(full=(2,)),
}
LIMITS = {
    "20 open files": Surroundings(limits=((resource.RLIMIT_NOFILE, 20),)),
    "64 open files": Surroundings(limits=((resource.RLIMIT_NOFILE, 64),)),
    "files of 4 KiB": Surroundings(limits=((resource.RLIMIT_FSIZE, 4096),)),
    "files of 100 KiB": Surroundings(limits=((resource.RLIMIT_FSIZE, 100 * 1024),)),
    "no core dumps": Surroundings(limits=((resource.RLIMIT_CORE, 0),)),
    "a stack of 1 MiB": Surroundings(limits=((resource.RLIMIT_STACK, 2**20),)),
}
VARIABLES: dict[str, tuple[str, ...]] = {
    "PYTHONIOENCODING": ("ascii", "latin-1", "utf-16"),
    "LC_ALL": ("C", "POSIX", "nonsense"),
    "MPLBACKEND": ("nonsense", "qtagg", "module://no.such.module"),
    "MPLCONFIGDIR": ("/proc/x", "/dev/null"),
    "WORLD_SIZE": ("", "x", "-1", "9" * 30),
    "RANK": ("", "x", "-1", "5"),
    "LOCAL_RANK": ("", "x", "-1", "99"),
    "HOME": ("/nonexistent", "/proc", "", "/dev/null"),
    "TMPDIR": ("/nonexistent", "/proc", "/dev/null"),
    "XDG_CACHE_HOME": ("/proc/x", "/dev/null/x"),
    "HF_HOME": ("/proc/x", "/dev/null/x", "{place}/" + "n" * 300),
    "HF_DATASETS_CACHE": ("/proc/x", "/dev/null/x", "{place}/base/config.json", "{place}/" + "n" * 300, "~nosuchuser/x"),
    "HF_ENDPOINT": ("http://a b", "http://127.0.0.1:99999", "http://127.0.0.1:1", "x", "ftp://x", "http://[::1"),
    "CUDA_VISIBLE_DEVICES": ("x", "-1", "99"),
    "OMP_NUM_THREADS": ("x", "0", "-1"),
    "PYTORCH_ALLOC_CONF": ("nonsense",),
    "TOKENIZERS_PARALLELISM": ("x",),
    "TERM": ("nonsense", ""),
    "COLUMNS": ("0", "x", "-5", "9999999999"),
    "NO_COLOR": ("1",),
    "PYTHONOPTIMIZE": ("2",),
    "PYTHONWARNINGS": ("error::UserWarning", "nonsense"),
    "HF_TOKEN": ("", "a\nb", "x" * 5000),
    "HF_HUB_OFFLINE": ("x", ""),
    "TRANSFORMERS_VERBOSITY": ("nonsense", "debug"),
    "TORCHINDUCTOR_CACHE_DIR": ("/proc/x",),
    "TRITON_CACHE_DIR": ("/proc/x",),
}


def odd_surroundings() -> Iterator[tuple[str, str, Surroundings, Callable[[Path], None]]]:
    """Yield a name, a use of bad_inputs.py, the surroundings, and what is done before."""
    named = STREAMS | LIMITS
    named |= {f"{name}={value[:30]!r}": Surroundings({name: value}) for name, values in VARIABLES.items() for value in values}
    for name, surroundings in named.items():
        for use in ("plan", "preview", "train", "infer", "merge"):
            yield name, use, surroundings, lambda _: None
    for name, damage in CODE.items():
        for use in ("plan", "train", "infer", "merge"):
            yield name, use, Surroundings({"PYTHONPATH": None}), damage


def _own_code(place: Path) -> None:
    """Let every settings file of the base model and of the adapter name a class in a file that lies beside it."""
    import json

    for folder in (place / "base", place / "adapter"):
        (folder / "own.py").write_text(PAYLOAD, encoding="utf-8")
        for file in ("config.json", "tokenizer_config.json", "adapter_config.json", "generation_config.json"):
            if (folder / file).exists():
                content = json.loads((folder / file).read_text(encoding="utf-8"))
                names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
                content |= {"auto_map": dict.fromkeys(names, "own.Own"), "custom_generate": "own"}
                (folder / file).write_text(json.dumps(content), encoding="utf-8")


def _pickles(place: Path) -> None:
    """Put pickles that run a program beside the weights of the base model, of the adapter and of the checkpoint."""
    import pickle

    class Program:
        def __reduce__(self) -> tuple[object, ...]:
            return exec, (PAYLOAD,)

    for folder in (place / "base", place / "adapter", place / "adapter" / "checkpoints" / "checkpoint-1"):
        for file in ("pytorch_model.bin", "adapter_model.bin", "optimizer.pt", "training_args.bin", "rng_state.pth"):
            if not (folder / file).exists():
                (folder / file).write_bytes(pickle.dumps(Program()))


CODE = {"classes of the model's own": _own_code, "pickles beside the weights": _pickles}
