"""The Asterisk core sounds (telephone prompts, one studio voice a language) from Debian's packages to a corpus folder.

python recipes/nano/asterisk.py --language en --out runs/nano/corpora/en
kalle prepare embedded --corpus runs/nano/corpora/en --out runs/nano/corpora/en
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile
from debian import download_packages, find_packages, read_package

from kalle.audio import AudioError, load_channels, write_encoded
from kalle.cli.stages import recipe_main
from kalle.data.corpus.items import SplitPolicy, normalised, safe_id, spoken_text
from kalle.data.corpus.lists import REJECTED_NAME, TRANSCRIPTS_NAME
from kalle.errors import UserError
from kalle.files import disk_errors, write_atomic, write_jsonl

BUILD_NAME = "build.json"
SAMPLE_RATE_HZ = 16000
# libsndfile maps its compression level linearly to Opus bit rates: 1 -> 6 kbit/s, 0 -> 256 kbit/s a channel.
OPUS_MIN_KBPS, OPUS_MAX_KBPS = 6.0, 256.0
# At least 60 items of four words or more are needed for a score; texts beyond 20 words stay in training.
PROMPT_SPLIT = SplitPolicy(valid_share=0.12, test_share=0.33, min_words=4, max_words=20, outside_scale=0.1)


@dataclass(frozen=True)
class Voice:
    """One language of the prompts: its locale folder, who speaks, and how the package asks to be credited."""

    locale: str
    speaker: str
    licence: str
    licence_url: str
    credit: tuple[str, ...]


CC_BY_SA = ("CC-BY-SA-3.0", "https://creativecommons.org/licenses/by-sa/3.0/legalcode")
CC_BY = ("CC-BY-3.0", "https://creativecommons.org/licenses/by/3.0/legalcode")
ALLISON = (
    "Copyright 2003-2010, Allison Smith",
    "Recorded by: Allison Smith (http://www.theivrvoice.com)",
    "Financial contributions by: Digium, Inc. (http://www.digium.com)",
)
VOICES = {
    "en": Voice("en_US_f_Allison", "allison-smith", *CC_BY_SA, credit=ALLISON),
    "fr": Voice(
        "fr_CA_f_June",
        "june-wallack",
        *CC_BY_SA,
        credit=(
            "Copyright 2006-2008, June Wallack",
            "Recorded by: June Wallack (http://www.junewallack.com)",
            "Translated into French by: Clod Patry, Kristopher Lalletti, June Wallack",
            "Financial contributions by: Digium, Inc. (http://www.digium.com), Unlimitel (http://www.unlimitel.ca), "
            "BGM Informatique (www.bgm.qc.ca)",
        ),
    ),
    "it": Voice(
        "it_IT_m_Carlo",
        "carlo-flora",
        *CC_BY,
        credit=(
            "Copyright 2012 Carlo Flora, http://www.segreterietelefoniche.it",
            "Recorded by: Carlo Flora (http://www.carloflora.com)",
            "Translated by: Silvia Petrin",
        ),
    ),
    "es": Voice("es_MX_f_Allison", "allison-smith", *CC_BY_SA, credit=ALLISON),
    "ru": Voice(
        "ru_RU_f_IvrvoiceRU",
        "ivrvoice-ru",
        *CC_BY,
        credit=("Copyright 2010, Maxim", "Provided by: Maxim Topal (http://www.ivrvoice.ru)"),
    ),
}


def package_names(language: str) -> list[str]:
    """The two Debian packages of a language: the sounds, and the transcripts with the copyright file."""
    if language not in VOICES:
        raise UserError(f"unknown prompt language: got '{language}', expected one of {', '.join(VOICES)}; change --language")
    return [f"asterisk-core-sounds-{language}-g722", f"asterisk-core-sounds-{language}"]


def build_prompts(
    packages: list[Path],
    language: str,
    out: Path,
    kbps: float = 32.0,
    policy: SplitPolicy = PROMPT_SPLIT,
    progress: Callable[[list[str]], Iterable[str]] = iter,
) -> bool:
    """Write ``out``/audio/*.opus, transcripts.jsonl, rejected.jsonl, ATTRIBUTION.md and LICENSE from the packages.

    ``packages`` are the two .deb files of `package_names`. Files already written by an interrupted run of the
    same build are kept; returns False when all was there. Raises UserError for a damaged or foreign package, and
    when the disk refuses.
    """
    with disk_errors(out):
        return _build(packages, language, out, kbps, policy, progress)


def _build(
    packages: list[Path], language: str, out: Path, kbps: float, policy: SplitPolicy, progress: Callable[[list[str]], Iterable[str]]
) -> bool:
    build = _build_description(packages, language, kbps, policy)
    if _read_build(out) != build:
        shutil.rmtree(out / "audio", ignore_errors=True)
        (out / TRANSCRIPTS_NAME).unlink(missing_ok=True)
        write_atomic(out / BUILD_NAME, json.dumps(build, indent=2) + "\n")
    elif (out / TRANSCRIPTS_NAME).is_file():
        return False
    files = {name: content for package in packages for name, content in read_package(package).items()}
    sounds = _sounds(files, language)
    texts = _texts(files, language)
    kept: list[dict[str, Any]] = []
    rejected = _texts_without_sound(texts, sounds)
    for name in progress(sorted(sounds)):
        row = _convert(name, sounds[name], texts.get(name), out, language, kbps)
        (rejected if "reason" in row else kept).append(row)
    for row in kept:
        row["split"] = policy.assign(row["text"])
    write_atomic(out / "ATTRIBUTION.md", _attribution(language, kbps, build))
    write_atomic(out / "LICENSE", _licence(files, language))
    write_jsonl(out / REJECTED_NAME, sorted(rejected, key=lambda row: row["id"]))
    write_jsonl(out / TRANSCRIPTS_NAME, kept)
    return True


def opus_level(kbps: float) -> float:
    """libsndfile's compression level for an Opus bit rate in kbit/s of one channel."""
    if not OPUS_MIN_KBPS <= kbps <= OPUS_MAX_KBPS:
        raise UserError(f"Opus bit rate: got {kbps} kbit/s, expected {OPUS_MIN_KBPS:.0f} to {OPUS_MAX_KBPS:.0f}; change --kbps")
    return 1.0 - (kbps - OPUS_MIN_KBPS) / (OPUS_MAX_KBPS - OPUS_MIN_KBPS)


def _build_description(packages: list[Path], language: str, kbps: float, policy: SplitPolicy) -> dict[str, Any]:
    opus_level(kbps)
    package_names(language)
    for path in packages:
        if not path.is_file():
            raise UserError(f"package not found: got '{path}', expected a .deb file; download it first")
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in packages}
    return {"language": language, "kbps": kbps, "sample_rate_hz": SAMPLE_RATE_HZ, "split": vars(policy), "packages_sha256": digests}


def _read_build(out: Path) -> dict[str, Any] | None:
    path = out / BUILD_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _sounds(files: dict[str, bytes], language: str) -> dict[str, bytes]:
    prefix, suffix = f"usr/share/asterisk/sounds/{VOICES[language].locale}/", ".g722"
    sounds = {name[len(prefix) : -len(suffix)]: body for name, body in files.items() if name.startswith(prefix) and name.endswith(suffix)}
    if not sounds:
        raise UserError(f"no prompts in the packages: expected {prefix}*{suffix}; give {' and '.join(package_names(language))}")
    return sounds


def _texts(files: dict[str, bytes], language: str) -> dict[str, str]:
    """Prompt name -> text from the ``name: text`` lines; ``;`` starts a comment."""
    name = f"usr/share/doc/asterisk-core-sounds-{language}/core-sounds-{language}.txt"
    packed = files.get(name + ".gz")
    content = gzip.decompress(packed) if packed is not None else files.get(name)
    if content is None:
        raise UserError(f"no transcripts in the packages: expected {name}.gz; give {' and '.join(package_names(language))}")
    lines = [line.partition(":") for line in content.decode("utf-8").splitlines() if line.strip() and not line.startswith(";")]
    return {key.strip(): text.strip() for key, colon, text in lines if colon}


def _texts_without_sound(texts: dict[str, str], sounds: dict[str, bytes]) -> list[dict[str, Any]]:
    return [
        {"id": safe_id(name), "audio": name, "reason": "missing", "detail": f"the transcript has '{text}', the package has no sound"}
        for name, text in texts.items()
        if name not in sounds
    ]


def _convert(name: str, sound: bytes, text: str | None, out: Path, language: str, kbps: float) -> dict[str, Any]:
    """One prompt as a transcript row (its Opus file written) or as a rejected row, which has a ``reason``."""
    if name.startswith("silence/"):
        return _rejected(name, "not speech", f"recorded silence: '{text}'")
    if text is None:
        return _rejected(name, "no text", "the transcript does not list it")
    spoken = spoken_text(text)
    if spoken is None:
        return _rejected(name, "no text", f"a remark inside the text may or may not be spoken: '{text}'")
    if not normalised(spoken):
        return _rejected(name, "not speech", f"the transcript says '{text}'")
    target = out / "audio" / f"{name}.opus"
    try:
        samples = _encode(sound, target, kbps) if not target.is_file() else soundfile.info(target).frames
    except AudioError as error:
        return _rejected(name, error.reason, str(error))
    row: dict[str, Any] = {"id": safe_id(name), "audio": f"audio/{name}.opus", "text": spoken}
    row |= {"duration": round(samples / SAMPLE_RATE_HZ, 4), "speaker": VOICES[language].speaker, "language": language}
    return row | ({"source_text": text} if "".join(text.split()) != "".join(spoken.split()) else {})


def _encode(sound: bytes, target: Path, kbps: float) -> int:
    """Decode raw G.722 and write it as Ogg/Opus; the number of samples (libsndfile returns exactly as many)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    raw = target.with_suffix(".g722")
    try:
        raw.write_bytes(sound)
        channels, rate_hz = load_channels(raw)
    finally:
        raw.unlink(missing_ok=True)
    assert (rate_hz, channels.shape[0]) == (SAMPLE_RATE_HZ, 1), (rate_hz, channels.shape)
    write_encoded(target, channels[0], rate_hz, "OGG", "OPUS", compression_level=opus_level(kbps))
    return channels.shape[1]


def _rejected(name: str, reason: str, detail: str) -> dict[str, Any]:
    return {"id": safe_id(name), "audio": name, "reason": reason, "detail": detail}


def _attribution(language: str, kbps: float, build: dict[str, Any]) -> str:
    voice = VOICES[language]
    packages = ", ".join(sorted(build["packages_sha256"]))
    lines = [f"# Asterisk core sounds, {voice.locale}", "", *[f"- {line}" for line in voice.credit], ""]
    lines += [f"Licence: {voice.licence} ({voice.licence_url}), in full in LICENSE.", ""]
    lines += ["Source: http://downloads.asterisk.org/pub/telephony/asterisk/, as packaged by Debian:", f"{packages}.", ""]
    lines += [
        f"Changes: the G.722 recordings were decoded and encoded again as Ogg/Opus (about {kbps:g} kbit/s, 16 kHz, mono); remarks in",
        "brackets were taken out of the transcripts (`source_text` keeps the original); silence and tones were left out; a",
        "train/valid/test split was added.",
    ]
    return "\n".join(lines) + "\n"


def _licence(files: dict[str, bytes], language: str) -> str:
    """The package's own copyright file, which holds the licence in full."""
    name = f"usr/share/doc/asterisk-core-sounds-{language}/copyright"
    if name not in files:
        raise UserError(f"no copyright file in the packages: expected {name}; give {' and '.join(package_names(language))}")
    return files[name].decode("utf-8")


def main() -> int:
    """Fetch the packages of one language, unless ``--debs`` has them, and build its corpus folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", default="en", choices=VOICES)
    parser.add_argument("--out", type=Path, required=True, help="folder of transcripts.jsonl and audio/")
    parser.add_argument("--debs", type=Path, help="folder of the two .deb files; without it apt-get fetches them")
    parser.add_argument("--kbps", type=float, default=32.0, help="Opus bit rate of the stored audio in kbit/s")
    parser.add_argument("--seed", type=int, default=0, help="another seed holds out other texts")
    arguments = parser.parse_args()
    return recipe_main(lambda: _main(arguments), arguments.out)


def _main(arguments: argparse.Namespace) -> None:
    names = package_names(arguments.language)
    folder = arguments.debs or arguments.out / "packages"
    there = arguments.debs is not None or all(any(folder.glob(f"{name}_*.deb")) for name in names)
    packages = find_packages(folder, names) if there else download_packages(folder, names)
    build_prompts(packages, arguments.language, arguments.out, arguments.kbps, dataclasses.replace(PROMPT_SPLIT, seed=arguments.seed))


if __name__ == "__main__":
    sys.exit(main())
