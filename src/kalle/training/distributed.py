"""Training in several processes: who takes part, how gradients are averaged, and how a language model is sharded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed
from lightning.pytorch.overrides.distributed import prepare_for_backward
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from kalle.errors import UserError
from kalle.models.lm import KalleLM

Reduction = Literal["global", "rank"]
FSDP = "fsdp2"
"""The name of the sharded strategy in ``trainer.strategy``."""


def started_ranks(environment: Mapping[str, str] | None = None) -> tuple[int, int] | None:
    """(processes of this machine, machines) of a run that torchrun, SLURM or `kalle train` has started; None for a lone process."""
    found = os.environ if environment is None else environment
    if "WORLD_SIZE" in found and "LOCAL_WORLD_SIZE" in found:
        world, local = int(found["WORLD_SIZE"]), int(found["LOCAL_WORLD_SIZE"])
        return (local, world // local) if world > 1 else None
    tasks = int(found.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks == 1:
        return None
    nodes = int(found.get("SLURM_STEP_NUM_NODES", found.get("SLURM_NNODES", "1")))
    if tasks % nodes:
        raise UserError(f"SLURM: got {tasks} tasks on {nodes} machines, expected equally many on each; set --ntasks-per-node")
    return tasks // nodes, nodes


def wanted_ranks(devices: Any, gpus: int) -> int:
    """Processes that ``trainer.devices`` asks for on a machine whose run may use ``gpus`` GPUs (0: it runs on the CPU).

    UserError for something that is neither a number, auto nor a list of numbers.
    """
    if devices in ("auto", "-1", -1):
        return max(1, gpus)
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices)
    try:
        count = int(devices)
    except ValueError:
        count = 0
    if count < 1:
        raise UserError(f"trainer.devices: got {devices}, expected auto, a number of devices or a list; correct it")
    if gpus and count > gpus:
        raise UserError(f"trainer.devices: got {devices}, but torch sees {gpus} GPUs; lower it")
    return count


def process_count(devices: Any, nodes: int, device: torch.device) -> int:
    """How many processes train, as far as the configuration and the environment say."""
    started = started_ranks()
    if started is not None:
        return started[0] * started[1]
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    return (1 if device.index is not None else wanted_ranks(devices, gpus)) * nodes


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within the block no gradient is computed for the parameters of ``module``; gradients still flow through it to its input."""
    thawed = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in thawed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in thawed:
            parameter.requires_grad_(True)


class AdversarialDDP(DDPStrategy):
    """Averages gradients over ranks for a module with manual optimisation whose ``networks()`` are trained in turn.

    torch's `DistributedDataParallel` around a whole `LightningModule` expects every backward to reach every parameter. With a
    generator and discriminators none does: it would fail, or, told to look for unused parameters, send the gradients of both at
    every backward. Here each network has a wrapper of its own, whose reducer works in the backwards that reach it; a network that
    takes no part in a step, as discriminators before their start, sends nothing. Every parameter of a network must be used when the
    network is.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._wrappers: list[DistributedDataParallel] = []

    def configure_ddp(self) -> None:
        """Wrap the networks, which gives every rank the weights of rank 0; the `LightningModule` itself stays unwrapped."""
        module = self.lightning_module
        networks = getattr(module, "networks", None)
        assert callable(networks), f"{type(module).__name__} has no networks()"
        assert module is not None
        assert not module.automatic_optimization, "a module with several networks optimises by hand"
        ids = self.determine_ddp_device_ids()
        # Buffers are constants here: windows and mel filters.
        self._wrappers = [DistributedDataParallel(network, device_ids=ids, broadcast_buffers=False) for network in networks()]

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Prepare the reducers that this backward may reach."""
        for wrapper in self._wrappers:
            if any(parameter.requires_grad for parameter in wrapper.module.parameters()):
                prepare_for_backward(wrapper, closure_loss)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Do nothing: the reducers have averaged the gradients by now."""

    def teardown(self) -> None:
        """Leave the networks without wrappers."""
        self._wrappers = []
        super().teardown()


def sum_over_ranks(value: Tensor, device: torch.device) -> Tensor:
    """The sum of ``value`` over all ranks, computed on ``device`` and returned where it was; ``value`` itself in a single process."""
    if not _several():
        return value
    total = value.to(device, copy=True)
    torch.distributed.all_reduce(total)
    return total.to(value.device)


def global_weight(count: Tensor) -> Tensor:
    """The factor of a rank's mean over ``count`` values with which the average over ranks is the mean over all values.

    Distributed training averages gradients over ranks, so a mean of each rank's own would weight a frame of a short batch more than one
    of a long batch. ``count`` is a scalar; every rank must call this equally often. Returns count * ranks / sum of counts, fp32 scalar; 1
    where there is one process.
    """
    if not _several():
        return torch.ones((), device=count.device)
    total = count.detach().float().clone()
    torch.distributed.all_reduce(total)
    return count.detach().float() * torch.distributed.get_world_size() / total


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def mixed_precision(precision: str) -> MixedPrecisionPolicy:
    """The policy for a trainer's ``precision``: bf16 weights and activations inside layers for bf16-*, gradients always summed in fp32."""
    if precision.startswith("bf16"):
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return MixedPrecisionPolicy()


def shard_language_model(lm: KalleLM, mesh: DeviceMesh, precision: str = "32-true") -> KalleLM:
    """Shard ``lm`` in place over the 1-D ``mesh`` (torch's fully_shard): each decoder layer is collected when it computes.

    Only the decoder layers compute in the precision's low type; embedding, norms and the two latent layers stay fp32.
    """
    for layer in lm.backbone.layers:
        fully_shard(layer, mesh=mesh, mp_policy=mixed_precision(precision))
    fully_shard(lm, mesh=mesh)
    return lm


def is_sharded(module: nn.Module) -> bool:
    """Whether some part of ``module`` is sharded."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The full state of a sharded ``module`` on the CPU, one tensor at a time; a collective call: every rank makes it, each gets all."""
    found = {}
    for name, tensor in module.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found[name] = whole.detach().cpu()
    return found


def whole_model(lm: KalleLM) -> KalleLM:
    """``lm`` itself, or where it is sharded a whole copy on the CPU; every rank makes this call."""
    if not is_sharded(lm):
        return lm
    whole = KalleLM(lm.config)
    whole.load_state_dict(whole_state(lm))
    return whole


def sharded_strategy(processes: int) -> ModelParallelStrategy:
    """Lightning's strategy for FSDP2 with all ``processes`` in one data-parallel group, and checkpoints that are one whole file."""
    return ModelParallelStrategy(data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False)


def check_sharding(lm: KalleLM, averages_weights: bool) -> None:
    """A UserError for what does not work with a sharded model."""
    if averages_weights:
        raise UserError("trainer=fsdp2: got an average of the weights (callbacks.ema), which needs them whole; add callbacks.ema=null")
    if lm.speaker_encoder is not None:
        raise UserError("trainer=fsdp2: got a speaker encoder, expected a model without one; use trainer=ddp")
    # What is exported is rebuilt from the configuration, which knows neither.
    if lm.state_dict().keys() != KalleLM.names_of(lm.config):
        raise UserError("trainer=fsdp2: got adapters or a compact vocabulary, expected neither; use compact_vocabulary=false without lora")
