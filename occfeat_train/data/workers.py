"""Reading processes: how they start, and that they end when the main process does."""

import atexit
import ctypes
import multiprocessing
import os
import signal
from contextlib import suppress
from functools import partial
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from threading import Thread

import torch
from torch.utils.data import DataLoader

from occfeat_train.data.dataset import FrameDataset
from occfeat_train.data.order import ShardSampler

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def make_loader(
    dataset: FrameDataset,
    batches: ShardSampler | list[list[int]],
    workers: int,
    start_method: str,
    pin_memory: bool,
) -> DataLoader:
    """A loader of the dataset's collated ``batches``; iterate it once per epoch.

    Workers stay for the next epoch, whose batches are read from ``batches`` when its iteration
    begins. An epoch may be abandoned: what was read ahead is thrown away. No ``workers`` read in
    this process; pinned memory is for asynchronous copies to a GPU.
    """
    loader = partial(
        DataLoader,
        dataset,
        batch_sampler=batches,
        collate_fn=dataset.collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else each epoch draws from the global random state
    )
    if workers == 0:
        return loader()
    context = multiprocessing.get_context(start_method)
    if start_method == "forkserver":  # imports once, not once per worker
        context.set_forkserver_preload(["__main__", __name__])
        previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which the server inherits
        forkserver.ensure_running()
        signal.signal(signal.SIGTERM, previous)
    return loader(
        num_workers=workers,
        multiprocessing_context=context,
        persistent_workers=True,
        worker_init_fn=_start_worker,
    )


def _start_worker(worker: int) -> None:
    """Set up a worker process."""
    # Ctrl-C reaches workers too, and torchrun and Slurm send SIGTERM to all processes; but it is
    # the main process that decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # torch's workers watch their parent process, which under forkserver is the server: after a
    # kill -9 of the main process both would stay for ever.
    Thread(target=_exit_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    # Keep freed memory. Else glibc gives a whole batch back each time, and the page faults to get
    # it again take about a sixth of a worker's time.
    with suppress(AttributeError, OSError):  # no glibc, no such problem
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


@atexit.register
def _end_workers() -> None:
    """Kill the workers that are left when this process exits, say after an error. multiprocessing
    would end them by SIGTERM, which they ignore, and then wait for them for ever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _exit_with(main_process: BaseProcess) -> None:
    """Wait until the main process is gone, then go too."""
    main_process.join()
    os._exit(1)
