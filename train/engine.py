"""The DeepSpeed engine behind one small interface, the same for ZeRO 0, 1, 2 and 3.

Everything that knows DeepSpeed's inner layout is here: the trainer, the EMA and the checkpoints see a list of `FlatShard`s
(this rank's fp32 master weights with the address of every piece in the full parameter) and nothing else.
"""

import logging
import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported; without it, it warns

import deepspeed
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.utils import groups, set_z3_leaf_modules

from .deepspeed_contract import check_deepspeed
from .engine_config import EngineConfig, deepspeed_settings
from .flat_shards import build_shards, full_shape
from .muon import Muon
from .optimizer import ShardAdamW
from .step_clock import Part, StepClock

# The first CPU `initialize` would compile this all-reduce with g++ for a minute, a killed build leaves a lock that hangs every
# later run, and only inference uses it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# Of an optimizer that is not on the list, DeepSpeed warns in every run.
ZERO_SUPPORTED_OPTIMIZERS.extend((ShardAdamW, Muon))
# DeepSpeed reports its set-up at INFO and calls collectives that torch 2.13 has renamed: nothing a user could act on.
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


@dataclass(frozen=True)
class StepResult:
    grad_norm: float | Tensor
    applied: bool


class Engine:
    """A model, its optimizer and the process group; forward, backward and step on micro-batches."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        config: EngineConfig,
        micro_batch: int,
        gradient_clipping: float,
        leaf_modules: tuple[type[nn.Module], ...] = (),
    ) -> None:
        """`leaf_modules` are gathered whole at ZeRO 3, in one go and by hooks that lie outside of their forward, where all of the
        model is trained.

        Raises ValueError where the installed DeepSpeed is another one than this was made for.
        """
        check_deepspeed()
        self.config = config
        # Frozen weights are in no shard, and so in no average and no checkpoint.
        self._names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.parameter_shapes = {name: full_shape(parameter) for parameter, name in self._names.items()}
        self._clipping = gradient_clipping
        assert not (config.offload_optimizer and isinstance(optimizer, ShardAdamW)), "its kernel reads no host memory"
        # Stage 0 in fp32 reports no gradient norm, so `step` clips there itself.
        deepspeed_clipping = gradient_clipping if config.zero > 0 else 0.0
        if isinstance(optimizer, ShardAdamW) and config.zero in (1, 2) and gradient_clipping > 0:
            # In the optimizer's own pass. Stage 3 multiplies the gradient anyway, if only by 1.
            deepspeed_clipping, optimizer.clip_coefficient = 0.0, self._clip_coefficient
        # Whether the optimizer's steps move the averages that they find in their shards' states, see EMA.
        self.moves_averages = isinstance(optimizer, ShardAdamW) and config.zero > 0
        if config.zero < 3 or not all(parameter.requires_grad for parameter in model.parameters()):
            # DeepSpeed reduces a leaf's gradients once those of its inputs are there. Where parameters in front of it are frozen
            # (under a LoRA), no input has one, and it would do so before the leaf's own are computed.
            leaf_modules = ()
        elif leaf_modules:
            set_z3_leaf_modules(model, list(leaf_modules))
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            dist_init_required=False,
            config=deepspeed_settings(
                config,
                micro_batch=micro_batch,
                gradient_clipping=deepspeed_clipping,
                largest_gather=largest_gather(model, leaf_modules),
                elements=sum(full_shape(parameter).numel() for parameter in model.parameters()),
            ),
        )
        if config.zero == 0 and dist.get_world_size() == 1:
            # Nobody to average with: packing the gradients for the reduction alone takes 7 % of a 0.13 s step.
            self._engine.enable_backward_allreduce = False
        self.shards = build_shards(self._engine.optimizer, self._names, zero=config.zero)
        if isinstance(optimizer, Muon):
            optimizer.bind(self.shards, self.parameter_shapes, is_sharded=config.zero > 0)
        # DeepSpeed asks the optimizer to step once for each shard, after it has reduced the gradients and taken their norm and
        # before any weight changes: the one place where a step can still be called off.
        self._accept: Callable[[float], bool] | None = None
        self._is_accepted: bool | None = None
        if config.zero > 0:
            self._optimizer_step: Callable[..., Any] = optimizer.step
            optimizer.step = self._step_if_accepted  # type: ignore[method-assign]

    @property
    def module(self) -> nn.Module:
        """The wrapped network; call the engine itself for training forwards."""
        return self._engine.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Accumulate the gradient of a micro-batch's loss, which sums over micro-batches and averages over ranks.

        With the last one of a step, which is so on all ranks at once, the ranks put theirs together.
        """
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float, accept: Callable[[float], bool] | None = None) -> StepResult:
        """Clip and update the weights, after the backward of a step's last micro-batch. Collective.

        A gradient that is not finite is not applied. Of any other, `accept` is asked once with its norm before clipping; where it
        says no, the weights, the optimizer's state and its count of steps stay as they are. It must say the same on all ranks.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if self.config.zero == 0:
            gradients = [parameter.grad for parameter in self._names if parameter.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            if not torch.isfinite(norm) or (accept is not None and not accept(float(norm))):
                self._engine.zero_grad()
                return StepResult(grad_norm=norm, applied=False)
            if self._clipping > 0:
                torch.nn.utils.clip_grads_with_norm_(list(self._names), self._clipping, norm)
            self._engine.step()
            return StepResult(grad_norm=norm, applied=True)
        self._accept, self._is_accepted = accept, None
        self._engine.step()
        # To DeepSpeed a step that was called off looks applied; of one that is not finite nobody was asked.
        return StepResult(grad_norm=self._engine.get_global_grad_norm(), applied=self._is_accepted is True)

    def time_reduction(self, clock: StepClock) -> None:
        """From now on, tell the clock what of the gradients' reduction a backward has left to wait for."""
        reduce = self._engine.allreduce_gradients

        def reduce_timed(*arguments: Any, **named: Any) -> None:
            with clock.running(Part.communication):
                reduce(*arguments, **named)

        self._engine.allreduce_gradients = reduce_timed

    def refresh_weights(self) -> None:
        """Make the weights used in the forward follow the master weights, after a load or a swap. Collective."""
        optimizer = self._engine.optimizer
        if self.config.zero in (1, 2):
            optimizer.update_lp_params()
        elif self.config.zero == 3:
            # Gathered copies must go: persistent parameters keep one, and so does any other after a forward without backward.
            optimizer.empty_partition_cache()
            for index in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(index)
            optimizer.invalidate_secondary_tensor()  # a node's copy is of the weights before
            if persistent := optimizer.persistent_parameters:
                persistent[0].all_gather(persistent)

    def optimizer_step_count(self) -> float:
        """Updates applied so far, as the optimizer counts them for its bias correction."""
        counts = [shard.optimizer_state["step"] for shard in self.shards if "step" in shard.optimizer_state]
        return float(counts[0]) if counts else 0.0

    def eval(self) -> None:
        self._engine.eval()

    def train(self) -> None:
        self._engine.train()

    def destroy(self) -> None:
        self._engine.destroy()

    def _step_if_accepted(self, closure: Callable[[], float] | None = None) -> Any:
        """What DeepSpeed calls as the optimizer's step; without one, the forward's weights follow masters that are as they were."""
        if self._is_accepted is None:
            # Reading the norm makes nobody wait: DeepSpeed has just looked whether it is finite.
            self._is_accepted = self._accept is None or self._accept(float(self._engine.optimizer._global_grad_norm))
        return self._optimizer_step(closure) if self._is_accepted else None

    def _clip_coefficient(self) -> Tensor:
        """What brings the gradient's norm under the limit; DeepSpeed has taken the norm when it calls the optimizer."""
        return (self._clipping / (self._engine.optimizer._global_grad_norm + 1e-6)).clamp(max=1.0)


