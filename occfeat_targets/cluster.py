"""Where tasks run: in this process or on Dask, local or not. Only this module imports dask."""

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing import resource_tracker
from typing import Any

import torch

WORKER_BYTES = 1_500_000_000
"""What one CPU worker is given: teacher, activations and one block."""
_GPU_THREADS = 8
"""Most threads of a GPU worker: JPEG decoding, not the teacher, bounds it."""
_RETRIES = 2
_LOOK_SECONDS = 10
_CONNECT_SECONDS = 10
_GONE_SECONDS = 300
"""How long all workers may be away: a dead one is started again, in minutes on a busy machine."""
_SETTINGS = {
    # Dask gives a worker up for good that is not back after so long, by default 15 s.
    "distributed.deploy.lost-worker-timeout": "1 week",
    # Dask makes malloc give every freed buffer back at once; the teacher's activations are then
    # paged in again for each layer. glibc's largest thresholds keep them.
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": 1 << 30,
    "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_THRESHOLD_": 32 << 20,
    "distributed.worker.profile.enabled": False,
}


class ClusterError(RuntimeError):
    """The cluster can't be reached, a task kills its worker every time, or all workers are gone."""


_listeners: dict[str, Callable[[Any], object]] = {}
"""Of tasks in this process, by topic."""


def tell(topic: str, message: Any) -> None:
    """From within a task, to whoever listens to the topic (:meth:`InProcess.listening`)."""
    if topic in _listeners:
        _listeners[topic](message)
    elif "distributed.worker" in sys.modules:
        from distributed import get_worker

        with suppress(ValueError):  # not in a task
            get_worker().log_event(topic, message)


class InProcess:
    """Everything in this process, one after another: breakpoints work."""

    @contextmanager
    def listening(self, topic: str, heard: Callable[[Any], object]) -> Iterator[None]:
        """Have ``heard(message)`` called, in some thread, for all that tasks :func:`tell`."""
        _listeners[topic] = heard
        try:
            yield
        finally:
            del _listeners[topic]

    def everywhere(self, function: Callable, argument: Any) -> list:
        """``function(argument)`` as often as there are workers, spread over them: the results."""
        return [function(argument)]

    def run(self, function: Callable, jobs: Iterable) -> Iterator[tuple[Any, Any]]:
        """``(job, result)`` or ``(job, exception)`` as jobs end. ``jobs`` is drawn from as workers
        come free, so it may end early: what is running then is still finished and yielded."""
        for job in jobs:
            try:
                result = function(job)
            except Exception as error:
                result = error
            yield job, result


class DaskExecutor:
    """Tasks on a Dask client: few in flight, retried, small results only."""

    def __init__(self, client: Any):
        self._client = client

    def _wait(self, futures: list, how: str) -> set:
        """Those of the futures that are done, if ``how`` all are or the first one is. Raises
        ClusterError if there are no workers any more."""
        from distributed import wait

        seen = time.monotonic()
        while True:
            try:
                found: Any = wait(futures, timeout=_LOOK_SECONDS, return_when=how)
                return found.done
            except TimeoutError:
                if self._client.nthreads():
                    seen = time.monotonic()
                elif time.monotonic() - seen > _GONE_SECONDS:
                    text = f"all workers are gone, for {_GONE_SECONDS} s now: run it again to go on"
                    raise ClusterError(text) from None

    @contextmanager
    def listening(self, topic: str, heard: Callable[[Any], object]) -> Iterator[None]:
        """See :class:`InProcess`."""
        self._client.subscribe_topic(topic, lambda event: heard(event[1]))
        try:
            yield
        finally:
            self._client.unsubscribe_topic(topic)

    def everywhere(self, function: Callable, argument: Any) -> list:
        """See :class:`InProcess`."""
        from distributed import KilledWorker

        # Not pinned to addresses: a worker that dies comes back under another one.
        n = max(1, len(self._client.nthreads()))  # if all are being started again: waits for one
        futures = [self._client.submit(function, argument, pure=False) for _ in range(n)]
        self._wait(futures, "ALL_COMPLETED")
        try:
            return self._client.gather(futures)
        except (KilledWorker, ImportError) as error:
            raise _readable(error) from error

    def run(self, function: Callable, jobs: Iterable) -> Iterator[tuple[Any, Any]]:
        """See :class:`InProcess`. A task whose worker dies is run again elsewhere."""
        jobs = iter(jobs)
        running: dict[Any, Any] = {}

        def top_up() -> None:
            threads = max(1, sum(self._client.nthreads().values()))  # workers come and go
            # One waiting task per thread hides the round trip; more would only hold memory.
            for job in islice(jobs, max(0, 2 * threads - len(running))):
                # One buffer instead of hundreds of small arrays: half the scheduler's time.
                call = (_unpack_and_run, function, pickle.dumps(job))
                future = self._client.submit(*call, retries=_RETRIES, pure=False)
                running[future] = job

        top_up()
        while running:
            for future in self._wait(list(running), "FIRST_COMPLETED"):
                job = running.pop(future)
                error = future.exception()
                yield job, future.result() if error is None else _readable(error)
                top_up()


