from __future__ import annotations

import errno
import gzip
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from kalle.audio import read_audio
from kalle.data.corpus.lists import read_embedded
from kalle.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "nano"))
import asterisk
import debian
from asterisk import VOICES, build_prompts, opus_level, package_names
from debian import download_packages, find_packages, read_package

sys.path.pop(0)
pytest.importorskip("av")
LOCALE = "usr/share/asterisk/sounds/en_US_f_Allison/"
DOCS = "usr/share/doc/asterisk-core-sounds-en/"
TRANSCRIPT = """; Core sounds

activated: Activated.
digits/1:  one
letters/at: at [@]
beep: [this is a beep]
join: <beep ascending>
silence/1: (1 second of silence)
menu: a menu (never again), press 4
gone: Has no sound.
"""


def deb(path: Path, files: dict[str, bytes], compression: str = "xz") -> Path:
    """A .deb as deb(5) describes it: ar of debian-binary, control.tar, data.tar."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=f"w:{compression}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo("./" + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with path.open("wb") as out:
        out.write(b"!<arch>\n")
        # An odd size needs the padding byte that ar inserts.
        for name, body in [("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), (f"data.tar.{compression}", data.getvalue())]:
            out.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n".encode() + body + b"\n" * (len(body) % 2))
    return path


def packages(folder: Path, seed: int = 0) -> list[Path]:
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(seed)
    names = ["activated", "digits/1", "letters/at", "beep", "join", "silence/1", "menu", "unlisted"]
    sounds = {f"{LOCALE}{name}.g722": random.integers(0, 256, 4000 + 8 * i, dtype=np.uint8).tobytes() for i, name in enumerate(names)}
    texts = {DOCS + "core-sounds-en.txt.gz": gzip.compress(TRANSCRIPT.encode()), DOCS + "copyright": b"Licence in full"}
    return [
        deb(folder / "asterisk-core-sounds-en-g722_1.6_all.deb", sounds),
        deb(folder / "asterisk-core-sounds-en_1.6_all.deb", texts, "gz"),
    ]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_become_a_corpus_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert build_prompts(packages(tmp_path / "debs"), "en", out)
    kept = {row["id"]: row for row in rows(out / "transcripts.jsonl")}
    assert {key: row["text"] for key, row in kept.items()} == {"activated": "Activated.", "digits_1": "one", "letters_at": "at"}
    assert kept["letters_at"]["source_text"] == "at [@]"
    assert "source_text" not in kept["digits_1"]
    assert kept["digits_1"]["audio"] == "audio/digits/1.opus"
    assert (kept["digits_1"]["speaker"], kept["digits_1"]["language"]) == ("allison-smith", "en")
    rejected = {row["id"]: row["reason"] for row in rows(out / "rejected.jsonl")}
    assert rejected == {
        "beep": "not speech",
        "join": "not speech",
        "silence_1": "not speech",
        "menu": "no text",
        "unlisted": "no text",
        "gone": "missing",
    }
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == [
        "ATTRIBUTION.md",
        "LICENSE",
        "audio/activated.opus",
        "audio/digits/1.opus",
        "audio/letters/at.opus",
        "build.json",
        "rejected.jsonl",
        "transcripts.jsonl",
    ]
    assert "Allison Smith" in (out / "ATTRIBUTION.md").read_text()
    assert "CC-BY-SA-3.0" in (out / "ATTRIBUTION.md").read_text()
    source = read_embedded(out)
    assert len(source.items) == 3
    assert len(source.rejected) == 6
    assert source.notes == {"texts with a remark in brackets taken out": 1}


def test_opus_keeps_rate_length_and_sound(tmp_path: Path) -> None:
    t = np.arange(16000 * 2 + 34) / 16000
    voice = (0.3 * np.sin(2 * np.pi * 200 * t) * np.sin(np.pi * t / t[-1])).astype(np.float32)
    raw = _g722(voice)
    files = packages(tmp_path / "debs")
    deb(files[0], {LOCALE + "activated.g722": raw})
    build_prompts(files, "en", tmp_path / "out")
    info = soundfile.info(tmp_path / "out" / "audio" / "activated.opus")
    assert (info.samplerate, info.channels, info.frames) == (16000, 1, 2 * len(raw))
    got = read_audio(tmp_path / "out" / "audio" / "activated.opus")
    (tmp_path / "a.g722").write_bytes(raw)
    decoded = read_audio(tmp_path / "a.g722")
    # Aligned to the sample: no codec delay is left at the front.
    assert np.corrcoef(got, decoded)[0, 1] > 0.99


def _g722(audio: np.ndarray) -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="g722") as container:
        stream = container.add_stream("g722", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray((audio * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    return buffer.getvalue()


def test_same_build_is_not_repeated_and_another_is(tmp_path: Path) -> None:
    debs = packages(tmp_path / "debs")
    assert build_prompts(debs, "en", tmp_path / "out")
    assert not build_prompts(debs, "en", tmp_path / "out")
    before = (tmp_path / "out" / "audio" / "activated.opus").stat().st_size
    assert build_prompts(debs, "en", tmp_path / "out", kbps=12.0)
    assert (tmp_path / "out" / "audio" / "activated.opus").stat().st_size < before
    assert build_prompts(packages(tmp_path / "debs", seed=1), "en", tmp_path / "out", kbps=12.0)


def test_two_builds_agree(tmp_path: Path) -> None:
    debs = packages(tmp_path / "debs")
    for name in ("one", "two"):
        build_prompts(debs, "en", tmp_path / name)
    assert rows(tmp_path / "one" / "transcripts.jsonl") == rows(tmp_path / "two" / "transcripts.jsonl")
    np.testing.assert_array_equal(read_audio(tmp_path / "one/audio/digits/1.opus"), read_audio(tmp_path / "two/audio/digits/1.opus"))


def test_an_interrupted_build_goes_on(tmp_path: Path) -> None:
    def stop(names: list[str]) -> Iterable[str]:
        yield from names[:3]
        raise KeyboardInterrupt

    debs = packages(tmp_path / "debs")
    with pytest.raises(KeyboardInterrupt):
        build_prompts(debs, "en", tmp_path / "out", progress=stop)
    assert not (tmp_path / "out" / "transcripts.jsonl").exists()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.opus")}
    assert done
    build_prompts(debs, "en", tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in done} == done
    build_prompts(debs, "en", tmp_path / "fresh")
    assert rows(tmp_path / "out" / "transcripts.jsonl") == rows(tmp_path / "fresh" / "transcripts.jsonl")


def test_full_disk_while_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    debs = packages(tmp_path / "debs")

    real = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        self.open("wb").write(content[:1])
        if self.suffix != ".g722":
            return real(self, content)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"out.*No space left on device.*make room"):
        build_prompts(debs, "en", tmp_path / "out")
    files = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files == ["build.json"]


@pytest.mark.parametrize("damage", [lambda content: b"not a package", lambda content: content[:2000], lambda content: content[:90]])
def test_a_damaged_package_is_named(tmp_path: Path, damage) -> None:
    debs = packages(tmp_path / "debs")
    debs[0].write_bytes(damage(debs[0].read_bytes()))
    with pytest.raises(UserError, match=r"not a readable Debian package: .*g722_1.6_all.deb.*download it again") as caught:
        build_prompts(debs, "en", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "transcripts.jsonl").exists()


def test_a_foreign_package_is_refused(tmp_path: Path) -> None:
    debs = packages(tmp_path / "debs")
    with pytest.raises(UserError, match=r"no prompts in the packages.*fr_CA_f_June"):
        build_prompts(debs, "fr", tmp_path / "out")
    with pytest.raises(UserError, match="no transcripts in the packages"):
        build_prompts(debs[:1], "en", tmp_path / "out")
    with pytest.raises(UserError, match="got 'de', expected one of en, fr, it, es, ru"):
        package_names("de")
    with pytest.raises(UserError, match="package not found"):
        build_prompts([tmp_path / "gone.deb"], "en", tmp_path / "out")


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_reading_agrees_with_dpkg(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text("Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n")
    (root / "usr" / "share" / "x").mkdir(parents=True)
    (root / "usr" / "share" / "x" / "a.txt").write_bytes(b"content")
    subprocess.run(["dpkg-deb", "-Zxz", "--build", str(root), str(tmp_path / "x.deb")], check=True, capture_output=True)
    assert read_package(tmp_path / "x.deb") == {"usr/share/x/a.txt": b"content"}


def test_find_packages(tmp_path: Path) -> None:
    (tmp_path / "a_1_all.deb").write_bytes(b"")
    (tmp_path / "a_2_all.deb").write_bytes(b"")
    assert find_packages(tmp_path, ["a"]) == [tmp_path / "a_2_all.deb"]
    with pytest.raises(UserError, match=r"expected b_\*.deb.*apt-get download b"):
        find_packages(tmp_path, ["a", "b"])


def test_download_without_apt_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"apt-get not found.*--debs DIR"):
        download_packages(tmp_path / "packages", ["a"])


@pytest.mark.parametrize("fails", [True, False])
def test_download_takes_whole_packages_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    def apt(command: list[str], cwd: Path, **_: object) -> subprocess.CompletedProcess[str]:
        (Path(cwd) / "a_1_all.deb").write_bytes(b"whole")
        return subprocess.CompletedProcess(command, 100 if fails else 0, "", "W: x\nE: Unable to locate package b\n")

    monkeypatch.setattr(debian.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(debian.subprocess, "run", apt)
    if fails:
        with pytest.raises(UserError, match=r"Unable to locate package b.*apt-get update"):
            download_packages(tmp_path / "packages", ["a"])
        assert not (tmp_path / "packages").exists()
    else:
        assert download_packages(tmp_path / "packages", ["a"]) == [tmp_path / "packages" / "a_1_all.deb"]
        assert [path.name for path in (tmp_path / "packages").iterdir()] == ["a_1_all.deb"]


def test_every_language_has_its_credit() -> None:
    assert set(VOICES) == {"en", "fr", "it", "es", "ru"}
    assert {language: voice.licence for language, voice in VOICES.items() if voice.licence != "CC-BY-SA-3.0"} == {
        "it": "CC-BY-3.0",
        "ru": "CC-BY-3.0",
    }
    assert all(voice.credit[0].startswith("Copyright") for voice in VOICES.values())


def test_opus_level_hits_the_wanted_rate() -> None:
    noise = 0.1 * np.random.default_rng(0).standard_normal(16000 * 4)
    for kbps in (16.0, 32.0, 64.0):
        buffer = io.BytesIO()
        soundfile.write(buffer, noise, 16000, format="OGG", subtype="OPUS", compression_level=opus_level(kbps))
        assert len(buffer.getvalue()) * 8 / 4 / 1000 == pytest.approx(kbps, rel=0.3)
    with pytest.raises(UserError, match="got 5"):
        opus_level(5.0)
    assert asterisk.PROMPT_SPLIT.min_words == 4
