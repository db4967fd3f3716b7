"""Being asked to stop: Ctrl-C and the signals of a cluster, and what all ranks agree on."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Preemption, and SLURM's warning (``--signal=USR1@120``)."""


class Preempted(Exception):
    """A run that was asked to end early by ``signal_number``, after its state was saved."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} at step {step}")
        self.signal_number, self.step = signal_number, step

    @property
    def exit_code(self) -> int:
        """128 + the signal, as shells have it: 143 for SIGTERM, 138 for SIGUSR1."""
        return 128 + self.signal_number


class StopSignals:
    """Remembers in ``asked`` which signal wants the run to end, 0 for none; the second Ctrl-C raises at once."""

    def __init__(self) -> None:
        self.asked = 0
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Take over the signals, where that is possible: in the main thread."""
        self.asked = 0
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._ctrl_c)
            for number in PREEMPTION_SIGNALS:
                self._before[number] = signal.signal(number, self._preempt)

    def release(self) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ctrl_c(self, number: int, frame: Any) -> None:
        if self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = self.asked or number
        logger.info("stopping after this batch; press Ctrl-C again to stop at once")

    def _preempt(self, number: int, frame: Any) -> None:
        if not self.asked:
            logger.info("%s: saving after this batch and ending", signal.Signals(number).name)
        self.asked = self.asked or number


class Agreement:
    """The largest of some small numbers over all ranks, found while a batch is computed.

    It goes over gloo whatever the gradients go over: the numbers live on the CPU, and a GPU need not be waited for.
    """

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if several else None
        self._values = torch.zeros(0, dtype=torch.int64)
        self._work: Any = None

    @property
    def alone(self) -> bool:
        """Whether there is nobody to agree with."""
        return self._group is None

    def ask(self, *values: int) -> None:
        """Begin to compare ``values`` with those of the other ranks; every rank must call it equally often."""
        self._values = torch.tensor(values, dtype=torch.int64)
        if self._group is not None:
            self._work = dist.all_reduce(self._values, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def answer(self) -> list[int]:
        """The result of the last `ask`."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return [int(value) for value in self._values]
