"""The cuts of a prepared corpus."""

from __future__ import annotations

from pathlib import Path

from lhotse import CutSet
from lhotse.cut import Cut

from kalle.errors import UserError


def load_cuts(corpus: str | Path, split: str) -> list[Cut]:
    """The cuts of ``split`` in the folder that ``kalle prepare`` wrote, their audio paths made absolute.

    UserError when the folder is no prepared corpus, is unfinished, or lacks the split.
    """
    root = Path(corpus).resolve()
    if not (root / ".completed").is_file():
        raise UserError(
            f"not a prepared corpus: got '{corpus}', expected cuts_*.jsonl.gz and .completed in it; run `kalle prepare` to the end"
        )
    path = root / f"cuts_{split}.jsonl.gz"
    if not path.is_file():
        found = splits_of(root)
        raise UserError(
            f"no split '{split}' in '{corpus}': found {', '.join(found) or 'none'}; name one of them or run `kalle prepare` again"
        )
    # A path that is absolute already stays as it is: pathlib drops what stands before it.
    return [cut.with_recording_path_prefix(root) for cut in CutSet.from_jsonl_lazy(path)]


def splits_of(corpus: str | Path) -> list[str]:
    """The names of the splits of a corpus folder, sorted; none when it isn't one."""
    return sorted(file.name.removeprefix("cuts_").removesuffix(".jsonl.gz") for file in Path(corpus).glob("cuts_*.jsonl.gz"))
