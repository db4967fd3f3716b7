"""The backbone computes what transformers' Llama computes, forwards and backwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaModel

from kalle.errors import UserError
from kalle.models import backbone
from kalle.models.backbone import Backbone, BackboneConfig
from kalle.models.lm import KalleLMConfig
from kalle.models.lm_state import KVCache

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_theta": 500000.0,
}
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def pair(**changes: Any) -> tuple[Backbone, LlamaModel]:
    """Both networks with the same random weights."""
    values = SIZES | changes
    torch.manual_seed(0)
    theirs = LlamaModel(LlamaConfig(**{key: dict(value) if isinstance(value, dict) else value for key, value in values.items()})).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0.5, 0.2) if parameter.dim() == 1 else torch.nn.init.normal_(parameter, std=0.15)
    config = BackboneConfig.of(values)
    ours = Backbone(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": SCALING},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}, "rope_theta": None},
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1, "head_dim": 8},
    ],
)
def test_it_computes_what_transformers_computes(changes: dict[str, Any]) -> None:
    changes = {key: value for key, value in changes.items() if value is not None}
    ours, theirs = pair(**changes)
    x = torch.randn(2, 300, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours(x).last_hidden_state, theirs(inputs_embeds=x).last_hidden_state, **CLOSE)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_transformers(packed: bool) -> None:
    ours, theirs = pair()
    x, positions = torch.randn(1, 40, 48), torch.cat([torch.arange(25), torch.arange(15)])[None] if packed else None
    ours(x, position_ids=positions).last_hidden_state.square().mean().backward()
    theirs(inputs_embeds=x, position_ids=positions, use_cache=False).last_hidden_state.square().mean().backward()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    assert len(wanted) == 9 * 3 + 1
    for name, parameter in ours.named_parameters():
        if name in wanted:
            torch.testing.assert_close(
                parameter.grad, wanted[name], atol=1e-6, rtol=1e-3, msg=lambda message, name=name: f"{name}: {message}"
            )


@pytest.mark.parametrize("longest", [0, backbone.SHORT])
def test_both_ways_to_train_in_bf16_agree(longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    two_products, taken = backbone._attended, []
    monkeypatch.setattr(backbone, "SHORT", longest)
    monkeypatch.setattr(backbone, "_attended", lambda *each: taken.append(each[0].dtype) or two_products(*each))
    ours, _ = pair()
    x = torch.randn(2, 40, 48)
    expected = torch.autograd.grad(ours(x).last_hidden_state.square().mean(), ours.parameters(), allow_unused=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(x).last_hidden_state.float().square().mean()
    got = torch.autograd.grad(loss, ours.parameters(), allow_unused=True)
    assert taken == ([torch.bfloat16] * 3 if longest else []), "the way for short rows, in every layer"
    for one, other in zip(got, expected, strict=True):
        if other is not None:
            assert (one - other).norm() < 0.03 * other.norm()


def test_frequencies_are_transformers() -> None:
    for rope in ({}, {"rope_scaling": SCALING}):
        ours, theirs = pair(**rope)
        torch.testing.assert_close(ours.config.inverse_frequencies(), theirs.rotary_emb.inv_freq, rtol=1e-6, atol=0)


def test_steps_with_a_cache_are_transformers_and_the_whole() -> None:
    ours, theirs = pair()
    x = torch.randn(2, 150, 48)
    mine, other = KVCache(), DynamicCache()
    with torch.inference_mode():
        whole = ours(x).last_hidden_state
        for begin, end in ((0, 40), (40, 43), *((n, n + 1) for n in range(43, 150))):
            got = ours(x[:, begin:end], past_key_values=mine).last_hidden_state
            wanted = theirs(inputs_embeds=x[:, begin:end], past_key_values=other, use_cache=True).last_hidden_state
            torch.testing.assert_close(got, wanted, **CLOSE)
            torch.testing.assert_close(got, whole[:, begin:end], **CLOSE)
    assert mine.get_seq_length() == 150
    for layer, theirs_layer in zip(mine.layers, other.layers, strict=True):
        torch.testing.assert_close(layer.keys, theirs_layer.keys, **CLOSE)
        torch.testing.assert_close(layer.values, theirs_layer.values, **CLOSE)


def test_rows_of_unequal_length_do_not_see_their_padding() -> None:
    ours, theirs = pair()
    x = torch.randn(2, 12, 48)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, :5] = False
    positions = (torch.arange(12) - torch.tensor([[0], [5]])).clamp(min=0)
    with torch.no_grad():
        mine, other = KVCache(), DynamicCache()
        ours(x[:, :11], valid[:, :11], positions[:, :11], mine)
        theirs(inputs_embeds=x[:, :11], attention_mask=valid[:, :11], position_ids=positions[:, :11], past_key_values=other, use_cache=True)
        got = ours(x[:, 11:], valid, positions[:, 11:], mine).last_hidden_state
        wanted = theirs(
            inputs_embeds=x[:, 11:], attention_mask=valid, position_ids=positions[:, 11:], past_key_values=other, use_cache=True
        )
        alone = ours(x[1:, 5:]).last_hidden_state[:, -1:]
    torch.testing.assert_close(got, wanted.last_hidden_state, **CLOSE)
    torch.testing.assert_close(got[1:], alone, **CLOSE)


def test_packed_documents_do_not_see_each_other() -> None:
    ours, _ = pair()
    x = torch.randn(1, 9, 48)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 0]])
    with torch.no_grad():
        together = ours(x, position_ids=positions).last_hidden_state
        apart = torch.cat([ours(x[:, :4]).last_hidden_state, ours(x[:, 4:7]).last_hidden_state], 1)
    torch.testing.assert_close(together[:, :7], apart, **CLOSE)


def test_half_precision_rounds_as_transformers_does() -> None:
    ours, theirs = pair()
    ours.to(torch.bfloat16)
    theirs.to(torch.bfloat16)
    x = torch.randn(2, 30, 48, dtype=torch.bfloat16)
    with torch.no_grad():
        got, wanted = ours(x).last_hidden_state, theirs(inputs_embeds=x).last_hidden_state
    assert got.dtype is torch.bfloat16
    assert (got.float() - wanted.float()).abs().mean() < 4e-3 * wanted.float().abs().mean()


def test_gradients_pass_through_cached_steps() -> None:
    ours, _ = pair()
    x = torch.randn(1, 6, 48, requires_grad=True)
    cache = KVCache()
    last = [ours(x[:, n : n + 1], past_key_values=cache).last_hidden_state for n in range(6)][-1]
    stepped = torch.autograd.grad(last.square().sum(), x)[0]
    whole = torch.autograd.grad(ours(x).last_hidden_state[:, -1].square().sum(), x)[0]
    torch.testing.assert_close(stepped, whole, atol=1e-4, rtol=1e-4)


def test_gradients_of_queries_alone_pass_through_cached_steps() -> None:
    ours, _ = pair()
    ours.requires_grad_(False)
    weight = ours.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    x = torch.randn(1, 6, 48)
    cache = KVCache()
    total = sum(ours(x[:, n : n + 1], past_key_values=cache).last_hidden_state.square().sum() for n in range(6))
    stepped = torch.autograd.grad(total, weight)[0]
    whole = torch.autograd.grad(ours(x).last_hidden_state.square().sum(), weight)[0]
    torch.testing.assert_close(stepped, whole, atol=1e-3, rtol=1e-3)


def test_a_cache_of_inference_mode_can_go_on_outside_it() -> None:
    ours, _ = pair()
    x = torch.randn(1, 4, 48)
    cache = KVCache()
    with torch.inference_mode():
        ours(x[:, :2], past_key_values=cache)
        ours(x[:, 2:3], past_key_values=cache)
    with torch.no_grad():
        got = ours(x[:, 3:], past_key_values=cache).last_hidden_state
        torch.testing.assert_close(got, ours(x).last_hidden_state[:, 3:], **CLOSE)


def test_room_grows_by_shares_and_keeps_what_it_holds() -> None:
    cache, seen, moves, where = KVCache(), [], 0, 0
    for _ in range(1000):
        new = torch.randn(1, 1, 1, 2)
        seen.append(new)
        with torch.no_grad():
            cache.update(new, new, 0)
        moves += cache.layers[0].keys.data_ptr() != where
        where = cache.layers[0].keys.data_ptr()
    assert torch.equal(cache.layers[0].keys, torch.cat(seen, 2))
    assert moves < 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "not supported: hidden_act is 'gelu' in 'x', expected 'silu'"),
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"attention_bias": True}, "attention_bias is True in 'x', expected False"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'rope_type': 'yarn'.*expected rope_type default, or llama3"),
        ({"rope_scaling": SCALING | {"factor": None}}, "'factor': None"),
        ({"rope_scaling": SCALING | {"factor": float("inf")}}, "'factor': inf"),
        ({"rope_scaling": SCALING | {"low_freq_factor": 9.0}}, "low below high"),
        ({"rope_scaling": SCALING | {"more": 1}}, "'more': 1"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"something_new": 1}, "unknown key 'something_new' in 'x'; valid keys: .*hidden_size"),
        ({"num_key_value_heads": 4}, "num_attention_heads is 6, expected a multiple of num_key_value_heads=4"),
        ({"head_dim": 7}, "head_dim is 7, expected an even number"),
        ({"head_dim": None, "num_attention_heads": 5}, "hidden_size is 48, expected a multiple of num_attention_heads=5"),
        ({"hidden_size": "48"}, "hidden_size is '48', expected an integer from 1 to "),
        ({"hidden_size": None}, "missing key 'hidden_size'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected an integer from 1 to 1024"),
        ({"rms_norm_eps": 2.0}, "rms_norm_eps is 2.0"),
        ({"initializer_range": "abc"}, "initializer_range is 'abc'"),
        ({"initializer_range": float("nan")}, "initializer_range is nan"),
    ],
)
def test_a_network_that_it_is_not_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BackboneConfig.of(SIZES | change, "x")
    with pytest.raises(UserError):
        KalleLMConfig(backbone=SIZES | change, latent_dim=4)


def test_a_new_network_starts_with_the_asked_spread() -> None:
    torch.manual_seed(0)
    network = Backbone(BackboneConfig.of(SIZES | {"initializer_range": 0.3, "vocab_size": 5000}))
    for weight in (network.embed_tokens.weight, network.layers[0].mlp.gate_proj.weight):
        assert float(weight.detach().std()) == pytest.approx(0.3, rel=0.05)
    assert (network.norm.weight == 1).all()


def test_what_changes_nothing_is_no_obstacle() -> None:
    given = SIZES | {
        "torch_dtype": "float16",
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": [1, 2],
        "tie_word_embeddings": False,
    }
    assert BackboneConfig.of(given) == BackboneConfig.of(SIZES)


@pytest.fixture
def cudnn_as_it_was() -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.usefixtures("cudnn_as_it_was")
def test_no_kernel_plans_for_one_length_on_cuda() -> None:
    backbone._choose_kernels(torch.device("cpu"))
    assert torch.backends.cuda.cudnn_sdp_enabled()
    backbone._choose_kernels(torch.device("cuda"))
    assert torch.backends.cuda.cudnn_sdp_enabled(), "training keeps torch's choice"
    with torch.inference_mode():
        backbone._choose_kernels(torch.device("cuda"))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_every_pass_chooses_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(backbone, "_choose_kernels", asked.append)
    config = BackboneConfig.of(SIZES)
    Backbone(config)(torch.zeros(1, 2, config.hidden_size))
    assert [device.type for device in asked] == ["cpu"]
