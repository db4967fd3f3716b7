"""Where weights are: a folder of this machine, or a repository on the Hugging Face Hub that is fetched once."""

from __future__ import annotations

import re
from pathlib import Path

from kalle.checkpoint import permission_errors, read_json
from kalle.convert import CONVERTED
from kalle.convert.once import holds_release, release_folder
from kalle.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@permission_errors()
def resolve_weights(
    folder_or_hub_id: str | Path, revision: str | None = None, *, local_files_only: bool = False, cache: Path | None = None
) -> Path:
    """The weight folder that ``folder_or_hub_id`` means; one that is not there is returned as it is, for its reader to refuse.

    A folder wins; a ``Path``, and a text whose first part is a folder here, is never taken for a hub id. Anything else of the form
    OWNER/NAME is fetched into ``cache`` (by default the assets folder of the hub's own cache) the first time, and not asked for again
    until another ``revision`` is wanted. Released .pt files, in a folder or fetched, are converted beside themselves once.
    UserError when the hub cannot give them, or ``local_files_only`` forbids asking and they were never fetched.
    """
    folder = Path(folder_or_hub_id)
    if isinstance(folder_or_hub_id, Path) or folder.is_dir() or (folder.parent.is_dir() and folder.parent != Path()):
        return _speaking(folder)
    if not _HUB_ID.fullmatch(folder_or_hub_id):
        return folder
    folder = (cache or _assets(folder_or_hub_id)) / (revision or "main").replace("/", "--")
    if not _is_complete(folder):
        if local_files_only:
            raise UserError(
                f"not here: got '{folder_or_hub_id}' with local_files_only, but it was never fetched and is no folder; "
                "allow the download, or give a weight folder"
            )
        from kalle.hub import download

        download(folder_or_hub_id, folder, revision)
    return _speaking(folder)


def _speaking(folder: Path) -> Path:
    """``folder``, or what is converted from the released files in it, or beside which it is about to be."""
    if folder.name == CONVERTED and not folder.is_dir() and holds_release(folder.parent):
        return release_folder(folder.parent)
    return release_folder(folder) if not (folder / "lm").is_dir() and holds_release(folder) else folder


def _assets(hub_id: str) -> Path:
    from huggingface_hub import cached_assets_path

    return cached_assets_path("kalle", hub_id, "weights")


def _is_complete(folder: Path) -> bool:
    """Whether a download into ``folder`` was finished, and nothing of it was taken away since."""
    from kalle.hub import RECORD_NAME

    record = folder / RECORD_NAME
    if not record.is_file():
        return False
    names = read_json(record).get("files")
    return isinstance(names, list) and all((folder / str(name)).is_file() for name in names)
