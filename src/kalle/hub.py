"""Files of a repository on the Hugging Face Hub: fetched with resume, and checked against the hub's own metadata.

``huggingface_hub`` asks and authenticates; the transfer is ours, because its own starts again from nothing after an interruption.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

from kalle.errors import UserError
from kalle.files import lock_descriptor, output_folder, unwritable, write_atomic
from kalle.progress import progress_bar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

DEFAULT_REPOSITORY = "kxxia/KALL-E"
RECORD_NAME = "download.json"
"""Beside the files: where they come from; it is written last, so its presence says that they are all there."""
WANTED = (".pt", ".safetensors", ".json", ".model", ".jinja")
"""Suffixes of weights, configurations and tokenizers; the rest of a repository (model card, samples) is not needed to speak."""
TRIES_WITHOUT_PROGRESS = 5
TIMEOUT_SECONDS = 30.0
_CHUNK = 1 << 20
_MEGABYTE = 1e6
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubFile:
    """One file as the hub describes it."""

    name: str
    """Path inside the repository, with forward slashes."""
    size: int
    """Bytes."""
    digest: str
    """SHA-256 (hex) of the content of a large file, the git blob SHA-1 of a small one: the hub's etag."""

    def problem(self, path: Path) -> str | None:
        """The defect of the copy at ``path``; None when it is byte for byte the hub's."""
        size = path.stat().st_size
        if size != self.size:
            return f"it has {size} bytes, the hub's has {self.size}"
        is_sha256 = len(self.digest) == hashlib.sha256().digest_size * 2
        digest = hashlib.sha256() if is_sha256 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        found = digest.hexdigest()
        return None if found == self.digest else f"its {digest.name} is {found[:12]}…, the hub's {self.digest[:12]}…"


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit."""

    repository: str
    commit: str
    files: tuple[HubFile, ...]
    """Those that are wanted."""
    left_out: tuple[str, ...]
    """The others."""


def download(
    repository: str, out: Path, revision: str | None = None, endpoint: str | None = None, pause_seconds: float = 1.0
) -> tuple[Snapshot, list[str]]:
    """Bring the weights of ``repository`` (OWNER/NAME) into ``out``; returns what the hub has and the names fetched now.

    A file that is there and equals the hub's stays; one that differs is fetched again. An interrupted transfer leaves NAME.*.partial and
    continues there next time; a file has its name only once it is whole and checked. ``revision`` is a branch, tag or commit,
    ``endpoint`` another hub than the public one (or HF_ENDPOINT). UserError when the hub refuses or cannot be reached, or the disk is full.
    """
    with quiet_http(), plain_errors(repository, revision, endpoint):
        snapshot = list_files(repository, revision, endpoint)
        if snapshot.left_out:
            _log.info("not needed and left out: %s", ", ".join(snapshot.left_out))
        with output_folder(out):
            todo = [file for file in snapshot.files if not _is_there(file, out / file.name)]
            _check_room(todo, out)
            with progress_bar() as bar:
                for file in todo:
                    task = bar.add_task(f"{file.name} (MB)", total=file.size / _MEGABYTE)
                    report = partial(_advance, bar, task)
                    _fetch(snapshot, file, out, endpoint, pause_seconds, report)
            names = [file.name for file in snapshot.files]
            record = {"repository": repository, "revision": revision, "commit": snapshot.commit, "files": names}
            write_atomic(out / RECORD_NAME, json.dumps(record, indent=2) + "\n")
    return snapshot, [file.name for file in todo]


def _advance(bar: Progress, task: TaskID, done_bytes: int) -> None:
    bar.update(task, completed=done_bytes / _MEGABYTE)


def list_files(repository: str, revision: str | None = None, endpoint: str | None = None) -> Snapshot:
    """Ask the hub for the files of ``repository`` with their sizes and hashes. UserError when the answer lacks them."""
    from huggingface_hub import HfApi

    info = HfApi(endpoint=endpoint).model_info(repository, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
    wanted: list[HubFile] = []
    left_out: list[str] = []
    for sibling in info.siblings or []:
        name, size = sibling.rfilename, sibling.lfs.size if sibling.lfs else sibling.size
        digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        if not name.endswith(WANTED) or name == RECORD_NAME:
            left_out.append(name)
            continue
        if size is None or digest is None or info.sha is None or _escapes(name):
            raise UserError(f"the hub's metadata of '{repository}' cannot be used: got {sibling}, expected a plain path, a size and a hash")
        wanted.append(HubFile(name, size, digest))
    if not wanted:
        raise UserError(f"no weights in '{repository}': got {len(left_out)} files, expected some of {', '.join(WANTED)}; check the id")
    return Snapshot(repository, str(info.sha), tuple(wanted), tuple(left_out))


def _escapes(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\\" in name


def _is_there(file: HubFile, path: Path) -> bool:
    if not path.is_file():
        return False
    problem = file.problem(path)
    if problem is None:
        _log.info("%s is there and equals the hub's", file.name)
        return True
    _log.warning("%s differs from the hub's: %s; fetching it again", file.name, problem)
    return False


def _partial(file: HubFile, out: Path) -> Path:
    """Where a file grows; its digest is in the name, so that what another revision left is not continued."""
    path = out / file.name
    return path.with_name(f"{path.name}.{file.digest[:8]}.partial")


def _check_room(files: list[HubFile], out: Path) -> None:
    have = sum(growing.stat().st_size for file in files if (growing := _partial(file, out)).is_file())
    need, free = sum(file.size for file in files) - have, shutil.disk_usage(out).free
    if need > free:
        raise unwritable(out, f"{need / 1e9:.1f} GB are to come and {free / 1e9:.1f} GB are free")


def _fetch(snapshot: Snapshot, file: HubFile, out: Path, endpoint: str | None, pause_seconds: float, report: Callable[[int], None]) -> None:
    """Bring one file; a UserError when what arrives is not what the hub says it is, twice."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(snapshot.repository, file.name, revision=snapshot.commit, endpoint=endpoint)
    growing, problem = _partial(file, out), None
    try:
        growing.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            _receive(url, growing, file, pause_seconds, report)
            problem = file.problem(growing)
            if problem is None:
                os.replace(growing, out / file.name)
                _log.info("%s: %.1f MB, checked", file.name, file.size / _MEGABYTE)
                return
            growing.unlink()
            _log.warning("%s arrived damaged: %s; fetching it again", file.name, problem)
    except OSError as error:
        if error.errno is None:
            raise
        raise unwritable(growing, error) from None
    finally:
        _tidy(growing, out)
    raise UserError(f"'{file.name}' arrives damaged: {problem}; try again later, or fetch it by other means")


