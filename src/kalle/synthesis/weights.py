"""Where weights are: a folder of this machine, those that ship with this package, or a repository on the hub that is fetched once."""

from __future__ import annotations

import re
from pathlib import Path

from kalle.checkpoint import CONFIG_NAME, permission_errors, read_json
from kalle.convert import CONVERTED
from kalle.convert.release import holds_release, release_folder
from kalle.errors import UserError

CKPT = Path("ckpt")
"""Where released weights are looked for, and their copies put, in the current folder."""
SHIPPED = "kalle-nano"
"""The model that ships with this package."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@permission_errors()
def resolve_weights(
    folder_or_hub_id: str | Path, revision: str | None = None, *, local_files_only: bool = False, cache: Path | None = None
) -> Path:
    """The weight folder that ``folder_or_hub_id`` means; one that is not there is returned as it is, for its reader to refuse.

    ``SHIPPED`` is the model that ships, where no folder here has its name. A folder wins; a ``Path``, and a text whose first part is a
    folder here, is never taken for a hub id. Anything else of the form OWNER/NAME is fetched into ``cache`` (by default the assets folder
    of the hub's own cache) the first time, and not asked for again until another ``revision`` is wanted. Released .pt files, in a folder
    or fetched, are converted beside themselves once.
    UserError when the hub cannot give them, or ``local_files_only`` forbids asking and they were never fetched.
    """
    folder = Path(folder_or_hub_id)
    if str(folder) == SHIPPED and not folder.is_dir():
        return shipped_weights()
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


def shipped_folder() -> Path | None:
    """The folder of the model that ships: inside the installed package, or in ckpt/ of a checkout; None where there is none."""
    package = Path(__file__).resolve().parents[1]
    candidates = [root / CKPT / SHIPPED for root in (package, package.parents[1])]
    return next((folder for folder in candidates if (folder / CONFIG_NAME).is_file()), None)


def shipped_weights() -> Path:
    """``shipped_folder``, or a UserError where there is none."""
    folder = shipped_folder()
    if folder is None:
        raise UserError(
            f"no weights: this installation lacks {SHIPPED}, the model that ships with it; install kalle again, fetch the released files "
            "with `kalle download`, train a model (make quickstart), or give a weight folder with --model"
        )
    return folder


def default_weights(ckpt: Path = CKPT) -> Path:
    """What speaks when nobody says what: the released weights in ``ckpt``, converted now if they are not yet, else the model that ships.

    UserError when neither is there, or the released files cannot be converted.
    """
    return release_folder(ckpt) if holds_release(ckpt) else shipped_weights()


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
