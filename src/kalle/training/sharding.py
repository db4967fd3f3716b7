"""The language model sharded over devices (torch's fully_shard, FSDP2): each holds a part of the weights, gradients and optimizer state."""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from kalle.errors import UserError
from kalle.models.lm import KalleLM
from kalle.training.lm import KalleLMTraining


def mixed_precision(precision: str) -> MixedPrecisionPolicy:
    """The policy for a trainer's ``precision``: bf16 weights and activations inside layers for bf16-*, gradients always summed in fp32."""
    if precision.startswith("bf16"):
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return MixedPrecisionPolicy()


def shard_language_model(lm: KalleLM, mesh: DeviceMesh, precision: str = "32-true") -> KalleLM:
    """Shard ``lm`` in place over the 1-D ``mesh``: each decoder layer is gathered when it computes, the rest stays gathered together.

    Only the decoder layers compute in the precision's low type; embedding, norms and the two latent layers stay fp32.
    """
    for layer in lm.backbone.layers:
        fully_shard(layer, mesh=mesh, mp_policy=mixed_precision(precision))
    fully_shard(lm, mesh=mesh)
    return lm


def is_sharded(module: nn.Module) -> bool:
    """Whether some part of ``module`` is sharded."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def whole_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The full state of a sharded ``module`` on the CPU, one tensor at a time; a collective call: every rank makes it, each gets all."""
    found = {}
    for name, tensor in module.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found[name] = whole.detach().cpu()
    return found


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2 with every process in one data-parallel group, and checkpoints that are one whole file."""

    def __init__(self) -> None:
        super().__init__(data_parallel_size="auto", tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Lightning's own "auto" would shard over machines only."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


class ShardedLMTraining(KalleLMTraining):
    """KalleLMTraining whose model is sharded once the processes have met."""

    def configure_model(self) -> None:
        """Shard; nothing when that is done."""
        if not is_sharded(self.lm):
            assert self.device_mesh is not None
            shard_language_model(self.lm, self.device_mesh["data_parallel"], str(self.trainer.precision))


def check_sharding(lm: KalleLM, averages_weights: bool) -> None:
    """A UserError for what does not work with a sharded model."""
    if averages_weights:
        raise UserError("trainer=fsdp2: got an average of the weights (callbacks.ema), which needs them whole; add callbacks.ema=null")
    if lm.speaker_encoder is not None:
        raise UserError("trainer=fsdp2: got a speaker encoder, expected a model without one; use trainer=ddp")
    # What is exported is rebuilt from the configuration, which knows neither.
    if lm.state_dict().keys() != KalleLM.names_of(lm.config):
        raise UserError("trainer=fsdp2: got adapters or a compact vocabulary, expected neither; use compact_vocabulary=false without lora")


def whole_model(lm: KalleLM) -> KalleLM:
    """``lm`` itself, or where it is sharded a whole copy on the CPU; every rank makes this call."""
    if not is_sharded(lm):
        return lm
    whole = KalleLM(lm.config)
    whole.load_state_dict(whole_state(lm))
    return whole
