"""Adapters: the change that test-time training or low-rank fine-tuning makes to a language model, in one file bound to that model."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kalle.checkpoint import require_readable
from kalle.errors import PATH, UserError, check_type
from kalle.files import write_atomic
from kalle.models.lm import KalleLM
from kalle.models.lora import FACTORS, linear_layers, with_low_rank, with_weights

FORMAT = "kalle-adapter-1"
ADAPTER_FILE = "adapter.safetensors"
"""Its name in the folder that a training run writes."""
LORA_A, LORA_B = FACTORS
WHOLE = ".whole"
ROWS = ":rows"
"""Ending of the name of a tensor that lists the rows another one holds."""
_LARGEST_EXPONENT = 14
"""A change is scaled by a power of two so that its largest value lies just below 2 ** 14, which fp16 holds: 2 ** 28 below it is still
a number."""
_LARGEST_STORED_EXPONENT = 300
"""More than those of fp32 need."""
SPEAKER_PARTS = ("speaker_encoder.", "speaker_projection")
"""Parameters that test-time training does not change (the paper freezes the speaker encoder)."""
AGAIN = "make the adapter again with `kalle adapt` or `kalle train lm lora=default`"
AdapterKind = Literal["lora", "full"]


def base_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of the state ``tensors`` of a language model, rounded to bfloat16.

    So it is the same for weights in fp32 and for the same ones loaded in bfloat16. In the order of the sorted names: the name in UTF-8, the
    shape as text, the little-endian bytes.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().astype("<i2", copy=False).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Adapter:
    """Low-rank factors ("lora") or changes of all weights ("full") of one language model.

    The model is never written to: ``applied_to`` makes another over the same memory. Two adapters are equal when they are the same object.
    A UserError for tensors that are no adapter: names that don't pair, other ranks or dtypes, NaN or infinity.
    """

    kind: AdapterKind
    base: str
    """``base_hash`` of the language model it was made for."""
    tensors: Mapping[str, Tensor]
    """"lora": LAYER.lora_a (r, in) and LAYER.lora_b (out, r), fp32; WEIGHT.whole takes the place of a weight that was trained beside them.
    "full": see ``encode_changes``."""
    scale: float = 1.0
    """Multiplies the product of the factors."""
    exponents: Mapping[str, int] = field(default_factory=dict)
    """"full" only: by the name of a weight, the binary exponent of its change."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """How it was made and what that did, JSON values: texts, steps, learning rate, seed, divergences and similarities."""
    _made: list[tuple[weakref.ref[KalleLM], KalleLM]] = field(default_factory=list, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in ("lora", "full"):
            raise UserError(f"a bad adapter: its kind is {self.kind!r}, expected lora or full; {AGAIN}")
        if not math.isfinite(self.scale) or any(abs(exponent) > _LARGEST_STORED_EXPONENT for exponent in self.exponents.values()):
            raise UserError(f"a bad adapter: its scale is {self.scale:g}, or an exponent beyond fp32, expected finite numbers; {AGAIN}")
        if not self.tensors:
            raise UserError(f"an empty adapter: got no tensors, expected some; {AGAIN}")
        for name, tensor in self.tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise UserError(f"a bad adapter: NaN or infinite values in {name}, expected numbers only; {AGAIN}")
        wrong = self._unpaired()
        if wrong:
            raise UserError(f"a bad adapter: {wrong[0]} stands alone or is misshapen, expected what `kalle adapt` writes; {AGAIN}")

    @classmethod
    def of_changes(cls, base: str, changes: Mapping[str, Tensor], notes: Mapping[str, Any] | None = None) -> Adapter:
        """An adapter of the ``changes`` (fp32) of weights, by their names, rounded to fp16; see ``encode_changes``."""
        stored, exponents = encode_changes(changes)
        return cls("full", base, stored, exponents=exponents, notes=notes or {})

    @classmethod
    def of_factors(
        cls,
        base: str,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        scale: float,
        notes: Mapping[str, Any] | None = None,
        whole: Mapping[str, Tensor] | None = None,
    ) -> Adapter:
        """An adapter of low-rank ``factors`` (A, B) by the names of the linear layers; ``whole`` replaces weights and buffers by name."""
        tensors = {f"{name}{end}": value.float() for name, pair in factors.items() for end, value in zip(FACTORS, pair, strict=True)}
        tensors |= {name + WHOLE: value for name, value in (whole or {}).items()}
        return cls("lora", base, {name: tensor.detach().cpu() for name, tensor in tensors.items()}, scale, notes=notes or {})

    @property
    def size_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def description(self) -> str:
        """One line for people."""
        kind = f"low rank {self.rank}" if self.kind == "lora" else "all weights"
        made = self.notes.get("steps_made")
        steps = "" if made is None else f", {made} steps"
        return f"{kind}{steps}, {self.size_bytes / 1e6:.1f} MB, for the language model {self.base[:12]}"

    @property
    def rank(self) -> int | None:
        """Rank of the factors; None for a change of all weights."""
        return next((len(tensor) for name, tensor in self.tensors.items() if name.endswith(LORA_A)), None)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of everything that decides what it does."""
        digest = hashlib.sha256(f"{self.kind} {self.base} {self.scale!r} {sorted(self.exponents.items())}".encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def check_fits(self, base: str) -> None:
        """UserError unless ``base`` (``base_hash``) is the language model it was made for."""
        if base != self.base:
            raise UserError(
                f"the adapter does not fit: it was made for the language model {self.base[:12]}, this one is {base[:12]}; "
                f"use the weights it was made with (in float32 or bfloat16), or {AGAIN}"
            )

    def applied_to(self, lm: KalleLM) -> KalleLM:
        """``lm`` with the adapter, in evaluation mode, kept while both live; ``lm`` itself is not touched, nor a file it is mapped from.

        "lora" takes no memory but its own; "full" a second copy of the weights it changes. UserError when a tensor does not fit.
        """
        with self._lock:
            if not self._made or self._made[0][0]() is not lm:
                self._made[:] = [(weakref.ref(lm), self._apply(lm).eval())]
            return self._made[0][1]

    def _apply(self, lm: KalleLM) -> KalleLM:
        if self.kind == "lora":
            layers = linear_layers(lm, SPEAKER_PARTS)
            factors = self._factors()
            for name, (lora_a, lora_b) in factors.items():
                wanted = None if name not in layers else (layers[name].out_features, layers[name].in_features)
                _check_shape(name, (len(lora_b), lora_a.shape[1]), wanted)
            return with_weights(with_low_rank(lm, factors, self.scale), self._whole(lm))
        weights, changed = dict(lm.named_parameters()), {}
        for name, exponent in self.exponents.items():
            _check_shape(name, self._full_shape(name, weights.get(name)), None if name not in weights else tuple(weights[name].shape))
            weight = weights[name].detach()
            changed[name] = (weight.float() + decode_change(self.tensors, name, exponent, weight)).to(weight.dtype)
        return with_weights(lm, changed)

    def change(self, name: str, like: Tensor) -> Tensor:
        """ "full": by how much the weight ``name`` is to be changed, fp32, of the shape and on the device of ``like``."""
        return decode_change(self.tensors, name, self.exponents[name], like)

    def _full_shape(self, name: str, weight: Tensor | None) -> tuple[int, ...]:
        shape, rows = tuple(self.tensors[name].shape), self.tensors.get(name + ROWS)
        if rows is None or weight is None or not len(rows):
            return shape
        inside = int(rows.min()) >= 0 and int(rows.max()) < len(weight)
        return (len(weight) if inside else int(rows.max()) + 1, *shape[1:])

    def _factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        names = [name.removesuffix(LORA_A) for name in self.tensors if name.endswith(LORA_A)]
        return {name: (self.tensors[name + LORA_A], self.tensors[name + LORA_B]) for name in names}

    def _whole(self, lm: KalleLM) -> dict[str, Tensor]:
        """ "lora": weights and buffers that take the place of those of ``lm``, in its dtypes and on its device."""
        state = {name: tensor for name, tensor in lm.state_dict().items() if not name.startswith(SPEAKER_PARTS)}
        found = {name.removesuffix(WHOLE): tensor for name, tensor in self.tensors.items() if name.endswith(WHOLE)}
        for name, tensor in found.items():
            _check_shape(name, tuple(tensor.shape), None if name not in state else tuple(state[name].shape))
        return {name: tensor.to(state[name].device, state[name].dtype, copy=True) for name, tensor in found.items()}

    def _unpaired(self) -> list[str]:
        """Names of tensors that are not what ``kind`` has."""
        given = self.tensors
        if self.kind == "lora":
            stems = {name.removesuffix(LORA_A).removesuffix(LORA_B) for name in given if not name.endswith(WHOLE)}
            ranks = {stem: [given.get(stem + LORA_A), given.get(stem + LORA_B)] for stem in stems}
            return [
                stem for stem, (a, b) in ranks.items()
                if a is None or b is None or a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or {a.dtype, b.dtype} != {torch.float32}
            ]  # fmt: skip
        alone = [name for name in self.exponents if name not in given or not given[name].is_floating_point()]
        for name, tensor in given.items():
            stem = name.removesuffix(ROWS)
            rows_fit = stem in given and tensor.ndim == 1 and len(tensor) == len(given[stem]) and not tensor.is_floating_point()
            if stem not in self.exponents or (name.endswith(ROWS) and not rows_fit):
                alone.append(name)
        return alone

    def header(self) -> str:
        """The fields that are no tensors, as JSON."""
        values = {"kind": self.kind, "base": self.base, "scale": self.scale, "exponents": dict(self.exponents), "notes": dict(self.notes)}
        return json.dumps(values, ensure_ascii=False)

    @classmethod
    def from_parts(cls, header: str, tensors: Mapping[str, Tensor], source: str | Path) -> Adapter:
        """The inverse of ``header`` and ``tensors``; a UserError names ``source`` where they are damaged."""
        try:
            values = json.loads(header)
            kind, base, scale, notes = values["kind"], str(values["base"]), float(values["scale"]), dict(values["notes"])
            exponents = {str(name): int(exponent) for name, exponent in values["exponents"].items()}
            return cls(cast("AdapterKind", kind), base, dict(tensors), scale, exponents, notes)
        except UserError as error:
            raise UserError(f"a damaged adapter: '{source}': {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"a damaged adapter: '{source}': no usable {error} in its header; {AGAIN}") from None

    def save(self, path: str | Path) -> None:
        """Write one safetensors file atomically; a UserError when the disk refuses."""
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        write_atomic(Path(path), save(tensors, metadata={"format": FORMAT, "adapter": self.header()}))

    @classmethod
    def load(cls, path: str | Path) -> Adapter:
        """Read a file that ``save`` wrote, or the one in a folder; a UserError when it is missing, damaged or something else."""
        check_type("path", path, PATH, "that of a .safetensors adapter")
        path = Path(path)
        path = path / ADAPTER_FILE if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"adapter file not found: got '{path}', expected a .safetensors adapter; check the path")
        require_readable(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise UserError(f"not an adapter file: '{path}' ({error}); {AGAIN}") from None
        if metadata.get("format") != FORMAT:
            got = metadata.get("format")
            hint = "; it is a voice: give it as the voice" if str(got).startswith("kalle-voice") else f"; {AGAIN}"
            raise UserError(f"not an adapter file: '{path}' has format {got!r}, expected {FORMAT!r}{hint}")
        return cls.from_parts(metadata.get("adapter", ""), tensors, path)


def _check_shape(name: str, got: tuple[int, ...], wanted: tuple[int, ...] | None) -> None:
    if got != wanted:
        expected = "this model has no such layer" if wanted is None else f"expected {wanted}"
        raise UserError(f"the adapter does not fit: {name} is of shape {got}, {expected}; {AGAIN}")


def encode_changes(changes: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """``changes`` (fp32) as fp16 tensors, and by their names the binary exponents that scale them back.

    A tensor without a change is left out; of one in which most rows have none (a text embedding), the others are kept, with their numbers
    (int32) under the name + ``ROWS``. The error of a value is at most 2 ** -11 of it.
    """
    stored: dict[str, Tensor] = {}
    exponents: dict[str, int] = {}
    for name, change in changes.items():
        largest = float(change.abs().max()) if change.numel() else 0.0
        if largest == 0:
            continue
        exponents[name] = math.frexp(largest)[1] - _LARGEST_EXPONENT
        kept = change
        if change.ndim == 2:
            rows = change.any(dim=1).nonzero()[:, 0]
            if 2 * len(rows) < len(change):
                kept, stored[name + ROWS] = change[rows], rows.to(torch.int32)
        stored[name] = torch.ldexp(kept, torch.tensor(-exponents[name])).to(torch.float16)
    return stored, exponents


def decode_change(stored: Mapping[str, Tensor], name: str, exponent: int, like: Tensor) -> Tensor:
    """The change ``name`` in fp32, of the shape and on the device of ``like``."""
    values = torch.ldexp(stored[name].to(like.device, torch.float32), torch.tensor(exponent, device=like.device))
    rows = stored.get(name + ROWS)
    if rows is None:
        return values
    change = torch.zeros(like.shape, device=like.device)
    change[rows.to(like.device, torch.int64)] = values
    return change
