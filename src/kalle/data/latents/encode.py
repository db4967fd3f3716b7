"""The latents of a prepared corpus as shards: `encode(config)`, called from a notebook, a test or `kalle encode`."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from lhotse.cut import Cut
from torch import nn

from kalle.checkpoint import as_tuple, check_fields, check_range, weights_hash, write_json
from kalle.data.corpus.cuts import cut_field, load_audio, load_cuts
from kalle.data.latents.shards import (
    COMPLETED_NAME,
    INFO_NAME,
    LatentRecord,
    ShardFolder,
    iter_posteriors,
    latent_fields,
    latent_frames,
    read_info,
    write_index,
)
from kalle.data.shared_work import OthersUnfinished, Share, rank_device, share_of_process
from kalle.errors import UserError
from kalle.files import fingerprint, folder_lock, output_folder
from kalle.gaussian import DiagGaussian
from kalle.losses.latent import constant_gaussian_baseline
from kalle.models.flowvae import FlowVAE
from kalle.models.speaker import SpeakerMel
from kalle.progress import CountProgress
from kalle.seeds import numpy_generator
from kalle.text.tokenizer import unspeakable

logger = logging.getLogger(__name__)

Input = TypeVar("Input")
Output = TypeVar("Output")
AHEAD_PER_THREAD = 4
"""Results that wait to be taken, so that memory stays bounded."""


def in_background(function: Callable[[Input], Output], items: Iterable[Input], threads: int) -> Iterator[tuple[Input, Output]]:
    """Every item with ``function(item)``, in order, computed in ``threads`` threads a little ahead; 0 computes on demand.

    An exception of ``function`` is raised where its item would have come.
    """
    if threads == 0:
        for item in items:
            yield item, function(item)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="prefetch") as pool:
        waiting: deque[tuple[Input, Future[Output]]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(function, item)))
                if len(waiting) > AHEAD_PER_THREAD * threads:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


@dataclass(frozen=True)
class JoinConfig:
    """How short utterances are joined."""

    passes: int = 0
    """Different random joinings of the whole split; 0 joins nothing."""
    min_seconds: float = 3.0
    """Least length up to which a joined utterance is filled; the wanted length is drawn uniformly from here to ``max_seconds``."""
    max_seconds: float = 12.0
    """Longest joined utterance, silences included."""
    gap_seconds: tuple[float, float] = (0.1, 0.4)
    """Range of the silence between two cuts, drawn uniformly."""
    seed: int = 0
    """Seed of the joinings."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "gap_seconds", as_tuple(self.gap_seconds))
        check_fields(self, "join")
        if len(self.gap_seconds) != 2:
            raise UserError(
                f"join.gap_seconds: got {list(self.gap_seconds)}, expected two numbers, the shortest and the longest; correct it"
            )
        low, high = self.gap_seconds
        if self.passes < 0 or not 0 < self.min_seconds <= self.max_seconds or not 0 <= low <= high:
            expected = "passes >= 0, 0 < min_seconds <= max_seconds, 0 <= gap_seconds[0] <= gap_seconds[1]"
            raise UserError(f"join: got {self}, expected {expected}; correct it")


@dataclass(frozen=True)
class Utterance:
    """A unit of encoding: one cut, or several with ``gaps_samples`` zeros between neighbours (one fewer than cuts)."""

    id: str
    cuts: tuple[Cut, ...]
    gaps_samples: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """The texts of all supervisions, joined by a space."""
        texts = [supervision.text or "" for cut in self.cuts for supervision in cut.supervisions]
        return " ".join(text.strip() for text in texts if text.strip())

    @property
    def speaker(self) -> str | None:
        """Speaker of the first cut; joined cuts share it."""
        return cut_field(self.cuts[0], "speaker")

    @property
    def language(self) -> str | None:
        """Language of the first cut."""
        return cut_field(self.cuts[0], "language")

    @property
    def seconds(self) -> float:
        """Duration without the gaps."""
        return float(sum(cut.duration for cut in self.cuts))

    def audio(self, sample_rate_hz: int) -> np.ndarray:
        """The waveform, float32 (S,), mono at ``sample_rate_hz``."""
        pieces = [load_audio(self.cuts[0], sample_rate_hz)]
        for gap, cut in zip(self.gaps_samples, self.cuts[1:], strict=True):
            pieces += [np.zeros(gap, np.float32), load_audio(cut, sample_rate_hz)]
        return np.concatenate(pieces)


