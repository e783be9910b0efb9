"""How a loss is minimised: learning rates over a run, weight decay, LAMB, the moving average of the
weights.

    lr_at              one learning rate at one step
    parameter_groups   pre-training: the mask token learns slowly
    layer_groups       fine-tuning: the first layers learn slowly
    Lamb, moving_average
"""

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def decays(name: str, p: Tensor) -> bool:
    """Norms, biases, mask token, gamma, positions (embedding and bias tables), class token and
    LayerScale do not decay.

    (The authors' name patterns miss some norms of ResNet and ConvNeXt, which decay there.)"""
    return p.ndim > 1 and not name.endswith(("layer_scale", "pos_embed", "relative_position_bias_table", "cls_token"))


def parameter_groups(model: nn.Module, weight_decay: float, token_lr: float) -> list[dict]:
    """Pre-training's groups for the optimiser, each with its `scale` of the lr."""
    groups = {}
    for name, p in model.named_parameters():
        key = (token_lr if name.startswith("mask_token.") else 1.0, weight_decay if decays(name, p) else 0.0)
        groups.setdefault(key, []).append(p)
    return [dict(params=params, scale=scale, weight_decay=decay) for (scale, decay), params in groups.items()]


def lr_at(step: int, total: int, warmup: int, base: float, floor: float, schedule: str, per_epoch: int = 1) -> float:
    """lr of one parameter group at iteration `step` of `total`, linear warm-up over `warmup`
    iterations. As released:

    cosine           c = floor + (base - floor)/2 (1 + cos(pi (t - W)/(T - W))), times t/W in
                     warm-up (mmcv)
    step             base, a tenth of it for the last eighth (epochs 700 to 800 of the ViT recipe)
    cosine-from-0    the cosine counted from iteration 0, under a ramp that rises from 1e-5
                     (ConvNeXt, fine-tuning)
    cosine-by-epoch  the same, but the cosine moves once an epoch (RSB)
    probe            base, x0.1 at 60 and 80 % of the run (linear probe)"""
    ramp = min(1.0, step / warmup) if warmup else 1.0
    if schedule == "probe":
        return base * 0.1 ** sum(step >= share * total for share in (0.6, 0.8))
    if schedule == "step":
        return base * ramp * (0.1 if step >= total * 7 / 8 else 1.0)
    if schedule == "cosine-by-epoch":
        step, total, warmup, ramp = step // per_epoch, total / per_epoch, 0, 1e-5 + (1 - 1e-5) * ramp
    elif schedule == "cosine-from-0":
        warmup, ramp = 0, 1e-5 + (1 - 1e-5) * ramp
    floor = min(floor, base)  # with a small batch the token's lr may lie below the floor
    return ramp * (floor + (base - floor) / 2 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))))


def layer_groups(model: nn.Module, weight_decay: float, layer_decay: float,
                 prefix: str = "encoder.backbone.") -> list[dict]:
    """Fine-tuning's groups: scale = layer_decay^(n - i) for level i of n (stem or patch embedding
    0), 1 for the head.

    The levels are the encoder's stages: a ViT's block i is level i + 1, so that 0.65^(L + 1 - j)
    comes out, with j = 0 for positions too; ConvNeXt has finer ones. prefix: of the backbone's
    names in `model`, below its model.Encoder. Frozen parameters stay out."""
    encoder, groups = model.get_submodule(prefix.removesuffix(".backbone.")), {}
    levels = [tuple(f"{name}." for name in names) for names in encoder.levels]
    for name, p in model.named_parameters():
        if p.requires_grad:
            inside = name.removeprefix(prefix) if name.startswith(prefix) else ""
            level = next((i for i, names in enumerate(levels) if inside.startswith(names)), len(levels))
            level = 0 if inside in ("cls_token", "pos_embed") else level
            groups.setdefault((level, decays(name, p)), []).append(p)
    return [dict(params=params, scale=layer_decay ** (len(levels) - level), weight_decay=weight_decay if decay else 0.0)
            for (level, decay), params in sorted(groups.items(), key=lambda item: item[0])]


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020, algorithm 2), which torch lacks; details as in NVIDIA's and timm's:

    gradients over max(1, their global norm); update = Adam's bias-corrected direction +
    weight_decay p; p -= lr |p| / |update| update (the ratio is 1 if either norm is 0), and plain lr
    where weight_decay is 0."""

    def __init__(self, params, lr: float, betas=(0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.02):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        torch._foreach_div_(grads, torch.stack(torch._foreach_norm(grads)).norm().clamp(min=1.0))
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            (b1, b2), decay, grads = group["betas"], group["weight_decay"], [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p].update(m=torch.zeros_like(p), v=torch.zeros_like(p))
            group["t"] = t = group.get("t", 0) + 1
            m, v = ([self.state[p][key] for p in params] for key in "mv")
            torch._foreach_lerp_(m, grads, 1 - b1)
            torch._foreach_mul_(v, b2)
            torch._foreach_addcmul_(v, grads, grads, 1 - b2)
            # m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) = scale m / (sqrt(v) + eps root)
            root = math.sqrt(1 - b2**t)
            scale, size = root / (1 - b1**t), torch._foreach_sqrt(v)
            torch._foreach_add_(size, group["eps"] * root)
            if decay:
                update = torch._foreach_mul(params, decay)
                torch._foreach_addcdiv_(update, m, size, scale)
                norms = zip(torch._foreach_norm(params), torch._foreach_norm(update))
                torch._foreach_mul_(update, [torch.where((p > 0) & (u > 0), p / u, 1.0) for p, u in norms])
                torch._foreach_add_(params, update, alpha=-group["lr"])
            else:
                torch._foreach_addcdiv_(params, m, size, -group["lr"] * scale)


def moving_average(model: nn.Module, decay: float, ramp: int) -> AveragedModel:
    """EMA of the parameters, from the initial ones on, as released: its decay rises from 0.9 decay
    over `ramp` steps.

    BatchNorm statistics stay the model's."""
    def average(averages, current, n):  # ema.n_averaged is n on the CPU: no wait for a GPU
        get_ema_multi_avg_fn(decay * (0.9 + 0.1 * min(1.0, (int(ema.n_averaged) - 1) / ramp)))(averages, current, n)
    ema = AveragedModel(model, multi_avg_fn=average, use_buffers=False)
    ema.n_averaged += 1  # at 0 torch would take its first update for the start
    return ema
