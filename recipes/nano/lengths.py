"""Texts of 1 to 60 words out of sentences that training did not see: what a model says when there is little to say, or much."""

from __future__ import annotations

import random
from collections.abc import Sequence

WORDS = range(1, 61)


def texts_of_all_lengths(sentences: Sequence[str], count: int, seed: int = 0) -> list[dict[str, str]]:
    """``count`` items {"id", "text"} whose lengths run through `WORDS` again and again, so that every prefix has short and long ones.

    One word is a sentence of one word while there are some, else the first word of another; more words are sentences one behind the
    other, the last one cut, and closed with a full stop. The same texts for the same ``sentences`` and ``seed``.
    """
    assert sentences, "no sentences to make texts of"
    generator = random.Random(seed)
    ordered = sorted(set(sentences))
    order = generator.sample(WORDS, len(WORDS))
    alone = _Deck([sentence for sentence in ordered if len(sentence.split()) == 1] or [s.split()[0] for s in ordered], generator)
    deck = _Deck([sentence for sentence in ordered if len(sentence.split()) > 1] or ordered, generator)
    items = []
    for index in range(count):
        wanted = order[index % len(order)]
        text = closed(alone.draw()) if wanted == 1 else _joined(deck, wanted)
        items.append({"id": f"words{wanted:02d}-{index:04d}", "text": text})
    return items


def closed(text: str) -> str:
    """``text`` with a sign at its end that ends a sentence."""
    return text if text[-1] in ".!?" else text.rstrip(" ,;:-") + "."


def _joined(deck: _Deck, wanted: int) -> str:
    words: list[str] = []
    while len(words) < wanted:
        words += closed(deck.draw()).split()
    return closed(" ".join(words[:wanted]))


class _Deck:
    """Draws from a shuffled list, shuffled anew when it is used up."""

    def __init__(self, values: Sequence[str], generator: random.Random) -> None:
        self.values, self.generator, self.left = list(values), generator, list[str]()

    def draw(self) -> str:
        if not self.left:
            self.left = self.generator.sample(self.values, len(self.values))
        return self.left.pop()
