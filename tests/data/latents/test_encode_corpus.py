from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lhotse import CutSet

from kalle.checkpoint import weights_hash
from kalle.data.corpus.cuts import load_audio
from kalle.data.latents.encode import CorpusEncoder, EncodeConfig, JoinConfig, encode_corpus, half_precision
from kalle.data.latents.shards import ShardFolder, read_info, read_items
from kalle.errors import UserError
from kalle.gaussian import DiagGaussian
from kalle.models.flowvae import FlowVAE
from kalle.models.speaker import SpeakerMel

MakeCuts = Callable[..., list[Any]]
LENGTHS = [3000, 4000, 4000, 5001, 4000, 2500, 6399]


def latents(folder: Path, split: str = "train") -> dict[str, np.ndarray]:
    return {item.id: item.latents.load() for item in read_items(folder, split)}


def content(folder: Path) -> dict[str, object]:
    """Everything that matters in a latent folder, byte for byte where the format allows it."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    tars = {name: path.read_bytes() for name, path in files.items() if name.endswith(".tar")}
    cuts = {name: [cut.to_dict() for cut in CutSet.from_file(path)] for name, path in files.items() if name.endswith(".jsonl.gz")}
    info = {name: path.read_text() for name, path in files.items() if path.name in ("info.json", ".completed")}
    return {"names": list(files), **tars, **cuts, **info}


def test_posteriors_are_those_of_each_utterance_alone(make_cuts: MakeCuts, tiny_flowvae: FlowVAE, tmp_path: Path) -> None:
    cuts = make_cuts(LENGTHS)
    encode_corpus(CorpusEncoder(tiny_flowvae, EncodeConfig()), {"train": cuts}, tmp_path / "out")
    stored = latents(tmp_path / "out")
    assert list(stored) == [cut.id for cut in cuts]
    for cut in cuts:
        with torch.inference_mode():
            alone = tiny_flowvae.encode(torch.from_numpy(load_audio(cut, 16000))[None])
        expected = torch.cat((alone.mean, alone.log_std), -1)[0].half().numpy()
        assert stored[cut.id].dtype == np.float16
        assert np.array_equal(stored[cut.id], expected)


def test_equal_length_batches_equal_singles(make_cuts: MakeCuts, tiny_flowvae: FlowVAE) -> None:
    cuts = make_cuts(LENGTHS)
    groups: list[int] = []
    plain = tiny_flowvae.encode

    def counting(wav: torch.Tensor) -> DiagGaussian:
        groups.append(len(wav))
        return plain(wav)

    from kalle.data.latents.encode import singles

    alone = {u.id: tiny_flowvae.encode(torch.from_numpy(u.audio(16000))[None]) for u in singles(cuts)}
    tiny_flowvae.encode = counting  # type: ignore[method-assign]
    records, _ = CorpusEncoder(tiny_flowvae, EncodeConfig(batch_size=2)).records(singles(cuts))
    assert sorted(groups) == [1, 1, 1, 1, 1, 2]
    assert [record.id for record in records] == [cut.id for cut in cuts]
    for record in records:
        reference = torch.cat((alone[record.id].mean, alone[record.id].log_std), -1)[0]
        torch.testing.assert_close(torch.from_numpy(record.latents).float(), reference, atol=1e-5, rtol=2**-10)
    batch = torch.from_numpy(np.stack([load_audio(cuts[1], 16000), load_audio(cuts[2], 16000)]))
    torch.testing.assert_close(plain(batch).mean[1], alone["c002"].mean[0], atol=1e-5, rtol=0)


def test_result_does_not_depend_on_shards_or_order(make_cuts: MakeCuts, tiny_flowvae: FlowVAE, tmp_path: Path) -> None:
    cuts = make_cuts(LENGTHS)
    encode_corpus(CorpusEncoder(tiny_flowvae, EncodeConfig(shard_size=2)), {"train": cuts}, tmp_path / "a")
    encode_corpus(CorpusEncoder(tiny_flowvae, EncodeConfig(shard_size=3)), {"train": cuts[::-1]}, tmp_path / "b")
    one, other = latents(tmp_path / "a"), latents(tmp_path / "b")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert read_info(tmp_path / "a")["splits"]["train"]["shards"] == 4


def test_shar_is_readable_by_lhotse_with_text_and_speaker(make_cuts: MakeCuts, tiny_flowvae: FlowVAE, tmp_path: Path) -> None:
    cuts = make_cuts(LENGTHS)
    config = EncodeConfig(shard_size=4, join=JoinConfig(passes=1, min_seconds=0.3, max_seconds=1.5, gap_seconds=(0.05, 0.1)))
    info = encode_corpus(CorpusEncoder(tiny_flowvae, config), {"train": cuts, "valid": make_cuts([4000], "v")}, tmp_path / "out")
    read = list(CutSet.from_shar(in_dir=str(tmp_path / "out" / "train")))
    ids = [cut.id for cut in read]
    assert ids[: len(cuts)] == [cut.id for cut in cuts], "single cuts are kept beside the joined ones"
    by_id = {cut.id: cut for cut in cuts}
    for cut in read:
        supervision = cut.supervisions[0]
        sources = [by_id[name] for name in cut.custom["sources"]]
        assert supervision.text == " ".join(source.supervisions[0].text for source in sources)
        assert {source.supervisions[0].speaker for source in sources} == {supervision.speaker}
        assert cut.load_latents().shape == (cut.custom["num_frames_latent"], 8)
    assert info["splits"]["train"]["joined"] == len(read) - len(cuts) > 0
    assert info["splits"]["valid"]["joined"] == 0


def test_info(make_cuts: MakeCuts, tiny_flowvae: FlowVAE, tmp_path: Path) -> None:
    cuts = [*make_cuts(LENGTHS), *make_cuts([100], "short")]
    info = encode_corpus(CorpusEncoder(tiny_flowvae, EncodeConfig()), {"train": cuts, "test": make_cuts([4000], "t")}, tmp_path / "out")
    assert info == read_info(tmp_path / "out") == json.loads((tmp_path / "out" / "info.json").read_text())
    assert (info["latent_dim"], info["hop_length"], info["frame_rate_hz"], info["sample_rate_hz"]) == (4, 160, 100, 16000)
    assert info["encoder_hash"] == weights_hash(tiny_flowvae.encoder)
    train = info["splits"]["train"]
    assert train["utterances"] == len(LENGTHS)
    assert train["skipped"] == {"short000": "shorter than one frame: 100 of 160 samples"}
    assert train["seconds"] == pytest.approx(sum(LENGTHS) / 16000)
    frames = np.concatenate(list(latents(tmp_path / "out").values())).astype(np.float64)
    assert train["frames"] == len(frames)
    assert info["total_frames"] == len(frames) + info["splits"]["test"]["frames"]
    mean, variance = frames[:, :4].mean(0), (np.exp(2 * frames[:, 4:]) + frames[:, :4] ** 2).mean(0) - frames[:, :4].mean(0) ** 2
    np.testing.assert_allclose(info["mean"], mean, rtol=1e-9)
    np.testing.assert_allclose(info["std"], np.sqrt(variance), rtol=1e-9)
    assert info["constant_gaussian_kl"]["train"]["prediction_posterior"] > 0


def test_interrupted_run_resumes_to_the_same_folder(
    make_cuts: MakeCuts, tiny_flowvae: FlowVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {"train": make_cuts(LENGTHS), "valid": make_cuts([4000, 4160], "v")}
    config = EncodeConfig(shard_size=2, join=JoinConfig(passes=1, min_seconds=0.3, max_seconds=1.0, gap_seconds=(0.05, 0.1)))
    encode_corpus(CorpusEncoder(tiny_flowvae, config), splits, tmp_path / "whole")
    encoder = CorpusEncoder(tiny_flowvae, config)
    calls: list[int] = []
    plain = encoder._encode_group

    def failing(group: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(group)

    monkeypatch.setattr(encoder, "_encode_group", failing)
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(encoder, splits, tmp_path / "out")
    with pytest.raises(UserError):
        read_items(tmp_path / "out", "train")
    assert sorted(path.name for path in (tmp_path / "out" / "train").iterdir()) == ["cuts.000000.jsonl.gz", "latents.000000.tar"]
    assert not list((tmp_path / "out").glob(".partial*"))
    before = (tmp_path / "out" / "train" / "latents.000000.tar").stat().st_mtime_ns
    encode_corpus(encoder, splits, tmp_path / "out")
    assert (tmp_path / "out" / "train" / "latents.000000.tar").stat().st_mtime_ns == before, "a finished shard is kept"
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    calls.clear()
    encode_corpus(encoder, splits, tmp_path / "out")
    assert not calls, "a complete folder is left alone"


@pytest.mark.parametrize("damage", ["truncate", "no record", "no cuts", "no tar"])
def test_torn_shard_is_written_again(make_cuts: MakeCuts, tiny_flowvae: FlowVAE, tmp_path: Path, damage: str) -> None:
    splits = {"train": make_cuts(LENGTHS)}
    out = tmp_path / "out"
    encode_corpus(CorpusEncoder(tiny_flowvae, EncodeConfig(shard_size=3)), splits, out)
    whole = content(out)
    tar = out / "train" / "latents.000001.tar"
    if damage == "truncate":
        tar.write_bytes(tar.read_bytes()[:-100])
    else:
        {"no record": out / "progress" / "train.000001.json", "no cuts": out / "train" / "cuts.000001.jsonl.gz", "no tar": tar}[
            damage
        ].unlink()
    encode_corpus(CorpusEncoder(tiny_flowvae, EncodeConfig(shard_size=3)), splits, out)
    assert content(out) == whole


def test_other_encoder_or_setting_is_refused(make_cuts: MakeCuts, tiny_flowvae: FlowVAE, tmp_path: Path) -> None:
    splits = {"train": make_cuts(LENGTHS)}
    encode_corpus(CorpusEncoder(tiny_flowvae, EncodeConfig(shard_size=2)), splits, tmp_path / "out")
    for config in (EncodeConfig(shard_size=3), EncodeConfig(shard_size=2, pad_to_hop=True)):
        with pytest.raises(UserError, match=r"already holds latents of another encoder|files of another run"):
            encode_corpus(CorpusEncoder(tiny_flowvae, config), splits, tmp_path / "out")
    with pytest.raises(UserError, match="files of another run"):
        encode_corpus(CorpusEncoder(tiny_flowvae, EncodeConfig(shard_size=2)), {"train": splits["train"][:4]}, tmp_path / "out")
    with torch.no_grad():
        tiny_flowvae.encoder.conv_out.bias.add_(1e-3)
    with pytest.raises(UserError, match="another encoder"):
        encode_corpus(CorpusEncoder(tiny_flowvae, EncodeConfig(shard_size=2)), splits, tmp_path / "out")


@pytest.mark.parametrize("value", [7e4, float("nan"), float("inf")])
def test_what_half_precision_cannot_hold(value: float) -> None:
    mean = torch.zeros(3, 4)
    mean[1, 2] = value
    with pytest.raises(UserError, match="posterior of cut 'c7' does not fit float16"):
        half_precision(DiagGaussian(mean, torch.zeros(3, 4)), "c7")
    with pytest.raises(UserError, match="c7"):
        half_precision(DiagGaussian(torch.zeros(3, 4), mean), "c7")


def test_overflow_leaves_no_shard(make_cuts: MakeCuts, tiny_flowvae: FlowVAE, tmp_path: Path) -> None:
    with torch.no_grad():
        tiny_flowvae.encoder.conv_out.bias.fill_(1e5)
    with pytest.raises(UserError, match="cut 'c000'"):
        encode_corpus(CorpusEncoder(tiny_flowvae, EncodeConfig()), {"train": make_cuts(LENGTHS)}, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_full_disk(make_cuts: MakeCuts, tiny_flowvae: FlowVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardFolder, "write", full)
    with pytest.raises(UserError, match=r"cannot write .*make room on the disk"):
        encode_corpus(CorpusEncoder(tiny_flowvae, EncodeConfig()), {"train": make_cuts([4000])}, tmp_path / "out")


def test_an_impossible_folder_is_refused_before_anything_is_encoded(
    make_cuts: MakeCuts, tiny_flowvae: FlowVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CorpusEncoder, "records", lambda *_: pytest.fail("encoded"))
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(UserError, match=r"cannot write .*choose another path") as caught:
            encode_corpus(CorpusEncoder(tiny_flowvae, EncodeConfig()), {"train": make_cuts([4000])}, out)
        assert "room" not in str(caught.value)


def test_nothing_to_encode(make_cuts: MakeCuts, tiny_flowvae: FlowVAE, tmp_path: Path) -> None:
    encoder = CorpusEncoder(tiny_flowvae, EncodeConfig())
    with pytest.raises(UserError):
        encode_corpus(encoder, {"train": []}, tmp_path / "out")
    with pytest.raises(UserError):
        encode_corpus(encoder, {"train": make_cuts([50])}, tmp_path / "out")
    with pytest.raises(UserError, match="'c000' twice"):
        encode_corpus(encoder, {"train": make_cuts([4000]) * 2}, tmp_path / "out2")


def test_a_text_that_nothing_reads_is_named(make_cuts: MakeCuts, tiny_flowvae: FlowVAE, tmp_path: Path) -> None:
    cuts = make_cuts([4000, 4000])
    cuts[1].supervisions[0].text = "It\u0092s"
    with pytest.raises(UserError, match=r"'c001' has .*U\+0092"):
        encode_corpus(CorpusEncoder(tiny_flowvae, EncodeConfig()), {"train": cuts}, tmp_path / "out")


def test_padding_to_the_hop_is_an_option(make_cuts: MakeCuts, tiny_flowvae: FlowVAE, tmp_path: Path) -> None:
    cuts = make_cuts([4801])
    encode_corpus(CorpusEncoder(tiny_flowvae, EncodeConfig()), {"train": cuts}, tmp_path / "a")
    encode_corpus(CorpusEncoder(tiny_flowvae, EncodeConfig(pad_to_hop=True)), {"train": cuts}, tmp_path / "b")
    assert len(latents(tmp_path / "a")["c000"]) == 30
    assert len(latents(tmp_path / "b")["c000"]) == 31


def test_speaker_mels_are_stored(make_cuts: MakeCuts, tiny_flowvae: FlowVAE, tmp_path: Path) -> None:
    cuts = make_cuts([40000, 60000])
    encode_corpus(CorpusEncoder(tiny_flowvae, EncodeConfig(speaker_mels=True), SpeakerMel()), {"train": cuts}, tmp_path / "out")
    items = read_items(tmp_path / "out", "train")
    assert [item.id for item in items] == ["c000", "c001"]
    for item, cut in zip(items, cuts, strict=True):
        assert item.speaker_mels is not None
        mels = item.speaker_mels.load()
        expected = SpeakerMel()(torch.from_numpy(load_audio(cut, 16000))).numpy()
        np.testing.assert_allclose(mels, expected, atol=0.01)


def test_weights_hash_follows_names_and_values(tiny_flowvae: FlowVAE) -> None:
    reference = weights_hash(tiny_flowvae.encoder)
    assert reference == weights_hash(tiny_flowvae.encoder)
    layer = torch.nn.Linear(2, 2)
    before = weights_hash(layer)
    assert before == weights_hash(layer.double())
    with torch.no_grad():
        layer.weight[0, 0] += 1e-3
    assert weights_hash(layer) != before