def singles(cuts: Sequence[Cut]) -> list[Utterance]:
    """Every cut as an utterance of its own."""
    return [Utterance(cut.id, (cut,)) for cut in cuts]


def joined_utterances(cuts: Sequence[Cut], config: JoinConfig, sample_rate_hz: int) -> list[Utterance]:
    """Joinings of ``cuts`` of the same speaker: deterministic in the set of cuts and the configuration, whatever their order.

    A pass puts the cuts of a speaker in a random order and fills one utterance after another up to a length drawn uniformly
    from [min_seconds, max_seconds]; a cut that stays alone gives none, for it exists as a single already.
    """
    by_speaker: dict[str, list[Cut]] = {}
    for cut in sorted(cuts, key=lambda cut: cut.id):
        by_speaker.setdefault(cut_field(cut, "speaker") or "", []).append(cut)
    utterances: list[Utterance] = []
    for number in range(config.passes):
        for speaker in sorted(by_speaker):
            utterances += _one_pass(by_speaker[speaker], config, number, speaker, sample_rate_hz)
    return utterances


def _one_pass(cuts: list[Cut], config: JoinConfig, number: int, speaker: str, sample_rate_hz: int) -> list[Utterance]:
    generator = numpy_generator("join", config.seed, number, speaker)
    shortest, longest = (round(seconds * sample_rate_hz) for seconds in (config.min_seconds, config.max_seconds))
    low, high = (round(seconds * sample_rate_hz) for seconds in config.gap_seconds)
    groups: list[Utterance] = []
    members: list[Cut] = []
    gaps: list[int] = []
    filled = target = 0

    def close() -> None:
        if len(members) > 1:
            name = f"joined-{number}-{speaker or 'unknown'}-{len(groups):06d}"
            groups.append(Utterance(name, tuple(members), tuple(gaps)))

    for index in generator.permutation(len(cuts)):
        samples = int(np.ceil(cuts[index].duration * sample_rate_hz))
        gap = int(generator.integers(low, high + 1))
        if members and filled + gap + samples <= target:
            members.append(cuts[index])
            gaps.append(gap)
            filled += gap + samples
            continue
        close()
        members, gaps, filled = [cuts[index]], [], samples
        target = int(generator.integers(shortest, longest + 1))
    close()
    return groups


TRAIN = "train"
DIRECTIONS = ("prediction_posterior", "posterior_prediction")


@dataclass(frozen=True)
class EncodeConfig:
    """How a corpus is encoded."""

    shard_size: int = 500
    """Utterances in a shard; an interrupted run repeats at most one shard."""
    batch_size: int = 1
    """Utterances encoded together, only ever of exactly equal length. 1 makes the result independent of the shards to the last bit."""
    pad_to_hop: bool = False
    """Append zeros up to a whole number of frames; the release does not, and its last frames differ."""
    speaker_mels: bool = False
    """Also store the log-mels of a speaker encoder."""
    loader_threads: int = 2
    """Threads that read and resample audio ahead of the encoder; 0 reads in turn. The result does not depend on it."""
    join: JoinConfig = field(default_factory=JoinConfig)
    """Joining of short training utterances; single ones are always kept too."""

    def __post_init__(self) -> None:
        check_fields(self, "")
        if self.shard_size < 1 or self.batch_size < 1:
            raise UserError(f"encode: got shard_size={self.shard_size} and batch_size={self.batch_size}, expected at least 1; correct them")
        if self.loader_threads < 0:
            raise UserError(f"encode: got loader_threads={self.loader_threads}, expected at least 0; correct it")


