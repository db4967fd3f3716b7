"""Whether an audio file ends before its header says: then its text is longer than its audio.

Only what is certain counts. WAV, RF64, W64, AIFF, AU, CAF and NIST files state the bytes of their audio, MP4 files those of every box, FLAC
files and MP3 files with a Xing or Info header their length. An Ogg file states none: its last page is incomplete, or a packet goes on in a
page that is not there. Ogg whose last page is complete but not marked as the last is whole: recorders of streams leave such files.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

from kalle.decoding import HEADER, MOST_CHUNKS, AudioError, open_audio, wave_data

Order = Literal["big", "little"]
_STREAMED_BYTES = ((0x7E000000, 2**32), (2**62, 2**64))
"""Sizes of four and of eight bytes that stand for one that was not known when it was written; SoX writes a little less than 0x7F000000."""
_XING_BYTES = 200
"""Of the first frame of an MP3 file, in which a Xing header is."""
_ROUNDED_SECONDS = 0.2
"""How much less than it claims a file may have: encoders count the padding at both ends or not."""
_NIST_BYTES = 1024
_OGG_HEADER_BYTES = 27


def cut_short(path: Path, seconds: float) -> str:
    """Why ``path``, of which ``seconds`` were decoded, is less than a whole file, in words; empty for any other."""
    with path.open("rb") as file:
        size = path.stat().st_size
        beginning = file.read(12)
        file.seek(0)
        if beginning.startswith(b"OggS"):
            return _message(path, seconds, "the rest of its last page") if _ends_inside_a_page(file, size) else ""
        if beginning[4:8] == b"ftyp":
            return _message(path, seconds, "the rest of its audio") if _ends_inside_a_box(file, size) else ""
        found = _audio_bytes(file, size, beginning)
        claimed = _claimed_by_bytes(*found, size, seconds) if found else _claimed_by_header(path, file)
    if claimed is None or claimed <= seconds + _ROUNDED_SECONDS:
        return ""
    return _message(path, seconds, f"the {claimed:.2f} s that its header says")


def refuse_cut_short(path: Path, seconds: float) -> None:
    """An AudioError for a file that claims more than the ``seconds`` it has: its text would be longer than its audio."""
    if problem := cut_short(path, seconds):
        raise AudioError(problem, "unreadable")


def _message(path: Path, seconds: float, expected: str) -> str:
    return f"cut short: got {seconds:.2f} s of '{path}', expected {expected}; fetch it again, or convert it to use what there is"


def _claimed_by_bytes(start: int, length: int, size: int, seconds: float) -> float | None:
    """The length in seconds of a file of ``size`` bytes whose audio has ``length`` from ``start`` on, by that of the part that is there."""
    return seconds * length / (size - start) if start < size < start + length else None


def _claimed_by_header(path: Path, file: IO[bytes]) -> float | None:
    """The length that the header of a FLAC or MP3 file states; None where it states none."""
    file.seek(0)
    tag = file.read(10)
    # The size of an ID3 tag has seven bits a byte.
    place = 10 + sum(byte << 7 * (3 - at) for at, byte in enumerate(tag[6:])) if tag.startswith(b"ID3") else 0
    file.seek(place)
    kind = "FLAC" if tag.startswith(b"fLaC") else "MP3" if re.search(rb"Xing|Info", file.read(_XING_BYTES)) else ""
    if not kind:
        return None
    try:
        with open_audio(path, None, HEADER) as header:
            return header.seconds if header.format == kind else None
    except AudioError:
        return None


_CHUNKED: dict[bytes, tuple[int, int, int, Order, bytes, int]] = {
    b"FORM": (12, 4, 4, "big", b"SSND", 0),
    b"caff": (8, 4, 8, "big", b"data", 0),
    b"riff": (40, 16, 8, "little", b"data", 24),
}
"""First bytes of AIFF, CAF and W64 -> where their chunks begin, the bytes of a name and of a size, their order, the beginning of the name
of the audio, and the bytes of name and size where a size counts them."""


def _audio_bytes(file: IO[bytes], size: int, beginning: bytes) -> tuple[int, int] | None:
    """Where the audio of an uncompressed file begins and the bytes that its header claims; None for any other, or for an unknown number."""
    found = None
    if beginning.startswith((b"RIFF", b"RF64")):
        wave = wave_data(file)
        found = (wave[2], wave[1]) if wave else None
    elif beginning.startswith((b".snd", b"dns.")):
        start, length = struct.unpack(">II" if beginning.startswith(b".snd") else "<II", beginning[4:12])
        found = (start, length)
    elif beginning.startswith(b"NIST_1A"):
        header = file.read(_NIST_BYTES)
        counts = dict(re.findall(rb"^(sample_count|channel_count|sample_n_bytes) -\w+ (\d{1,12})\s", header, re.MULTILINE))
        is_packed = re.search(rb"^sample_coding .*embedded", header, re.MULTILINE)  # by shorten: the counts are of samples, not of bytes
        found = (_NIST_BYTES, math.prod(map(int, counts.values()))) if len(counts) == 3 and not is_packed else None
    elif beginning[:4] in _CHUNKED:
        place, name_bytes, size_bytes, order, wanted, counted = _CHUNKED[beginning[:4]]
        chunks = _chunks(file, size, place, name_bytes, size_bytes, order, counted)
        found = next(((start, length) for name, start, length in chunks if name.startswith(wanted)), None)
    return found if found and found[1] > 0 and not any(low <= found[1] < high for low, high in _STREAMED_BYTES) else None


def _chunks(
    file: IO[bytes], size: int, place: int, name_bytes: int, size_bytes: int, order: Order, counted: int
) -> Iterator[tuple[bytes, int, int]]:
    """Name, place of the content and bytes of each chunk from ``place`` on, as far as a file of ``size`` bytes has some."""
    for _ in range(MOST_CHUNKS):
        if place >= size:  # a damaged size may be more than a file can have
            return
        file.seek(place)
        head = file.read(name_bytes + size_bytes)
        if len(head) < name_bytes + size_bytes:
            return
        length = int.from_bytes(head[name_bytes:], order) - counted
        yield head[:name_bytes], place + len(head), length
        if length < 0:
            return
        step = 8 if counted else 1 if size_bytes == 8 else 2
        place += len(head) + -(-length // step) * step


def _ends_inside_a_box(file: IO[bytes], size: int) -> bool:
    """Whether a box of an MP4 file is longer than what is left of the file."""
    place = 0
    for _ in range(MOST_CHUNKS):
        file.seek(place)
        head = file.read(16)
        if len(head) < 8:
            return False
        length = int.from_bytes(head[:4], "big")
        length = int.from_bytes(head[8:], "big") if length == 1 else length
        if length < 8:  # 0 is to the end of the file
            return False
        place += length
        if place > size:
            return head[4:8] in (b"mdat", b"moof")
    return False


def _ends_inside_a_page(file: IO[bytes], size: int) -> bool:
    """Whether the last page of an Ogg file is incomplete, or ends in a packet that goes on in a page that is not there."""
    place = 0
    while place < size:
        file.seek(place)
        head = file.read(_OGG_HEADER_BYTES)
        if not head.startswith(b"OggS"):
            return False  # what is behind the last page is no Ogg
        sizes = file.read(head[-1]) if len(head) == _OGG_HEADER_BYTES else b""
        if len(head) < _OGG_HEADER_BYTES or len(sizes) < head[-1]:
            return True
        place += _OGG_HEADER_BYTES + len(sizes) + sum(sizes)
        is_last, is_unfinished = head[5] & 4, sizes.endswith(b"\xff")
    return place > size or (is_unfinished and not is_last)
