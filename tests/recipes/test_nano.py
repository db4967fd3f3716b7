"""The recipe of the shipped weights: its texts, its command lines, its summary."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kalle.checkpoint import read_json, write_json
from kalle.cli.hydra_entry import compose, folder_override
from kalle.cli.stages import Stages
from kalle.errors import UserError
from kalle.evaluation.test_list import TestItem
from kalle.models.flowvae import FlowVAE
from kalle.models.lm import ATTENTION

ROOT = Path(__file__).parents[2]
SENTENCES = ["He went home", "Stop!", "A boat, a house and a tree", "No.", "They had not seen the river in years."]


class Recorder:
    """Stages that only remember what they were asked to run."""

    def __init__(self) -> None:
        self.asked: dict[str, list[str]] = {}

    def command(self, name: str, *words: str) -> None:
        self.asked[name] = list(words)

    def run(self, name: str, action: object) -> None:
        self.asked[name] = []


def command_line(recipe: Any, *words: str) -> argparse.Namespace:
    given = recipe("nano", "run").parse(list(words))
    assert isinstance(given, argparse.Namespace)
    return given


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("He went  home.", "He went home."),
        ("‘Yes,’ she said—and “left”.", "'Yes,' she said — and \"left\"."),
        ('An "open quote stays out.', "An open quote stays out."),
        ("In 1984 they paid $20.", "In nineteen eighty-four they paid twenty dollars."),
        ("See chapter XIV of it.", None),
        ("He came, i.e. he went.", None),
        ("THE WHOLE TRUTH", None),
        ("Two words.", None),
        ("Привет, милый друг.", None),
    ],
)
def test_texts_that_are_read_in_one_way(written: str, spoken: str | None, recipe: Any) -> None:
    assert recipe("nano", "texts").clean(written) == spoken


def test_sentences_do_not_end_at_titles(recipe: Any) -> None:
    split = recipe("nano", "texts").split_sentences
    assert list(split('Mr. Elton came. "Did he?" asked J. Knightley. Yes!')) == ["Mr. Elton came.", '"Did he?" asked J. Knightley.', "Yes!"]


def test_no_test_sentence_is_trained_on(recipe: Any) -> None:
    texts = recipe("nano", "texts")
    many = [(source, f"The {source} book has {number} pages for you.") for source in ("first", "other") for number in texts.COUNTED]
    many += [("third", text.upper()) for _, text in many[:5]]
    train, test = texts.divide(texts.in_order(many))
    assert not train
    assert len(test) == 2 * len(texts.COUNTED), "all that there are, when they are fewer than are wanted, and none twice"
    many += [("third", f"{text} And {word} more of them.") for _, text in many[:40] for word in texts.COUNTED[:9]]
    train, test = texts.divide(texts.in_order(many))
    assert len(test) == texts.TEST_SENTENCES
    assert {source for source, _ in test} == {"first", "other", "third"}
    assert not {texts.key_of(text) for _, text in train} & {texts.key_of(text) for _, text in test}
    harvard = (ROOT / "recipes/nano/harvard.txt").read_text(encoding="utf-8").splitlines()
    assert len(harvard) == len(set(harvard)) == 60


def test_one_word_comes_now_and_then(recipe: Any) -> None:
    texts = recipe("nano", "texts")
    lines = list(texts.with_words([("a", str(n)) for n in range(60)], ["house", "tree"]))
    assert [index for index, (source, _) in enumerate(lines) if source == "word"] == [25, 51]


def test_paragraphs_of_the_bible_have_no_notes_and_no_loose_marks(recipe: Any) -> None:
    sources = recipe("nano", "sources")
    text = '<title>The Book</title><div type="x-p"/><w lemma="G1">Christ</w> , <note n="1">or</note><w>came</w> .<div/>“ Go !'
    assert [part for part in sources.osis_paragraphs(text) if part] == ["Christ, came.", "“Go!"]


def test_lines_of_the_novels_come_out_of_r(recipe: Any) -> None:
    import struct
    import zlib

    sources = recipe("nano", "sources")
    strings = ["UTF-8", "Emma was", "rich.", "", "She lived."]
    data = b"".join(b"\x00\x04\x00\x09" + struct.pack(">I", len(text)) + text.encode() for text in strings)
    packed = zlib.compress(b"X\n" + data)
    assert list(sources.austen({sources.AUSTEN: struct.pack(">I", len(data) + 2) + packed})) == ["Emma was rich.", "She lived."]


def test_wordnet_gives_examples_and_frequent_words(recipe: Any) -> None:
    sources = recipe("nano", "sources")
    gloss = b'00001 | a thing; "he went home early"; "the boat was seen at noon"\n'
    files = dict.fromkeys(sources.WORDNET_FILES, gloss) | {
        sources.WORDNET_COUNTS: b"go%2:38 1 40\ngo%2:39 2 2\na%1:10 1 9\nhouse%1:06 1 41\n"
    }
    assert list(sources.wordnet(files))[:2] == ["he went home early", "the boat was seen at noon"]
    assert sources.wordnet_words(files, 5) == ["go", "house"]


def test_another_package_than_the_pinned_one_is_refused(recipe: Any, tmp_path: Path) -> None:
    packages = recipe("nano", "packages")
    path = tmp_path / "kokoro-js-1.2.1.tgz"
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="expected 1f0d0383"):
        packages.fetch_npm("kokoro-js", tmp_path)


def test_a_source_that_is_gone_is_left_out(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    texts = recipe("nano", "texts")

    def gone(name: str, folder: Path) -> Path:
        raise UserError(f"{name} is gone")

    monkeypatch.setattr(texts, "fetch_npm", gone)
    monkeypatch.setattr(texts, "fetch_debian", gone)
    with pytest.raises(UserError, match="got no package"):
        texts.make_texts(tmp_path, tmp_path)
    assert "wordnet-base is gone" in caplog.text


def test_a_corpus_that_is_gone_is_left_out(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    corpora = recipe("nano", "corpora")

    def teacher(stages: object, out: Path, name: str, *_: object) -> None:
        if name == "kokoro":
            raise UserError("npm not found")
        (out / "corpora" / name).mkdir(parents=True)

    monkeypatch.setattr(corpora, "_teacher", teacher)
    amounts = corpora.Amounts(60.0, 6.0, 10.0, 3.0, 2)
    corpora.make_corpora(Recorder(), tmp_path, amounts)
    assert "corpus kokoro is left out: npm not found" in caplog.text


@pytest.mark.parametrize(("shares", "parts"), [("FOR_TESTS", {"test"}), ("FOR_TRAINING", {"train", "valid"})])
def test_what_a_teacher_spoke_is_all_for_tests_or_all_for_training(recipe: Any, tmp_path: Path, shares: str, parts: set[str]) -> None:
    corpora = recipe("nano", "corpora")
    corpus = ROOT / "recipes/quickstart/corpus"
    rows = [json.loads(line) for line in (corpus / "transcripts.jsonl").read_text(encoding="utf-8").splitlines()]
    audio = sorted(corpus.rglob("*.opus"))[:6]
    listed = [{"audio": str(path), "text": f"{rows[0]['text']} {index}", "id": path.stem} for index, path in enumerate(audio)]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    folder = tmp_path / "test" / "hibari"
    corpora._prepare(Stages(tmp_path, {}), tmp_path / "list.jsonl", folder, "hibari", *getattr(corpora, shares))
    report = json.loads((folder / "report.json").read_text())
    assert {split for split, row in report["splits"].items() if row["items"]} == parts
    assert report["kept"] == len(audio) == 6


def test_texts_of_all_lengths(recipe: Any) -> None:
    make = recipe("nano", "lengths").texts_of_all_lengths
    items = make(SENTENCES, 120, seed=1)
    assert items == make(SENTENCES[::-1], 120, seed=1) != make(SENTENCES, 120, seed=2)
    counts = sorted(len(item["text"].split()) for item in items)
    assert counts == sorted([*range(1, 61)] * 2)
    assert len({item["id"] for item in items}) == len(items)
    assert all(item["text"][-1] in ".!?" for item in items)
    assert {item["text"] for item in items if " " not in item["text"]} <= {"Stop!", "No."}


def test_one_word_where_no_sentence_has_just_one(recipe: Any) -> None:
    items = recipe("nano", "lengths").texts_of_all_lengths(["He went home"], 60)
    assert "He." in {item["text"] for item in items}


@pytest.mark.parametrize(
    ("words", "repeated"),
    [("", 0), ("one two three", 0), ("one one", 1), ("go on go on go on", 4), ("a b c a b c d", 3), ("a b a c a d", 0)],
)
def test_repeated_words(words: str, repeated: int, recipe: Any) -> None:
    assert recipe("nano", "score_lengths").repeated_words(words.split()) == repeated


@pytest.mark.parametrize(
    ("change", "true"),
    [
        ({}, set()),
        ({"stop_reason": "max_frames"}, {"no_end"}),
        ({"stop_reason": "repetition"}, {"no_end", "repetition"}),
        ({"audio_s": 0.4}, {"early_stop", "short"}),
        ({"transcript": "He went"}, {"early_stop", "last_word_missing"}),
        ({"transcript": "He went", "stop_reason": "silence"}, {"no_end", "last_word_missing"}),
        ({"transcript": "he went hone"}, set()),
        ({"transcript": "he went home went home went home went home"}, {"repetition"}),
        ({"transcript": ""}, {"early_stop", "last_word_missing"}),
    ],
)
def test_verdicts(change: dict[str, Any], true: set[str], recipe: Any) -> None:
    row = {"id": "a", "text": "He went home.", "transcript": "He went home", "stop_reason": "end", "audio_s": 1.3} | change
    verdict = recipe("nano", "score_lengths").judged(row, 0.1)
    assert {name for name, value in verdict.items() if value == 1.0} == true
    assert verdict["words"] == 3


def test_rates_by_length(recipe: Any) -> None:
    scoring = recipe("nano", "score_lengths")
    rows = [{"id": n, "words": words, **dict.fromkeys(scoring.RATES, float(words > 30))} for n, words in enumerate((1, 1, 10, 40))]
    rates = scoring.summarised(rows)
    assert set(rates) == {"all", "1-1", "6-15", "31-60"}
    assert rates["all"]["no_end"]["value"] == 0.25
    assert rates["31-60"]["no_end"]["value"] == 1.0
    assert rates["1-1"]["items"] == 2
    assert scoring.lengths_table(rates)[2].startswith("| all | 4 | 25.0% |")
    assert scoring.summarised(rows * 3) == rates, "seeds are no items"


def test_pace_is_of_timed_recordings(recipe: Any) -> None:
    items = [TestItem("a", "12345", duration_s=1.0), TestItem("b", "12345678901234567890", duration_s=1.5), TestItem("c", "x" * 99)]
    assert recipe("nano", "score_lengths").seconds_per_character(items) == pytest.approx(0.1)


def test_margins_are_over_the_nearest_other(recipe: Any) -> None:
    axes = np.eye(3)
    recorded = {"a": axes[[0, 0]], "b": axes[[1, 1]], "c": axes[[2]]}
    spoken = {"a": axes[[0]], "b": np.array([[0.6, 0.8, 0.0]])}
    found = recipe("nano", "similarity").margins(spoken, recorded)
    assert found["a"]["own"] == found["a"]["margin"] == found["a"]["ceiling"] == 1.0
    assert found["b"]["margin"] == pytest.approx(0.8 - 0.6)
    assert found["b"]["others"] == pytest.approx({"a": 0.6, "c": 0.0})
    assert recipe("nano", "similarity").margins_table(found)[3] == "| b | - | 0.800 | a 0.600 | 0.200 | 1.000 |"


def test_compute_adds_up_over_continuations(recipe: Any, tmp_path: Path) -> None:
    compute = recipe("nano", "compute")
    first = compute.write_compute(tmp_path / "first" / "compute.json", [], {"steps": [1, 1, 1]}, {"train lm": 10.0, "encode": 2.0})
    earlier = compute.earlier_runs(tmp_path / "first")
    second = compute.write_compute(tmp_path / "compute.json", earlier, {"steps": [0, 0, 5]}, {"train lm": 30.0})
    assert (first["total_seconds"], second["total_seconds"]) == (12.0, 42.0)
    assert [run["steps"] for run in read_json(tmp_path / "compute.json")["runs"]] == [[1, 1, 1], [0, 0, 5]]
    assert compute.earlier_runs(tmp_path) and not compute.earlier_runs(None)  # noqa: PT018


def test_lists_of_all_parts_become_one(recipe: Any, tmp_path: Path) -> None:
    for part in range(2):
        (tmp_path / f"list.{part}.jsonl").write_text(json.dumps({"id": part}) + "\n")
    recipe("nano", "corpora").combine_lists(tmp_path, 2)
    assert [json.loads(line)["id"] for line in (tmp_path / "list.jsonl").read_text().splitlines()] == [0, 1]


def trained(recipe: Any, given: argparse.Namespace) -> dict[str, list[str]]:
    stages = Recorder()
    training = recipe("nano", "trainings").Training(stages, given)
    training.run()
    training.finish(given.out / "kalle-nano")
    return stages.asked


def test_trainings_follow_each_other(recipe: Any, tmp_path: Path) -> None:
    given = command_line(
        recipe, "--out", str(tmp_path), "--steps", "7", "8", "9", "--seed", "3", "--override", "trainer.log_every_n_steps=1"
    )
    asked = trained(recipe, given)
    first, second, short, lm = (asked[f"train {name}"] for name in ("flowvae", "flowvae2", "lm short", "lm"))
    assert list(asked)[:3] == ["train flowvae", "sources", "train flowvae2"]
    assert list(asked)[-4:] == ["train lm", "assemble", "calibrate", "export"]
    config = compose("train_flowvae", first[2:])
    assert (config.trainer.max_steps, config.seed, config.trainer.log_every_n_steps) == (7, 3, 1)
    assert len(config.data.corpus) == 9
    assert f"init={tmp_path}/flowvae-sources" in second
    decoder = compose("train_flowvae", second[2:])
    assert (decoder.trainer.max_steps, list(decoder.freeze)) == (8, ["encoder.*", "flow.*"])
    assert decoder.objective.energy_weight > 0
    assert f"flowvae={tmp_path}/flowvae2/weights" in lm
    assert f"init={tmp_path}/lm-short/weights" in lm
    assert not any(word.startswith("init=") for word in first + short)
    steps = [compose("train_lm", folder_override(words[2:], "flowvae")).trainer.max_steps for words in (short, lm)]
    assert steps == [4, 5], "of nine"
    for name in ("en", "hibari"):
        encode = compose("encode", folder_override(asked[f"encode {name}"][1:], "flowvae"))
        assert encode.flowvae.folder == f"{tmp_path}/flowvae/weights"
        assert encode.speaker_mels
        assert encode.join.passes > 0


def test_a_gpu_trains_a_language_model_of_its_own(recipe: Any, tmp_path: Path) -> None:
    gpu = trained(recipe, command_line(recipe, "--out", str(tmp_path), "--lm", "nano_lm_gpu"))
    cpu = trained(recipe, command_line(recipe, "--out", str(tmp_path)))
    for asked, stage in ((gpu, "train lm short"), (gpu, "train lm"), (cpu, "train lm")):
        config = compose("train_lm", folder_override(asked[stage][2:], "flowvae"))
        assert config.lm.backbone.hidden_size == config.data.speaker.latent_dim == 384
        assert config.objective.alignment_layers == [1, 2]
        assert config.attention in ATTENTION


def test_a_continuation_starts_from_weights_and_skips_what_has_no_steps(recipe: Any, tmp_path: Path) -> None:
    start = tmp_path / "shipped"
    (start / "lm").mkdir(parents=True)
    given = command_line(recipe, "--out", str(tmp_path / "out"), "--continue-from", str(start), "--steps", "0", "0", "5")
    asked = trained(recipe, given)
    assert "train flowvae" not in asked
    assert "train flowvae2" not in asked
    assert f"flowvae={start}" in asked["encode hibari"]
    assert {f"init={start}", f"flowvae={start}"} <= set(asked["train lm"])
    assert "train lm short" not in asked


def test_a_decoder_with_noise_keeps_it_when_all_is_trained_on(recipe: Any, tmp_path: Path, toy_weights: Path) -> None:
    fuller = tmp_path / "fuller"
    FlowVAE.from_pretrained(toy_weights).with_sources().save_pretrained(fuller)
    (fuller / "lm").symlink_to(toy_weights / "lm")
    for folder, weight in ((toy_weights, 0.0), (fuller, 3.0)):
        asked = trained(
            recipe, command_line(recipe, "--out", str(tmp_path / "out"), "--continue-from", str(folder), "--steps", "5", "0", "5")
        )
        assert compose("train_flowvae", asked["train flowvae"][2:]).objective.energy_weight == weight


@pytest.mark.parametrize("words", [["--steps", "0", "1", "1"], ["--steps", "1", "1", "0"], ["--continue-from", "nowhere"]])
def test_parts_that_come_from_nowhere_are_refused(words: list[str], recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected"):
        recipe("nano", "trainings").Training(Recorder(), command_line(recipe, "--out", str(tmp_path), *words))


def test_assembled_parts_are_the_chosen_ones(recipe: Any, tmp_path: Path, toy_weights: Path) -> None:
    given = command_line(recipe, "--out", str(tmp_path), "--continue-from", str(toy_weights), "--steps", "0", "0", "0")
    training = recipe("nano", "trainings").Training(Recorder(), given)
    training.assemble(tmp_path / "weights")
    from kalle.synthesis.kalle import Kalle

    assert Kalle.from_pretrained(tmp_path / "weights").default_voice is None
    training.assemble(tmp_path / "weights")  # again, over what is there


def test_a_continuation_keeps_what_the_weights_say_of_texts(recipe: Any, tmp_path: Path, toy_weights: Path) -> None:
    start, out = tmp_path / "start", tmp_path / "out"
    for folder in (start, out / "lm/weights"):
        shutil.copytree(toy_weights, folder)
    described = read_json(start / "config.json")
    write_json(start / "config.json", described | {"temperature": 0.6, "text": {"capital_words": True}})
    given = command_line(recipe, "--out", str(out), "--continue-from", str(start), "--steps", "0", "0", "5")
    recipe("nano", "trainings").Training(Recorder(), given).assemble(out / "weights")
    kept = read_json(out / "weights/config.json")
    assert (kept["temperature"], kept["text"]) == (0.6, {"capital_words": True})


def test_every_evaluation_composes(recipe: Any, tmp_path: Path, toy_corpus: Path) -> None:
    for name in ("corpora/en", "test/hibari", "test/strangers"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(toy_corpus)
    given = command_line(recipe, "--out", str(tmp_path), "--items", "5", "--score-seeds", "0", "1")
    scores = recipe("nano", "scores")
    (tmp_path / "lengths.jsonl").touch()
    from kalle.cli.evaluate import testset_path

    found = scores.evaluations(given, tmp_path / "weights", tmp_path)
    assert set(found) == {
        "synthetic",
        "harvard",
        "recorded",
        "lengths",
        "reconstruction-hibari",
        "reconstruction-strangers",
        "reconstruction-en",
    }
    for name, words in found.items():
        config = compose("evaluate", [testset_path(word) for word in words])
        assert config.metrics.wer.model == "base"
        assert config.testset.limit == (None if name == "lengths" else 5)
        if name in ("synthetic", "recorded"):
            assert list(config.synthesis.seeds) == [0, 1]
    assert compose("evaluate", [testset_path(word) for word in found["recorded"]]).synthesis.prompt_text is None


def test_voices_are_made_with_their_notes(recipe: Any, tmp_path: Path) -> None:
    import typer

    from kalle.cli.voices import app

    voices = recipe("nano", "voices")
    assert len({voice.name for voice in voices.BUILT_IN}) == len(voices.BUILT_IN) == 14
    prompt = TestItem("id", "What it's saying, here", tmp_path / "a.wav", "somebody")
    command: Any = typer.main.get_command(app)
    for voice in voices.BUILT_IN:
        words = voices.create_command(voice, prompt, tmp_path)
        context = command.commands["create"].make_context("create", words[2:])
        assert context.params["licence"] == voice.licence
        assert context.params["name"] == voice.name
        assert context.params["consent"]


def test_a_voice_that_names_its_recording_is_made_from_it(recipe: Any, toy_corpus: Path) -> None:
    voices = recipe("nano", "voices")
    made = [voices.BuiltIn("a", toy_corpus.name, "CC0", "yes", recording=name) for name in (None, "train03", "elsewhere")]
    chosen = [voices.prompt_of(voice, toy_corpus.parent).id for voice in made]
    assert chosen == [chosen[0], "train03", chosen[0]]
    assert chosen[0].startswith("valid")


def test_the_report_compares_targets_and_survives_what_is_missing(recipe: Any, tmp_path: Path) -> None:
    report = recipe("nano", "report")
    numbers = {"wer_corpus": {"value": 0.2, "interval": [0.1, 0.3], "count": 9}}
    summary = {"size": {"bytes": 31e6, "largest_file_bytes": 26e6}, "speech": {"synthetic": {"synthesis": numbers}}}
    table = report.goals_table(summary)
    assert "| weights, MB | <= 40.0 | 31.0 | yes |" in table
    assert "| largest file, MB | <= 25.0 | 26.0 | no |" in table
    assert "| WER, the same texts in the default voice | - | 0.200 [0.100, 0.300] |  |" in table
    speech = {"reconstruction-fr": {"recording": numbers, "reconstruction": {"wer_corpus": {"value": 0.5}}}}
    assert report.reconstruction_table(speech, ["fr"])[0].startswith("| Flow-VAE, unseen recordings | WER of them | wer_corpus |")
    assert report.reconstruction_table(speech, ["fr"])[2:] == ["| fr (recorded) | 0.200 | 0.500 | - | - | - | - | 0.300 |"]


def test_curves_are_drawn_from_the_newest_table(recipe: Any, tmp_path: Path) -> None:
    curves = recipe("nano", "curves")
    for version, value in ((2, 5), (10, 7)):
        path = tmp_path / f"lm/csv/version_{version}/metrics.csv"
        path.parent.mkdir(parents=True)
        path.write_text(f"step,train/loss,val/loss,lr\n0,{value},,1\n10,{value - 1},3,1\n")
    assert curves.read_metrics(tmp_path / "lm") == {"train/loss": [(0, 7.0), (10, 6.0)], "val/loss": [(10, 3.0)]}
    assert curves.draw_curves([tmp_path / "lm", tmp_path / "none"], tmp_path / "drawn") == [tmp_path / "drawn/lm.png"]
    assert (tmp_path / "drawn/lm.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_chain_from_training_to_scores(tmp_path: Path, recipe: Any) -> None:
    """All but the making of the corpora, which needs packages: the embedded corpus stands for each of them but Kokoro's, which is gone."""
    from kalle.cli.hydra_entry import configs_dir
    from kalle.cli.main import COMMANDS, dispatch

    if "export" not in COMMANDS or not (configs_dir() / "experiment" / "nano_lm.yaml").is_file():
        pytest.skip("needs `kalle export` and experiment=nano_lm")
    dispatch(["prepare", "embedded", "--corpus", str(ROOT / "recipes/quickstart/corpus"), "--out", str(tmp_path / "embedded")])
    (tmp_path / "corpora").mkdir()
    (tmp_path / "test").mkdir()
    corpora = recipe("nano", "corpora")
    for name in (*corpora.LANGUAGES, corpora.SYNTHETIC):
        (tmp_path / "corpora" / name).symlink_to(tmp_path / "embedded")
    for name in (corpora.SYNTHETIC, corpora.STRANGERS):
        (tmp_path / "test" / name).symlink_to(tmp_path / "embedded")
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "recipes/nano/run.py"), "--out", str(out), "--corpora", str(tmp_path / "corpora")]
    command += [
        "--steps",
        "3",
        "2",
        "3",
        "--items",
        "1",
        "--lengths",
        "2",
        "--device",
        "cpu",
        "--only",
        "train",
        "finish",
        "voices",
        "evaluate",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1700)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = read_json(out / "evaluation/summary.json")
    assert set(summary["voices"]) == {"hibari", "allison", "june", "carlo", "ivrvoice"}
    assert all(row["wer"] > 0 for row in (*summary["voices"].values(), *summary["strangers"].values()))
    assert summary["size"]["peak_memory_bytes"] > summary["size"]["bytes"] > 0
    assert summary["lengths"]["rates"]["all"]["items"] == 2
    assert read_json(out / "compute.json")["total_seconds"] > 0
    assert read_json(out / "kalle-nano/config.json")["voice"] == "hibari"
    assert "| weights, MB |" in (out / "evaluation/summary.md").read_text()


def test_another_run_in_the_same_folder_is_refused(recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "stages.json", {"settings": {"seed": 0}, "seconds": {}, "done": []})
    assert recipe("nano", "run").run(["--out", str(tmp_path), "--seed", "1"]) == 2
    assert "use another --out" in capsys.readouterr().err


def test_another_temperature_needs_no_other_export(recipe: Any, tmp_path: Path) -> None:
    write_json(tmp_path / "kalle-nano/config.json", {"language": "en"})
    for temperature in ("0.6", "0.7"):
        given = command_line(recipe, "--out", str(tmp_path), "--temperature", temperature)
        assert not any(word.startswith("--temperature") for word in trained(recipe, given)["export"])
        assert read_json(tmp_path / "kalle-nano/config.json") == {"language": "en", "temperature": float(temperature)}


@pytest.mark.parametrize("words", [["--temperature", "-1"], ["--temperature", "nan"], ["--temperature", "0.5", "--only", "evaluate"]])
def test_a_temperature_that_cannot_be_stored_is_refused(words: list[str], recipe: Any, tmp_path: Path, capsys) -> None:
    assert recipe("nano", "run").run(["--out", str(tmp_path), *words]) == 2
    assert "--temperature: got" in capsys.readouterr().err
