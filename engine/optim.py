"""How the loss is minimised: learning rates, weight decay, LAMB, a moving average of the weights.

    lr_at              the learning rate of a step
    parameter_groups   pre-training: the mask token has an lr of its own
    layer_groups       fine-tuning: layer-wise lr decay
    make_optimizer     AdamW, SGD or LAMB, by name
    momentum_sgd       torch's SGD, safe to start
    Lamb               an optimiser that torch lacks
    MovingAverage      of the weights (EMA)
    nan_unless_finite  the sign of a step that was not made
"""

import copy
import math

import torch
from torch import Tensor, nn

from .command import Distributed

# ---- learning rates ----

def lr_at(step: int, total: int, warmup: int, base: float, floor: float, schedule: str,
          per_epoch: int = 1) -> float:
    """The lr of a parameter group at `step` (t) of `total` (T), with a warm-up of `warmup` steps
    (W).

    cosine           min(1, t / W) (floor + (base - floor) / 2 (1 + cos(pi (t - W) / (T - W)))), as
                     in mmcv. With W > T / 2 the ramp alone before W: t / W base
    step             min(1, t / W) base; a tenth of it in the last eighth of the run (epochs 700 to
                     800 of the ViT recipe)
    cosine-from-0    the cosine counts from step 0, and the warm-up starts at 1e-5 base (ConvNeXt,
                     fine-tuning)
    cosine-by-epoch  as cosine-from-0, but the cosine changes once per epoch (RSB)
    probe            base; a tenth of it from 60 %, a hundredth from 80 % of the run (linear probe)

    Source: the released configs."""
    ramp = min(1.0, step / warmup) if warmup else 1.0
    if schedule == "probe":
        drops = (step >= 0.6 * total) + (step >= 0.8 * total)
        return base * 0.1**drops
    if schedule == "step":
        is_late = step >= total * 7 / 8
        return base * ramp * (0.1 if is_late else 1.0)

    if schedule != "cosine":                                 # the cosine counts from step 0
        warmup = 0
        ramp = 1e-5 + (1 - 1e-5) * ramp
    if schedule == "cosine-by-epoch":
        step = step // per_epoch
        total = total / per_epoch
    if warmup > total / 2:                                   # the cosine would rise and fall before
        step = max(step, warmup)
    floor = min(floor, base)                                 # a token's lr may lie below the floor
    angle = math.pi * (step - warmup) / max(1, total - warmup)               # from W: 0 to pi
    return ramp * (floor + (base - floor) / 2 * (1 + math.cos(angle)))


def nan_unless_finite(loss: Tensor, model: nn.Module) -> Tensor:
    """The loss, or NaN if a gradient is not finite. GradScaler then skips the step, which
    Checkpointer counts by this sign. The host does not wait for a GPU."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients:
        return loss
    norms = torch.stack(torch._foreach_norm(gradients))      # a few kernels for all of them
    return torch.where(norms.isfinite().all(), loss, math.nan)


# ---- parameter groups: what decays, and the share of the lr ----

NO_DECAY = ("layer_scale", "pos_embed", "relative_position_bias_table", "cls_token")


def decays(name: str, parameter: Tensor) -> bool:
    """Does weight decay apply to a parameter?

    Not to vectors (norms, biases, mask token, gamma), LayerScale, class token, and positions
    (embedding and bias tables). The authors' name patterns miss some norms of ResNet and ConvNeXt,
    which decay in the released code."""
    return parameter.ndim > 1 and not name.endswith(NO_DECAY)


def parameter_groups(model: nn.Module, weight_decay: float, token_lr: float) -> list[dict]:
    """The optimiser's groups for pre-training. `scale` multiplies the lr: token_lr for the mask
    token, 1 otherwise."""
    groups = {}                                              # (scale, decay) -> parameters
    for name, parameter in model.named_parameters():
        scale = token_lr if name.startswith("mask_token.") else 1.0
        decay = weight_decay if decays(name, parameter) else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    return [dict(params=parameters, scale=scale, weight_decay=decay)
            for (scale, decay), parameters in groups.items()]


def layer_groups(model: nn.Module, weight_decay: float, layer_decay: float,
                 prefix: str = "encoder.backbone.") -> list[dict]:
    """The optimiser's groups for fine-tuning, with layer-wise lr decay. Frozen parameters are left
    out.

    `scale` multiplies the lr: layer_decay^(n - i) for level i of n, where level 0 is the stem or
    the patch embedding, and 1 for the head. The levels are those of model.Encoder. A ViT's block i
    is level i + 1, so with L blocks its scale is layer_decay^(L - i). A ViT's class token and
    position embedding belong to level 0.

    prefix: of the backbone's names in `model`. It ends in '.backbone.', below the Encoder."""
    encoder = model.get_submodule(prefix.removesuffix(".backbone."))
    levels = []
    for names in encoder.levels:
        levels.append(tuple(f"{name}." for name in names))

    def level_of(name: str) -> int:
        inside = name.removeprefix(prefix)
        if not name.startswith(prefix):                      # the head
            return len(levels)
        if inside in ("cls_token", "pos_embed"):
            return 0
        for i, names in enumerate(levels):
            if inside.startswith(names):
                return i
        return len(levels)

    groups = {}                                              # (level, decays) -> parameters
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (level_of(name), decays(name, parameter))
            groups.setdefault(key, []).append(parameter)
    rows = []
    for level, is_decayed in sorted(groups):
        rows.append(dict(params=groups[level, is_decayed],
                         scale=layer_decay ** (len(levels) - level),
                         weight_decay=weight_decay if is_decayed else 0.0))
    return rows


