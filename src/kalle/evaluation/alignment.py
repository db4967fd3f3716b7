"""Times of words in speech whose text is known, by a Whisper recogniser that is installed."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from kalle.audio import Audio, resample
from kalle.evaluation.asr import AlignedPiece, FasterWhisper, find_asr_model
from kalle.evaluation.metrics import RATE_HZ
from kalle.extras import require

WITHOUT_SPACES = frozenset({"zh", "yue", "ja", "th", "lo", "my", "km"})
"""Languages whose words Whisper's tokenizer splits where the text has no space."""


class WordAligner:
    """Word times by the cross-attention of a Whisper recogniser, which is loaded at the first use; for several threads.

    The method is that of faster-whisper's ``find_alignment``, dynamic time warping over the attention of chosen heads
    (Radford et al. 2022, arXiv 2212.04356, and openai/whisper's timing.py).
    """

    def __init__(self, model: str = "auto", threads: int = 1) -> None:
        """``model`` as `find_asr_model` takes it; ``threads`` of the CPU."""
        self._model, self._threads, self._lock = model, threads, threading.Lock()
        self._recognisers: dict[str, FasterWhisper] = {}

    def check(self, language: str) -> None:
        """UserError where no recogniser of ``language`` is installed, naming what to install, or none knows it."""
        require("faster_whisper", "eval", "times of words")
        with self._lock:
            self._recogniser(language).check_language(language)

    def __call__(self, audio: Audio, sample_rate: int, text: str, language: str) -> list[AlignedPiece]:
        """The words of ``text``, punctuation included, in order with their times in mono float32 (S,) that says it; [] for no samples.

        UserError as `check` raises it, and for audio of more than 30 s.
        """
        with self._lock:
            pieces = self._recogniser(language).align(resample(audio, sample_rate, RATE_HZ), text, language)
        return words_of(pieces, text, language, len(audio) / sample_rate)

    def _recogniser(self, language: str) -> FasterWhisper:
        name = find_asr_model(self._model, [language]).name
        if name not in self._recognisers:
            self._recognisers[name] = FasterWhisper(self._model, threads=self._threads, languages=[language])
        return self._recognisers[name]


def words_of(pieces: Iterable[AlignedPiece], text: str, language: str, seconds: float) -> list[AlignedPiece]:
    """The words of ``text``, separated by its spaces, with the times of the ``pieces`` that spell them, none beyond ``seconds``.

    A word that no piece spells has no time and is left out. In a language `WITHOUT_SPACES` a piece is a word.
    """
    found = [piece for piece in pieces if piece.text.strip()]
    if language in WITHOUT_SPACES:
        return [AlignedPiece(piece.text.strip(), min(piece.start_s, seconds), min(piece.end_s, seconds)) for piece in found]
    ends, at = [], 0  # of each piece, in characters that are no space
    for piece in found:
        at += len("".join(piece.text.split()))
        ends.append(at)
    words: list[AlignedPiece] = []
    begin, first = 0, 0
    for word in text.split():
        end = begin + len(word)
        while first < len(found) and ends[first] <= begin:
            first += 1
        last = first
        while last + 1 < len(found) and ends[last] < end:
            last += 1
        if first < len(found):
            words.append(AlignedPiece(word, min(found[first].start_s, seconds), min(found[last].end_s, seconds)))
        begin = end
    return words
