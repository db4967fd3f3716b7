"""Every reader of what comes from outside, given inputs that are nearly right: each ends in a result or in one line, never otherwise.

`make test-slow` gives 20,000 inputs to each (docs/results/README.md, "Hostile input"), the fast suite a few.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from damage import ODD, documents, ends_well, files, json_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kalle.audio import load_channels, load_mono, read_audio
from kalle.data.corpus.cuts import cuts_path, load_audio, make_cut, read_cuts
from kalle.data.corpus.items import PrepareOptions, Source
from kalle.data.corpus.lists import read_csv_corpus, read_folder, read_jsonl_corpus
from kalle.data.corpus.prepare import prepare_corpus
from kalle.data.corpus.published import read_kaldi
from kalle.data.latents.shards import iter_posteriors, read_items
from kalle.data.shared_work import RankJournals, ResumeJournal, Share
from kalle.decoding import Span
from kalle.errors import UserError
from kalle.evaluation.test_list import read_test_list
from kalle.models.flowvae import FlowVAE
from kalle.models.lm import KalleLM
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import GenerationOptions, SpeechRequest, StopRule, check_seed, checked_language
from kalle.synthesis.voice import Binding, Voice
from kalle.synthesis.weights import load_tokenizer, read_weight_folder
from kalle.text.frontend import LearntTexts, TextFrontEnd
from kalle.text.languages import split_sentences, unspoken

INPUTS = 20_000
FEW = 8
sizes = pytest.mark.parametrize("inputs", [FEW, pytest.param(INPUTS, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])
ROOT = Path(__file__).parents[2]
TONE = (0.3 * np.sin(np.arange(2400) / 9)).astype(np.float32)


def fuzz(strategy: st.SearchStrategy[Any], read: Callable[[Any], object], inputs: int) -> None:
    """Give ``inputs`` values of ``strategy`` to ``read``, and print how they ended."""
    results, slowest, number = 0, 0.0, 0

    @settings(max_examples=inputs, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(value: Any) -> None:
        nonlocal results, slowest, number
        began = time.monotonic()
        results += ends_well(lambda: read(value), UserError)
        slowest, number = max(slowest, time.monotonic() - began), number + 1

    run()
    print(f"\n{number} inputs: {results} read, {number - results} refused in one line, slowest {slowest:.2f} s")


def encoded(kind: str, subtype: str | None, channels: int = 1, rate_hz: int = 16000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.repeat(TONE[:, None], channels, axis=1), rate_hz, format=kind, subtype=subtype)
    return buffer.getvalue()


def by_pyav(kind: str, codec: str) -> bytes:
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=48000)
        for start in range(0, 4800, 960):
            frame = av.AudioFrame.from_ndarray(np.resize(TONE, (1, 960)).astype(np.float32), format="flt", layout="mono")
            frame.sample_rate, frame.pts = 48000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


COMPRESSED = {
    "ogg": [("OGG", "VORBIS")], "opus": [("OGG", "OPUS")], "mp3": [("MP3", None)], "caf": [("CAF", "ALAC_16")],
    "wav": [("WAV", "IMA_ADPCM"), ("WAV", "MS_ADPCM"), ("WAV", "GSM610")], "xi": [("XI", "DPCM_16")],
}  # fmt: skip
PLAIN = {
    "wav": [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAVEX", "FLOAT"), ("RF64", "PCM_16"), ("WAV", "ULAW"), ("WAV", "PCM_U8")],
    "aiff": [("AIFF", "PCM_16")], "au": [("AU", "PCM_16")], "caf": [("CAF", "PCM_16")], "flac": [("FLAC", "PCM_16")],
}  # fmt: skip


def read_in_one_way(path: Path, content: bytes) -> None:
    """The three ways to read a file, one for each content."""
    path.write_bytes(content)
    ways = (lambda: read_audio(path, 16000, 5.0), lambda: load_mono(path, 5.0), lambda: load_channels(path, 5.0, Span(0.05, 0.02)))
    ways[zlib.crc32(content) % 3]()


@sizes
def test_compressed_audio(tmp_path: Path, inputs: int) -> None:
    kinds = [(suffix, encoded(*kind)) for suffix, some in COMPRESSED.items() for kind in some]
    kinds += [
        ("m4a", by_pyav("ipod", "aac")),
        ("webm", by_pyav("webm", "libopus")),
    ]
    strategy = st.one_of(*(st.tuples(st.just(suffix), files(200, content)) for suffix, content in kinds))

    fuzz(strategy, lambda value: read_in_one_way(tmp_path / f"a.{value[0]}", value[1]), inputs)


@sizes
def test_headers_of_plain_audio(tmp_path: Path, inputs: int) -> None:
    kinds = [(suffix, encoded(*kind, channels)) for suffix, some in PLAIN.items() for kind in some for channels in (1, 3)]
    unfinished = bytearray(encoded("WAV", "PCM_16"))
    unfinished[40:44] = bytes(4)
    strategy = st.one_of(*(st.tuples(st.just(suffix), files(80, content)) for suffix, content in [*kinds, ("wav", bytes(unfinished))]))

    fuzz(strategy, lambda value: read_in_one_way(tmp_path / f"a.{value[0]}", value[1]), inputs)


@pytest.fixture
def weights(tmp_path: Path, toy_weights: Path) -> Path:
    shutil.copytree(toy_weights, tmp_path / "weights")
    return tmp_path / "weights"


@sizes
def test_config_json_of_a_weight_folder(weights: Path, inputs: int) -> None:
    whole = {
        "format_version": 1, "parts": ["flowvae", "lm", "tokenizer"], "sample_rate": 16000, "language": "en", "voice": "a",
        "temperature": 0.8, "stop": {"threshold": 0.5, "min_index": 3, "false_stop_rate": 0.1}, "longest_seconds": 9.5,
        "confidence": {"low": -1.0, "temperature": 0.8, "utterances": 20},
        "text": {"characters": {"en": "abc ,.", "zh": None}, "capital_words": False, "replace": {"ä": "ae"}},
    }  # fmt: skip

    def read(content: bytes) -> None:
        (weights / "config.json").write_bytes(content)
        folder = read_weight_folder(weights)
        folder.words("Words, 3 of them – ä.", GenerationOptions())
        folder.transcript("WORDS")

    fuzz(json_files(whole), read, inputs)


@sizes
def test_config_json_of_the_models(weights: Path, inputs: int) -> None:
    paths = {part: weights / part / "config.json" for part in ("flowvae", "lm")}
    whole = {part: json.loads(path.read_bytes()) for part, path in paths.items()}
    strategy = st.one_of(*(st.tuples(st.just(part), json_files(values)) for part, values in whole.items()))

    def read(value: tuple[str, bytes]) -> None:
        part, content = value
        paths[part].write_bytes(content)
        (FlowVAE if part == "flowvae" else KalleLM).from_pretrained(weights)
        Binding.of_folder(weights)

    def restored(value: tuple[str, bytes]) -> None:
        try:
            read(value)
        finally:
            paths[value[0]].write_text(json.dumps(whole[value[0]]))

    fuzz(strategy, restored, inputs)


@sizes
def test_index_and_shards_of_weights(weights: Path, inputs: int) -> None:
    from kalle.checkpoint import read_tensors, read_weights, write_weights

    tensors = {name: tensor.clone() for name, tensor in read_tensors(weights / "flowvae" / "model.safetensors").items()}
    (weights / "flowvae" / "model.safetensors").unlink()
    names = [path.name for path in write_weights(weights / "flowvae", tensors, sum(one.nbytes for one in tensors.values()) // 2)]
    index = weights / "flowvae" / "model.safetensors.index.json"
    whole = {name: (weights / "flowvae" / name).read_bytes() for name in [*names, index.name]}
    shards = [st.tuples(st.just(name), files(3000, whole[name])) for name in names]
    strategy = st.one_of(st.tuples(st.just(index.name), json_files(json.loads(whole[index.name]))), *shards)

    def read(value: tuple[str, bytes]) -> None:
        for name, content in (whole | dict([value])).items():
            (weights / "flowvae" / name).unlink(missing_ok=True)  # what is mapped is never overwritten in place
            (weights / "flowvae" / name).write_bytes(content)
        read_weights(weights / "flowvae")
        FlowVAE.from_pretrained(weights)

    fuzz(strategy, read, inputs)


@sizes
def test_tokenizers(weights: Path, inputs: int) -> None:
    path = weights / "tokenizer" / "tokenizer.json"
    whole = json.loads(path.read_bytes())
    phonemes = json.loads((ROOT / "ckpt" / "kalle-nano" / "tokenizer" / "phonemes.json").read_bytes())
    small = whole | {"model": whole["model"] | {"vocab": dict(list(whole["model"]["vocab"].items())[:4])}}
    strategy = st.one_of(
        st.tuples(st.just("tokenizer.json"), json_files(small, whole)), st.tuples(st.just("phonemes.json"), json_files(phonemes))
    )

    def read(value: tuple[str, bytes]) -> None:
        path.write_text(json.dumps(whole))
        path.with_name("phonemes.json").unlink(missing_ok=True)
        path.with_name(value[0]).write_bytes(value[1])
        load_tokenizer(weights).encode("Some words, 12.", "de")

    fuzz(strategy, read, inputs)


@sizes
def test_latent_folders(tmp_path: Path, toy_latents: Path, inputs: int) -> None:
    root = tmp_path / "latents"
    shutil.copytree(toy_latents, root)
    whole = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != ".completed"}
    wanted = [name for name in whole if name == "info.json" or name.startswith("index.valid") or name.startswith("valid/")]
    strategies = []
    for name in wanted:
        if name == "info.json":
            strategies += 4 * [st.tuples(st.just(name), json_files(json.loads(whole[name])))]
        elif name.endswith(".gz"):
            rows = [json.loads(line) for line in gzip.decompress(whole[name]).splitlines()]
            strategies += [st.tuples(st.just(name), documents(rows).map(_packed)), st.tuples(st.just(name), files(None, whole[name]))]
        else:
            strategies += 2 * [st.tuples(st.just(name), files(3000, whole[name]))]

    def read(value: tuple[str, bytes]) -> None:
        name, content = value
        (root / name).write_bytes(content)
        if name.endswith((".gz", ".tar")):
            (root / "index.valid.safetensors").unlink(missing_ok=True)
        try:
            table = read_items(root, "valid")
            for item in table:
                item.latents.load()
                assert isinstance(item.text, str)
            list(iter_posteriors(root, "valid"))
        finally:
            (root / name).write_bytes(whole[name])
            (root / "index.valid.safetensors").write_bytes(whole["index.valid.safetensors"])

    fuzz(st.one_of(*strategies), read, inputs)


def _packed(rows: Any) -> bytes:
    lines = "\n".join(json.dumps(row) for row in rows) if isinstance(rows, list) else json.dumps(rows)
    return gzip.compress(lines.encode("utf-8", "surrogatepass"), 1)


@sizes
def test_cuts_of_a_corpus(tmp_path: Path, inputs: int) -> None:
    (tmp_path / "a.wav").write_bytes(encoded("WAV", "PCM_16"))
    (tmp_path / "a.ogg").write_bytes(encoded("OGG", "VORBIS"))
    rows = [make_cut("a", "a.wav", 16000, 2400, rate, "a text", "ann", "en", custom={"dnsmos": 3.1}).to_dict() for rate in (16000, 24000)]
    rows.append(make_cut("a", "a.ogg", 16000, 2400, 16000, "a text", "ann", "en", "b", 800, 0.05).to_dict())
    strategy = st.one_of(*(documents(row) for row in rows)).map(lambda row: _packed([row])) | files(None, _packed(rows))

    def read(content: bytes) -> None:
        cuts_path(tmp_path, "test").write_bytes(content)
        for cut in read_cuts(cuts_path(tmp_path, "test")):
            load_audio(cut, 16000)
        read_test_list(cuts_path(tmp_path, "test"), min_words=0)

    fuzz(strategy, read, inputs)


@sizes
def test_reports_markers_and_journals(tmp_path: Path, inputs: int) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.wav").write_bytes(encoded("WAV", "PCM_16", 2))
    (tmp_path / "in" / "a.txt").write_text("some words")
    source, out, options = read_folder(tmp_path / "in"), tmp_path / "out", PrepareOptions(min_seconds=0.01)
    whole = prepare_corpus(source, out, options).report
    names = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    lines = [{"fingerprint": "f"}, {"index": 0, "rows": [{"id": "a", "system": "s", "wer": 0.5}]}, {"index": 1, "rows": []}]
    written = documents(lines).map(
        lambda rows: b"".join(json.dumps(row).encode() + b"\n" for row in rows) if isinstance(rows, list) else b"x"
    )
    strategy = st.one_of(
        st.tuples(st.just("report.json"), json_files(whole)),
        *(st.tuples(st.just(name), files(None, content)) for name, content in names.items()),
        *3 * [st.tuples(st.just("journal"), written | json_files(*lines))],
    )

    def read(value: tuple[str, bytes]) -> None:
        name, content = value
        if name != "journal":
            (out / name).write_bytes(content)
            assert prepare_corpus(source, out, options).report == whole
            return
        for path in (tmp_path / "progress" / "rank-0.jsonl", tmp_path / "progress" / "rank-1.jsonl"):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        with RankJournals(tmp_path, "f", Share(0, 2), 4) as journal:
            journal.pending()
        ResumeJournal(tmp_path / "progress" / "rank-0.jsonl", "f").close()

    fuzz(strategy, read, inputs)


@sizes
def test_test_lists(tmp_path: Path, inputs: int) -> None:
    (tmp_path / "a.wav").write_bytes(encoded("WAV", "PCM_16"))
    row = {"id": "a", "text": "Some words are here.", "audio": "a.wav", "speaker": "ann", "language": "en", "duration": 0.15}
    row |= {"prompt_text": "More.", "prompt_audio": "a.wav", "split": "test"}
    lists = st.text(alphabet="ab|.wav \n\r\t\0\u2028é|", max_size=60).map(lambda text: ("lst", text.encode()))
    lists |= files(None, b"a|more|a.wav|some words|a.wav\nb|more|a.wav|some words\nc|words").map(lambda content: ("lst", content))
    strategy = json_files(row).map(lambda content: ("jsonl", content)) | documents([row, row | {"id": "b"}]).map(
        lambda rows: ("jsonl", _lines(rows))
    )

    def read(value: tuple[str, bytes]) -> None:
        path = tmp_path / f"list.{value[0]}"
        path.write_bytes(value[1])
        for item in read_test_list(path, min_words=0).items:
            assert item.text is not None
            if item.audio_path is not None:
                item.audio(16000)

    fuzz(strategy | lists, read, inputs)


def _lines(rows: Any) -> bytes:
    return "\n".join(json.dumps(row) for row in (rows if isinstance(rows, list) else [rows])).encode("utf-8", "surrogatepass")


def items_of(source: Source) -> None:
    ids = [item.id for item in source.items]
    assert len(set(ids)) == len(ids)


@sizes
def test_tables(tmp_path: Path, inputs: int) -> None:
    table = b'audio,text,speaker,duration\na.wav,"some, words",ann,0.15\nb.wav,more words,bob,0.2\n"c.wav","a ""quoted"" word",,\n'
    piped = b"a.wav|some words|ann\nb.wav|more words|bob\n"
    tabs = b"path\tsentence\tlocale\na.wav\tsome words\ten\nb.wav\tmore\tde\n"
    text = st.text(alphabet='a1.|,;\t"\n\r wav\u0301\0é', max_size=80).map(lambda text: text.encode("utf-8", "surrogatepass"))

    def read(value: bytes) -> None:
        (tmp_path / "a.csv").write_bytes(value)
        items_of(read_csv_corpus(tmp_path / "a.csv"))

    fuzz(files(None, table, piped, tabs) | text, read, inputs)


@sizes
def test_jsonl_manifests(tmp_path: Path, inputs: int) -> None:
    (tmp_path / "a.wav").write_bytes(encoded("WAV", "PCM_16"))
    ours = {
        "audio": "a.wav",
        "text": "some words",
        "speaker": "ann",
        "language": "en",
        "id": "a",
        "start": 0.0,
        "duration": 0.1,
        "style": "calm",
    }
    nemo = {"audio_filepath": "a.wav", "text": "some words", "offset": 0.01, "duration": 0.1, "lang": "en", "split": "dev"}
    rows = st.lists(documents(ours, nemo), max_size=3).map(_lines)
    options = PrepareOptions(min_seconds=0.01)

    def read(value: bytes) -> None:
        (tmp_path / "a.jsonl").write_bytes(value)
        source = read_jsonl_corpus(tmp_path / "a.jsonl")
        items_of(source)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        prepare_corpus(source, tmp_path / "out", options)

    fuzz(rows | json_files(ours, nemo), read, inputs)


@sizes
def test_kaldi_folders(tmp_path: Path, inputs: int) -> None:
    (tmp_path / "a.wav").write_bytes(encoded("WAV", "PCM_16"))
    whole = {
        "wav.scp": b"a a.wav\nb cat a.wav |\n",
        "text": b"a some words\nb more\n",
        "utt2spk": b"a ann\nb bob\n",
        "segments": b"a a 0.0 0.1\nb b 0 -1\n",
    }
    strategy = st.one_of(*(st.tuples(st.just(name), files(None, content)) for name, content in whole.items()))

    def read(value: tuple[str, bytes]) -> None:
        for name, content in (whole | dict([value])).items():
            (tmp_path / name).write_bytes(content)
        items_of(read_kaldi(tmp_path))

    fuzz(strategy, read, inputs)


@sizes
def test_voices(tmp_path: Path, inputs: int) -> None:
    from safetensors import safe_open
    from safetensors.torch import save

    path = next((ROOT / "ckpt" / "kalle-nano" / "voices").glob("*.safetensors"))
    with safe_open(path, framework="pt") as file:
        notes = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    notes |= {"seed": "3", "seconds": "1.5", "format": "kalle-voice-2", "adapter": json.dumps({"format": 1, "tensors": {}})}

    def text(value: Any) -> str:
        return str(value).encode("utf-8", "replace").decode()

    def named(values: Any) -> bytes:
        return save(tensors, {text(key): text(value) for key, value in values.items()}) if isinstance(values, dict) else b""

    strategy = files(1500, path.read_bytes()) | documents(notes, notes | {"format": "kalle-voice-1"}).map(named)

    def read(content: bytes) -> None:
        (tmp_path / "v.safetensors").unlink(missing_ok=True)
        (tmp_path / "v.safetensors").write_bytes(content)
        voice = Voice.load(tmp_path / "v.safetensors")
        voice.save(tmp_path / "again.safetensors")
        voice.check_fits(voice.bound_to)

    fuzz(strategy, read, inputs)


WORDS = st.sampled_from([
    "Mr.", "Ms.", "10:45:30", "1,234", "$5.50", "£3m", "3.5%", "1990s", "'90s", "2026-11-30", "30/11/2026", "3rd", "No.", "I.", "XIV",
    "(555)", "010-2030", "www.a.org/x?y=1", "a@b.co", "3/4", "½", "²", "٣", "三", "第12章", "2026年", "「はい」と", "é", "ﬁ", "<b>",
    "</b>", "&amp;", "**", "#", "…", "—", "“", "”", "‘", "’", "[word](/wˈɜːd/)", "[a](/", ")", "](", "👍", "-5", "1e9", "0x1F",
    "12:00", "p.m.", "5km/h", "$", "the", "words", "Dr", "St.", "U.S.A.", "don't", "?!", "e\u0301", "\n\n", "\r", "\u2029", "\x0b",
    "\0", " ",
    "9" * 40, "1." * 20, "a" * 300,
])  # fmt: skip
TEXTS = (
    st.lists(WORDS | st.text(max_size=4), min_size=1, max_size=9).map(" ".join)
    | st.lists(WORDS, max_size=6).map("".join)
    | st.text(max_size=40)
)
LEARNT = LearntTexts({"en": "abcdefghijklmnopqrstuvwxyz ,.'", "zh": None}, capital_words=False)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("inputs", [INPUTS])
def test_the_text_front_end(inputs: int) -> None:
    pytest.importorskip("inflect")
    pytest.importorskip("wetext")
    tokenizer = load_tokenizer(ROOT / "ckpt" / "kalle-nano")

    def read(value: tuple[str, str | None, bool, bool]) -> None:
        text, language, normalise, phonemes = value
        spoken = TextFrontEnd(LEARNT if phonemes else LearntTexts(), language, normalise, phonemes).read(text)
        sentences = split_sentences(text, language, lambda piece: len(piece) < 60)
        unspoken(text, sentences)
        for sentence in sentences[:2]:
            tokenizer.encode(sentence.spoken, language)
        tokenizer.encode(spoken.text, language)

    fuzz(st.tuples(TEXTS, st.sampled_from([None, "en", "zh", "ja", "de"]), st.booleans(), st.booleans()), read, inputs)


OPTIONS = st.dictionaries(st.sampled_from(list(GenerationOptions.__dataclass_fields__)), ODD | st.binary(max_size=2), max_size=3)


@sizes
def test_generation_options(inputs: int) -> None:
    def read(value: tuple[dict[str, Any], Any, Any]) -> None:
        fields, first, second = value
        for make in (
            lambda: GenerationOptions(**fields).changed(**fields),
            lambda: SpeechRequest(first, second, **fields),
            lambda: SpeechRequest("text", None, second),
            lambda: StopRule(first, second, probability=fields.get("temperature")),
            lambda: checked_language(first),
            lambda: check_seed(first),
            lambda: Voice(bound_to=first, speaker_latent=second, **{k: v for k, v in fields.items() if k in ("seed", "language")}),
            lambda: Kalle.from_pretrained(first),
            lambda: Kalle.from_pretrained("kalle-nano", device=first if not first or first is True else "cpu", dtype=second),
        ):
            ends_well(make, UserError)

    fuzz(st.tuples(OPTIONS, ODD, ODD), read, inputs)


VALUES = st.text(alphabet="[]{}'\"\\,:=${}?a1.- ", max_size=6) | st.sampled_from([
    "null", "true", "-1", "0", "1e9", "nan", ".inf", "abc", "[]", "[1,a]", "{a:1}", "{}", "''", "???", "${out}", "${no}", "1,2",
    "a=b", "é", "\\", "9" * 30,
])  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("inputs", [INPUTS // 2])
@pytest.mark.parametrize("stage", ["lm", "flowvae"])
def test_overrides_of_a_training(stage: str, inputs: int) -> None:
    from omegaconf import OmegaConf

    from kalle.cli.hydra_entry import compose
    from kalle.cli.train import training_config

    def keys_of(config: Any, prefix: str = "") -> list[str]:
        found = []
        for key in config:
            name = f"{prefix}{key}"
            found.append(name)
            if not OmegaConf.is_missing(config, key) and OmegaConf.is_dict(config[key]):
                found += keys_of(config[key], f"{name}.")
        return found

    given_always = ["data.corpus=c"] if stage == "flowvae" else ["data.latents=l", "tokenizer=bytes"]
    keys = [key for key in keys_of(compose(f"train_{stage}", [])) if "_target_" not in key]
    override = st.tuples(st.sampled_from(["", "", "", "", "+", "++", "~"]), st.sampled_from(keys) | st.text(max_size=4), VALUES).map(
        lambda parts: f"{parts[0]}{parts[1]}={parts[2]}"
    )

    def read(overrides: list[str]) -> None:
        training_config(compose(f"train_{stage}", [*given_always, "out=o", *overrides]))

    fuzz(st.lists(override, min_size=1, max_size=2), read, inputs)
