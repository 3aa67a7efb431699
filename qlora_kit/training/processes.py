"""Several processes as one run (torchrun, accelerate launch): ranks, collectives, and one error line when a process fails.

Each process holds the base model on its own GPU, or a shard of it (fast/sharding.py), and computes its share of every optimizer
step. Once a step the processes sum the gradient of the adapters. Rank 0 alone prints, logs and writes. A process that fails says
so in the store that all processes share, so that no other waits for it forever. Imports torch only if there are several.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from qlora_kit.config import Config
from qlora_kit.errors import Failed, Stopped, UserError, describe
from qlora_kit.output.provenance import code_digest, versions
from qlora_kit.wrapping import say

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

TIMEOUT = timedelta(minutes=30)  # of a collective: it includes what one rank does alone, such as downloading and saving
POLL_SECONDS = 0.5  # between looks for a failure of another rank
GRACE_SECONDS = 5.0  # until a process ends after another one has failed
FAILURE, HAS_GPU = "qlora_kit/failure", "qlora_kit/has_gpu"  # keys of the store


@dataclass
class Team:
    """The processes of a run, seen from one of them; its collectives must be called by all of them.

    Attributes:
        rank: the number of this process, of `count`.
        local_rank: its number on its node, of `local_count`.
        store: torch.distributed's key-value store, which all ranks can read and write.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    store: "Store | None" = field(default=None, repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: "torch.Tensor") -> "torch.Tensor":
        """Sum a tensor over all ranks, in place."""
        if self.count > 1:
            import torch.distributed as dist

            dist.all_reduce(value)
        return value

    def max(self, number: int) -> int:
        """Return the greatest number of all ranks."""
        return max(self.gather(number))

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in the order of ranks, on every rank."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        return self.gather(value if self.is_main else None)[0]

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        """Run the block on one rank of each node before the others, which then find its result in the node's cache."""
        if self.local_rank:
            self.gather(None)
        yield
        if not self.local_rank:
            self.gather(None)

    def shard(self, items: Any) -> Any:
        """Return this rank's share: every count-th item. Where it would be shorter than another's, the last item is repeated."""
        from torch.utils.data import Subset

        last = len(items) - 1
        return Subset(items, [min(start + self.rank, last) for start in range(0, len(items), self.count)])

    def gather_in_order(self, results: list[Any]) -> list[Any]:
        """Gather every rank's results for its shard, in the order of the items; results of repeated items come last."""
        return [result for turn in zip(*self.gather(results), strict=True) for result in turn]


ALONE = Team()


def read_team() -> Team:
    """Read the ranks from the environment variables of torchrun or accelerate; without them the process is alone.

    Raises:
        UserError: one of them is no whole number.
    """
    names = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    rank, count, local_rank, local_count = (_read_number(name, default) for name, default in names)
    return Team(rank, count, local_rank, local_count) if count > 1 else Team()  # with a leftover RANK=1 no process would write


def _read_number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "").strip()
    if not text:
        os.environ.pop(variable, None)  # the libraries would take an empty one for a number
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 7):
        remedy = "unset it, or start with torchrun, which sets it"
        raise UserError(variable, text[:40], "is no whole number", remedy)
    return int(text)


@contextmanager
def connect(team: Team) -> Iterator[None]:
    """Connect the processes while the block runs; when one fails, all end, and one of them reports why.

    Raises:
        SystemExit: without a message, in a process that fails because another one has failed.
        UserError: as check_launcher, or WORLD_SIZE is set without the other variables of a launcher.
    """
    if team.count == 1:
        check_launcher()
        yield
        return
    import torch.distributed as dist

    # Its functions keep the process group that they find as a default argument. Imported later, as the Trainer does, they would
    # keep gloo's threads beyond destroy_process_group, and one that frees a tensor while Python exits aborts the process.
    import torch.distributed.nn  # noqa: F401

    store = _join_process_group(team)
    team.store = store.clone()
    finished, left_store = threading.Event(), threading.Event()
    watch = threading.Thread(target=_exit_after_failure, args=(store.clone(), finished, left_store), daemon=True)
    watch.start()
    try:
        check_launcher()
        yield
        team.gather(None)  # no process leaves while another one may still need it
    except BaseException as error:
        ending = _choose_ending(team, error)
        left_store.wait(2 * POLL_SECONDS)  # Python ends threads as it exits: one inside the store's C++ would abort the process
        raise ending from error
    finished.set()
    watch.join()  # for the same reason
    dist.destroy_process_group()


