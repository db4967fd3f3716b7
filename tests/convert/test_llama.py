from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kalle.errors import UserError
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.models.text_weights import load_text_weights, with_text_backbone

ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

SIZES = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
REPLACED = KalleLMConfig(backbone=SIZES, latent_dim=4)


def text_model(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(3)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    rope = {"rope_theta": 5000.0, **ROPE}
    return LlamaForCausalLM(LlamaConfig(**size, head_dim=8, vocab_size=90, tie_word_embeddings=tied, rope_parameters=rope)).eval()


@pytest.fixture(params=["one file", "shards", "untied", "half"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, LlamaForCausalLM]:
    model = text_model(tied=request.param != "untied")
    if request.param == "half":
        model = model.to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="4KB" if request.param == "shards" else "5GB")
    assert (tmp_path / "model.safetensors.index.json").is_file() == (request.param == "shards")
    return tmp_path, model


def start(folder: Path, tokens: int = 98) -> KalleLM:
    lm = KalleLM(with_text_backbone(REPLACED, folder, tokens)).eval()
    load_text_weights(lm, folder, torch.Generator().manual_seed(0))
    return lm


def test_the_backbone_is_the_text_model(folder: tuple[Path, LlamaForCausalLM]) -> None:
    path, _ = folder
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    lm = start(path)
    ids = torch.randint(0, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(lm.backbone(lm.backbone.embed_tokens(ids)).last_hidden_state, expected, atol=1e-6, rtol=1e-5)
    assert lm.config.latent_dim == 4
    assert all(parameter.dtype == torch.float32 for parameter in lm.parameters())


def test_new_tokens_are_drawn_like_the_old_ones(tmp_path: Path) -> None:
    model = text_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(torch.arange(16.0))
    model.save_pretrained(tmp_path)
    one, again = (start(tmp_path, 600 + 90).backbone.embed_tokens.weight.detach() for _ in range(2))
    assert torch.equal(one, again)
    assert torch.equal(one[:90], model.model.embed_tokens.weight)
    torch.testing.assert_close(one[90:].mean(0), one[:90].mean(0), atol=0.01, rtol=0)
    torch.testing.assert_close(one[90:].std(0), one[:90].std(0), atol=0, rtol=0.15)
    assert start(tmp_path, 85).vocab_size == 90, "rows that no token uses stay"


def test_the_saved_folder_loads_again(tmp_path: Path) -> None:
    text_model().save_pretrained(tmp_path / "text")
    lm = start(tmp_path / "text")
    lm.save_pretrained(tmp_path / "ours")
    ids = torch.tensor([[1, 95, 3]])
    torch.testing.assert_close(KalleLM.from_pretrained(tmp_path / "ours").predict(ids).mean, lm.predict(ids).mean)


def test_mistakes_are_told(tmp_path: Path) -> None:
    config = REPLACED
    text_model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"the tokenizer has 40 tokens but the text weights in .* embed 90: it is another tokenizer"):
        with_text_backbone(config, tmp_path, 40)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "model_type": "qwen2"}))
    with pytest.raises(UserError, match="has model_type 'qwen2', expected 'llama'"):
        with_text_backbone(config, tmp_path, 98)
    path.write_text(json.dumps({**values, "num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"do not fit the model \(9 tensors\): missing: layers.2"):
        start(tmp_path)
    path.write_text(json.dumps(values))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no text weights in .* expected model.safetensors or model.safetensors.index.json"):
        start(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    text_model().save_pretrained(tmp_path, max_shard_size="4KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=re.escape(shard.name)):
        start(tmp_path)