class CorpusEncoder:
    """Encodes utterances with one Flow-VAE; padding or another utterance never reaches a posterior."""

    def __init__(self, flowvae: FlowVAE, config: EncodeConfig, speaker_mel: nn.Module | None = None) -> None:
        """``speaker_mel`` maps a waveform (S,) to log-mels (80, F); required when the configuration asks for speaker mels."""
        if config.speaker_mels and speaker_mel is None:
            raise UserError("speaker_mels=true: got no speaker front end, expected a SpeakerMel; pass one")
        self.flowvae, self.config = flowvae.eval(), config
        self.speaker_mel = speaker_mel if config.speaker_mels else None
        self.encoder_hash = weights_hash(flowvae.encoder)
        self.device = next(flowvae.parameters()).device
        self.dtype = next(flowvae.parameters()).dtype

    def records(
        self, utterances: Sequence[Utterance], done: Callable[[int], None] = lambda count: None
    ) -> tuple[list[LatentRecord], dict[str, str]]:
        """Encode ``utterances``; returns their records in order, and the reason for each one that was skipped.

        ``done`` is called with how many are finished as they are.
        """
        hop, sample_rate_hz = self.flowvae.config.hop_length, self.flowvae.config.sample_rate
        skipped: dict[str, str] = {}
        records: dict[str, LatentRecord] = {}

        def loaded() -> Iterator[tuple[Utterance, np.ndarray]]:
            read = in_background(lambda utterance: utterance.audio(sample_rate_hz), utterances, self.config.loader_threads)
            for utterance, audio in read:
                if len(audio) < hop:
                    skipped[utterance.id] = f"shorter than one frame: {len(audio)} of {hop} samples"
                else:
                    yield utterance, audio

        for group in equal_length_groups(loaded(), self.config.batch_size):
            for record in self._encode_group(group):
                records[record.id] = record
            done(len(records) + len(skipped))
        return [records[utterance.id] for utterance in utterances if utterance.id in records], skipped

    def _encode_group(self, group: Sequence[tuple[Utterance, np.ndarray]]) -> Iterator[LatentRecord]:
        hop, sample_rate_hz = self.flowvae.config.hop_length, self.flowvae.config.sample_rate
        wav = torch.from_numpy(np.stack([audio for _, audio in group]))
        if self.config.pad_to_hop:
            wav = torch.nn.functional.pad(wav, (0, -wav.shape[1] % hop))
        with torch.inference_mode():
            posterior = self.flowvae.encode(wav.to(self.device, self.dtype))
            mels = None if self.speaker_mel is None else [self.speaker_mel(torch.from_numpy(audio)) for _, audio in group]
        for row, (utterance, audio) in enumerate(group):
            yield LatentRecord(
                id=utterance.id,
                text=utterance.text,
                speaker=utterance.speaker,
                language=utterance.language,
                sources=tuple(cut.id for cut in utterance.cuts),
                samples=len(audio),
                sample_rate_hz=sample_rate_hz,
                latents=half_precision(posterior[row], utterance.id),
                speaker_mels=None if mels is None else mels[row].numpy().astype(np.float16),
            )


def equal_length_groups(items: Iterable[tuple[Utterance, np.ndarray]], batch_size: int) -> Iterator[list[tuple[Utterance, np.ndarray]]]:
    """Groups of at most ``batch_size`` utterances with exactly as many samples each."""
    waiting: dict[int, list[tuple[Utterance, np.ndarray]]] = {}
    for item in items:
        group = waiting.setdefault(len(item[1]), [])
        group.append(item)
        if len(group) == batch_size:
            yield waiting.pop(len(item[1]))
    yield from waiting.values()


def half_precision(posterior: DiagGaussian, cut_id: str) -> np.ndarray:
    """``posterior`` (T, D) as (T, 2D) float16, mean then log_std; a UserError when half precision cannot hold a value."""
    parameters = torch.cat((posterior.mean, posterior.log_std), dim=-1).float().cpu()
    half = parameters.half()
    if not torch.isfinite(half).all():
        worst = parameters.abs().nan_to_num(nan=float("inf")).max().item()
        raise UserError(
            f"the posterior of cut '{cut_id}' does not fit float16: got a value of {worst:g}, expected finite values within 65504; "
            "train the Flow-VAE longer or with a larger KL weight, or remove the cut"
        )
    return half.numpy()


@dataclass(frozen=True)
class _Shard:
    """One shard of the plan: where it goes and what goes in."""

    folder: ShardFolder
    number: int
    utterances: Sequence[Utterance]
    mark: str

    def finished(self) -> dict[str, Any] | None:
        return self.folder.finished(self.number, self.mark)


