"""``kalle convert`` as a user runs it: exit codes and one-line errors."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from kalle.cli.main import main
from kalle.text import tokenizer as llama3
from kalle.text.tokenizer import Tokenizer

REFERENCE = Path(__file__).parents[1] / "reference"


def _release(out: Path, *extra: str) -> int:
    return main(
        [
            "convert",
            "release",
            "--flowvae",
            str(REFERENCE / "flowvae_tiny.pt"),
            "--flowvae-config",
            str(REFERENCE / "flowvae_tiny.json"),
            "--lm",
            str(REFERENCE / "lm_tiny.pt"),
            "--lm-config",
            str(REFERENCE / "lm_tiny.json"),
            "--out",
            str(out),
            *extra,
        ]
    )


def test_release_and_back(tmp_path, capsys):
    Tokenizer.bytes().save(tmp_path / "tokenizer")
    assert _release(tmp_path / "name", "--tokenizer", str(tmp_path / "tokenizer")) == 0
    assert main(["convert", "to-release", str(tmp_path / "name"), "--out", str(tmp_path / "back")]) == 0
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["flowvae.json", "flowvae.pt", "lm.json", "model.pt", "tokenizer"]
    assert capsys.readouterr().out.split() == [str(tmp_path / "name"), str(tmp_path / "back")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["release", "--out", "OUT"], "expected --flowvae with --flowvae-config, --lm or --tokenizer"),
        (["release", "--lm", "OUT/none.pt", "--out", "OUT/x"], "file not found"),
        (["release"], "--out"),
        (["to-release", "OUT/none", "--out", "OUT/x"], "not a weight folder"),
        (["tokenizer", "OUT/none.model", "--out", "OUT/x"], "file not found"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, capsys, arguments, words):
    assert main(["convert", *(argument.replace("OUT", str(tmp_path)) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_from_a_tiktoken_file(tmp_path, monkeypatch):
    # 256 bytes and one merge stand for Llama 3's 128,000 ranks.
    monkeypatch.setattr(llama3, "LLAMA3_RANKS", 257)
    pieces = [bytes([value]) for value in range(256)] + [b"ab"]
    model = tmp_path / "tokenizer.model"
    model.write_bytes(b"".join(base64.b64encode(piece) + f" {rank}\n".encode() for rank, piece in enumerate(pieces)))
    out = tmp_path / "tokenizer"
    assert main(["convert", "tokenizer", str(model), "--out", str(out)]) == 0
    assert Tokenizer.load(out).encode("ab")[1:] == [256]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer", "tokenizer.model"]
    assert main(["convert", "tokenizer", str(model), "--out", str(out)]) == 2
