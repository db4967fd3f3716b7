from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from kalle.errors import UserError
from kalle.models.lm import KalleLM, KalleLMConfig, NextFrame
from kalle.models.lm_batch import LMBatch, Packing

EXACT = {"atol": 1e-5, "rtol": 1e-4}
FRAMES, TEXTS = [7, 3, 5], [4, 6, 2]


@pytest.fixture
def config(toy_lm_config: KalleLMConfig) -> KalleLMConfig:
    return dataclasses.replace(toy_lm_config, stop_head=True)


@pytest.fixture
def lm(config: KalleLMConfig) -> KalleLM:
    torch.manual_seed(0)
    return KalleLM(config).eval().requires_grad_(False)


@pytest.fixture
def batch() -> LMBatch:
    torch.manual_seed(1)
    valid = (torch.arange(7) < torch.tensor(FRAMES)[:, None])[..., None]
    return LMBatch(torch.randint(0, 256, (3, 6)), torch.tensor(TEXTS), torch.randn(3, 7, 4) * valid, torch.tensor(FRAMES))


def logit_of(prediction: NextFrame) -> torch.Tensor:
    assert prediction.stop_logit is not None
    assert prediction.stop_logit.dtype == torch.float32
    return prediction.stop_logit


def test_without_a_head_nothing_is_different(toy_lm_config: KalleLMConfig, config: KalleLMConfig, batch: LMBatch) -> None:
    torch.manual_seed(0)
    plain = KalleLM(toy_lm_config).eval()
    torch.manual_seed(0)
    headed = KalleLM(config).eval()
    assert "stop_head" not in toy_lm_config.to_dict()
    assert headed.state_dict().keys() - plain.state_dict().keys() == {"stop_head.weight", "stop_head.bias"}
    assert all(torch.equal(tensor, headed.state_dict()[name]) for name, tensor in plain.state_dict().items())
    assert plain(batch).stop_logit is None
    assert torch.equal(plain(batch).mean, headed(batch).mean)
    assert torch.equal(plain(batch).log_std, headed(batch).log_std)


def test_every_way_to_a_prediction_has_the_same_logit(lm: KalleLM, batch: LMBatch) -> None:
    whole = logit_of(lm(batch))
    assert whole.shape == (3, 8)
    assert whole.std() > 1e-3, "a constant proves nothing"
    torch.testing.assert_close(logit_of(lm.all_positions(batch))[0, TEXTS[0] - 1 : TEXTS[0] + FRAMES[0]], whole[0], **EXACT)
    for row, (length, frames) in enumerate(zip(TEXTS, FRAMES, strict=True)):
        ids, latents = batch.text_ids[row : row + 1, :length], batch.latents[row : row + 1, :frames]
        torch.testing.assert_close(logit_of(lm.predict_all(ids, latents))[0], whole[row, : frames + 1], **EXACT)
        torch.testing.assert_close(logit_of(lm.predict(ids, latents))[0], whole[row, frames], **EXACT)
        prediction, state = lm.prefill(ids, latents[:, :1])
        for index in range(1, frames):
            torch.testing.assert_close(logit_of(prediction)[0], whole[row, index], **EXACT)
            prediction, state = lm.step(latents[:, index], state)
        torch.testing.assert_close(logit_of(prediction)[0], whole[row, frames], **EXACT)


@pytest.mark.parametrize("row_positions", [None, 12])
def test_packed_equals_padded(lm: KalleLM, batch: LMBatch, row_positions: int | None) -> None:
    packed = lm(batch, lm.layout(batch, Packing(row_positions)))
    torch.testing.assert_close(logit_of(packed), logit_of(lm(batch)), **EXACT)


def test_the_head_stays_in_fp32(lm: KalleLM, batch: LMBatch, tmp_path: Path) -> None:
    lm.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "lm" / "config.json").read_text())["stop_head"] is True
    assert torch.equal(logit_of(KalleLM.from_pretrained(tmp_path)(batch)), logit_of(lm(batch)))
    half = KalleLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.stop_head is not None
    assert half.stop_head.weight.dtype == torch.float32
    torch.testing.assert_close(logit_of(half(batch)), logit_of(lm(batch)), atol=0.1, rtol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        logit_of(lm(batch))


def test_a_head_that_the_configuration_does_not_know_is_refused(lm: KalleLM, tmp_path: Path) -> None:
    lm.save_pretrained(tmp_path)
    path = tmp_path / "lm" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stop_head": False}))
    with pytest.raises(UserError, match=r"stop_head"):
        KalleLM.from_pretrained(tmp_path)


def test_a_head_added_later_follows_from_its_generator(toy_lm_config: KalleLMConfig, batch: LMBatch, tmp_path: Path) -> None:
    def built(seed: int) -> KalleLM:
        torch.manual_seed(0)
        lm = KalleLM(toy_lm_config).eval()
        before = lm(batch).mean
        torch.manual_seed(seed + 50)
        lm.add_stop_head(torch.Generator().manual_seed(seed))
        assert torch.equal(lm(batch).mean, before)
        return lm

    one, again, other = built(1), built(1), built(2)
    assert torch.equal(logit_of(one(batch)), logit_of(again(batch)))
    assert not torch.equal(logit_of(one(batch)), logit_of(other(batch)))
    one.save_pretrained(tmp_path)
    assert torch.equal(logit_of(KalleLM.from_pretrained(tmp_path)(batch)), logit_of(one(batch)))


def test_predictions_are_joined_indexed_and_cut_from_the_graph_whole() -> None:
    values = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    parts = [NextFrame(row, row + 1, row[:, 0].requires_grad_()) for row in values]
    joined = NextFrame.cat(parts)
    assert joined.mean.shape == (6, 4)
    assert torch.equal(logit_of(joined[3]), values[1, 1, 0])
    assert torch.equal(joined[None].detach().stop_logit, values[..., 0].reshape(1, 6))  # type: ignore[arg-type]
    assert not logit_of(joined.detach()).requires_grad
    assert joined.to(torch.float64).stop_logit.dtype == torch.float64  # type: ignore[union-attr]
    with pytest.raises(AssertionError):
        NextFrame.cat([parts[0], NextFrame(values[0], values[0])])
