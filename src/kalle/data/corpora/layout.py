"""What the readers of published corpora share: finding the folder that was meant, and saying what was expected."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kalle.data.corpora.items import Rejection, Source, SourceItem, unique
from kalle.errors import UserError


def find_root(folder: Path, patterns: tuple[str, ...], corpus: str, layout: str) -> Path:
    """``folder``, or the one folder inside it, that holds something of each of ``patterns``; else a UserError that tells the layout."""
    if not folder.is_dir():
        raise UserError(f"folder not found: got '{folder}', expected {corpus}: {layout}; check the path")
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    found = [root for root in (folder, *inside) if all(any(root.glob(pattern)) for pattern in patterns)]
    if found and (found[0] == folder or len(found) == 1):
        return found[0]
    if found:
        names = ", ".join(root.name for root in found)
        raise UserError(f"more than one copy of {corpus} in '{folder}': got {names}, expected one; name that folder")
    raise UserError(f"not the layout of {corpus}: got '{folder}', expected {layout}; name the folder that holds these")


def collected(corpus: str, items: Iterable[SourceItem], rejected: list[Rejection], notes: dict[str, object] | None = None) -> Source:
    """A Source in which every id is there once; a UserError when a corpus has nothing in it."""
    kept = unique(list(items), rejected)
    if not kept and not rejected:
        raise UserError(f"nothing found of {corpus}: got 0 recordings, expected some; is it unpacked completely?")
    return Source(corpus, kept, rejected, notes or {})
