"""One bad item never ends a job: whatever a file holds, `check_item` keeps it or gives a reason."""

from __future__ import annotations

import dataclasses
import errno
import functools
import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from kalle.audio import AudioError, load_channels, load_mono, mix_down, read_audio, rms_dbfs
from kalle.data.corpus.check import Kept, check_item
from kalle.data.corpus.cuts import load_audio, load_cuts, splits_of
from kalle.data.corpus.items import AUDIO_SUFFIXES, PrepareOptions, Rejection, Source, SourceItem
from kalle.data.corpus.lists import read_folder, read_jsonl_corpus
from kalle.data.corpus.prepare import prepare_corpus
from kalle.truncation import cut_short

OPTIONS = PrepareOptions(max_seconds=5.0)
SUFFIXES = (*sorted(AUDIO_SUFFIXES), ".raw", ".pcm", ".sd2", ".xi", ".txt", "")
TONE = (0.3 * np.sin(np.arange(16000) / 9)).astype(np.float32)


def encoded(kind: str, subtype: str, audio: np.ndarray = TONE, rate_hz: int = 16000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, rate_hz, format=kind, subtype=subtype)
    return buffer.getvalue()


CODECS = [
    *[("WAV", subtype) for subtype in ("PCM_16", "IMA_ADPCM", "MS_ADPCM", "GSM610", "ULAW", "G721_32")],
    *(("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")),
    *(("AIFF", "PCM_16"), ("AU", "PCM_16"), ("CAF", "ALAC_16"), ("W64", "PCM_16")),
]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_is_no_audio_has_a_reason(tmp_path: Path, suffix: str) -> None:
    for number, content in enumerate((b"", b"\0" * 3000, b"RIFF\xff\xff\xff\xffWAVEfmt ", bytes(range(256)) * 9)):
        path = tmp_path / f"{number}{suffix}"
        path.write_bytes(content)
        result = check_item(SourceItem("a", path, "a text"), OPTIONS, tmp_path)
        # Some kinds have no header, or one that decoders look for anywhere.
        assert isinstance(result, Rejection) or suffix in (".g722", ".mp3", ".aac", ".au"), (suffix, number)


