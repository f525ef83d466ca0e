"""One writer of a store at a time. A local store has a lock file beside it, which ends with its
process. An object store knows no locks: there ``build/lease.json`` says who writes it, and changes
as long as that process lives. Whoever comes next watches it: two machines' clocks differ."""

import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from occfeat_targets.store.files import (
    LEASE,
    StoreError,
    filesystem,
    is_local,
    lock_owner,
    locked,
    named,
    this_process,
)

_BEAT_S = 2.0
"""Between changes of a lease."""
_DEAD_S = 30
"""A lease that has not changed for so long has no owner any more."""


@contextmanager
def one_writer(url: str) -> Iterator[Callable[[], None]]:
    """Keep other builds of a store out of the ``with`` block, by a StoreError that names this
    process. Yields what raises one if another took over, since this one had stopped for long."""
    doing = f"is building {url} now: wait for it, or stop it and run this again"
    if lock := _lock_file(url):
        with locked(lock, StoreError, doing):
            yield lambda: None
        return
    lease = _Lease(url)
    lease.take(doing)
    try:
        yield lease.require
    finally:
        lease.give_back()


def writer_of(url: str) -> str | None:
    """The process that builds a store at this moment, for a message; None: nobody, as it seems."""
    if lock := _lock_file(url):
        return lock_owner(lock)
    with suppress(Exception):  # remote filesystems raise what they like
        lease = _Lease(url)
        found = lease.read()
        if found and lease.lives(found, seconds=5):
            return named(found)
    return None


def _lock_file(url: str) -> Path | None:
    place = Path(filesystem(url)[1]).resolve()
    return place.with_name(f".{place.name}.lock") if is_local(url) else None


class _Lease:
    def __init__(self, url: str):
        self._url = url
        self._fs, root = filesystem(url)
        self._path = f"{root}/{LEASE}"
        self._mine = this_process() | {"id": uuid.uuid4().hex, "beats": 0}
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)

    def take(self, doing: str) -> None:
        """Raises StoreError: a living process has it, and is ``doing`` something."""
        while True:
            found = self.read()
            if not found:
                try:
                    self._write("create")
                    return self._beats.start()
                except OSError as error:  # FileExistsError, but not from all object stores
                    if not self.read() and not isinstance(error, FileExistsError):
                        raise
            elif self.lives(found, _DEAD_S):
                raise StoreError(f"{named(found)} {doing}")
            elif self.read() == found:
                self._fs.rm_file(self._path)

    def require(self) -> None:
        """Raises StoreError: it is another's by now."""
        if (found := self.read()).get("id") != self._mine["id"]:
            raise StoreError(
                f"{named(found)} took over {self._url}, as this one had stopped for {_DEAD_S} s or "
                "more: once that is finished, run this again"
            )

    def give_back(self) -> None:
        self._ended.set()
        self._beats.join()
        with suppress(Exception):  # gone, or out of reach: it will be taken over
            self.require()
            self._fs.rm_file(self._path)
            self._fs.rmdir(self._path.rpartition("/")[0])

    def read(self) -> dict[str, Any]:
        """What it says; empty: there is none."""
        try:
            data = self._fs.cat_file(self._path)
        except FileNotFoundError:
            return {}
        try:
            return dict(json.loads(data))
        except (ValueError, TypeError):
            return {"text": data}

    def lives(self, found: dict[str, Any], seconds: int) -> bool:
        """Whether the lease that was found changes within so many seconds."""
        for second in range(seconds):
            if _is_dead(found):
                return False
            if second == 5:
                print(f"waiting {seconds} s for a sign of {named(found)}", file=sys.stderr)
            time.sleep(1)
            if (now := self.read()) != found:
                return bool(now)
        return False

    def _write(self, mode: str) -> None:
        self._fs.pipe_file(self._path, json.dumps(self._mine).encode(), mode=mode)

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_S):
            with suppress(Exception):  # the network may be away for a while
                self.require()
                self._mine["beats"] += 1
                self._write("overwrite")


def _is_dead(process: dict[str, Any]) -> bool:
    """Whether it is known to be: it ran on this very system."""
    if process.get("system") != this_process()["system"]:
        return False
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        pass
    return False
