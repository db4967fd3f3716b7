"""``kalle data retranscribe``: transcribe a corpus a second time and keep where both transcripts agree."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from kalle.data.corpus.retranscribe import Recogniser


def retranscribe(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS", help="folder that `kalle prepare` wrote")],
    out: Annotated[Path, typer.Option(help="the corpus folder to write")],
    max_wer: Annotated[float, typer.Option(help="most errors per word (per character in Chinese, Japanese, Thai …)")] = 0.1,
    text: Annotated[str, typer.Option(help="text of the kept items: keep (their own), asr, or fill (asr where there is none)")] = "keep",
    language: Annotated[str, typer.Option(help="of items that name none, such as en")] = "",
    asr: Annotated[str, typer.Option(help="folder of a CTranslate2 Whisper, a packaged model's name, or auto")] = "auto",
    decoding: Annotated[str, typer.Option(help="protocol (greedy) or beam5")] = "beam5",
    normaliser: Annotated[
        str, typer.Option(help="what is compared: whisper (numbers, contractions unified), seed_tts, kalle_authors")
    ] = "whisper",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto")] = "auto",
    compute_type: Annotated[str, typer.Option(help="CTranslate2's, such as int8, float16, float32")] = "int8",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 for all")] = 0,
) -> None:
    """Transcribe every item with a speech recogniser and write a corpus of the items whose text agrees with the transcript.

    An interrupted run goes on, and another --max-wer or --text uses the transcripts that are there.
    """
    from kalle.cli.data_doctor import measuring
    from kalle.data.corpus.retranscribe import RetranscribeOptions, retranscribe_corpus

    options = RetranscribeOptions(max_error_rate=max_wer, text=text, language=language)
    with measuring(out, "transcribe") as progress:
        languages = _languages(corpus, language)
        settings = {"model": asr, "decoding": decoding, "device": device, "compute_type": compute_type, "threads": threads}
        report = retranscribe_corpus(corpus, out, recogniser(normaliser, languages, **settings), options, progress)
    reasons = ", ".join(f"{count} {reason}" for reason, count in report["left_out_by_reason"].items()) or "none"
    typer.echo(f"{report['kept']} of {report['items']} items, {report['hours'] * 60:.1f} minutes, in {out}; left out: {reasons}")


def recogniser(normaliser: str, languages: list[str], **asr: Any) -> Recogniser:
    """faster-whisper and a named normaliser as the layer of the data wants them; ``asr`` goes to `FasterWhisper`."""
    from kalle.audio import Audio, resample
    from kalle.data.corpus.retranscribe import Recogniser
    from kalle.evaluation.asr import WINDOW_SAMPLES, FasterWhisper
    from kalle.evaluation.metrics import RATE_HZ
    from kalle.evaluation.word_errors import normaliser as named
    from kalle.evaluation.word_errors import require_zhconv, word_errors

    tokens = named(normaliser)
    whisper = FasterWhisper(languages=languages, **asr)

    def one_script(text: str, language: str) -> str:
        if language not in ("zh", "yue"):
            return text
        require_zhconv()
        import zhconv

        # Not zh-cn, which also puts the words of one country for those of another.
        return str(zhconv.convert(text, "zh-hans"))

    def transcribe(audio: Audio, rate_hz: int, language: str) -> str:
        return one_script(whisper(resample(audio, rate_hz, RATE_HZ), language), language)

    return Recogniser(
        transcribe=transcribe,
        tokens=tokens,
        errors=lambda reference, hypothesis: word_errors(reference, hypothesis).errors,
        one_script=one_script,
        description={**whisper.describe(), "normaliser": normaliser},
        max_seconds=WINDOW_SAMPLES / RATE_HZ,
    )


def _languages(corpus: Path, default: str) -> list[str]:
    """The languages that the items name, for the choice of a model."""
    from kalle.data.corpus.cuts import corpus_cuts

    named = {(cut.supervisions[0].language if cut.supervisions else None) or default for cut in corpus_cuts(corpus).values()}
    return sorted(language.lower().replace("_", "-").split("-")[0] for language in named if language) or ["en"]
