"""Several processes as one run, as torchrun or `accelerate launch` starts them: who this one is, and what they tell each other.

Each process holds the whole base model on its own GPU, or its part of it (fast/sharding.py), and computes its share of every
optimizer step; what they exchange is the gradient of the adapters, once a step, and a few numbers. The first process (rank 0)
alone prints, logs and writes. A process that fails says so where the others look, so that none waits for it in vain. Imports
torch only when there are several.
"""

import hashlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config import Config
from qlora_kit.errors import Failed, Stopped, UserError
from qlora_kit.output.provenance import versions

if TYPE_CHECKING:
    import torch

PATIENCE = timedelta(minutes=30)  # with what one process does alone: fetching and preparing, evaluating, saving
LOOKS_EVERY, GRACE = 0.5, 5.0  # seconds: between looks for a failure elsewhere, and until this process ends for it
FAILURE, HAS_GPU = "qlora_kit/failure", "qlora_kit/has_gpu"


@dataclass
class Team:
    """The processes of a run, of which this one is number `rank` of `count`, and `local_rank` of `local_count` on its node."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    store: Any = field(default=None, repr=False)  # what all can read and write: torch.distributed's

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum(self, value: "torch.Tensor") -> "torch.Tensor":
        """Of all processes' values; in place."""
        if self.count > 1:
            import torch.distributed as dist

            dist.all_reduce(value)
        return value

    def highest(self, number: int) -> int:
        """The greatest of the numbers that the processes have."""
        if self.count == 1:
            return number
        import torch
        import torch.distributed as dist

        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def gather(self, what: Any) -> list[Any]:
        """What each process has, in the order of ranks."""
        if self.count == 1:
            return [what]
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, what)
        return found

    def told(self, what: Any) -> Any:
        """What the first process has."""
        return self.gather(what if self.leads else None)[0]

    @contextmanager
    def first_on_each_node(self) -> Iterator[None]:
        """One process of a node does it before the others, which then find the result in its cache."""
        if self.local_rank:
            self.gather(None)
        yield
        if not self.local_rank:
            self.gather(None)

    def shares(self, items: Any) -> "EveryNth":
        """This process's part of a sequence: every count-th item, and the last one again where others would have one more."""
        return EveryNth(items, self.rank, self.count)

    def joined(self, part: list[Any]) -> list[Any]:
        """All results in the order of the items, of each process's for its `shares`; those that filled up come last."""
        return [result for turn in zip(*self.gather(part), strict=True) for result in turn]


ALONE = Team()


@dataclass(frozen=True)
class EveryNth:
    items: Any
    first: int
    step: int

    def __len__(self) -> int:
        return -(-len(self.items) // self.step)

    def __getitem__(self, index: int) -> Any:
        return self.items[min(self.first + index * self.step, len(self.items) - 1)]


def find_team() -> Team:
    """From the variables that torchrun and accelerate set; alone without them."""
    names = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
    rank, count, local_rank, local_count = (int(os.environ.get(name, default)) for name, default in names)
    return Team(rank, count, local_rank, local_count) if count > 1 else Team()  # a rank left over would write nothing


@contextmanager
def connected(team: Team) -> Iterator[None]:
    """The processes can talk while the context lasts; when one fails, all end, and one of them says why.

    Raises:
        SystemExit: quietly, in a process whose failure follows from another's.
        UserError: as check_launcher, or variables of a launcher are set and no launcher has set them.
    """
    if team.count == 1:
        check_launcher()
        yield
        return
    import torch
    import torch.distributed as dist

    # Its functions keep the group that they find as a default argument. Imported later, as the Trainer does, they would keep
    # gloo's threads beyond destroy_process_group, and one that frees a tensor while Python exits aborts the process.
    import torch.distributed.nn

    try:
        store, rank, count = next(iter(dist.rendezvous("env://", timeout=PATIENCE)))
    except ValueError as error:  # not all of them, or no numbers
        missing = next((name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)), "MASTER_PORT")
        raise UserError(
            f"WORLD_SIZE: {team.count}: is set in the environment, and {missing} is not as torchrun sets it; start with "
            f"torchrun --nproc_per_node={team.count}, or unset WORLD_SIZE for one process"
        ) from error
    store.set(f"{HAS_GPU}/{rank}", str(torch.cuda.is_available()))
    all_have = all(store.get(f"{HAS_GPU}/{other}") == b"True" for other in range(count))
    backend = "cpu:gloo,cuda:nccl" if all_have else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
    team.store = store.clone()
    over, outside = threading.Event(), threading.Event()
    watch = threading.Thread(target=_end_with_the_others, args=(store.clone(), over, outside), daemon=True)
    watch.start()
    try:
        check_launcher()
        yield
        team.gather(None)  # none leaves while another may still ask it something
    except BaseException as error:
        ending = _as_one(team, error)
        outside.wait(2 * LOOKS_EVERY)  # for the reason below
        raise ending from error
    over.set()
    watch.join()  # Python ends threads as it exits, and one inside the store's C++ would take the process and its status with it
    dist.destroy_process_group()


