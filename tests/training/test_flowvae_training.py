from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from kalle.errors import UserError
from kalle.models.discriminators import DiscriminatorConfig, Discriminators
from kalle.models.flowvae import FlowVAE, FlowVAEConfig
from kalle.models.flowvae.model import FrameWindow
from kalle.models.lm_batch import WaveBatch
from kalle.training.distributed import frozen
from kalle.training.flowvae import ClipSchedule, FlowVAEObjective, FlowVAETraining
from kalle.training.optimisation import WarmupCosine
from kalle.training.update_guard import GuardConfig, UpdateGuard

JUDGES = DiscriminatorConfig(periods=(2, 3), resolutions=((256, 60, 240),), width=0.05)
LR, WARMUP, TOTAL = 1e-3, 3, 8


@pytest.fixture
def make(toy_flowvae_config: FlowVAEConfig) -> Callable[..., FlowVAETraining]:
    def build(judged: bool = True, seed: int = 0, start: int = 0, **objective: Any) -> FlowVAETraining:
        torch.manual_seed(11)
        return FlowVAETraining(
            FlowVAE(toy_flowvae_config),
            optimizer=partial(torch.optim.AdamW, lr=LR),
            scheduler=WarmupCosine(warmup_steps=WARMUP, total_steps=TOTAL),
            objective=FlowVAEObjective(discriminator_start_step=start, **objective),
            clip=ClipSchedule(),
            discriminators=Discriminators(JUDGES) if judged else None,
            seed=seed,
        )

    return build


@pytest.fixture
def batches() -> list[WaveBatch]:
    generator = torch.Generator().manual_seed(5)
    return [WaveBatch(0.1 * torch.randn(2, 3200, generator=generator), ("a", "b")) for _ in range(3)]