Executor = InProcess | DaskExecutor
"""Runs functions of one argument on one or many workers."""


def _unpack_and_run(function: Callable, packed: bytes) -> Any:
    return function(pickle.loads(packed))


def _readable(error: BaseException) -> BaseException:
    from distributed import KilledWorker

    if isinstance(error, KilledWorker):
        return ClusterError(
            "its worker died every time (out of memory?): use fewer --workers or smaller "
            "block_frames, or --workers 0 to see the error here"
        )
    if isinstance(error, ImportError):
        return ClusterError(f"a worker lacks a package: {error}; install occfeat[targets] there")
    return error


@contextmanager
def executor(
    workers: int | None = None, threads: int | None = None, scheduler: str | None = None
) -> Iterator[Executor]:
    """Executor for the ``with`` block: at ``scheduler``, a running Dask scheduler's address such as
    ``tcp://host:8786``; or as many ``workers`` here, 0 for none but this process, each with so many
    ``threads`` (tasks at a time). None chooses by cores, memory and GPUs (one worker per GPU).
    Raises ClusterError if the scheduler can't be reached or has no workers, or one can't start."""
    if workers == 0 and scheduler is None:
        yield InProcess()
        return
    import dask.config
    from distributed import Client

    if scheduler is None:
        with (
            dask.config.set(_SETTINGS),
            _deaf_loop() as loop,
            _local_cluster(workers, threads, loop) as cluster,
            Client(cluster) as client,
        ):
            client.register_worker_callbacks(_name_no_locks)
            yield DaskExecutor(client)
        return
    try:
        client = Client(scheduler, timeout=_CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise ClusterError(f"no Dask scheduler at {scheduler}: {error}") from error
    with client:
        if not client.nthreads():
            hint = f"start some with dask worker {scheduler}"
            raise ClusterError(f"the scheduler at {scheduler} has no workers: {hint}")
        yield DaskExecutor(client)


@contextmanager
def _deaf_loop() -> Iterator[Any]:
    """An event loop in a thread that SIGINT does not reach, nor any process that it starts: at a
    Ctrl-C, which a terminal sends to all, this process stops them, and they print nothing."""
    from distributed.utils import LoopRunner

    runner = LoopRunner()
    resource_tracker.ensure_running()  # its start would let SIGINT through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        runner.start()  # threads and processes begin with the mask of their makers
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield runner.loop
    finally:
        runner.stop()


def _name_no_locks() -> None:
    """In a worker: locks, of which numcodecs has one, get no names under this method. A worker that
    is busy at a Ctrl-C is killed, and a named one it leaves behind is complained of."""
    multiprocessing.set_start_method("fork", force=True)


def _local_cluster(workers: int | None, threads: int | None, loop: Any) -> Any:
    from dask.system import CPU_COUNT  # both know of containers' limits
    from distributed import Nanny, Scheduler, SpecCluster
    from distributed.system import MEMORY_LIMIT

    gpus = visible_gpus()
    chosen_workers, chosen_threads = choose(CPU_COUNT, MEMORY_LIMIT, len(gpus))
    workers, threads = workers or chosen_workers, threads or chosen_threads
    quiet: Any = logging.CRITICAL
    options = {"nthreads": threads, "silence_logs": quiet, "dashboard_address": None}
    options["memory_limit"] = MEMORY_LIMIT / workers
    specs = {i: {"cls": Nanny, "options": dict(options)} for i in range(workers)}
    for i in specs if gpus else ():  # each sees one GPU, set before its process imports torch
        specs[i]["options"]["env"] = {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]}
    logging.getLogger("distributed").setLevel(quiet)
    # No dashboard; its server takes any free port, else it warns of other clusters on the machine.
    http = {"dashboard": False, "dashboard_address": "127.0.0.1:0"}
    scheduler = {"cls": Scheduler, "options": http}
    try:
        return SpecCluster(workers=specs, scheduler=scheduler, loop=loop, silence_logs=quiet)
    except RuntimeError as error:
        raise ClusterError(
            f"a worker process ended while it started ({error}; out of memory?): use fewer "
            "--workers, or --workers 0 to work in this process"
        ) from error


def choose(cores: int, memory: int, gpus: int) -> tuple[int, int]:
    """Workers and threads per worker for a machine (memory in bytes)."""
    if gpus:
        return gpus, max(1, min(_GPU_THREADS, cores // gpus))
    return max(1, min(cores, memory // WORKER_BYTES)), 1


def visible_gpus() -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES, one per GPU this process may use."""
    if not torch.cuda.is_available():
        return []
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return listed.split(",")[:count] if listed else [str(i) for i in range(count)]
