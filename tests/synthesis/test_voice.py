from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from kalle.errors import UserError
from kalle.synthesis.voice import Voice


def test_save_and_load_keep_everything(tmp_path) -> None:
    voice = Voice(
        {"flowvae_encoder": "a" * 64, "speaker_encoder": "b" * 64},
        torch.randn(5, 8, generator=torch.Generator().manual_seed(0)),
        torch.ones(64),
        "one two",
        "en",
        "CC-BY",
        "agreed in writing",
        name="Änna",
        description="two\nlines",
        source="recording",
        seed=2**62,
        seconds=1.25,
    )
    voice.save(tmp_path / "deep" / "v.safetensors")
    loaded = Voice.load(tmp_path / "deep" / "v.safetensors")
    assert torch.equal(loaded.prompt_latents, voice.prompt_latents)
    assert torch.equal(loaded.speaker_latent, voice.speaker_latent)
    for name in ("bound_to", "text", "language", "licence", "consent", "name", "description", "source", "seed", "seconds"):
        assert getattr(loaded, name) == getattr(voice, name)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["v.safetensors"]


def test_missing_notes_stay_missing(tmp_path) -> None:
    Voice({}, speaker_latent=torch.ones(4)).save(tmp_path / "v.safetensors")
    loaded = Voice.load(tmp_path / "v.safetensors")
    assert loaded.text is loaded.language is loaded.licence is loaded.prompt_latents is None


def test_bad_voices(tmp_path) -> None:
    with pytest.raises(UserError, match="an empty voice"):
        Voice({})
    with pytest.raises(UserError, match="a prompt without its transcript"):
        Voice({}, torch.zeros(2, 8))
    with pytest.raises(UserError, match="voice file not found"):
        Voice.load(tmp_path / "v.safetensors")
    (tmp_path / "v.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="not a voice file"):
        Voice.load(tmp_path / "v.safetensors")
    save_file({"prompt_latents": torch.zeros(2, 8)}, tmp_path / "v.safetensors")
    with pytest.raises(UserError, match="has format None"):
        Voice.load(tmp_path / "v.safetensors")


def test_a_failed_write_leaves_nothing(tmp_path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").touch()
    for target in ("folder.safetensors", "file/v.safetensors"):
        with pytest.raises(UserError, match="cannot write"):
            Voice({}, speaker_latent=torch.ones(4)).save(tmp_path / target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.safetensors"]


def test_a_voice_fits_a_model_with_its_encoder_whatever_else_it_has() -> None:
    voice = Voice({"flowvae_encoder": "a" * 64}, torch.zeros(2, 8), text="x")
    voice.check_fits({"flowvae_encoder": "a" * 64, "speaker_encoder": "c" * 64})
    with pytest.raises(UserError, match="does not fit"):
        voice.check_fits({"flowvae_encoder": "b" * 64})


def test_files_of_the_first_version_are_read(tmp_path) -> None:
    metadata = {"format": "kalle-voice-1", "bound_to.flowvae_encoder": "a" * 64, "text": "one", "later": "x"}
    save_file({"prompt_latents": torch.ones(2, 8)}, tmp_path / "v.safetensors", metadata)
    voice = Voice.load(tmp_path / "v.safetensors")
    assert (voice.text, voice.name, voice.seed, voice.seconds, voice.kind) == ("one", None, None, None, "prompt")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"prompt_latents": torch.full((2, 8), float("nan"))}, "16 NaN or infinite values in its prompt latents"),
        ({"prompt_latents": torch.zeros(8)}, r"prompt latents of shape \(8,\), expected \(P, D\)"),
        ({"prompt_latents": torch.zeros(0, 8)}, r"prompt latents of shape \(0, 8\)"),
        ({"prompt_latents": torch.zeros(2, 8).half()}, "prompt latents in torch.float16"),
        ({"speaker_latent": torch.zeros(1, 8)}, r"speaker latent of shape \(1, 8\), expected \(H,\)"),
        ({"speaker_latent": torch.tensor([float("inf")])}, "1 NaN or infinite values in its speaker latent"),
        ({"other": torch.zeros(3)}, "an empty voice"),
    ],
)
def test_damaged_tensors(tmp_path, tensors, message: str) -> None:
    save_file(tensors, tmp_path / "v.safetensors", {"format": "kalle-voice-1", "text": "one"})
    with pytest.raises(UserError, match=rf"a damaged voice: .*{message}"):
        Voice.load(tmp_path / "v.safetensors")


def test_damaged_notes(tmp_path) -> None:
    save_file({"speaker_latent": torch.ones(3)}, tmp_path / "v.safetensors", {"format": "kalle-voice-1", "seed": "x"})
    with pytest.raises(UserError, match="its seed is 'x', expected a number"):
        Voice.load(tmp_path / "v.safetensors")
    save_file({"speaker_latent": torch.ones(3)}, tmp_path / "v.safetensors", {"format": "kalle-voice-1", "description": "\x1b[31m"})
    with pytest.raises(UserError, match="its description has control characters"):
        Voice.load(tmp_path / "v.safetensors")
    with pytest.raises(UserError, match="its consent is not Unicode text"):
        Voice({}, speaker_latent=torch.ones(3), consent="\udc80")


def test_a_voice_that_does_not_say_where_it_is_from_fits_nothing() -> None:
    with pytest.raises(UserError, match="does not say which Flow-VAE encoder made it"):
        Voice({}, torch.zeros(2, 8), text="x").check_fits({"flowvae_encoder": "a" * 64})


def test_voices_can_be_compared_and_collected() -> None:
    one, other = (Voice({}, speaker_latent=torch.ones(3)) for _ in range(2))
    assert one != other
    assert one == one
    assert len({one, other, one}) == 2