@pytest.mark.parametrize(("kind", "subtype"), CODECS)
def test_damage_in_any_codec_is_a_reason_or_sound(tmp_path: Path, kind: str, subtype: str) -> None:
    whole = encoded(kind, subtype)
    random = np.random.default_rng(len(whole))
    path = tmp_path / f"a.{kind.lower()}"
    for round_number in range(12):
        content = bytearray(whole)
        for place in random.integers(0, len(content), 1 + 4 * round_number):
            content[place] = random.integers(0, 256)
        path.write_bytes(content if round_number % 3 else content[: len(content) // (2 + round_number)])
        check_item(SourceItem("a", path, "a text"), OPTIONS, tmp_path)
        check_item(SourceItem("a", path, "a text", start_s=0.2, duration_s=0.5), OPTIONS, tmp_path)
        check_item(SourceItem("a", path, "a text"), dataclasses.replace(OPTIONS, headers_only=True), tmp_path)


def test_an_hour_is_refused_without_being_decoded(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.flac", np.zeros(3600 * 2000, np.int16), 2000)
    result = check_item(SourceItem("a", tmp_path / "long.flac", "a text"), OPTIONS, tmp_path)
    assert isinstance(result, Rejection)
    assert result.reason == "too long"


def test_a_header_that_claims_more_than_there_is(tmp_path: Path) -> None:
    content = bytearray(encoded("WAV", "PCM_16"))
    content[40:44] = struct.pack("<I", 2**32 - 1)
    (tmp_path / "a.wav").write_bytes(content)
    result = check_item(SourceItem("a", tmp_path / "a.wav", "a text"), OPTIONS, tmp_path)
    assert isinstance(result, Rejection) or result.seconds == 1.0


def test_silent_channels_do_not_make_a_mix_quieter(tmp_path: Path) -> None:
    channels = np.zeros((16000, 6), np.float32)
    channels[:, 2] = TONE
    soundfile.write(tmp_path / "six.wav", channels, 16000, subtype="FLOAT")
    kept = check_item(SourceItem("six", tmp_path / "six.wav", "a text"), OPTIONS, tmp_path)
    assert not isinstance(kept, Rejection)
    stored, _ = load_channels(tmp_path / kept.audio)
    assert rms_dbfs(stored[0]) == pytest.approx(rms_dbfs(TONE), abs=0.01)
    np.testing.assert_array_equal(mix_down(np.stack([TONE, TONE])), TONE)
    np.testing.assert_allclose(mix_down(np.stack([TONE, 0.5 * TONE])), 0.75 * TONE, rtol=1e-6)
    assert not mix_down(np.zeros((3, 10), np.float32)).any()


def shifted(content: bytes, samples: int) -> bytes:
    """An Ogg stream as one that was cut out of a longer one: every granule position raised by ``samples``."""
    out, at = b"", 0
    while at < len(content):
        segments = content[at + 26]
        page = bytearray(content[at : at + 27 + segments + sum(content[at + 27 : at + 27 + segments])])
        position = struct.unpack("<q", page[6:14])[0]
        page[6:14] = struct.pack("<q", position + samples if position > 0 else position)
        page[22:26] = bytes(4)
        checksum = 0
        for byte in page:
            checksum ^= byte << 24
            for _ in range(8):
                checksum = (checksum << 1 ^ (0x04C11DB7 if checksum >> 31 else 0)) & 0xFFFFFFFF
        page[22:26] = struct.pack("<I", checksum)
        out, at = out + bytes(page), at + len(page)
    return out


@pytest.mark.parametrize("late", [0, 500, 48000 * 3600])
def test_opus_that_begins_late_is_read_from_its_beginning(tmp_path: Path, late: int) -> None:
    content = encoded("OGG", "OPUS", np.tile(TONE, 3))
    (tmp_path / "whole.opus").write_bytes(content)
    (tmp_path / "late.opus").write_bytes(shifted(content, late))
    expected, _ = load_channels(tmp_path / "whole.opus")
    np.testing.assert_array_equal(load_channels(tmp_path / "late.opus")[0], expected)
    report = prepare_corpus(
        Source("one", [SourceItem("a", tmp_path / "late.opus", "a text")]), tmp_path / "out", PrepareOptions(max_seconds=5.0)
    ).report
    assert report["converted_to_flac"] == int(late > 0)
    [cut] = load_cuts(tmp_path / "out", "train")
    np.testing.assert_allclose(load_audio(cut, 16000), expected[0], atol=1e-4)


@pytest.mark.parametrize("headers_only", [False, True])
def test_a_rate_that_lhotse_needs_gigabytes_for_is_converted(tmp_path: Path, headers_only: bool) -> None:
    for rate_hz in (15999, 44100):
        soundfile.write(tmp_path / f"{rate_hz}.wav", 0.3 * np.sin(2 * np.pi * 440 * np.arange(rate_hz) / rate_hz), rate_hz)
    items = [SourceItem(path.stem, path, f"text {path.stem}") for path in sorted(tmp_path.glob("*.wav"))]
    options = dataclasses.replace(OPTIONS, headers_only=headers_only)
    report = prepare_corpus(Source("rates", items), tmp_path / "out", options).report
    assert (report["kept"], report["converted_to_flac"]) == (2, 1)
    odd, usual = (load_audio(cut, 16000) for split in splits_of(tmp_path / "out") for cut in load_cuts(tmp_path / "out", split))
    assert odd.size == usual.size == 16000
    np.testing.assert_allclose(odd[1000:-1000], usual[1000:-1000], atol=0.01)


def test_the_rest_of_a_corpus_is_kept(tmp_path: Path) -> None:
    items = []
    for number, suffix in enumerate((".raw", ".wav", ".mp3", ".opus")):
        (tmp_path / f"{number}{suffix}").write_bytes(bytes(range(256)) * 20)
        items.append(SourceItem(f"bad{number}", tmp_path / f"{number}{suffix}", f"bad {number}"))
    soundfile.write(tmp_path / "good.wav", TONE, 16000)
    report = prepare_corpus(Source("all", [*items, SourceItem("good", tmp_path / "good.wav", "good")]), tmp_path / "out", OPTIONS).report
    assert (report["kept"], report["items"]) == (1, 5)


class Shut:
    """Refuses what is about a path with ``part`` in it, as the system does."""

    def __init__(self, part: str, real: Callable[..., object]) -> None:
        self.part, self.real = part, real

    def __call__(self, path: object, *arguments: object, **options: object) -> object:
        if self.part in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return self.real(path, *arguments, **options)

    def __get__(self, path: Path, kind: type) -> Callable[..., object]:
        return functools.partial(self, path)


@pytest.mark.parametrize("refused", [("open", "stat"), ("open",)], ids=["folder", "file"])
def test_names_and_files_that_the_system_refuses_cost_their_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: tuple[str, ...]
) -> None:
    (tmp_path / "shut").mkdir()
    for name in ("good.wav", "shut/a.wav"):
        soundfile.write(tmp_path / name, TONE, 16000)
    names = ["good.wav", "shut/a.wav", "é" * 300, "a\0b", "gone.wav"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"audio": name, "text": f"text {at}"}) for at, name in enumerate(names)))
    for method in refused:
        monkeypatch.setattr(Path, method, Shut("shut/a.wav", getattr(Path, method)))
    report = prepare_corpus(read_jsonl_corpus(tmp_path / "a.jsonl"), tmp_path / "out", OPTIONS).report
    assert (report["kept"], report["rejected_by_reason"]) == (1, {"unreadable": 1, "missing": 3})
    assert "change its permissions" in report["rejected_items"][0]["detail"]


