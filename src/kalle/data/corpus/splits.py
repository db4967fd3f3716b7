"""Train, valid or test by a hash of the normalised text, so that one text never sits on two sides."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kalle.errors import UserError

SPLITS = ("train", "valid", "test")


def normalised(text: str) -> str:
    """Case, punctuation, accents' encoding and spacing removed: what two readings of one text have in common.

    Apostrophes vanish ("we're" is "were"), every other sign becomes a space. May be empty.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).replace("'", "").replace("\u2019", "")
    # Marks (M*) belong to the letter before them in scripts such as Devanagari.
    spaced = "".join(char if unicodedata.category(char)[0] in "LNM" else " " for char in folded)
    return " ".join(spaced.split())


def word_count(text: str) -> int:
    """Number of words of the normalised text."""
    return len(normalised(text).split())


@dataclass(frozen=True)
class SplitPolicy:
    """Shares of distinct texts held out, by length: texts outside [min_words, max_words] use shares times ``outside_scale``.

    Short prompts say little about quality and are needed in training; very long ones would eat the training minutes.
    """

    valid_share: float = 0.02
    test_share: float = 0.02
    seed: int = 0
    min_words: int = 0
    max_words: int = 1_000_000
    outside_scale: float = 1.0

    def __post_init__(self) -> None:
        if min(self.valid_share, self.test_share) < 0 or self.valid_share + self.test_share >= 1:
            raise UserError(
                f"split shares: got valid {self.valid_share} and test {self.test_share}, expected both >= 0 and a sum below 1; change them"
            )

    def assign(self, text: str) -> str:
        """The split of ``text``: a function of its normalised form and the seed alone, not of the rest of the corpus."""
        key = normalised(text)
        scale = 1.0 if self.min_words <= len(key.split()) <= self.max_words else self.outside_scale
        position = self._position(key)
        if position < self.test_share * scale:
            return "test"
        return "valid" if position < (self.test_share + self.valid_share) * scale else "train"

    def _position(self, key: str) -> float:
        digest = hashlib.sha256(f"{self.seed}\n{key}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    def completed(self, texts: Sequence[str], splits: Sequence[str], fixed: Collection[str] = ()) -> list[str]:
        """``splits`` of ``texts`` with at least one text in training and in each part that has a share, if there are texts enough.

        A small corpus has parts that no hash falls into. Such a part gets the text of the lowest hash out of the largest other one, all
        items of it. ``fixed`` are the parts that hold items of their own besides.
        """
        keys = [normalised(text) for text in texts]
        found = dict(zip(keys, splits, strict=True))
        wanted = {"train": True, "valid": self.valid_share > 0, "test": self.test_share > 0}
        for part in (part for part, share in wanted.items() if share and part not in fixed):
            counts = Counter(found.values())
            if not counts[part] and counts and max(counts.values()) > 1:
                largest = max(SPLITS, key=lambda name: counts[name])
                found[min((key for key, split in found.items() if split == largest), key=self._position)] = part
        return [found[key] for key in keys]
