"""The voices that come with the weights: one of every speaker, made from a recording that training did not see."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from asterisk import VOICES as PROMPTS
from corpora import LANGUAGES, SYNTHETIC, present

from kalle.checkpoint import CONFIG_NAME, read_json, write_json
from kalle.cli.stages import Stages
from kalle.errors import UserError
from kalle.evaluation.test_list import TestItem, choose_prompt, read_test_list
from kalle.files import write_atomic

ATTRIBUTION = "ATTRIBUTION.md"
SYNTHETIC_LICENCE = "Apache-2.0"


@dataclass(frozen=True)
class BuiltIn:
    """A voice to make."""

    name: str
    corpus: str
    """Name of the corpus with its recordings."""
    licence: str
    consent: str
    speaker: str | None = None
    """One of the corpus' speakers, where it has several."""
    recording: str | None = None
    """Id of the recording to make it from; the recipe chooses one without."""

    @property
    def language(self) -> str:
        """Of the recording, ISO 639-1."""
        return self.corpus if self.corpus in LANGUAGES else "en"


def _recorded(name: str, language: str) -> BuiltIn:
    voice = PROMPTS[language]
    credit = "; ".join(voice.credit)
    return BuiltIn(name, language, voice.licence, f"publication of the recordings under {voice.licence} ({voice.licence_url}). {credit}")


def _kokoro(name: str, *parts: str, blend: str | None = None, recording: str | None = None) -> BuiltIn:
    """A voice of Kokoro's style vector ``parts``, or of the mean of several, which the corpus calls ``blend`` (speak.py)."""
    of = f"its style vector {parts[0]}" if blend is None else f"the mean of its style vectors {', '.join(parts)}, nobody's voice"
    return BuiltIn(name, "kokoro", SYNTHETIC_LICENCE, f"a synthetic voice: Kokoro-82M (Apache-2.0), {of}", blend or parts[0], recording)


BUILT_IN = (
    BuiltIn("hibari", SYNTHETIC, SYNTHETIC_LICENCE, "a synthetic voice: the one inside hibari-tts 0.2.1 (Apache-2.0)"),
    _kokoro("heart", "af_heart"),
    _kokoro("aoede", "af_aoede", recording="af_aoede-s054503"),
    _kokoro("bella", "af_bella"),
    _kokoro("isabella", "bf_isabella"),
    _kokoro("robin", "af_aoede", "bf_alice", "af_sky", blend="blend_15", recording="blend_15-s058863"),
    _kokoro("emma", "bf_emma"),
    _kokoro("michael", "am_michael"),
    _kokoro("rowan", "am_onyx", "bm_lewis", blend="blend_01"),
    _kokoro("wren", "af_aoede", "af_jessica", blend="blend_02"),
    _recorded("allison", "en"),
    _recorded("june", "fr"),
    _recorded("carlo", "it"),
    _recorded("ivrvoice", "ru"),
)
DEFAULT = BUILT_IN[0].name


def prompt_of(voice: BuiltIn, corpora: Path) -> TestItem:
    """The recording that ``voice`` is made from: of the validation split, so that the test split stays unheard.

    A speaker of many may have none there and then gives one of training; UserError without one. A voice that names its recording has that
    one, of either split, where the corpus has it.
    """
    lists = [read_test_list(corpora / voice.corpus / f"cuts_{split}.jsonl.gz").items for split in ("valid", "train")]
    named = [item for items in lists for item in items if item.id == voice.recording]
    if named:
        return named[0]
    try:
        return choose_prompt(lists[0], speaker=voice.speaker)
    except UserError:
        return choose_prompt(lists[1], speaker=voice.speaker)


def create_command(voice: BuiltIn, prompt: TestItem, weights: Path) -> list[str]:
    """The `kalle` command that makes ``voice`` in ``weights``/voices, by ear.

    Without the transcript there are no prompt latents: at this size a model that continues a prompt ends after a syllable.
    """
    notes = ["--licence", voice.licence, "--consent", voice.consent, "--description", f"{prompt.speaker}, recording {prompt.id}"]
    words = ["--audio", str(prompt.audio_path), "--language", voice.language]
    return ["voices", "create", "--model", str(weights), "--name", voice.name, *words, *notes, "--force"]


def made_of(corpora: list[str]) -> list[BuiltIn]:
    """Those of `BUILT_IN` whose corpora are there."""
    return [voice for voice in BUILT_IN if voice.corpus in corpora]


def make_voices(stages: Stages, corpora: Path, weights: Path) -> None:
    """Make every voice of `BUILT_IN` in ``weights``, say where they come from, and let `DEFAULT` speak unless told otherwise."""
    for voice in made_of(present(corpora)):
        stages.command(f"voice {voice.name}", *create_command(voice, prompt_of(voice, corpora), weights))
    stages.run("voice notes", lambda: _describe(corpora, weights))


def _describe(corpora: Path, weights: Path) -> None:
    folders = dict.fromkeys(corpora / voice.corpus / ATTRIBUTION for voice in BUILT_IN)
    texts = [path.read_text(encoding="utf-8") for path in folders if path.is_file()]
    made = "".join(f"- {voice.name}: {voice.consent}\n" for voice in made_of(present(corpora)) if voice.licence == SYNTHETIC_LICENCE)
    write_atomic(weights / "voices" / ATTRIBUTION, "\n".join([*texts, f"# Synthetic voices\n\n{made}"]))
    path = weights / CONFIG_NAME
    write_json(path, read_json(path) | {"voice": DEFAULT})