def test_what_may_not_be_looked_into_is_rejected_and_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in" / "shut").mkdir(parents=True)
    for name in ("good", "bad", "shut/a"):
        soundfile.write(tmp_path / "in" / f"{name}.wav", TONE, 16000)
        (tmp_path / "in" / f"{name}.txt").write_text(f"the text of {name}")
    monkeypatch.setattr(os, "scandir", Shut("in/shut", os.scandir))
    monkeypatch.setattr(Path, "read_bytes", Shut("bad.txt", Path.read_bytes))
    source = read_folder(tmp_path / "in")
    assert [item.id for item in source.items] == ["good"]
    assert {Path(rejection.audio).stem: rejection.reason for rejection in source.rejected} == {"shut": "unreadable", "bad": "no text"}


@pytest.mark.parametrize("key", ["audio", "text", "id", "speaker", "language", "style", "extra"])
def test_half_of_a_surrogate_pair_costs_its_item_at_most(tmp_path: Path, key: str) -> None:
    soundfile.write(tmp_path / "a.wav", TONE, 16000)
    rows = [{"audio": "a.wav", "text": "some words", "id": name} for name in ("good", "odd")]
    rows[1][key] = "a\ud800b"
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    report = prepare_corpus(read_jsonl_corpus(tmp_path / "a.jsonl"), tmp_path / "out", OPTIONS).report
    assert (report["kept"], report["items"]) == (1 + (key in ("style", "extra")), 2)
    assert {cut.id for split in splits_of(tmp_path / "out") for cut in load_cuts(tmp_path / "out", split)} >= {"good"}


@pytest.mark.parametrize("text", ["It\u0092s late.", "\0H\0i", "bell\a"])
def test_a_control_character_in_a_text_costs_its_item(tmp_path: Path, text: str) -> None:
    for name, said in (("good", "good words"), ("odd", text)):
        soundfile.write(tmp_path / f"{name}.wav", TONE, 16000)
        (tmp_path / f"{name}.txt").write_text(said)
    report = prepare_corpus(read_folder(tmp_path), tmp_path / "out", OPTIONS).report
    assert (report["kept"], report["rejected_by_reason"]) == (1, {"bad entry": 1})
    assert "control character" in report["rejected_items"][0]["detail"]


SNDFILE_FORMATS = {
    ".caf": "CAF",
    ".w64": "W64",
    ".rf64": "RF64",
    ".aifc": "AIFF",
    ".oga": "OGG",
    ".sph": "NIST",
    ".voc": "VOC",
}
AV_FORMATS = {
    **{".3gp": ("3gp", "aac"), ".3g2": ("3g2", "aac"), ".mka": ("matroska", "aac"), ".mkv": ("matroska", "aac"), ".mov": ("mov", "aac")},
    **{".m4b": ("mp4", "aac"), ".amr": ("amr", "libopencore_amrnb"), ".mp2": ("mp2", "mp2"), ".ac3": ("ac3", "ac3")},
    **{".eac3": ("eac3", "eac3"), ".wv": ("wv", "wavpack"), ".tta": ("tta", "tta")},
}


