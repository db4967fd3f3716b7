"""Which recording of a list makes a good prompt."""

from __future__ import annotations

from collections.abc import Sequence

from kalle.data.testlist import TestItem, count_words
from kalle.errors import UserError

USUAL_SECONDS = 5.0
"""Long enough to hear a voice in, short enough to leave a small model its context."""
MIN_WORDS = 4


def choose_prompt(items: Sequence[TestItem], seconds: float = USUAL_SECONDS, speaker: str | None = None) -> TestItem:
    """The recording of ``items`` whose length is nearest to ``seconds``; of equally near ones the first by id.

    Only those of ``speaker`` (of anybody, when None) with a stated length and a text of `MIN_WORDS` words count, for a single word tells
    little of a voice. UserError when there is none.
    """
    usable = [
        item
        for item in items
        if item.audio_path is not None and speaker in (None, item.speaker) and count_words(item.text) >= MIN_WORDS and item.duration_s
    ]
    if not usable:
        whose = "anybody" if speaker is None else f"'{speaker}'"
        raise UserError(
            f"no prompt: got {len(items)} items, expected a recording of {whose} with a text of {MIN_WORDS} words and a stated length; "
            "give another list"
        )
    return min(usable, key=lambda item: (abs((item.duration_s or 0.0) - seconds), item.id))
