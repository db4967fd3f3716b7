"""A second transcript of every item, and a corpus of those where both agree (how KALL-E's second-stage data was made)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lhotse import fastcopy
from lhotse.cut import Cut

from kalle.audio import Audio
from kalle.data.corpus.cuts import check_target, corpus_cuts, corpus_digest, load_audio, write_derived
from kalle.data.corpus.diagnosis import AGREEMENT_NAME, ITEMS_NAME, write_agreement_figure
from kalle.data.corpus.measures import ItemProgress, MeasuredItem, Measures, audio_stamp, item_of
from kalle.data.shared_work import ResumeJournal
from kalle.errors import UserError
from kalle.files import fingerprint, output_folder, write_jsonl
from kalle.text.languages import has_words, language_code, language_of_name

MADE_BY = "kalle data retranscribe"
TRANSCRIPTS_NAME = "transcripts.jsonl"
KEEP, ASR, FILL = "keep", "asr", "fill"
TEXTS = (KEEP, ASR, FILL)
"""Which text an item gets: its own; the recogniser's; its own, or the recogniser's where it has none."""
_APOSTROPHES = re.compile("[\u2018\u2019\u201b\u02bc\u2032\uff07\u0060\u00b4](?=\\w)")
"""Signs that are typed for the apostrophe of a word, which a recogniser writes plainly."""
PER_CHARACTER = frozenset({"zh", "yue", "ja", "th", "lo", "km", "my"})
"""Languages written without spaces: errors are counted by character."""


@dataclass(frozen=True)
class Recogniser:
    """A recogniser and how its transcript is compared, both from the layers above."""

    transcribe: Callable[[Audio, int, str], str]
    """Mono float32 (S,), sample rate in Hz, two-letter language -> text."""
    tokens: Callable[[str, str], list[str]]
    """Text, language -> tokens to compare."""
    errors: Callable[[Sequence[str], Sequence[str]], int]
    """Reference tokens (at least one), hypothesis tokens -> substitutions, deletions and insertions."""
    description: Mapping[str, object]
    """The settings that determine the transcripts: model, decoding, versions."""
    max_seconds: float
    """The recogniser reads no more of an item than that."""
    one_script: Callable[[str, str], str] = lambda text, language: text
    """Text, language -> the text in the one script in which both texts are compared, character by character: simplified Chinese."""


@dataclass(frozen=True)
class RetranscribeOptions:
    """When two transcripts agree, and which of them is kept."""

    max_error_rate: float = 0.1
    """Errors per token of the item's own text."""
    text: str = KEEP
    language: str = ""
    """Of items that name none."""

    def __post_init__(self) -> None:
        if self.text not in TEXTS:
            raise UserError(f"text: got '{self.text}', expected one of {', '.join(TEXTS)}; correct it")
        if not self.max_error_rate >= 0:
            raise UserError(f"max_error_rate: got {self.max_error_rate}, expected at least 0; correct it")
        if self.language and language_code(self.language) is None:
            raise UserError(f"language: got '{self.language}', expected an ISO 639 code such as en or zh, or an English name; correct it")


@dataclass(frozen=True)
class TranscriptDecision:
    """The decision on one item; ``reason`` says why it was removed, and is empty for one that stays."""

    split: str
    id: str
    seconds: float
    text: str
    transcript: str
    errors: int | None
    tokens: int | None
    reason: str
    new_text: str = ""

    @property
    def error_rate(self) -> float | None:
        """Errors per token; None where there was nothing to compare."""
        return None if self.errors is None or not self.tokens else self.errors / self.tokens


