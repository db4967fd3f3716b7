"""lhotse manifests to a `Source`: what its recipes return, and what its users keep."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lhotse import CutSet, MonoCut, Recording, RecordingSet, SupervisionSegment, SupervisionSet, load_manifest_lazy

from kalle.data.corpora.items import Rejection, Source, SourceItem, unique
from kalle.data.prepare_files import safe_id
from kalle.errors import UserError

LANGUAGE_CODES = {"english": "en", "chinese": "zh", "mandarin": "zh", "zh-hk": "yue"}
_WHOLE_S = 1e-3
_LAYOUT = "expected cuts*.jsonl.gz, or *recordings*.jsonl.gz beside *supervisions*.jsonl.gz of the same name (lhotse manifests)"


def split_of_part(part: str) -> str | None:
    """Valid or test for a part that is named so (dev-clean, test_other …), None for the rest, which trains unless shares hold some out."""
    name = part.lower()
    if name.startswith(("dev", "valid", "eval")):
        return "valid"
    return "test" if name.startswith("test") else None


def language_code(name: str | None) -> str:
    """ISO 639 code of a language by its English name, or of a locale such as zh-CN; "" for None."""
    lowered = (name or "").strip().lower().replace("_", "-")
    return LANGUAGE_CODES.get(lowered, lowered.split("-")[0])


def from_manifests(
    recordings: RecordingSet, supervisions: SupervisionSet, split: str | None, rejected: list[Rejection], language: str = ""
) -> Iterator[SourceItem]:
    """An item for each supervision; one whose audio is no local file goes to ``rejected``."""
    by_id = {recording.id: recording for recording in recordings}
    for supervision in supervisions:
        recording = by_id.get(supervision.recording_id)
        if recording is None:
            rejected.append(Rejection(safe_id(supervision.id), "", "missing", f"no recording '{supervision.recording_id}' in the manifest"))
            continue
        yield from _item(recording, supervision, supervision.start, split, rejected, language)


def from_cuts(cuts: CutSet, split: str | None, rejected: list[Rejection], language: str = "") -> Iterator[SourceItem]:
    """An item for each supervision of each cut; cuts that are mixed, padded or without a recording go to ``rejected``."""
    for cut in cuts:
        if not isinstance(cut, MonoCut) or cut.recording is None:
            rejected.append(Rejection(safe_id(cut.id), "", "unreadable", f"got a {type(cut).__name__}, expected a MonoCut of a recording"))
            continue
        if not cut.supervisions:
            rejected.append(Rejection(safe_id(cut.id), "", "no text", "a cut without a supervision"))
        for supervision in cut.supervisions:
            yield from _item(cut.recording, supervision, cut.start + supervision.start, split, rejected, language)


def _item(
    recording: Recording, supervision: SupervisionSegment, start: float, split: str | None, rejected: list[Rejection], language: str
) -> Iterator[SourceItem]:
    item_id = safe_id(supervision.id)
    if len(recording.sources) != 1 or recording.sources[0].type != "file":
        kinds = ", ".join(source.type for source in recording.sources)
        rejected.append(Rejection(item_id, "", "unreadable", f"got audio from {kinds}, expected one file; write it to a file first"))
        return
    whole = start < _WHOLE_S and abs(supervision.duration - recording.duration) < _WHOLE_S
    yield SourceItem(
        item_id,
        Path(recording.sources[0].source).resolve(),
        supervision.text or "",
        supervision.speaker or "unknown",
        language_code(supervision.language) or language,
        split,
        start_s=0.0 if whole else start,
        duration_s=None if whole else supervision.duration,
        channel=supervision.channel if recording.num_channels > 1 and isinstance(supervision.channel, int) else None,
        custom=plain_fields({"gender": supervision.gender, **(supervision.custom or {})}),
    )


def plain_fields(fields: dict[str, Any]) -> dict[str, Any] | None:
    """Those fields that are text or numbers, None when there are none."""
    return {key: value for key, value in fields.items() if isinstance(value, str | int | float) and value != ""} or None


def read_lhotse(path: Path, speaker: str = "unknown", language: str = "") -> Source:
    """A cuts file, or a folder of such files or of recordings and supervisions, as lhotse's own recipes write them.

    Parts named dev or test are valid and test. Relative audio paths count from the working directory, as in lhotse. Raises UserError
    for a path without manifests.
    """
    rejected: list[Rejection] = []
    items: list[SourceItem] = []
    pairs = _manifest_files(path)
    for first, second in pairs:
        split = next((found for word in first.name.split(".")[0].split("_") if (found := split_of_part(word))), None)
        try:
            manifests = [load_manifest_lazy(file) for file in (first, second) if file is not None]
        except Exception as error:
            raise UserError(f"cannot read '{first}' ({type(error).__name__}: {error}); {_LAYOUT}; write it again with lhotse") from None
        if second is None:
            items += from_cuts(manifests[0], split, rejected, language)
        else:
            items += from_manifests(manifests[0], manifests[1], split, rejected, language)
    named = [_with_speaker(item, speaker) for item in items]
    return Source(path.resolve().name.split(".")[0], unique(named, rejected), rejected, {"lhotse manifests": len(pairs)})


def _with_speaker(item: SourceItem, speaker: str) -> SourceItem:
    from dataclasses import replace

    return item if item.speaker != "unknown" else replace(item, speaker=speaker)


def _manifest_files(path: Path) -> list[tuple[Path, Path | None]]:
    """(cuts, None) or (recordings, supervisions)."""
    if path.is_file():
        return [(path, None)]
    if not path.is_dir():
        raise UserError(f"not found: got '{path}', {_LAYOUT}; check the path")
    files = sorted(file for file in path.iterdir() if ".jsonl" in file.suffixes)
    pairs: list[tuple[Path, Path | None]] = []
    for file in files:
        if "recordings" in file.name:
            supervisions = file.with_name(file.name.replace("recordings", "supervisions"))
            if not supervisions.is_file():
                raise UserError(f"no '{supervisions.name}' beside '{file}': {_LAYOUT}; write both")
            pairs.append((file, supervisions))
    pairs = pairs or [(file, None) for file in files if "cuts" in file.name]
    if not pairs:
        raise UserError(f"no manifests in '{path}': {_LAYOUT}; check the path")
    return pairs
