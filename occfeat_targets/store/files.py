"""A store's place: a local directory, or a URL that fsspec opens."""

import fcntl
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import fsspec
import zarr
from fsspec.implementations.local import LocalFileSystem
from zarr.storage import FsspecStore, LocalStore


class StoreError(RuntimeError):
    """A store is missing, foreign, incomplete, of another version, or damaged."""


def filesystem(url: str) -> tuple[Any, str]:
    """Fsspec's filesystem and path of a url. Raises StoreError: protocol unknown, not installed."""
    try:
        return fsspec.url_to_fs(str(url))
    except (ImportError, ValueError) as error:
        raise StoreError(f"{url}: {error}") from error


def absolute(url: str) -> str:
    """A local path made absolute, since workers may run elsewhere; other urls as they are."""
    fs, path = filesystem(url)
    return path if isinstance(fs, LocalFileSystem) else str(url)


def find(url: str, below: str = "") -> dict[str, int]:
    """All files of a store, or of one of its folders, listed afresh: key to size in bytes."""
    fs, path = filesystem(url)
    fs.invalidate_cache()
    found = fs.find(f"{path}/{below}" if below else path, detail=True)
    return {name.removeprefix(f"{path}/"): info["size"] for name, info in found.items()}


def zarr_store(url: str, read_only: bool) -> LocalStore | FsspecStore:
    """Zarr's store object of a store."""
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        return LocalStore(path, read_only=read_only)
    return FsspecStore.from_url(str(url), read_only=read_only)


def open_group(url: str, mode: Literal["r", "r+"]) -> zarr.Group:
    """The root group of a store."""
    return zarr.open_group(zarr_store(url, read_only=mode == "r"), mode=mode, zarr_format=3)


@contextmanager
def locked(file: Path, busy: RuntimeError) -> Iterator[None]:
    """Keep other processes out of the ``with`` block, who get ``busy`` raised; a kill lets go. An
    error of the same class: the filesystem knows no locks."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError as error:
            raise type(busy)(f"cannot lock {file}: {error}; put it elsewhere") from error
        yield


def one_writer(url: str) -> AbstractContextManager[None]:
    """Keeps other builds of a store out of a ``with`` block, by StoreError and a file beside the
    store. On an object store nothing does that yet."""
    fs, path = filesystem(url)
    if not isinstance(fs, LocalFileSystem):
        return nullcontext()
    busy = f"{url} is being built by another process: wait for that, or stop it"
    place = Path(path).resolve()
    return locked(place.with_name(f".{place.name}.lock"), StoreError(busy))