# ---- AdamW, SGD and LAMB ----

def make_optimizer(name: str, groups: list[dict], world: Distributed) -> torch.optim.Optimizer:
    """'adamw', 'sgd' or 'lamb' over parameter groups. The lr is set before each step."""
    if name == "lamb":
        return Lamb(groups, lr=0.0)
    fused = not world.on_mps
    if name == "sgd":
        return momentum_sgd(groups, lr=0.0, fused=fused)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=fused)


def momentum_sgd(groups: list[dict], lr: float, fused: bool) -> torch.optim.SGD:
    """SGD with momentum 0.9. If it is fused, GradScaler can skip a step without waiting for a GPU.

    The momentum starts at 0, which makes the same first step as torch's own start. Torch's fused
    SGD leaves it uninitialised if the first step is skipped, as fp16's first step often is."""
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=fused)
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020, algorithm 2). For a weight p with gradient g at step t:

        g  = g / max(1, global norm of all gradients)
        m  = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
        u  = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p
        p -= lr |p| / |u| u

    The ratio |p| / |u| is 1 if a norm is 0, and where weight_decay is 0. The global norm, the bias
    correction and the exception without weight decay are those of NVIDIA's and timm's LAMB."""

    def __init__(self, params, lr: float, betas=(0.9, 0.999), eps: float = 1e-6,
                 weight_decay: float = 0.02):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        """One step. torch._foreach_* work on a list of tensors, with few kernels on a GPU."""
        gradients = []
        for group in self.param_groups:
            gradients += [p.grad for p in group["params"] if p.grad is not None]
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        torch._foreach_div_(gradients, norm.clamp(min=1.0))
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                group["t"] = group.get("t", 0) + 1
                self.update_group(group, parameters)

    def update_group(self, group: dict, parameters: list[Tensor]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p].update(m=torch.zeros_like(p), v=torch.zeros_like(p))
        g = [p.grad for p in parameters]
        m = [self.state[p]["m"] for p in parameters]
        v = [self.state[p]["v"] for p in parameters]
        b1, b2 = group["betas"]
        torch._foreach_lerp_(m, g, 1 - b1)
        torch._foreach_mul_(v, b2)
        torch._foreach_addcmul_(v, g, g, 1 - b2)

        update = torch._foreach_div(m, 1 - b1 ** group["t"])
        size = torch._foreach_div(v, 1 - b2 ** group["t"])
        torch._foreach_sqrt_(size)
        torch._foreach_add_(size, group["eps"])
        torch._foreach_div_(update, size)
        if group["weight_decay"]:
            torch._foreach_add_(update, parameters, alpha=group["weight_decay"])
            weight_norms = torch.stack(torch._foreach_norm(parameters))
            update_norms = torch.stack(torch._foreach_norm(update))
            ratios = trust_ratio(weight_norms, update_norms)
            torch._foreach_mul_(update, ratios.unbind())
        torch._foreach_add_(parameters, update, alpha=-group["lr"])


def trust_ratio(weight_norm: Tensor, update_norm: Tensor) -> Tensor:
    """|p| / |u|, or 1 if one of them is 0. One number per weight, on the device."""
    are_positive = (weight_norm > 0) & (update_norm > 0)
    return torch.where(are_positive, weight_norm / update_norm, 1.0)


# ---- a moving average of the weights ----

class MovingAverage(nn.Module):
    """The exponential moving average (EMA) of a model's parameters: `module`, a copy of the model
    that starts with the initial parameters. Its buffers (BatchNorm statistics) are the model's.

    The decay rises from 0.9 `decay` to `decay` over `ramp` steps, as released. The state dict is
    that of torch's AveragedModel, which would copy its counter to the GPU in each step."""

    def __init__(self, model: nn.Module, decay: float, ramp: int):
        super().__init__()
        self.module = copy.deepcopy(model)
        self.decay = decay
        self.ramp = ramp
        # on the CPU, so that no step waits for a GPU
        self.register_buffer("n_averaged", torch.tensor(1))  # the initial parameters count

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """After a step of the optimiser."""
        steps = int(self.n_averaged) - 1
        decay = self.decay * (0.9 + 0.1 * min(1.0, steps / self.ramp))
        averages, current = list(self.module.parameters()), list(model.parameters())
        torch._foreach_lerp_(averages, current, 1 - decay)   # decay average + (1 - decay) current
        for copied, buffer in zip(self.module.buffers(), model.buffers()):
            copied.copy_(buffer)
        self.n_averaged += 1
