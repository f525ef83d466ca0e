"""Processes and devices: from torchrun's environment, or one plain process without it."""

import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from occfeat_targets.store.settings import ConfigError


class ProcessLost(RuntimeError):
    """Another process of this training ended while this one needed it."""


@dataclass(frozen=True)
class Process:
    """This process among those that train together."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this one writes files and talks to the user."""
        return self.rank == 0

    def describe(self) -> str:
        """One line for the log."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        many = "one process" if self.world == 1 else f"{self.world} processes"
        return f"{many} on {name}, {socket.gethostname()}"


@contextmanager
def process_group() -> Iterator[Process]:
    """Join the other processes torchrun started, if any, and leave them at the end. NCCL with one
    GPU a process if there are any, else gloo on the CPU. ConfigError: this machine has too few;
    ProcessLost."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    backend, device_id, device = "gloo", None, torch.device("cpu")
    if torch.cuda.is_available():
        backend, device_id = "nccl", (device := torch.device("cuda", local_rank))
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(f"{local_rank + 1} processes, but {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group(backend, device_id=device_id)
    stopped = None
    try:
        yield Process(rank, world, device)
    except SystemExit as error:  # after Ctrl-C, in all processes
        stopped = error
    except RuntimeError as error:
        if "gloo/transport" in str(error) or isinstance(error, dist.DistError):
            raise ProcessLost(f"process {rank} of {world} lost another one") from error
        raise
    # Not after an error: the others may be waiting in a collective, and this would wait for them.
    if world > 1:
        dist.destroy_process_group()
    if stopped:
        raise stopped


def note(text: str) -> None:
    """A sentence for the user on stderr; of several processes, from the main one."""
    if os.environ.get("RANK", "0") == "0":
        print(f"Note: {text}", file=sys.stderr)


def leave(text: str, lost: bool) -> NoReturn:
    """End this process, one of several, at once with an error: others may be waiting for it in a
    collective, and an orderly exit would wait for them. torchrun then stops them.

    The long report that it prints last has ``text``, which is in the file that it named. ``lost``:
    the cause is the end of another process, of which torchrun must hear first.
    """
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if lost or not report or os.environ["RANK"] == "0":
        print(text, file=sys.stderr, flush=True)
    if report:
        time.sleep(1 if lost else 0)
        said = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(report).write_text(json.dumps({"message": said}))
    os._exit(1)


def peak_memory_gb(device: torch.device) -> float:
    """Most memory that this process had so far: of its GPU, else of the machine; in 10^9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over processes, in place; returns its argument."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def from_main(value: str) -> str:
    """The main process's text, in every process."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def copy_from_main(tensors: Iterable[torch.Tensor]) -> None:
    """Give all processes the main one's values, in place."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.broadcast(tensor, 0)


def any_process(*flags: bool, device: torch.device) -> list[bool]:
    """Of each flag whether any process has it set."""
    if not dist.is_initialized():
        return list(flags)
    return all_reduce_sum(torch.tensor(flags, dtype=torch.float32, device=device)).bool().tolist()


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def pick_precision(precision: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The autocast dtype for ``run.precision`` and why, in words."""
    if precision != "auto":
        return getattr(torch, precision), "asked for"
    if device.type != "cuda":
        return torch.float32, "on a CPU"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "this GPU has it"
    return torch.float16, "this GPU has no bfloat16"


@contextmanager
def stop_signals(tell: bool) -> Iterator[Callable[[], bool]]:
    """Note Ctrl-C and SIGTERM instead of dying: yields a function that says whether one came. A
    second Ctrl-C is obeyed at once; with ``tell``, the first signal is answered on the terminal."""
    received = []

    def note(number: int, _frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if tell and not received:  # not by print, which the signal may have interrupted
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once, unsaved\n")
        received.append(number)

    previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    except Exception:
        if dist.is_initialized():  # torchrun stops the rest once one is gone: first say why
            previous[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
