"""Common Voice: train.tsv, dev.tsv and test.tsv beside clips/, for one language or several.

Read here and not by lhotse's recipe, which demands columns that only some releases have, knows some of the languages, and passes over
missing clips.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from kalle.data.corpora.items import Rejection, Source, SourceItem
from kalle.data.corpora.layout import collected
from kalle.data.corpora.manifests import language_code, plain_fields, split_of_part
from kalle.data.prepare_files import read_lines, safe_id
from kalle.errors import UserError

TABLES = ("train.tsv", "dev.tsv", "test.tsv")
_LAYOUT = "expected LANGUAGE/train.tsv, dev.tsv, test.tsv and LANGUAGE/clips/*.mp3, there or in a folder cv-corpus-…"
_KEPT = ("age", "gender", "accents", "accent", "variant")


def read_common_voice(folder: Path) -> Source:
    """The validated clips that train, dev and test name, with client ids as speakers and the locale folder as language.

    Clips that no such table names (validated, invalidated and other have more) are not looked at. Raises UserError for another layout.
    """
    if not folder.is_dir():
        raise UserError(f"folder not found: got '{folder}', {_LAYOUT} (Common Voice); check the path")
    roots = [folder, *sorted(folder.glob("*/")), *sorted(folder.glob("*/*/"))]
    locales = [root for root in roots if (root / "clips").is_dir() and any((root / table).is_file() for table in TABLES)]
    if not locales:
        raise UserError(f"not the layout of Common Voice: got '{folder}', {_LAYOUT}; name the folder that holds these")
    rejected: list[Rejection] = []
    items: list[SourceItem] = []
    for locale in locales:
        for table in TABLES:
            if (locale / table).is_file():
                items += _rows(locale, locale / table, rejected)
    names = ", ".join(locale.resolve().name for locale in locales)
    return collected("Common Voice", items, rejected, {"locales": names})


def _rows(locale: Path, table: Path, rejected: list[Rejection]) -> Iterator[SourceItem]:
    # Sentences hold unbalanced quotation marks, which mean nothing here.
    rows = csv.DictReader(read_lines(table), delimiter="\t", quoting=csv.QUOTE_NONE)
    missing = {"path", "sentence", "client_id"} - set(rows.fieldnames or ())
    if missing:
        raise UserError(f"cannot read '{table}': no column {', '.join(sorted(missing))}; expected a table of Common Voice; unpack it again")
    clips = (locale / "clips").resolve()
    split = split_of_part(table.stem)
    for row in rows:
        name = row["path"] or ""
        audio = clips / (name if Path(name).suffix else f"{name}.mp3")
        item_id = safe_id(Path(name).with_suffix("").name)
        if not name or not audio.is_file():
            rejected.append(Rejection(item_id, str(audio), "missing", f"named in {table.name}, but not in clips"))
            continue
        language = language_code(row.get("locale") or locale.resolve().name)
        custom = plain_fields({key: row.get(key) or "" for key in _KEPT})
        yield SourceItem(item_id, audio, row["sentence"] or "", row["client_id"] or "unknown", language, split, custom=custom)
