"""Discriminators against BigVGAN's numbers at 1/16 width."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kalle.errors import UserError
from kalle.losses.waveform import discriminator_loss, feature_matching_loss, generator_loss
from kalle.models.discriminators import (
    DiscriminatorConfig,
    Discriminators,
    MultiPeriodDiscriminator,
    MultiResolutionDiscriminator,
    PeriodDiscriminator,
)

REFERENCE = Path(__file__).parents[1] / "reference"
TINY = DiscriminatorConfig(width=1 / 16)


def map_released_discriminator_keys(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weight-norm's old tensor names to its parametrization's."""
    names = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    mapped = {}
    for name, value in tensors.items():
        module, _, last = name.rpartition(".")
        mapped[f"{module}.{names.get(last, last)}"] = value
    return mapped


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(REFERENCE / "discriminators_tiny_io.safetensors")


@pytest.fixture(scope="module")
def discriminators() -> Discriminators:
    weights = torch.load(REFERENCE / "discriminators_tiny.pt", weights_only=True)
    module = Discriminators(TINY)
    for name in ("mpd", "mrd"):
        getattr(module, name).load_state_dict(map_released_discriminator_keys(weights[name]))
    return module


@pytest.mark.parametrize("kind", ["mpd", "mrd"])
def test_scores_and_losses_equal_bigvgan(golden, discriminators, kind):
    module = getattr(discriminators, kind)
    with torch.no_grad():
        real, fake = module(golden["real"][:, 0]), module(golden["fake"][:, 0])
    assert len(real.scores) == sum(name.startswith(f"{kind}_") and name.endswith("_real") for name in golden)
    for name, output in (("real", real), ("fake", fake)):
        for index, scores in enumerate(output.scores):
            torch.testing.assert_close(scores, golden[f"{kind}_{index}_{name}"], rtol=1e-4, atol=1e-5)
    losses = {
        "discriminator": discriminator_loss(real.scores, fake.scores),
        "generator": generator_loss(fake.scores),
        "feature": feature_matching_loss(real.features, fake.features),
    }
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(golden[f"{kind}_{name}_loss"].item(), rel=1e-4), name


def test_one_pass_over_real_and_fake_equals_two(golden, discriminators):
    wav = torch.cat([golden["real"][:, 0], golden["fake"][:, 0]])
    with torch.no_grad():
        real, fake = discriminators(wav).split(2)
        alone = discriminators(golden["fake"][:, 0])
    assert len(real.scores) == len(fake.features) == 8
    for together, separate in zip(fake.scores, alone.scores, strict=True):
        torch.testing.assert_close(together, separate, rtol=1e-4, atol=1e-5)
    for together_maps, separate_maps in zip(fake.features, alone.features, strict=True):
        assert [fmap.shape for fmap in together_maps] == [fmap.shape for fmap in separate_maps]


def test_full_size_has_bigvgan_channels():
    with torch.device("meta"):
        module = Discriminators(DiscriminatorConfig())
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert shapes["mpd.discriminators.4.convs.3.parametrizations.weight.original1"] == (1024, 512, 5, 1)
    assert shapes["mpd.discriminators.0.conv_post.parametrizations.weight.original1"] == (1, 1024, 3, 1)
    assert shapes["mrd.discriminators.2.convs.1.parametrizations.weight.original1"] == (32, 32, 3, 9)
    assert shapes["mrd.discriminators.2.convs.1.parametrizations.weight.original0"] == (32, 1, 1, 1)
    assert not any("window" in name for name in shapes)


def test_period_columns_do_not_mix():
    torch.manual_seed(0)
    module = PeriodDiscriminator(5, TINY)
    wav = torch.randn(1, 1000, requires_grad=True)
    _, features = module(wav)
    features[-1][..., 2].sum().backward()
    assert wav.grad is not None
    columns = wav.grad.view(-1, 5).abs().sum(0)
    assert columns[2] > 0
    assert columns[[0, 1, 3, 4]].sum() == 0


def test_fold_reflects_the_end():
    folded = PeriodDiscriminator(5, TINY).fold(torch.arange(8.0)[None])
    assert folded[0, 0].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 6, 5]]
    assert PeriodDiscriminator(2, TINY).fold(torch.zeros(3, 8)).shape == (3, 1, 4, 2)