def _tidy(growing: Path, out: Path) -> None:
    """Take away a file that nothing was received for, and the folders made for it."""
    with contextlib.suppress(OSError):
        if not growing.stat().st_size:
            growing.unlink()
    with contextlib.suppress(OSError):
        for folder in growing.relative_to(out).parents[:-1]:
            (out / folder).rmdir()


def _receive(url: str, growing: Path, file: HubFile, pause_seconds: float, report: Callable[[int], None]) -> None:
    """Append to ``growing`` until it has the size of ``file``, continuing where it ended, after breaks of the connection too."""
    tries = 0
    with _open_growing(growing) as stream:
        if stream.tell() > file.size:
            stream.truncate(0)
        if stream.tell():
            _log.info("%s: continuing at %.1f of %.1f MB", file.name, stream.tell() / _MEGABYTE, file.size / _MEGABYTE)
        while (have := stream.tell()) < file.size:
            reason = "it sent nothing"
            try:
                _append(url, stream, have, file.size, report)
            except Exception as error:
                if not is_connection_error(error):
                    raise
                reason = first_line(error)
            stream.flush()
            tries = 0 if stream.tell() > have else tries + 1
            if tries == TRIES_WITHOUT_PROGRESS:
                raise UserError(
                    f"the connection broke at {have / _MEGABYTE:.1f} of {file.size / _MEGABYTE:.1f} MB of '{file.name}' ({reason}); "
                    "run the same command again to continue from there"
                )
            if stream.tell() < file.size:
                _log.warning("%s: the connection broke (%s); continuing at %.1f MB", file.name, reason, stream.tell() / _MEGABYTE)
                time.sleep(pause_seconds)


def _append(url: str, stream: BinaryIO, have: int, size: int, report: Callable[[int], None]) -> None:
    """One request for what is missing; a server that ignores the range starts over."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    headers = build_hf_headers(library_name="kalle") | {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_SECONDS) as response:
        if response.status_code == 416:
            stream.truncate(0)
            return
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        if have and response.status_code != 206:
            stream.truncate(0)
        for chunk in response.iter_bytes():  # of any size: what has come by the time of a break is kept
            stream.write(chunk)
            report(stream.tell())
            if stream.tell() > size:
                return


def _open_growing(growing: Path) -> BinaryIO:
    """The file at its end, for this process alone; a link in its place is not followed."""
    stream = os.fdopen(os.open(growing, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666), "ab")
    if lock_descriptor(stream.fileno()) is False:
        stream.close()
        raise UserError(f"in use: another download is writing '{growing}'; wait for it or choose another folder")
    return stream


@contextmanager
def quiet_http() -> Iterator[None]:
    """The HTTP client logs every request as news; inside, it does not."""
    loggers = [logging.getLogger(name) for name in ("httpx", "httpx2")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def plain_errors(repository: str, revision: str | None, endpoint: str | None) -> Iterator[None]:
    """An error of the hub's library as one line with a remedy."""
    from huggingface_hub import constants, errors

    hub = endpoint or constants.ENDPOINT
    by_hand = "or put the released files into the folder by hand"
    try:
        yield
    except errors.HFValidationError:
        raise UserError(f"not a hub id: got '{repository}', expected OWNER/NAME, such as kxxia/KALL-E") from None
    except errors.OfflineModeIsEnabled:
        raise UserError(f"offline: HF_HUB_OFFLINE is set, so '{repository}' cannot be fetched; unset it, {by_hand}") from None
    except errors.GatedRepoError:
        raise UserError(
            f"not allowed: '{repository}' asks its users to accept terms; accept them at {hub}/{repository} and log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"no such revision: '{repository}' has no '{revision}', expected a branch, tag or commit; check revision") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"no such repository on {hub}, or no access to it: got '{repository}'; check the id, or log in with `hf auth login`"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        remedy = "check the id, and log in with `hf auth login`" if status in (401, 403) else "try again later"
        raise UserError(f"the hub {hub} refuses '{repository}' with status {status}: {first_line(error)}; {remedy}") from None
    except json.JSONDecodeError:
        raise UserError(f"not a hub: '{hub}' answers with something else; check HF_ENDPOINT and the network's login page") from None
    except Exception as error:
        if not is_connection_error(error):
            raise
        raise UserError(f"cannot reach the hub {hub} ({first_line(error)}); check the connection, {by_hand}") from None


def is_connection_error(error: BaseException) -> bool:
    """Whether ``error`` means a connection that cannot be made or broke, as opposed to an answer."""
    # The hub's library has changed its HTTP client more than once; each has a TransportError for a connection that fails.
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def first_line(error: BaseException) -> str:
    """The first line of ``error``; its type when it has none."""
    return (str(error).strip().splitlines() or [""])[0].strip() or type(error).__name__