def encode_corpus(
    encoder: CorpusEncoder,
    splits: Mapping[str, Sequence[Cut]],
    out: str | Path,
    progress: CountProgress | None = None,
    share: Share | None = None,
) -> dict[str, Any]:
    """Write the latent folder ``out`` from the cuts of each split and return its info.json.

    Complete shards of an interrupted run are kept and incomplete ones written again. ``share`` is the part of this process where several
    encode into one folder: shard n, counted over all splits, belongs to rank n % world_size, and the rank that ends last completes the
    folder, which holds the same bytes as one process's. The others raise OthersUnfinished; ``progress`` counts the own share.
    UserError for cuts without audio, for posteriors that half precision cannot hold, for an ``out`` that holds something else, and for a
    full disk.
    """
    root, share = Path(out), share or Share()
    plan = {split: planned(split, cuts, encoder) for split, cuts in splits.items()}
    if not any(plan.values()):
        raise UserError("nothing to encode: got no cuts, expected at least one; run `kalle prepare` on the corpus")
    with output_folder(root):
        shards = {split: _shards(encoder, root, split, utterances) for split, utterances in plan.items()}
        own = [shard for index, shard in enumerate(_all(shards)) if share.owns(index)]
        report = progress or (lambda done, total: None)
        waiting = [shard for shard in own if shard.finished() is None]
        total = sum(len(shard.utterances) for shard in own)
        done = total - sum(len(shard.utterances) for shard in waiting)
        report(done, total)
        for shard in waiting:
            _write(encoder, shard, share, lambda count, before=done: report(before + count, total))  # type: ignore[misc]
            done += len(shard.utterances)
            report(done, total)
        recorded = {split: [shard.finished() for shard in some] for split, some in shards.items()}
        missing = sum(record is None for records in recorded.values() for record in records)
        if missing:
            raise OthersUnfinished(share, missing, "shards")
        with folder_lock(root, "info", wait=True):
            return _finish(encoder, root, {split: [r for r in records if r is not None] for split, records in recorded.items()})


def _shards(encoder: CorpusEncoder, root: Path, split: str, utterances: Sequence[Utterance]) -> list[_Shard]:
    folder = ShardFolder(root, split, latent_fields(encoder.config.speaker_mels))
    size = encoder.config.shard_size
    parts = [utterances[start : start + size] for start in range(0, len(utterances), size)]
    folder.check_only(len(parts))
    return [_Shard(folder, number, part, shard_mark(encoder, part)) for number, part in enumerate(parts)]


def _all(shards: Mapping[str, Sequence[_Shard]]) -> list[_Shard]:
    return [shard for some in shards.values() for shard in some]


def planned(split: str, cuts: Sequence[Cut], encoder: CorpusEncoder) -> list[Utterance]:
    """The utterances of ``split``: every cut, and for the training split the joinings after them."""
    utterances = singles(cuts)
    if split == TRAIN:
        utterances += joined_utterances(cuts, encoder.config.join, encoder.flowvae.config.sample_rate)
    twice = [name for name, count in Counter(utterance.id for utterance in utterances).items() if count > 1]
    if twice:
        raise UserError(f"cut ids of the split '{split}' must differ: got '{twice[0]}' twice; run `kalle prepare` again")
    for utterance in utterances:
        if strange := unspeakable(utterance.text):
            raise UserError(f"the text of cut '{utterance.id}' has {strange}, expected words; run `kalle prepare` again, which rejects it")
    return utterances


def shard_mark(encoder: CorpusEncoder, utterances: Sequence[Utterance]) -> str:
    """SHA-256 (hex) of all that decides the content of a shard, short of the audio itself."""
    config = encoder.config
    facts = [
        [encoder.encoder_hash, str(encoder.dtype), config.pad_to_hop, config.speaker_mels],
        *[[u.id, u.text, u.speaker, u.gaps_samples, [(c.id, c.start, c.duration) for c in u.cuts]] for u in utterances],
    ]
    return fingerprint(facts)


def _write(encoder: CorpusEncoder, shard: _Shard, share: Share, done: Callable[[int], None]) -> None:
    """Write ``shard`` unless it is complete already, or another process, started with the same rank by mistake, is writing it."""
    folder, number = shard.folder, shard.number
    with folder_lock(folder.root, f"{folder.split}.{number:06d}", wait=False) as holder:
        if holder is not None:
            logger.warning("%s shard %d is being written by %s, left to it; start every rank once", folder.split, number, holder)
            return
        if shard.finished() is not None:
            return
        (folder.root / COMPLETED_NAME).unlink(missing_ok=True)
        started = time.perf_counter()
        records, skipped = encoder.records(shard.utterances, done)
        seconds = sum(record.samples for record in records) / encoder.flowvae.config.sample_rate
        facts = {
            "utterances": len(records),
            "joined": sum(len(record.sources) > 1 for record in records),
            "frames": sum(len(record.latents) for record in records),
            "seconds": seconds,
            "skipped": skipped,
        }
        folder.write(number, records, shard.mark, facts)
    for name, reason in skipped.items():
        logger.warning("skipped %s: %s", name, reason)
    speed = seconds / (time.perf_counter() - started)
    who = f"{share}: " if share.world_size > 1 else ""
    logger.info("%s%s shard %d: %d utterances, %.0f s at %.0f x real time", who, folder.split, number, len(records), seconds, speed)