def retranscribe_corpus(
    corpus: Path, out: Path, recogniser: Recogniser, options: RetranscribeOptions, progress: ItemProgress
) -> dict[str, Any]:
    """Write to ``out`` a prepared corpus of the items of ``corpus`` on which both transcripts agree; returns its report.

    transcripts.jsonl keeps every transcript, so an interrupted run continues and another threshold costs nothing; items.jsonl says
    what became of each item; agreement.png shows the error rates. UserError for a folder that is no prepared corpus, an ``out`` that
    holds something else, an item without a language, and when no training item is left.
    """
    check_target(out, corpus, MADE_BY, others=(TRANSCRIPTS_NAME,))
    cuts = corpus_cuts(corpus)
    items = {key: item_of(cut, key[0], Measures(seconds=float(cut.duration))) for key, cut in cuts.items()}
    languages = {key: _language(item, options) for key, item in items.items()}
    with output_folder(out):
        transcripts = _transcripts(cuts, languages, out, recogniser, progress)
        verdicts = [compare_transcripts(item, languages[key], transcripts.get(key), recogniser, options) for key, item in items.items()]
        source = {"corpus": str(corpus.resolve()), "digest": corpus_digest(corpus)}
        report = {"source": source, "recogniser": dict(recogniser.description), "options": asdict(options), **agreement_report(verdicts)}
        write_jsonl(out / ITEMS_NAME, [{**asdict(verdict), "error_rate": verdict.error_rate} for verdict in verdicts])
        write_agreement_figure(out, verdicts, options.max_error_rate)
        kept = _kept(cuts, verdicts)
        mark = fingerprint([source["digest"], dict(recogniser.description), asdict(options)])
        write_derived(out, kept, report, agreement_markdown(report), MADE_BY, mark)
    return report


def _language(item: MeasuredItem, options: RetranscribeOptions) -> str:
    language = language_of_name(item.language) or language_of_name(options.language)
    if not language:
        raise UserError(f"no language: got none for '{item.id}', expected one such as en; set language")
    return language


def _transcripts(
    cuts: Mapping[tuple[str, str], Cut], languages: Mapping[tuple[str, str], str], out: Path, recogniser: Recogniser, progress: ItemProgress
) -> dict[tuple[str, str], dict[str, Any]]:
    """The journal entry of every cut that fits the recogniser's window: its transcript, or why its audio could not be read."""
    stamps = {key: f"{languages[key]}:{cut.start:.6f}+{cut.duration:.6f}:{audio_stamp(cut)}" for key, cut in cuts.items()}
    journal = ResumeJournal(out / TRANSCRIPTS_NAME, json.dumps(dict(recogniser.description), sort_keys=True))
    try:
        done = {(entry["split"], entry["id"]): entry for entry in journal.entries}
        done = {key: entry for key, entry in done.items() if stamps.get(key) == entry["stamp"]}
        waiting = [key for key, cut in cuts.items() if key not in done and cut.duration <= recogniser.max_seconds]

        def results() -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
            for key in waiting:
                yield key, _transcribe(cuts[key], languages[key], recogniser)

        for key, result in progress(results(), len(waiting)):
            done[key] = {"split": key[0], "id": key[1], "stamp": stamps[key], **result}
            journal.add(done[key])
    finally:
        journal.close()
    return done


def _transcribe(cut: Cut, language: str, recogniser: Recogniser) -> dict[str, Any]:
    try:
        audio = load_audio(cut, int(cut.sampling_rate))
    except UserError as error:
        return {"problem": str(error)[:300]}
    return {"transcript": recogniser.transcribe(audio, int(cut.sampling_rate), language)}


def compare_transcripts(
    item: MeasuredItem, language: str, result: dict[str, Any] | None, recogniser: Recogniser, options: RetranscribeOptions
) -> TranscriptDecision:
    """Compare the item's own text with the transcript, and say which text it gets."""
    transcript = str((result or {}).get("transcript", ""))
    facts: dict[str, Any] = {"split": item.split, "id": item.id, "seconds": item.sound.seconds, "text": item.text, "transcript": transcript}
    nothing: dict[str, Any] = {**facts, "errors": None, "tokens": None}
    if result is None:
        return TranscriptDecision(**nothing, reason=f"longer than {recogniser.max_seconds:g} s")
    if "problem" in result:
        return TranscriptDecision(**nothing, reason="unreadable")
    if not item.text:
        if options.text != FILL:
            return TranscriptDecision(**nothing, reason="no text")
        return TranscriptDecision(**nothing, reason="" if has_words(transcript) else "nothing heard", new_text=transcript)
    first = _tokens(item.text, language, recogniser) if has_words(item.text) else []
    if not first:
        return TranscriptDecision(**nothing, reason="text without words")
    errors = recogniser.errors(first, _tokens(transcript, language, recogniser))
    agrees = errors <= options.max_error_rate * len(first)
    new_text = transcript if options.text == ASR else item.text
    return TranscriptDecision(
        **facts, errors=errors, tokens=len(first), reason="" if agrees else "disagrees", new_text=new_text if agrees else ""
    )