def shard_parameter(parameter: nn.Parameter, config: EngineConfig) -> None:
    """Split a whole parameter over the processes, as ZeRO 3 has it, and free it; all get what rank 0 has. Collective."""
    if config.node_shards is not None and groups._get_zero_param_intra_parallel_group() is None:
        groups._create_zero_param_parallel_group(config.node_shards)
    node = groups._get_zero_param_intra_parallel_group() if config.node_shards is not None else None
    deepspeed.zero.Init(module=nn.ParameterList([parameter]), dtype=parameter.dtype, zero_param_parallel_group=node)


def largest_gather(model: nn.Module, leaf_modules: tuple[type[nn.Module], ...]) -> int:
    """Elements of what ZeRO 3 gathers at once: all of a leaf module, else what a module has of its own."""
    sizes = [0]
    for module in model.modules():
        parameters = module.parameters(recurse=isinstance(module, leaf_modules))
        sizes.append(sum(full_shape(parameter).numel() for parameter in parameters))
    return max(sizes)


class RendezvousError(RuntimeError):
    """The processes of the run did not find each other."""


def initialise_distributed(config: EngineConfig) -> torch.device:
    """Join the process group that torchrun, srun or nobody (one process) set up; returns this rank's device.

    Raises RendezvousError where that fails.
    """
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.setdefault("LOCAL_RANK", "0")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=config.timeout_seconds)
        )
    except (RuntimeError, ValueError) as error:
        given = " ".join(
            f"{name}={os.environ.get(name)}" for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        )
        cause = (str(error).splitlines() or [""])[0]
        raise RendezvousError(
            f"cannot meet the other processes at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} ({cause}); "
            f"{given}: is the port taken, a process missing, or a variable of another run?"
        ) from error
    # Groups that are made later, DeepSpeed's among them, have torch's limits and not that of the first one: 10 minutes over NCCL,
    # less than the watchdog's, which says more.
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(distributed_c10d, name, timedelta(seconds=config.timeout_seconds))
    deepspeed.init_distributed(dist_init_required=False)
    return device
