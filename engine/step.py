"""What fine-tuning, segmentation and detection share of a training step.

    memory_format    channels_last for a CNN
    wrap             device, SyncBN, torch.compile and DDP around a model
    make_scaler      the GradScaler
    take_step        the optimiser's step, after the backward passes
    is_evaluated     is there an evaluation after this step?

pretrain.py has its own lines in plain sight, and imports nothing from here.
"""

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from .checkpointer import StepPlan
from .command import Distributed
from .optim import nan_unless_finite


def memory_format(settings, world: Distributed, is_cnn: bool) -> torch.memory_format:
    """channels_last is faster on a CNN; mps lacks it."""
    channels_last = settings.channels_last and is_cnn and not world.on_mps
    return torch.channels_last if channels_last else torch.contiguous_format


def wrap(model: nn.Module, settings, world: Distributed,
         layout: torch.memory_format) -> tuple[nn.Module, nn.Module]:
    """(the model, whose weights have their own names; what a step calls)."""
    model = net = model.to(world.device).to(memory_format=layout)
    if world.size > 1 and world.on_cuda:                     # statistics of all GPUs, as released
        model = net = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if settings.compile:
        model.compile(dynamic=False)                         # a training batch has one size
    if world.size > 1:
        devices = [world.local_rank] if world.on_gpu else None
        # rank 0's BatchNorm statistics are saved, and shared before each evaluation
        net = DDP(model, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False)
    return model, net


def make_scaler(settings, world: Distributed) -> torch.amp.GradScaler:
    """Without fp16 the scale stays 1; it then only skips steps with non-finite gradients."""
    scale = {} if settings.amp == "fp16" else {"init_scale": 1.0}
    return torch.amp.GradScaler(world.device.type, **scale)


def take_step(state, settings, record: dict[str, Tensor]) -> None:
    """Clips the gradients if asked to, and makes the step unless a gradient is not finite. The loss
    in `record` is then NaN, as a sign for Checkpointer.

    state has `model`, `optimizer` and `scaler`."""
    if settings.amp != "fp16":                               # in which gradients may overflow
        record["loss"] = nan_unless_finite(record["loss"], state.model)
    if settings.clip_grad:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), settings.clip_grad)
    state.scaler.step(state.optimizer)
    state.scaler.update(None if settings.amp == "fp16" else 1.0)             # adapts for fp16 only
    state.optimizer.zero_grad(set_to_none=True)


def is_evaluated(done: int, plan: StepPlan, every: int) -> bool:
    """After `done` steps: at the end of every `every` epochs, and of the run."""
    epoch, inside = divmod(done, plan.per_epoch)
    is_due = inside == 0 and epoch % every == 0
    return done > 0 and (is_due or done >= plan.total)