def test_silence_has_a_finite_gradient():
    torch.manual_seed(0)
    wav = torch.zeros(1, 3840, requires_grad=True)
    output = Discriminators(TINY)(wav)
    generator_loss(output.scores).backward()
    assert wav.grad is not None
    assert torch.isfinite(wav.grad).all()


def test_spectrograms_stay_fp32_under_autocast(golden):
    module = MultiResolutionDiscriminator(TINY).discriminators[0]
    wav = golden["real"][:, 0].bfloat16()  # what a generator returns under autocast
    with torch.autocast("cpu", dtype=torch.bfloat16):
        spectrogram = module.spectrogram(wav)
        scores, _ = module(wav)
    assert spectrogram.dtype == torch.float32
    assert torch.isfinite(scores).all()
    torch.testing.assert_close(spectrogram, module.spectrogram(wav.float()), rtol=0, atol=0)


def test_configuration_from_lists_equals_tuples():
    listed = DiscriminatorConfig(periods=[2, 3], resolutions=[[512, 50, 240]])  # type: ignore[arg-type]
    assert listed == DiscriminatorConfig(periods=(2, 3), resolutions=((512, 50, 240),))
    assert len(MultiPeriodDiscriminator(listed).discriminators) == 2


def test_impossible_configurations_are_user_errors():
    with pytest.raises(UserError, match="width"):
        DiscriminatorConfig(width=0.01)
    with pytest.raises(UserError, match="at least one"):
        DiscriminatorConfig(periods=(), resolutions=())


@torch.no_grad()
def test_signals_keep_their_variance_from_the_start():
    """torch's default shrinks them from layer to layer until the scores hardly depend on the sound."""
    wav = 0.1 * torch.randn(8, 7680, generator=torch.Generator().manual_seed(0))
    resolutions = ((1024, 256, 1024), (512, 128, 512), (256, 64, 256))

    def spread(**more: bool) -> tuple[list[float], list[float]]:
        torch.manual_seed(0)
        output = Discriminators(DiscriminatorConfig(width=0.25, resolutions=resolutions, **more))(wav)
        return [float(maps[-2].std()) for maps in output.features], [float(scores.std()) for scores in output.scores]

    default, _ = spread()
    for log_magnitude in (False, True):
        deep, scores = spread(variance_preserving=True, log_magnitude=log_magnitude)
        assert all(0.1 < value < 10 for value in deep), deep
        assert all(0.02 < value < 2 for value in scores), scores
        assert all(value > 5 * before for value, before in zip(deep[:5], default[:5], strict=True)), (deep, default)


@torch.no_grad()
def test_logarithms_of_magnitudes_have_the_scale_of_a_standard_normal():
    wav = 0.1 * torch.randn(4, 7680, generator=torch.Generator().manual_seed(0))
    config = DiscriminatorConfig(resolutions=((512, 128, 512),), log_magnitude=True)
    (discriminator,) = MultiResolutionDiscriminator(config).discriminators
    loud, quiet = discriminator.spectrogram(wav), discriminator.spectrogram(0.01 * wav)
    assert abs(float(loud.mean())) < 2
    assert 0.2 < float(loud.std()) < 2
    (linear,) = MultiResolutionDiscriminator(DiscriminatorConfig(resolutions=((512, 128, 512),))).discriminators
    inner = linear.spectrogram(0.01 * wav) > 1e-3
    ratio = (loud - quiet)[inner]
    torch.testing.assert_close(ratio, torch.full_like(ratio, ratio[0]), rtol=0, atol=1e-4)
    assert discriminator.spectrogram(torch.zeros(1, 7680)).isfinite().all()


def test_convolutions_on_spectrograms_are_channels_last_on_a_cpu(discriminators: Discriminators) -> None:
    maps = [fmap for fmaps in discriminators.mrd(torch.zeros(1, 7680)).features for fmap in fmaps if fmap.shape[1] > 1]
    assert len(maps) == 3 * 5
    assert all(fmap.is_contiguous(memory_format=torch.channels_last) for fmap in maps)
