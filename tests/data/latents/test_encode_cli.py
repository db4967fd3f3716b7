from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kalle
from kalle.cli.encode import encoding_config, run
from kalle.cli.hydra_entry import compose, folder_override
from kalle.data.latents.encode import EncodingConfig, encode
from kalle.data.latents.shards import read_info, read_items
from kalle.errors import UserError
from kalle.models.flowvae import FlowVAE

MakeCuts = Callable[..., list[Any]]


def test_command_encodes_a_corpus(
    make_cuts: MakeCuts, write_corpus: Callable[..., Path], tiny_flowvae: FlowVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_flowvae.save_pretrained(tmp_path / "model")
    cuts = make_cuts([3000 + 400 * n for n in range(6)])
    corpus = write_corpus(train=cuts, valid=make_cuts([4000], "v"), test=make_cuts([4000], "t"))
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "latents"
    words = [f"flowvae={tmp_path / 'model'}", f"corpus={corpus}", f"out={out}", "device=cpu", "join.passes=1", "join.min_seconds=0.5"]
    assert run(words) == 0
    info = read_info(out)
    assert {split: info["splits"][split]["utterances"] - info["splits"][split]["joined"] for split in ("train", "valid", "test")} == {
        "train": 6,
        "valid": 1,
        "test": 1,
    }
    assert info["config"]["join"]["passes"] == 1
    assert info["splits"]["train"]["joined"] > 0
    assert [item.text for item in read_items(out, "train")][:6] == [cut.supervisions[0].text for cut in cuts]
    assert not (tmp_path / "outputs").exists(), "Hydra leaves no folder of its own"


def little_disk() -> None:
    """Files of more than 4 kB cannot be written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def test_a_full_disk_is_one_line(toy_corpus: Path, toy_weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    words = [f"flowvae={toy_weights}", f"corpus={toy_corpus}", f"out={out}", "device=cpu", "speaker_mels=true", "shard_size=100"]
    command = [sys.executable, "-m", "kalle", "encode", *words]
    source = Path(kalle.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=little_disk, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: cannot write '{out}': File too large, expected room for it; make room on the disk")
    assert not list(tmp_path.rglob("*.tar"))


def test_flowvae_is_a_path_not_a_configuration_group() -> None:
    assert folder_override(["flowvae=a=b", "corpus=c", "flowvae.folder=d"], "flowvae") == [
        "flowvae.folder=a=b",
        "corpus=c",
        "flowvae.folder=d",
    ]


def test_yaml_and_dataclass_agree() -> None:
    words = ["flowvae.folder=f", "corpus=c", "out=o"]
    assert encoding_config(compose("encode", words)) == EncodingConfig(flowvae="f", corpus="c", out="o")
    for wrong, message in (
        ("shard_size=many", "shard_size: got 'many', expected a whole number"),
        ("join.passes=x", "join.passes: got 'x'"),
    ):
        with pytest.raises(UserError, match=message):
            encoding_config(compose("encode", [*words, wrong]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["corpus=c", "out=o"], r"no value for flowvae\.folder"),
        (["flowvae=f", "corpus=c", "out=o", "join.pases=2"], r"join\.passes"),
        (["flowvae=nowhere", "corpus=c", "out=o"], "not a weight folder"),
        (["flowvae=f", "corpus=c", "out=o", "shard_size=0"], "shard_size=0"),
    ],
)
def test_mistakes(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        run(words)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_corpus_is_encoded_from_python(toy_weights: Path, toy_corpus: Path, tmp_path: Path) -> None:
    counts: list[tuple[int, int]] = []
    config = EncodingConfig(flowvae=toy_weights, corpus=toy_corpus, out=tmp_path / "latents", splits=("train", "valid"), device="cpu")
    info = encode(config, lambda done, total: counts.append((done, total)))
    assert info == read_info(tmp_path / "latents")
    assert set(info["splits"]) == {"train", "valid"}
    assert counts[-1] == (15, 15)


def test_latents_never_go_into_the_corpus_itself(toy_weights: Path, toy_corpus: Path) -> None:
    before = sorted(toy_corpus.iterdir())
    with pytest.raises(UserError, match="the corpus itself"):
        encode(EncodingConfig(flowvae=toy_weights, corpus=toy_corpus, out=toy_corpus / ".." / toy_corpus.name))
    assert sorted(toy_corpus.iterdir()) == before