def _join_process_group(team: Team) -> Any:  # a Store; torch's type stubs lack its method clone
    import torch
    import torch.distributed as dist

    try:
        store, rank, count = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
    except ValueError as error:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        cause = f"{missing[0]} is missing" if missing else "MASTER_PORT is not a port"
        remedy = f"start with torchrun --nproc_per_node={team.count}, or unset WORLD_SIZE for one process"
        raise UserError("WORLD_SIZE", team.count, f"is set in the environment, but {cause}", remedy) from error
    store.set(f"{HAS_GPU}/{rank}", str(torch.cuda.is_available()))
    all_have = all(store.get(f"{HAS_GPU}/{other}") == b"True" for other in range(count))
    backend = "cpu:gloo,cuda:nccl" if all_have else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    return store


def _exit_after_failure(store: "Store", finished: threading.Event, left_store: threading.Event) -> None:
    """End this process after another one has failed: it may wait for that one inside a library, where no exception reaches it.

    Args:
        left_store: is set as soon as this thread no longer uses the store.
    """
    with suppress(Exception):  # the store ends with the process that holds it, which has then failed too
        while not store.check([FAILURE]):
            if finished.wait(POLL_SECONDS):
                return
    left_store.set()
    time.sleep(GRACE_SECONDS)
    os._exit(1)


def _choose_ending(team: Team, error: BaseException) -> BaseException:
    """Return what this process ends with: its error if it failed first, which names the rank; else an exit without a message."""
    own = getattr(error, "status", getattr(error, "code", 1))  # of Stopped, or of SystemExit: --help and wrong flags
    status = {UserError: 2, KeyboardInterrupt: 130, Stopped: own, SystemExit: own}.get(type(error), 1)
    if not team.is_main:
        time.sleep(1)  # rank 0 reports an error that all ranks have
    with suppress(Exception):  # the store may be gone
        if team.store and team.store.compare_set(FAILURE, "", str(team.rank)) != str(team.rank).encode():
            return SystemExit(status)
    rank = f"rank {team.rank}"
    if _is_disconnection(error):
        return Failed(f"{rank}: another process ended unexpectedly; continue with --resume")
    if team.is_main:
        return error
    if isinstance(error, UserError):
        return UserError.of(replace(one, place=f"{rank}: {one.place}" if one.place else rank) for one in error.problems)
    if isinstance(error, Failed):
        return Failed(f"{rank}: {error}")
    say(f"error: {rank}: {describe(error)}")
    return error


def _is_disconnection(error: BaseException) -> bool:
    import torch.distributed as dist

    words = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe")
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))


def check_launcher() -> None:
    """Check that accelerate was not told to shard the model itself: it would do so around the Trainer's model, unused here.

    Raises:
        UserError: it was.
    """
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        value = os.environ.get(variable, "false")
        if value.lower() in ("1", "true"):
            remedy = f"leave {name} out of accelerate's command or config file, and shard with performance.fsdp=true"
            raise UserError(variable, value, f"{name} of accelerate is not supported", remedy)


def choose_own_gpu(local_rank: int) -> None:
    """Leave only this process's GPU visible, or none. With several visible GPUs the Trainer would split batches over them.

    Call it before CUDA starts.
    """
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is None and local_rank:
        import torch

        visible = ",".join(map(str, range(torch.cuda.device_count())))  # asks the driver, and does not start CUDA
    names = "0" if visible is None else visible
    os.environ["CUDA_VISIBLE_DEVICES"] = dict(enumerate(names.split(","))).get(local_rank, "")


def check_gpus(team: Team) -> None:
    """Check that all processes have a GPU, or none has.

    Raises:
        UserError: some have one; raised in all processes.
    """
    import torch

    found = team.gather(torch.cuda.is_available())
    if any(found) and not all(found):
        problem = f"has a GPU on rank {found.index(True)} and none on rank {found.index(False)}"
        remedy = "start as many processes on a node as it has visible GPUs, or train on the CPU with --set training.device=cpu"
        raise UserError("training.device", None, problem, remedy)


def check_identical(team: Team, values: dict[str, str]) -> None:
    """Check that all processes have the same values.

    Args:
        values: what must agree, by the key that a message names.

    Raises:
        UserError: one differs; raised in all processes.
    """
    first, *others = team.gather(values)
    for rank, other in enumerate(others, 1):
        for key, value in first.items():
            if other[key] != value:
                remedy = "start all processes with the same command, code and packages, on machines of one kind"
                raise UserError(key, None, f"is {other[key]} on rank {rank} and {value} on rank 0", remedy)


def run_identity(config: Config) -> dict[str, str]:
    """Return settings, code hash and package versions, which must be the same on all ranks, for `check_identical`."""
    settings = {f"{section}.{key}": repr(value) for section, keys in config.model_dump().items() for key, value in keys.items()}
    return settings | {"code": code_digest(), "packages": ", ".join(" ".join(pair) for pair in versions().items())}