def _end_with_the_others(store: Any, over: threading.Event, outside: threading.Event) -> None:
    """A process may wait for one that has failed inside a library, where no exception reaches it.

    Args:
        outside: set when one has failed, and the store is asked no more.
    """
    with suppress(Exception):  # the store goes with the process that holds it, which has then failed as well
        while not store.check([FAILURE]):
            if over.wait(LOOKS_EVERY):
                return
    outside.set()
    time.sleep(GRACE)
    os._exit(1)


def _as_one(team: Team, error: BaseException) -> BaseException:
    """What this process is to end with: the error, where it is the first of all, else a quiet exit."""
    own = getattr(error, "status", getattr(error, "code", 1))  # Stopped, or SystemExit: of --help and wrong flags
    status = {UserError: 2, KeyboardInterrupt: 130, Stopped: own, SystemExit: own}.get(type(error), 1)
    if not team.leads:
        time.sleep(1)  # what all have found, the first one says
    with suppress(Exception):
        if team.store.compare_set(FAILURE, "", str(team.rank)) != str(team.rank).encode():
            return SystemExit(status)
    if _is_lost(error):
        return Failed(f"rank {team.rank}: another process of the run has ended without a word; go on with --resume")
    if team.leads:
        return error
    if isinstance(error, UserError):
        return UserError(*(f"rank {team.rank}: {problem}" for problem in error.lines))
    if isinstance(error, Failed):
        return Failed(f"rank {team.rank}: {error}")
    print(f"error: rank {team.rank}: {type(error).__name__}: {_first_line(error)}", file=sys.stderr)
    return error


def _is_lost(error: BaseException) -> bool:
    import torch.distributed as dist

    words = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe")
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def check_launcher() -> None:
    """
    Raises:
        UserError: accelerate was told to divide the model in a way of its own, which it does around the Trainer's and not here.
    """
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            raise UserError(
                f"accelerate launch: {name}: is not used here; leave it out of the command or its config file, and set "
                "performance.fsdp=true to divide the base model over the processes"
            )


def check_alike(team: Team, found: dict[str, str]) -> None:
    """All processes have to run the same code with the same settings on the same kind of device.

    Raises:
        UserError: one does not; in all processes.
    """
    first, *others = team.gather(found)
    for rank, other in enumerate(others, 1):
        for name, value in first.items():
            if other[name] != value:
                raise UserError(
                    f"{name}: rank {rank} has {other[name]}, rank 0 has {value}; start all with the same, on like machines"
                )


def choose_own_gpu(local_rank: int) -> None:
    """Before CUDA starts: leave one GPU visible, this process's own, or none. With several the Trainer would divide batches."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number) for number in range(_gpu_count() if local_rank else 1)] if visible is None else visible.split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = names[local_rank] if local_rank < len(names) else ""


def check_gpus(team: Team) -> None:
    """Either all processes have a GPU or none.

    Raises:
        UserError: one has none while another has; in all processes.
    """
    import torch

    found = team.gather(torch.cuda.is_available())
    if any(found) and not all(found):
        raise UserError(
            f"rank {found.index(False)}: has no GPU of its own, while rank {found.index(True)} has; start as many processes on a "
            "node as it has visible GPUs, or train on the CPU with --set training.device=cpu"
        )


def _gpu_count() -> int:
    """Asked of the driver, which does not start CUDA in this process."""
    import torch

    return torch.cuda.device_count()


def what_runs(config: Config) -> dict[str, str]:
    """What all processes of a run have to have in common, by the words of a message."""
    home = Path(__file__).resolve().parents[2]
    code = sorted([*home.glob("*.py"), *home.glob("qlora_kit/**/*.py")])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in code)).hexdigest()[:12]
    settings = {f"{section}.{key}": repr(value) for section, keys in config.model_dump().items() for key, value in keys.items()}
    return settings | {"the code": digest, "the packages": ", ".join(" ".join(pair) for pair in versions().items())}