def _tokens(text: str, language: str, recogniser: Recogniser) -> list[str]:
    tokens = recogniser.tokens(recogniser.one_script(_APOSTROPHES.sub("'", text), language), language)
    return list("".join(tokens)) if language in PER_CHARACTER else tokens


def _kept(cuts: Mapping[tuple[str, str], Cut], verdicts: Sequence[TranscriptDecision]) -> dict[str, list[Cut]]:
    """The cuts that stay, with their texts, by split."""
    kept: dict[str, list[Cut]] = {split: [] for split, _ in cuts}
    for verdict in verdicts:
        if verdict.reason:
            continue
        cut = cuts[verdict.split, verdict.id]
        if verdict.new_text != verdict.text:
            said = [fastcopy(cut.supervisions[0], text=verdict.new_text)]
            cut = fastcopy(cut, supervisions=said)
        kept[verdict.split].append(cut)
    return kept


OTHER_THRESHOLDS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)


def agreement_report(verdicts: Sequence[TranscriptDecision]) -> dict[str, Any]:
    """The numbers of report.json; ``items`` = kept + left out, always."""
    kept = [verdict for verdict in verdicts if not verdict.reason]
    compared = [verdict for verdict in verdicts if verdict.error_rate is not None]
    tokens = sum(verdict.tokens or 0 for verdict in compared)
    return {
        "items": len(verdicts),
        "kept": len(kept),
        "kept_by_split": dict(Counter(verdict.split for verdict in kept)),
        "hours": round(sum(verdict.seconds for verdict in kept) / 3600, 5),
        "hours_before": round(sum(verdict.seconds for verdict in verdicts) / 3600, 5),
        "new_texts": sum(verdict.new_text != verdict.text for verdict in kept),
        "left_out_by_reason": dict(Counter(verdict.reason for verdict in verdicts if verdict.reason).most_common()),
        "compared": len(compared),
        "error_rate_of_all_tokens": round(sum(verdict.errors or 0 for verdict in compared) / tokens, 4) if tokens else None,
        "kept_at_other_rates": {f"{rate:g}": sum((verdict.error_rate or 0.0) <= rate for verdict in compared) for rate in OTHER_THRESHOLDS},
    }


def agreement_markdown(report: dict[str, Any]) -> str:
    """The text of report.md."""
    lines = [
        f"# Transcribed a second time: {report['source']['corpus']}",
        "",
        f"{report['kept']} of {report['items']} items kept ({report['hours']:.3f} of {report['hours_before']:.3f} hours), where at most "
        f"{report['options']['max_error_rate']:g} errors a token lie between the two transcripts.",
        f"Text: {report['options']['text']}; {report['new_texts']} items have a new one.",
        "",
        f"Recogniser: {', '.join(f'{name} {value}' for name, value in report['recogniser'].items())}.",
        f"Errors per token over all {report['compared']} compared items: {report['error_rate_of_all_tokens']}.",
        "",
        f"![error rates]({AGREEMENT_NAME})",
        "",
        "| left out | items |",
        "| --- | --- |",
        *[f"| {reason} | {count} |" for reason, count in report["left_out_by_reason"].items()],
        "",
        "| at most so many errors a token | items kept |",
        "| --- | --- |",
        *[f"| {rate} | {count} |" for rate, count in report["kept_at_other_rates"].items()],
        "",
    ]
    return "\n".join(lines)