class Recorder(Callback):
    """Copies of what a run went through, per batch."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.lr: list[list[float]] = []
        self.metrics: list[dict[str, float]] = []
        self.judges: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        self.lr.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        self.steps.append(trainer.global_step)
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        if pl_module.discriminators is not None:
            self.judges.append({name: tensor.clone() for name, tensor in pl_module.discriminators.state_dict().items()})


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def test_one_step_trains_reconstruction_and_prior(make, batches, fit) -> None:
    module, recorder = make(judged=False), Recorder()
    before = weights(module.flowvae)
    assert fit(module, batches, 1, callbacks=[recorder]).global_step == 1
    after = weights(module.flowvae)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    for part in ("encoder.", "decoder.", "flow."):
        assert any(name.startswith(part) for name in changed), part
    (metrics,) = recorder.metrics
    assert {name.removeprefix("train/") for name in metrics} == {"mel", "kl", "gradient_norm", "total", "loss"}
    assert all(torch.isfinite(torch.tensor(list(metrics.values()))))
    assert metrics["train/total"] == pytest.approx(45 * metrics["train/mel"] + 32 * metrics["train/kl"], rel=1e-5)


def test_one_step_trains_both_sides(make, batches, fit) -> None:
    module, recorder = make(), Recorder()
    generator, judges = weights(module.flowvae), weights(module.discriminators)
    trainer = fit(module, batches, 1, callbacks=[recorder])
    assert trainer.global_step == 1
    assert any(not torch.equal(generator[name], value) for name, value in weights(module.flowvae).items())
    assert all(not torch.equal(judges[name], value) for name, value in weights(module.discriminators).items() if name.endswith("original1"))
    m = {name.removeprefix("train/"): value for name, value in recorder.metrics[0].items()}
    assert set(m) == {"mel", "kl", "generator", "feature", "discriminator", "gradient_norm", "total", "loss"}
    assert all(torch.isfinite(torch.tensor(list(m.values()))))
    assert m["total"] == pytest.approx(45 * m["mel"] + 32 * m["kl"] + m["generator"] + m["feature"], rel=1e-5)


def test_only_generator_updates_count_as_steps(make, batches, fit) -> None:
    recorder = Recorder()
    trainer = fit(make(), batches, 5, callbacks=[recorder])
    assert recorder.steps == [1, 2, 3, 4, 5]
    assert trainer.fit_loop.epoch_loop.batch_progress.total.completed == 5
    states = [next(iter(optimizer.state.values()))["step"] for optimizer in trainer.optimizers]
    assert [int(step) for step in states] == [5, 5]


def test_the_learning_rate_is_the_scheduled_one_at_every_step(make, batches, fit) -> None:
    recorder = Recorder()
    fit(make(), batches, 7, callbacks=[recorder])
    alone = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    factor = WarmupCosine(WARMUP, TOTAL)(alone).lr_lambdas[0]
    expected = [LR * factor(step) for step in range(7)]
    assert [both[0] for both in recorder.lr] == pytest.approx(expected)
    assert [both[1] for both in recorder.lr] == pytest.approx(expected)
    assert expected[:4] == pytest.approx([LR / 3, 2 * LR / 3, LR, LR])


def test_judges_may_start_late_and_warm_up_then(make, batches, fit) -> None:
    module, recorder = make(start=3), Recorder()
    first = {name: tensor.clone() for name, tensor in module.discriminators.state_dict().items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, batches, 5, callbacks=[recorder])
    assert not [str(warning.message) for warning in caught if "lr_scheduler.step()" in str(warning.message)]
    for judges in recorder.judges[:3]:
        assert all(torch.equal(judges[name], first[name]) for name in first)
    assert any(not torch.equal(recorder.judges[3][name], first[name]) for name in first)
    assert "train/generator" not in recorder.metrics[2]
    assert "train/generator" in recorder.metrics[3]
    assert [both[1] for both in recorder.lr] == pytest.approx([LR / 3] * 4 + [2 * LR / 3])


def test_no_warning_about_the_order_of_optimizer_and_schedule(make, batches, fit) -> None:
    for judged in (False, True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(make(judged=judged), batches, 2)
        assert not [str(warning.message) for warning in caught if "lr_scheduler" in str(warning.message)]


def test_the_judges_see_no_gradient_of_the_generator_step(make, batches, fit) -> None:
    """The judges move by their own loss alone, whatever the weights of the generator's terms."""
    one, other = make(adversarial_weight=1.0, feature_weight=1.0), make(adversarial_weight=50.0, feature_weight=20.0)
    fit(one, batches, 1)
    fit(other, batches, 1)
    for name, tensor in weights(one.discriminators).items():
        assert torch.equal(tensor, weights(other.discriminators)[name]), name
    assert any(not torch.equal(a, b) for a, b in zip(one.flowvae.parameters(), other.flowvae.parameters(), strict=True))


def test_clip_schedule() -> None:
    clip = ClipSchedule(norm=1000.0, early=100.0, early_steps=20_000)
    assert [clip.at(step) for step in (0, 19_999, 20_000, 10**6)] == [100.0, 100.0, 1000.0, 1000.0]


