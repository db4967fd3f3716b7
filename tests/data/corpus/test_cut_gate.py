"""Whatever a prepared corpus names, only plain audio files are opened."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from lhotse import MonoCut, Recording
from lhotse.audio import AudioSource

from kalle.data.corpus.cuts import cuts_path, load_audio, load_cuts, make_cut, read_cuts
from kalle.errors import UserError
from kalle.evaluation.test_list import read_test_list

Change = Callable[[dict[str, Any], Path], None]


@pytest.fixture
def row(tmp_path: Path) -> dict[str, Any]:
    soundfile.write(tmp_path / "a.wav", 0.1 * np.sin(np.arange(16000) / 20), 16000)
    return make_cut("a", "a.wav", 16000, 16000, 16000, "four words are here", "ann", "en").to_dict()


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    with gzip.open(cuts_path(folder, "test"), "wt") as file:
        file.writelines(json.dumps(one) + "\n" for one in rows)
    (folder / ".completed").touch()
    return cuts_path(folder, "test")


def command(marker: Path) -> dict[str, Any]:
    return {"type": "command", "channels": [0], "source": f"touch {marker}; cat a.wav"}


def as_source(row: dict[str, Any], marker: Path) -> None:
    row["recording"]["sources"] = [command(marker)]


def as_second_source(row: dict[str, Any], marker: Path) -> None:
    row["recording"]["sources"].append(command(marker))


def as_url(row: dict[str, Any], marker: Path) -> None:
    row["recording"]["sources"][0] |= {"type": "url", "source": "file:///etc/hostname"}


def as_impulse_response(row: dict[str, Any], marker: Path) -> None:
    rir = {**row["recording"], "sources": [command(marker)]}
    row["recording"]["transforms"] = [{"name": "ReverbWithImpulseResponse", "kwargs": {"rir": rir}}]


def as_custom_field(row: dict[str, Any], marker: Path) -> None:
    row["custom"] = {"other": {**row["recording"], "sources": [command(marker)]}}


def as_track(row: dict[str, Any], marker: Path) -> None:
    inner = {**row, "recording": {**row["recording"], "sources": [command(marker)]}}
    track = {"cut": inner, "offset": 0.0, "type": "MonoCut"}
    row.clear()
    row |= {"id": "a", "tracks": [track], "type": "MixedCut"}


@pytest.mark.parametrize("change", [as_source, as_second_source, as_url, as_impulse_response, as_custom_field, as_track])
def test_nothing_but_files_is_opened(tmp_path: Path, row: dict[str, Any], change: Change) -> None:
    marker = tmp_path / "ran"
    change(row, marker)
    write(tmp_path, row)
    for read in (lambda: load_cuts(tmp_path, "test"), lambda: read_test_list(tmp_path)):
        with pytest.raises(UserError, match=r"cuts_test.jsonl.gz' line 1: got a recording .*prepare the corpus again") as caught:
            read()
        assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_a_file_name_is_never_a_line_for_the_shell(tmp_path: Path, row: dict[str, Any]) -> None:
    marker = tmp_path / "ran"
    for name in ("x';touch ran;'.sph", "x;touch ran;.sph", "x';touch ran;'.opus"):
        (tmp_path / name).write_bytes(b"NIST_1A\n   1024\nnot audio")
        row["recording"]["sources"][0]["source"] = name
        [cut] = read_cuts(write(tmp_path, row))
        with pytest.raises(UserError, match="unreadable audio: cut 'a'"):
            load_audio(cut, 16000)
    assert not marker.exists()
    assert not Path("ran").exists()


def test_a_pipe_or_a_device_is_not_waited_for(tmp_path: Path, row: dict[str, Any]) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    for name in ("pipe.wav", "/dev/zero", "."):
        row["recording"]["sources"][0]["source"] = name
        [cut] = read_cuts(write(tmp_path, row))
        with pytest.raises(UserError):
            load_audio(cut, 16000)


def test_a_cut_made_elsewhere_is_checked_too(tmp_path: Path) -> None:
    recording = Recording("a", [AudioSource(**command(tmp_path / "ran"))], 16000, 16000, 1.0)
    with pytest.raises(UserError, match="of type 'command'"):
        load_audio(MonoCut("a", 0, 1.0, 0, recording=recording), 16000)
    assert not (tmp_path / "ran").exists()


def resample(from_hz: float, to_hz: float) -> dict[str, Any]:
    return {"name": "Resample", "kwargs": {"source_sampling_rate": from_hz, "target_sampling_rate": to_hz}}


def test_a_rate_that_takes_gigabytes_to_change_is_refused(tmp_path: Path, row: dict[str, Any]) -> None:
    row["recording"]["sampling_rate"] = 15999
    row |= {"duration": 0.5}
    [cut] = read_cuts(write(tmp_path, row))
    with pytest.raises(UserError, match="from 15999 to 16000 Hz"):
        load_audio(cut, 16000)


def test_a_speed_counts_at_the_rate_that_it_meets(tmp_path: Path, row: dict[str, Any]) -> None:
    """Of 22,050 Hz it would take a large filter; the recording is at 16,000 by then."""
    speed = {"name": "Speed", "kwargs": {"factor": 1.05}}
    row["recording"].update(transforms=[resample(22050, 16000), speed])
    assert len(read_cuts(write(tmp_path, row))) == 1
    row["recording"].update(transforms=[speed, resample(22050, 16000)])
    with pytest.raises(UserError, match="a filter of gigabytes"):
        read_cuts(write(tmp_path, row))


DAMAGED: dict[str, Change] = {
    "endless": lambda row, _: row.update(duration=float("inf")),
    "not a number": lambda row, _: row.update(start=float("nan")),
    "a number beyond floats": lambda row, _: row["supervisions"][0].update(start=10**400),
    "negative": lambda row, _: row.update(duration=-1),
    "a day": lambda row, _: row.update(duration=86400.0),
    "no rate": lambda row, _: row["recording"].update(sampling_rate=0),
    "a number as text": lambda row, _: row["supervisions"][0].update(text=5),
    "no sources": lambda row, _: row["recording"].pop("sources"),
    "a list": lambda row, _: row.update(recording=[]),
    "another type": lambda row, _: row.update(type="Thing"),
    "a filter of gigabytes": lambda row, _: row["recording"].update(transforms=[resample(15999, 16000)]),
    "an endless rate": lambda row, _: row["recording"].update(transforms=[resample(16000, float("inf"))]),
    "a rate of nothing": lambda row, _: row["recording"].update(transforms=[resample(16000, 0)]),
    "a speed of its own": lambda row, _: row["recording"].update(transforms=[{"name": "Speed", "kwargs": {"factor": 1.0001}}]),
    "endless silence": lambda row, _: row.update(
        type="PaddingCut", sampling_rate=16000, num_samples=10**12, feat_value=0.0, recording=None, supervisions=[]
    ),
    "a day of samples": lambda row, _: row.update(duration=3600.0) or row["recording"].update(sampling_rate=700_000),
    "a zero byte": lambda row, _: row["recording"]["sources"][0].update(source="a\0.wav"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_cut_is_one_line(tmp_path: Path, row: dict[str, Any], name: str) -> None:
    DAMAGED[name](row, tmp_path)
    with pytest.raises(UserError, match="line 1: ") as caught:
        read_cuts(write(tmp_path, row))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "damage", [lambda content: content[:40], lambda content: b"plain text", lambda content: content[:-9] + b"\xff" * 9]
)
def test_a_damaged_file_of_cuts_is_one_line(tmp_path: Path, row: dict[str, Any], damage: Callable[[bytes], bytes]) -> None:
    path = write(tmp_path, row)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"cannot read .*prepare the corpus again"):
        load_cuts(tmp_path, "test")


def test_the_commands_refuse_it(tmp_path: Path, row: dict[str, Any]) -> None:
    as_source(row, tmp_path / "ran")
    write(tmp_path, row)
    for words in (["data", "shard", tmp_path, tmp_path / "o"], ["data", "doctor", tmp_path, "--out", tmp_path / "d"]):
        done = subprocess.run([sys.executable, "-m", "kalle", *map(str, words)], capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: cannot read"), done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "ran").exists()