def write_by_av(path: Path, container: str, codec: str) -> None:
    """A tone in a format that libsndfile does not write."""
    av = pytest.importorskip("av")
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV without {codec}")
    rate_hz = {".amr": 8000, ".ac3": 48000, ".eac3": 48000}.get(path.suffix, 16000)
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate_hz, layout="mono")
        frame = av.AudioFrame.from_ndarray((TONE * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = rate_hz, 0
        resampler = av.AudioResampler(stream.format, "mono", rate_hz, frame_size=stream.codec_context.frame_size or 0)
        for part in (*resampler.resample(frame), *resampler.resample(None), None):
            file.mux(stream.encode(part))


@pytest.mark.parametrize("suffix", [*SNDFILE_FORMATS, *AV_FORMATS])
def test_every_format_that_is_read_is_found_in_a_folder(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix in SNDFILE_FORMATS:
        path.write_bytes(encoded(SNDFILE_FORMATS[suffix], "VORBIS" if suffix == ".oga" else "PCM_16"))
    else:
        write_by_av(path, *AV_FORMATS[suffix])
    (tmp_path / "a.txt").write_text("a tone")
    assert prepare_corpus(read_folder(tmp_path), tmp_path / "out", OPTIONS).report["kept"] == 1


def test_opposite_channels_are_named_and_not_called_quiet(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.stack([TONE, -0.99 * TONE], axis=1), 16000)
    result = check_item(SourceItem("a", path, "a text"), OPTIONS, tmp_path)
    assert isinstance(result, Rejection)
    assert "keep one" in result.detail
    for read in (load_mono, read_audio):
        with pytest.raises(AudioError, match="keep one"):
            read(path)
    soundfile.write(path, np.stack([TONE, np.roll(TONE, 14)], axis=1), 16000)
    assert isinstance(check_item(SourceItem("a", path, "a text"), OPTIONS, tmp_path), Kept)
    assert len(load_mono(path)[0]) == len(TONE)


@pytest.mark.parametrize("headers_only", [False, True])
@pytest.mark.parametrize(
    ("suffix", "kind", "subtype"),
    [
        *((".wav", "WAV", "PCM_16"), (".wav", "WAV", "IMA_ADPCM"), (".mp3", "MP3", "MPEG_LAYER_III"), (".flac", "FLAC", "PCM_16")),
        *((".aiff", "AIFF", "PCM_16"), (".aifc", "AIFF", "ULAW"), (".au", "AU", "PCM_16"), (".au", "AU", "ULAW")),
        *((".w64", "W64", "PCM_16"), (".rf64", "RF64", "PCM_16"), (".caf", "CAF", "PCM_16"), (".sph", "NIST", "PCM_16")),
        *((".ogg", "OGG", "VORBIS"), (".opus", "OGG", "OPUS")),
    ],
)
def test_a_file_that_was_cut_short_is_no_item(tmp_path: Path, suffix: str, kind: str, subtype: str, headers_only: bool) -> None:
    # Noise, for a tone is little in a lossless format and begins late in a file.
    content = encoded(kind, subtype, 0.1 * np.random.default_rng(0).standard_normal(3 * len(TONE)))
    options = dataclasses.replace(OPTIONS, headers_only=headers_only)
    for name, part in (("whole", content), ("cut", content[: len(content) // 2])):
        (tmp_path / f"{name}{suffix}").write_bytes(part)
    whole, cut = (check_item(SourceItem(name, tmp_path / f"{name}{suffix}", "a text"), options, tmp_path) for name in ("whole", "cut"))
    assert isinstance(whole, Kept)
    assert isinstance(cut, Rejection) or (headers_only and kind in ("MP3", "FLAC"))
    for read in (load_mono, read_audio):
        read(tmp_path / f"whole{suffix}")
        with pytest.raises(AudioError):
            read(tmp_path / f"cut{suffix}")
    beginning = SourceItem("part", tmp_path / f"cut{suffix}", "a text", start_s=0.2, duration_s=0.5)
    assert isinstance(check_item(beginning, OPTIONS, tmp_path), Kept)


@pytest.mark.parametrize("headers_only", [False, True])
def test_a_tag_behind_flac_is_no_damage(tmp_path: Path, headers_only: bool) -> None:
    (tmp_path / "a.flac").write_bytes(encoded("FLAC", "PCM_16") + b"TAG".ljust(128, b"\0"))
    kept = check_item(SourceItem("a", tmp_path / "a.flac", "a text"), dataclasses.replace(OPTIONS, headers_only=headers_only), tmp_path)
    assert isinstance(kept, Kept)
    assert len(load_mono(tmp_path / "a.flac")[0]) == len(TONE)


@pytest.mark.parametrize(("coding", "is_short"), [(b"-s3 pcm", True), (b"-s4 ulaw", True), (b"-s26 pcm,embedded-shorten-v2.00", False)])
def test_nist_files_that_are_packed_are_not_short(tmp_path: Path, coding: bytes, is_short: bool) -> None:
    """Their header counts what shorten unpacks."""
    lines = b"channel_count -i 1\nsample_rate -i 16000\nsample_n_bytes -s1 2\nsample_count -i 16000\nsample_coding " + coding
    path = tmp_path / "a.sph"
    path.write_bytes((b"NIST_1A\n   1024\n" + lines + b"\nend_head\n").ljust(1024) + bytes(12000))
    assert bool(cut_short(path, 1.0)) == is_short


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_wrong_rate_in_bytes_makes_no_file_short_or_whole(tmp_path: Path, factor: float) -> None:
    """Some recorders state it wrongly; the other numbers of the header say how long the file is."""
    path = tmp_path / "a.wav"
    soundfile.write(path, 0.1 * np.sin(np.arange(16000) / 9), 16000, subtype="PCM_16")
    data = bytearray(path.read_bytes())
    assert data[28:32] == (32000).to_bytes(4, "little")
    data[28:32] = round(32000 * factor).to_bytes(4, "little")
    path.write_bytes(data)
    assert cut_short(path, 1.0) == ""
    path.write_bytes(data[: len(data) // 2])
    assert "expected the 1.00 s" in cut_short(path, 0.5)


@pytest.mark.parametrize(
    ("kind", "place", "size"),
    [
        *(
            ("WAV", 40, b"\xff\xff\xff\xff"),
            ("WAV", 40, b"\x00\xf0\xff\x7f"),
            ("AU", 8, b"\xff\xff\xff\xff"),
            ("AIFF", 0, b"\x7e\xff\xff\xf0"),
        ),
        *(("CAF", 0, b"\xff" * 8), ("RF64", 28, b"\xff" * 8)),
    ],
)
def test_a_size_that_a_stream_did_not_know_makes_no_file_short(tmp_path: Path, kind: str, place: int, size: bytes) -> None:
    """SoX, FFmpeg and others write one of these where they cannot seek back to the header."""
    content = bytearray(encoded(kind, "PCM_16"))
    place = place or content.index(b"SSND" if kind == "AIFF" else b"data") + 4
    content[place : place + len(size)] = size
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(content)
    assert cut_short(path, 1.0) == ""


def pages(content: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(content):
        count = content[at + 26]
        length = 27 + count + sum(content[at + 27 : at + 27 + count])
        found.append(content[at : at + length])
        at += length
    return found


def test_ogg_is_short_where_a_page_or_a_packet_is_incomplete_and_nowhere_else(tmp_path: Path) -> None:
    content = encoded("OGG", "OPUS", np.tile(TONE, 4))
    *first, last = pages(content)
    assert len(first) > 3
    going_on = bytearray(first[-1])
    count = going_on[26]
    assert last[5] & 4
    path = tmp_path / "a.opus"
    ends = bytes(going_on[:26]) + bytes([count]) + bytes(going_on[27 : 26 + count]) + b"\xff" + bytes(sum(going_on[27 : 26 + count]) + 255)
    for name, data, short in [
        ("whole", content, False),
        ("two in turn", content + content, False),
        ("a stream that was recorded until its end was missing", b"".join(first), False),
        ("a tag behind it", content + b"TAG" + bytes(125), False),
        ("a header alone", content[: -len(last)] + last[:20], True),
        ("a table alone", content[: -len(last)] + last[:28], True),
        ("half a page", content[:-10], True),
        ("the second of two", content + content[:-10], True),
        ("a packet that goes on", b"".join(first[:-1]) + ends, True),
    ]:
        path.write_bytes(data)
        assert bool(cut_short(path, 2.0)) == short, name


@pytest.mark.parametrize("size", [2**63 - 1, 2**64 - 1, 2**62])
@pytest.mark.parametrize(
    ("start", "order"), [(b"caff\0\1\0\0free", "big"), (b"riff" + bytes(36) + b"free" + bytes(12), "little")], ids=["CAF", "W64"]
)
def test_a_chunk_of_an_impossible_size_makes_no_file_short(tmp_path: Path, start: bytes, order: str, size: int) -> None:
    path = tmp_path / "x.audio"
    path.write_bytes(start + size.to_bytes(8, order) + bytes(100))
    assert cut_short(path, 1.0) == ""


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_mp4_whose_boxes_reach_beyond_its_end_is_cut_short(tmp_path: Path, share: float) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "a.m4a"
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as file:
        stream = file.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray((np.tile(TONE, 3) * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        resampler = av.AudioResampler(stream.format, "mono", 16000, frame_size=stream.codec_context.frame_size)
        for part in (*resampler.resample(frame), *resampler.resample(None), None):
            file.mux(stream.encode(part))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert isinstance(check_item(SourceItem("a", path, "a text"), OPTIONS, tmp_path), Kept if share == 1 else Rejection)