def test_gradients_are_clipped_at_the_limit_of_the_step(make, batches, fit) -> None:
    norms: list[float] = []

    class Norms(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            gradients = [p.grad for p in pl_module.flowvae.parameters() if p.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    module, recorder = make(judged=False), Recorder()
    module.clip = ClipSchedule(norm=0.5, early=0.25, early_steps=1)
    fit(module, batches, 2, callbacks=[recorder, Norms()])
    assert norms == pytest.approx([0.25, 0.5], rel=1e-4)
    assert all(metrics["train/gradient_norm"] > 1 for metrics in recorder.metrics)


def test_equal_seeds_give_equal_weights(make, batches, fit) -> None:
    runs = []
    for seed in (4, 4, 5):
        module = make(seed=seed)
        torch.manual_seed(seed + len(runs))  # the global generator must have no say
        fit(module, batches, 3)
        runs.append(weights(module))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert any(not torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


def test_noise_is_a_function_of_seed_epoch_cut_and_crop(make) -> None:
    module, other = make(judged=False, seed=1), make(judged=False, seed=2)
    wav = torch.zeros(3, 3200)
    noise = module.noise(WaveBatch(wav, ("a", "b", "a"), (0, 0, 1)))
    assert noise.shape == (3, 20, module.flowvae.config.latent_dim)
    assert len({tuple(row.flatten().tolist()) for row in noise}) == 3
    moved = module.noise(WaveBatch(wav[:2], ("b", "a"), (0, 1)))
    assert torch.equal(moved, noise[1:]), "whatever the row and the company"
    assert not torch.equal(other.noise(WaveBatch(wav[:1], ("a",), (0,))), noise[:1])


def test_the_noise_reaches_the_model_and_changes_with_the_epoch(make, batches, fit) -> None:
    seen: list[Tensor] = []
    module = make(judged=False, seed=9)
    original = module.flowvae.forward

    def watched(wav: Tensor, noise: Tensor | None = None, **more: Any) -> Any:
        output = original(wav, noise, **more)
        seen.append(((output.z - output.posterior.mean) / output.posterior.std).detach())
        torch.testing.assert_close(seen[-1], noise, atol=1e-4, rtol=1e-4)
        return output

    module.flowvae.forward = watched
    fit(module, batches[:1], 2)
    assert len(seen) == 2
    assert not torch.allclose(seen[0], seen[1], atol=0.1)


class Dtypes:
    """The dtypes that enter and leave modules during a run."""

    def __init__(self, module: FlowVAETraining) -> None:
        self.seen: dict[str, set[torch.dtype]] = {}
        judge = module.discriminators.mrd.discriminators[0]
        flowvae = module.flowvae
        watched = {"mel": module.mel_loss, "decoder": flowvae.decoder.head, "encoder": flowvae.encoder, "flow": flowvae.flow}
        for name, part in {**watched, "judge conv": judge.convs[0], "encoder conv": flowvae.encoder.stages[0].down}.items():
            part.register_forward_hook(lambda part, inputs, output, name=name: self.note(name, inputs, output))
        spectrogram = judge.spectrogram
        judge.spectrogram = lambda wav: self.returned("spectrogram", wav, spectrogram(wav))

    def note(self, name: str, inputs: Any, output: Any) -> None:
        self.seen.setdefault(f"{name} in", set()).update(tensor.dtype for tensor in inputs if isinstance(tensor, Tensor))
        self.seen.setdefault(f"{name} out", set()).add(output.dtype)

    def returned(self, name: str, given: Tensor, value: Tensor) -> Tensor:
        self.note(name, [given], value)
        return value


def test_half_precision_keeps_signals_and_losses_in_single(make, batches, fit) -> None:
    module = make()
    dtypes, logged = Dtypes(module), {}
    original = module.log_dict

    def watched(metrics: dict[str, Tensor], **options: Any) -> None:
        logged.update({name: value.dtype for name, value in metrics.items()})
        original(metrics, **options)

    module.log_dict = watched
    recorder = Recorder()
    fit(module, batches, 2, precision="bf16-mixed", callbacks=[recorder])
    assert set(logged.values()) == {torch.float32}
    for signal in ("mel in", "mel out", "decoder out", "encoder out", "spectrogram in", "spectrogram out", "flow in", "flow out"):
        assert dtypes.seen[signal] == {torch.float32}, signal
    assert dtypes.seen["encoder conv out"] == dtypes.seen["judge conv out"] == {torch.bfloat16}, "else nothing was gained"
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
    single = Recorder()
    fit(make(), batches, 2, callbacks=[single])
    for name in ("mel", "kl", "generator", "feature", "discriminator"):
        assert recorder.metrics[0][f"train/{name}"] == pytest.approx(single.metrics[0][f"train/{name}"], rel=0.05, abs=2e-3), name


def test_half_precision_stays_finite(make, batches, fit) -> None:
    module, recorder = make(), Recorder()
    fit(module, batches, 20, precision="bf16-mixed", callbacks=[recorder])
    assert len(recorder.metrics) == 20
    assert all(torch.isfinite(torch.tensor(list(metrics.values()))).all() for metrics in recorder.metrics)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_the_generator_meets_the_judges_new_weights_in_half_precision(make, batches, fit) -> None:
    """Autocast caches half-precision copies of weights for the whole step, in which the judges were updated."""
    module, scores = make(), []
    module.discriminators.register_forward_hook(lambda judges, inputs, output: scores.append(output.scores[0].detach().clone()))
    before = {name: tensor.clone() for name, tensor in module.discriminators.state_dict().items()}
    fit(module, batches, 1, precision="bf16-mixed")
    assert len(scores) == 3, "both sides at once, the truth, the judged"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module.discriminators(batches[0].wav).scores[0], scores[1])
        module.discriminators.load_state_dict(before)
        torch.clear_autocast_cache()
        assert not torch.equal(module.discriminators(batches[0].wav).scores[0], scores[1])


def test_frozen_players_pass_gradients_on_and_get_none(make, batches) -> None:
    judges = make().discriminators
    wav = batches[0].wav.clone().requires_grad_(True)
    with frozen(judges):
        sum(score.sum() for score in judges(wav).scores).backward()
    assert wav.grad is not None and wav.grad.abs().sum() > 0  # noqa: PT018
    assert all(parameter.grad is None and parameter.requires_grad for parameter in judges.parameters())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reductions_and_factors_are_the_configured_ones(make, batches, fit, reduction: str) -> None:
    changes = {"adversarial_reduction": reduction, "feature_reduction": reduction, "feature_factor": 1.0 if reduction == "mean" else 2.0}
    one, recorder = make(**changes), Recorder()
    fit(one, batches, 1, callbacks=[recorder])
    plain = Recorder()
    fit(make(), batches, 1, callbacks=[plain])
    maps = sum(len(features) for features in make().discriminators(batches[0].wav).features)
    judges = len(JUDGES.periods) + len(JUDGES.resolutions)
    expected = {"discriminator": 1 / judges, "feature": 0.5 / maps} if reduction == "mean" else {"discriminator": 1.0, "feature": 1.0}
    for name, ratio in expected.items():
        assert recorder.metrics[0][f"train/{name}"] == pytest.approx(ratio * plain.metrics[0][f"train/{name}"], rel=1e-5), name


def test_another_mel_loss_is_used(make, batches, fit) -> None:
    class Constant(torch.nn.Module):
        def forward(self, real: Tensor, fake: Tensor) -> Tensor:
            assert real.shape == fake.shape
            return 7.0 + 0.0 * fake.sum()

    module, recorder = make(judged=False), Recorder()
    module.mel_loss = Constant()
    fit(module, batches, 1, callbacks=[recorder])
    assert recorder.metrics[0]["train/mel"] == 7.0


def test_windows_are_cut_from_the_recording_where_they_were_decoded(make, batches, fit) -> None:
    """The encoder has the whole crop; decoder and mel loss have some of its frames, the discriminators some of those."""
    module, seen, compared, heard = make(decoded_frames=8, judged_frames=5), [], [], []
    hop, batch = module.flowvae.config.hop_length, batches[0]
    module.flowvae.decoder.conv_in.register_forward_hook(lambda part, inputs, output: seen.append(inputs[0].detach().transpose(1, 2)))
    module.flowvae.encoder.register_forward_hook(lambda part, inputs, output: seen.append(inputs[0]))
    module.mel_loss.register_forward_hook(lambda part, inputs, output: compared.append(inputs))
    module.discriminators.register_forward_hook(lambda part, inputs, output: heard.append(inputs[0].detach()))
    with torch.no_grad():
        posterior = module.flowvae.encode(batch.wav)
        z = posterior.sample(module.noise(batch))
    seen.clear()
    fit(module, [batch], 1)
    crop, decoded = seen
    assert crop.shape[-1] == batch.wav.shape[1]
    assert decoded.shape == (2, 8, module.flowvae.config.latent_dim)
    ((real, fake),) = compared
    assert real.shape == fake.shape == (2, 8 * hop)
    both, truth, scored = heard
    for row in range(2):
        (start,) = [at for at in range(20 - 8 + 1) if torch.equal(z[row, at : at + 8], decoded[row])]
        assert torch.equal(real[row], batch.wav[row, start * hop : (start + 8) * hop])
        (inner,) = [at for at in range(8 - 5 + 1) if torch.equal(real[row, at * hop : (at + 5) * hop], truth[row])]
        assert torch.equal(fake[row, inner * hop : (inner + 5) * hop], scored[row])
    assert torch.equal(both, torch.cat([truth, scored])), "both steps hear the same"


def test_windows_reach_every_place_and_depend_on_epoch_and_crop_alone(make, batches) -> None:
    module = make()
    wav = torch.zeros(200, 3200)
    batch = WaveBatch(wav, tuple(f"cut {row}" for row in range(200)))
    window = module._window("decoded", batch, 20, 8)
    assert set(window.starts.tolist()) == set(range(13))
    other = module._window("decoded", WaveBatch(wav[:1], ("cut 7",), (7,)), 20, 8)
    assert other.starts.tolist() == window.starts[7:8].tolist(), "whatever the row and the company"
    assert module._window("judged", batch, 20, 8).starts.tolist() != window.starts.tolist()
    assert module._window("decoded", batch, 20, None) is None is module._window("decoded", batch, 20, 20)


def test_the_noise_of_a_decoder_begins_elsewhere_in_each_crop_and_epoch(make, batches, fit, toy_flowvae_config) -> None:
    module, starts = make(judged=False), []
    module.flowvae = module.flowvae.with_sources()
    module.flowvae.decoder.head.register_forward_hook(lambda part, inputs, output: starts.append(inputs[1].tolist()))
    fit(module, batches[:1], 2)
    assert len({start for both in starts for start in both}) == 4, starts


def test_the_energy_distance_compares_two_reconstructions(make, batches, fit) -> None:
    """They differ by the decoder's noise alone; the distance enters the total with its weight."""
    module, recorder, compared = make(judged=False, energy_weight=2.0, decoded_frames=8), Recorder(), []
    module.flowvae = module.flowvae.with_sources()
    module.energy.windows = (128, 256)
    module.energy.register_forward_hook(lambda part, inputs, output: compared.append(inputs))
    fit(module, batches[:1], 1, callbacks=[recorder])
    ((real, fake, other),) = compared
    assert real.shape == fake.shape == other.shape == (2, 8 * module.flowvae.config.hop_length)
    assert not torch.equal(fake, other)
    torch.testing.assert_close(fake, other, atol=0.05, rtol=0)
    m = {name.removeprefix("train/"): value for name, value in recorder.metrics[0].items()}
    assert m["total"] == pytest.approx(45 * m["mel"] + 32 * m["kl"] + 2 * m["energy"], rel=1e-5)


def test_the_pitch_of_the_recording_is_learnt_and_used(make, fit) -> None:
    hertz = torch.tensor([[220.0], [270.0]])
    time = torch.arange(3200) / 16000
    wav = sum(0.05 * torch.cos(2 * torch.pi * number * hertz * time) for number in range(1, 9))
    module, recorder, given = make(judged=False, pitch_weight=2.0), Recorder(), []
    module.flowvae = module.flowvae.with_sources()
    module.flowvae.decoder.head.register_forward_hook(lambda part, inputs, output: given.append(inputs[2]))
    before = module.flowvae.decoder.head.pitch.bias.detach().clone()
    fit(module, [WaveBatch(wav, ("a", "b"))], 1, callbacks=[recorder])
    config = module.flowvae.config.decoder
    (pitch,) = given
    assert pitch.shape == (2, 3200 // config.hop_length_stft)
    inner = pitch[:, 5:-5] * 16000 / config.n_fft
    torch.testing.assert_close(inner, hertz.expand_as(inner), rtol=0.02, atol=0)
    assert not torch.equal(module.flowvae.decoder.head.pitch.bias, before)
    m = {name.removeprefix("train/"): value for name, value in recorder.metrics[0].items()}
    assert m["total"] == pytest.approx(45 * m["mel"] + 32 * m["kl"] + 2 * m["pitch"], rel=1e-5)


def test_the_energy_distance_needs_noise(toy_flowvae_config: FlowVAEConfig) -> None:
    with pytest.raises(UserError, match=r"without noise.*with_sources"):
        FlowVAEObjective(energy_weight=1.0).check_fits(toy_flowvae_config, 8)


def test_the_energy_distance_needs_crops_as_long_as_its_windows(toy_flowvae_config: FlowVAEConfig) -> None:
    config = dataclasses.replace(toy_flowvae_config, decoder=dataclasses.replace(toy_flowvae_config.decoder, noise=True))
    FlowVAEObjective(energy_weight=1.0, decoded_frames=13).check_fits(config, 20)
    with pytest.raises(UserError, match="got 1920 samples of a crop to compare, expected at least 2048"):
        FlowVAEObjective(energy_weight=1.0, decoded_frames=12).check_fits(config, 20)


def test_harmonics_without_noise_learn_their_pitch(make, batches, fit) -> None:
    module, recorder = make(judged=False), Recorder()
    config = module.flowvae.config
    torch.manual_seed(0)
    module.flowvae = FlowVAE(dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, harmonics=True)))
    fit(module, batches, 1, callbacks=[recorder])
    assert "train/pitch" in recorder.metrics[0]


def test_frames_outside_of_the_window_get_no_gradient(make, batches) -> None:
    module = make(judged=False)
    z = torch.randn(2, 20, module.flowvae.config.latent_dim, requires_grad=True)
    window = FrameWindow(torch.tensor([0, 12]), 8)
    module.flowvae.decoder(window.of(z).transpose(1, 2)).square().sum().backward()
    reached = z.grad.abs().sum(dim=2) > 0
    assert reached.tolist() == [[at < 8 for at in range(20)], [at >= 12 for at in range(20)]]


@pytest.mark.parametrize(("objective", "named"), [({"decoded_frames": 0}, "decoded"), ({"judged_frames": -1}, "judged")])
def test_windows_without_frames_are_refused(objective: dict[str, int], named: str) -> None:
    with pytest.raises(UserError, match=f"{named}_frames.*at least 1"):
        FlowVAEObjective(**objective)


def test_windows_that_are_too_long_are_refused(toy_flowvae_config: FlowVAEConfig) -> None:
    with pytest.raises(UserError, match=r"judged_frames: got 9, more than objective\.decoded_frames=8"):
        FlowVAEObjective(decoded_frames=8, judged_frames=9)
    for name in ("decoded_frames", "judged_frames"):
        FlowVAEObjective(**{name: 8}).check_fits(toy_flowvae_config, 8)
        with pytest.raises(UserError, match=rf"{name}: got 8, more than the 7 frames of a crop.*segment_samples"):
            FlowVAEObjective(**{name: 8}).check_fits(toy_flowvae_config, 7)


def test_validation_measures_whole_utterances(make, batches, fit) -> None:
    """An odd length is no multiple of the hop; the decoded mean and the recording are compared over what both have."""
    odd = [WaveBatch(0.1 * torch.randn(1, 3333, generator=torch.Generator().manual_seed(1)), ("x",))]
    module = make(judged=False)
    trainer = fit(module, batches, 3, valid=odd)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    assert {"val/mel_l1", "val/kl_per_element", "val/mean_std", "val/active_dimensions", "val/z_std"} <= set(metrics)
    with torch.no_grad():
        wav = module.flowvae.decode(module.flowvae.encode(odd[0].wav).mean)
        samples = min(wav.shape[1], 3333)
        expected = (module.log_mel(odd[0].wav[:, :samples]) - module.log_mel(wav[:, :samples])).abs().mean()
    assert metrics["val/mel_l1"] == pytest.approx(float(expected), rel=1e-4)


def test_the_guard_judges_both_players_before_clipping(make, batches, fit, tmp_path) -> None:
    module, guard = make(), UpdateGuard(tmp_path, GuardConfig())
    module.clip = ClipSchedule(norm=1e-3, early=1e-3)
    trainer = fit(module, batches, 1, callbacks=[guard])
    norms = guard.state_dict()["norms"]
    assert norms["0"] == pytest.approx([float(trainer.callback_metrics["train/gradient_norm"])])
    assert min(norms["0"] + norms["1"]) > 1e-2
