"""What the language model says of the frame to come: its distribution, and where there is a stop head, whether it is the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kalle.gaussian import DiagGaussian


@dataclass(frozen=True)
class NextFrame(DiagGaussian):
    """The Gaussian (..., D) of the next frame, and the stop head's logit (...) that this frame is the end; None without a head."""

    stop_logit: Tensor | None = None

    @classmethod
    def cat(cls, parts: Sequence[NextFrame]) -> NextFrame:
        """The rows of ``parts``, of one model, below one another."""
        logits = [part.stop_logit for part in parts if part.stop_logit is not None]
        assert len(logits) in (0, len(parts)), "predictions with and without a stop head do not go together"
        mean, log_std = torch.cat([part.mean for part in parts]), torch.cat([part.log_std for part in parts])
        return cls(mean, log_std, torch.cat(logits) if logits else None)

    def to(self, *args: object, **kwargs: object) -> NextFrame:
        """Every tensor through ``Tensor.to``."""
        return self._each(lambda tensor: tensor.to(*args, **kwargs))  # type: ignore[call-overload,no-any-return]

    def detach(self) -> NextFrame:
        """Every tensor cut from the graph."""
        return self._each(Tensor.detach)

    def __getitem__(self, index: object) -> NextFrame:
        """Index every tensor alike, over the leading dimensions."""
        return self._each(lambda tensor: tensor[index])  # type: ignore[index]

    def _each(self, function: Callable[[Tensor], Tensor]) -> NextFrame:
        return NextFrame(function(self.mean), function(self.log_std), None if self.stop_logit is None else function(self.stop_logit))
