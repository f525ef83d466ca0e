"""A store's place: a local directory, or a URL that fsspec opens."""

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import fsspec
import zarr
from fsspec.implementations.local import LocalFileSystem
from zarr.storage import FsspecStore, LocalStore

LEASE = "build/lease.json"
"""Who writes a store, see ``lease``; no part of it."""


class StoreError(RuntimeError):
    """A store is missing, foreign, incomplete, of another version, or damaged."""


def filesystem(url: str) -> tuple[Any, str]:
    """Fsspec's filesystem and path of a url. Raises StoreError: protocol unknown, not installed."""
    try:
        return fsspec.url_to_fs(str(url))
    except (ImportError, ValueError) as error:
        raise StoreError(f"{url}: {error}") from error


def is_local(url: str) -> bool:
    """Whether a store is on this machine's filesystem."""
    return isinstance(filesystem(url)[0], LocalFileSystem)


def absolute(url: str) -> str:
    """A local path made absolute, since workers may run elsewhere; other urls as they are."""
    fs, path = filesystem(url)
    return path if isinstance(fs, LocalFileSystem) else str(url)


def file_sha256(path: Path) -> str:
    """Of a local file's bytes, 64 hex digits; OSError: it can't be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find(url: str, below: str = "") -> dict[str, int]:
    """All files of a store but its lease, or of one folder, listed afresh: key to size in bytes."""
    fs, path = filesystem(url)
    fs.invalidate_cache()
    with _reaching(url):
        found = fs.find(f"{path}/{below}" if below else path, detail=True)
    # s3fs names the folder itself if it comes into being between two of its requests.
    there = {name: info["size"] for name, info in found.items() if info["type"] != "directory"}
    sizes = {name.removeprefix(f"{path}/"): size for name, size in there.items()}
    return {key: size for key, size in sizes.items() if key != LEASE}


def zarr_store(url: str, read_only: bool) -> LocalStore | FsspecStore:
    """Zarr's store object of a store."""
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        return LocalStore(path, read_only=read_only)
    return FsspecStore.from_url(str(url), read_only=read_only)


def open_group(url: str, mode: Literal["r", "r+"]) -> zarr.Group:
    """The root group of a store. StoreError: it is out of reach."""
    with _reaching(url):
        return zarr.open_group(zarr_store(url, read_only=mode == "r"), mode=mode, zarr_format=3)


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Whatever a remote filesystem raises, which is what it likes, in one sentence."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        no_network = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
        if isinstance(error, no_network) or is_local(url):
            raise
        raise StoreError(f"{url} is out of reach: {str(error) or repr(error)}") from error


def this_process() -> dict[str, Any]:
    """Names this process to others: ``host``, ``pid``, and in which ``system`` the pid counts."""
    names = (Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid"))
    known = [os.readlink(p) if p.is_symlink() else p.read_text() for p in names if p.exists()]
    return {"host": socket.gethostname(), "pid": os.getpid(), "system": "".join(known)}


def named(process: dict[str, Any]) -> str:
    """A process in a message, as :func:`this_process` gave it."""
    known = process.keys() >= {"pid", "host"}
    return f"process {process['pid']} on {process['host']}" if known else "another process"


@contextmanager
def locked(file: Path, error: type[RuntimeError], doing: str) -> Iterator[None]:
    """Keep other processes out of the ``with`` block, who get an ``error`` that names this one and
    says what it is ``doing`` ("is training …"); a kill lets go. The same ``error``: the filesystem
    knows no locks."""
    file.parent.mkdir(parents=True, exist_ok=True)
    held = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise error(f"{_owner(file)} {doing}") from None
        except OSError as reason:
            raise error(f"cannot lock {file}: {reason}; put it elsewhere") from reason
        with suppress(OSError):  # a full disk: a lock without its owner's name
            os.ftruncate(held, 0)
            os.write(held, json.dumps(this_process()).encode())
        yield
    finally:
        os.close(held)


def lock_owner(file: Path) -> str | None:
    """The process that holds a lock, for a message; None: nobody."""
    try:
        with file.open() as looking:
            fcntl.flock(looking, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _owner(file)
    except OSError:  # no such file, or no locks there
        pass
    return None


def _owner(file: Path) -> str:
    try:
        return named(json.loads(file.read_text()))
    except ValueError:  # it has just got the lock
        return named({})