def _finish(encoder: CorpusEncoder, root: Path, recorded: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Write the indices, info.json, then the marker that the folder is complete; no more than the first when it is."""
    for split in recorded:
        write_index(root, split, latent_fields(encoder.config.speaker_mels), latent_frames)
    if (root / COMPLETED_NAME).is_file():
        try:
            return read_info(root)
        except UserError:  # damaged: computed anew
            (root / COMPLETED_NAME).unlink()
    config = encoder.flowvae.config
    counts = {
        split: {
            "shards": len(shards),
            **{key: sum(shard[key] for shard in shards) for key in ("utterances", "joined", "frames", "seconds")},
            "skipped": {name: reason for shard in shards for name, reason in shard["skipped"].items()},
        }
        for split, shards in recorded.items()
    }
    filled = [split for split in counts if counts[split]["frames"]]
    if not filled:
        raise UserError("nothing was encoded: every utterance is shorter than one frame; check the corpus")
    baselines = {
        split: {direction: constant_gaussian_baseline(iter_posteriors(root, split), direction) for direction in DIRECTIONS}  # type: ignore[arg-type]
        for split in filled
    }
    marginal = baselines[TRAIN if TRAIN in filled else filled[0]]["posterior_prediction"].distribution
    info: dict[str, Any] = {
        "format_version": 1,
        "latent_dim": config.latent_dim,
        "sample_rate_hz": config.sample_rate,
        "hop_length": config.hop_length,
        "frame_rate_hz": config.frame_rate_hz,
        "encoder_hash": encoder.encoder_hash,
        "speaker_mels": encoder.config.speaker_mels,
        "config": {key: value for key, value in dataclasses.asdict(encoder.config).items() if key != "loader_threads"},
        "total_frames": sum(count["frames"] for count in counts.values()),
        "splits": counts,
        "constant_gaussian_kl": {
            split: {direction: baseline.kl.mean().item() for direction, baseline in both.items()} for split, both in baselines.items()
        },
        "mean": marginal.mean.tolist(),
        "std": marginal.log_std.exp().tolist(),
    }
    write_json(root / INFO_NAME, info)
    (root / COMPLETED_NAME).touch()
    return read_info(root)


@dataclass(frozen=True, kw_only=True)
class EncodingConfig:
    """The corpus, the folder to write, and the share of this process."""

    flowvae: str | Path
    """Weight folder, NAME or NAME/flowvae."""
    corpus: str | Path
    """Folder that `kalle prepare` wrote."""
    out: str | Path
    """Latent folder; encode again to continue after an interruption."""
    options: EncodeConfig = field(default_factory=EncodeConfig)
    splits: tuple[str, ...] = ("train", "valid", "test")
    device: str = "auto"
    """auto, cpu or cuda; with several processes each has a GPU of its own."""
    rank: int | None = None
    """The part of this process of ``world_size``; None: what torchrun or SLURM say, else all of it."""
    world_size: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "splits", as_tuple(self.splits))
        check_fields(self, "")
        check_range(self, "", "rank")
        check_range(self, "", "world_size", least=1)


def encode(config: EncodingConfig, report: CountProgress | None = None) -> dict[str, Any]:
    """Encode this process's share of a corpus; returns the info.json of the complete latent folder.

    ``report`` is called with the numbers of utterances done and of all. OthersUnfinished when shards of other processes are not there
    yet; a UserError for a folder that is no corpus or has no Flow-VAE.
    """
    share = share_of_process(config.rank, config.world_size)
    if Path(config.out).resolve() == Path(config.corpus).resolve():
        raise UserError(f"out: got the corpus itself, '{config.out}', expected a folder for the latents alone; choose another")
    flowvae = FlowVAE.from_pretrained(config.flowvae, device=rank_device(config.device))
    splits = {split: load_cuts(config.corpus, split) for split in config.splits}
    encoder = CorpusEncoder(flowvae, config.options, SpeakerMel() if config.options.speaker_mels else None)
    return encode_corpus(encoder, splits, config.out, report, share)
