"""The loss, L = L_spatial + lambda * L_fourier (paper, Fig. 3 and the loss of its approach section), and how it is minimised.

    spatial_loss   the painted pixels against the true ones, over hidden pixels only
    fourier_loss   move 3: the same error seen as frequencies, where the large ones are weighted up
    a2mim_loss     both, with their parts for the log
    lr_at          the released schedules
    parameter_groups, layer_groups    who decays, who learns slowly: pre-training, fine-tuning; then LAMB and EMA

Images are normalised, (B, 3, H, W); masks (B, gh, gw), True = hidden. Everything runs in float32, whatever autocast says.
"""

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from masking import resize_mask

STAND_INS = ("mixed", "prediction", "target", "mean")
SPECTRA = ("batch", "image")


# ---- over pixels ----

def focal_l1(d: Tensor, alpha: float = 0.2) -> Tensor:
    """|d| (2 sigmoid(alpha |d|) - 1), elementwise, >= 0: small errors count less than in plain |d|.

    Source: Yang et al. 2021 (gamma 1), as in the released CNN configs; the ViT configs use plain L1."""
    return d * (d * (alpha / 2)).tanh_()                     # 2 sigmoid(a) - 1 = tanh(a / 2); two odd factors need no |.|


def spatial_loss(pred: Tensor, image: Tensor, mask: Tensor, focal: bool = True) -> Tensor:
    """sum(|pred - image| m) / (sum(m) + 1e-5) / 3 over hidden pixels m; `focal` puts focal_l1 for |.|. A scalar."""
    m = resize_mask(mask, image.shape[-2:])                  # (B, 1, H, W)
    d = (pred.float() - image.float()).mul_(m)               # focal_l1(0) = 0: the mask may go inside
    error = focal_l1(d) if focal else d.abs()
    return error.sum() / (m.sum() + 1e-5) / image.shape[1]


# ---- move 3: over frequencies ----

def residual(pred: Tensor, image: Tensor, mask: Tensor, stand_in: str, u: float, average: bool = False) -> Tensor:
    """p - image, where p = pred w + stand_in (1 - w) and w = m + (1 - m) u: what the Fourier loss looks at. (B, 3, H, W)

    At visible pixels the prediction is swapped for a stand-in, so they pull on it by `u` at most. With `average` its mean
    over the batch, (1, 3, H, W)."""
    if stand_in not in STAND_INS:
        raise ValueError(f"stand-in {stand_in!r}: must be one of {', '.join(STAND_INS)}")
    mean = (lambda x: x.mean(0, keepdim=True)) if average else (lambda x: x)              # early: what follows is B times smaller
    w = torch.where(resize_mask(mask, image.shape[-2:]), 1.0, u)            # (B, 1, H, W)
    d = pred - image
    wd = mean(w * d)
    if stand_in == "mean":                                   # the true image's mean colour
        return wd + mean((1 - w) * (image.mean((2, 3), keepdim=True) - image))
    share = {"prediction": 1.0, "mixed": 0.5, "target": 0.0}[stand_in]      # how much of d the stand-in keeps
    return torch.add(wd, (mean(d) - wd).detach(), alpha=share)


def fourier_loss(pred: Tensor, image: Tensor, mask: Tensor, *, stand_in: str = "mixed", u: float = 1e-3,
                 spectrum: str = "batch", focal: bool = True, alpha: float = 1.0, log_weight: bool = True) -> Tensor:
    """Focal frequency loss (Jiang et al., ICCV 2021) with A2MIM's stand-in for visible pixels. A scalar.

    D = F(p) - F(image), F = orthonormal 2-D FFT per channel; weight = log(1 + |D|^alpha) (log_weight=False: |D|^alpha)
    over its maximum, in [0, 1], detached; loss = mean(weight |D|^2). focal=False: mean of focal_l1(|D|) over the full plane,
    as released for ResNet-101, whose head takes its pixel criterion again.

    stand_in  'mixed' (released): half prediction, half image; 'prediction': the paper; 'target'; 'mean' colour
    u         share of the gradient that visible pixels keep: 1e-3 (ResNet), 0 (ViT, ConvNeXt, Swin)
    spectrum  'batch' (released): the spectra are averaged over the local batch before D is formed, one maximum over all.
              Errors of different images then cancel: the term sees the batch's mean residual only, and depends on the
              batch per process and on accumulation. 'image' (the paper): one D and one maximum per image and channel.
    Raises ValueError for another stand-in or spectrum."""
    if spectrum not in SPECTRA:
        raise ValueError(f"spectrum {spectrum!r}: must be one of {', '.join(SPECTRA)}")
    with torch.autocast(image.device.type, enabled=False):
        # F is linear: F(p) - F(image) = F(p - image), and the mean of spectra is the spectrum of the mean: one FFT, not B
        r = residual(pred.float(), image.float(), mask, stand_in, u, average=spectrum == "batch")
        D = torch.fft.rfft2(r, norm="ortho")                 # (B or 1, 3, H, W//2 + 1): a real image's other half mirrors it
        if focal:
            size = torch.view_as_real(D).square().sum(-1)    # |D|^2
            weight = size.detach().sqrt() ** alpha
            weight = torch.log1p(weight) if log_weight else weight
            peak = weight.amax() if spectrum == "batch" else weight.amax((2, 3), keepdim=True)
            size = (weight / peak).nan_to_num(0).clamp(0, 1) * size         # 0/0 where nothing is wrong: no loss
        else:
            size = focal_l1(D.abs())
        twice = torch.full((D.shape[-1],), 2.0, device=D.device)            # each inner column stands for its mirror too
        twice[0] = 1
        if image.shape[-1] % 2 == 0:
            twice[-1] = 1
        return (size * twice).sum() / r.numel()


# ---- together ----

def a2mim_loss(pred: Tensor, image: Tensor, mask: Tensor, *, fourier_weight: float = 0.5, focal_pixels: bool = True,
               focal_fourier: bool = True, stand_in: str = "mixed", u: float = 1e-3, spectrum: str = "batch",
               alpha: float = 1.0, log_weight: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """L_spatial + fourier_weight * L_fourier, and {'spatial', 'fourier'}, the detached parts (unweighted).

    The target is the true image, hidden pixels included. The defaults are the released ResNet-50 configuration.
    With fourier_weight 0 (ConvNeXt, SimMIM) the transform is not computed and its part is absent."""
    total = spatial_loss(pred, image, mask, focal_pixels)
    parts = {"spatial": total.detach()}
    if fourier_weight:
        fourier = fourier_loss(pred, image, mask, stand_in=stand_in, u=u, spectrum=spectrum,
                               focal=focal_fourier, alpha=alpha, log_weight=log_weight)
        total = total + fourier_weight * fourier
        parts["fourier"] = fourier.detach()
    return total, parts


# ---- how it is minimised ----

def decays(name: str, p: Tensor) -> bool:
    """Weight decay is not for norms, biases, mask token, gamma, positions (embedding and bias tables), class token and LayerScale.

    (The authors' name patterns miss some norms of ResNet and ConvNeXt, which decay there.)"""
    return p.ndim > 1 and not name.endswith(("layer_scale", "pos_embed", "relative_position_bias_table", "cls_token"))


def parameter_groups(model: nn.Module, weight_decay: float, token_lr: float) -> list[dict]:
    """Pre-training's groups for the optimiser, each with its `scale` of the lr."""
    groups = {}
    for name, p in model.named_parameters():
        key = (token_lr if name.startswith("mask_token.") else 1.0, weight_decay if decays(name, p) else 0.0)
        groups.setdefault(key, []).append(p)
    return [dict(params=params, scale=scale, weight_decay=decay) for (scale, decay), params in groups.items()]


def lr_at(step: int, total: int, warmup: int, base: float, floor: float, schedule: str) -> float:
    """lr of one parameter group at iteration `step` of `total`, linear warm-up over `warmup` iterations from 0.

    cosine: c = floor + (base - floor)/2 (1 + cos(pi (t - W)/(T - W))), times t/W in warm-up, as released (mmcv);
    step: base, a tenth of it for the last eighth (epochs 700 to 800 of the ViT recipe)."""
    ramp = min(1.0, step / warmup) if warmup else 1.0
    if schedule == "step":
        return base * ramp * (0.1 if step >= total * 7 / 8 else 1.0)
    floor = min(floor, base)                                 # with a small batch the token's lr may lie below the floor
    return ramp * (floor + (base - floor) / 2 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))))


def layer_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    """Fine-tuning's groups: scale = layer_decay^(n - i) for level i of n (stem or patch embedding 0), 1 for the head.

    The levels are the encoder's: its stages, so that a ViT's block i is level i + 1 and 0.65^(L + 1 - j) comes out, with j = 0
    for positions too; ConvNeXt has finer ones. `model` has an `encoder` (model.Encoder); frozen parameters are left out."""
    levels, groups = model.encoder.levels, {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            inside = name.removeprefix("encoder.backbone.")
            level = next((i for i, names in enumerate(levels) if inside.startswith(tuple(f"{s}." for s in names))), len(levels))
            level = 0 if inside in ("cls_token", "pos_embed") else level
            groups.setdefault((level, decays(name, p)), []).append(p)
    return [dict(params=params, scale=layer_decay ** (len(levels) - level), weight_decay=weight_decay if decay else 0.0)
            for (level, decay), params in sorted(groups.items(), key=lambda item: item[0])]


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020, algorithm 2), which torch lacks; details as in NVIDIA's and timm's:

    gradients over max(1, their global norm); update = Adam's bias-corrected direction + weight_decay p;
    p -= lr |p| / |update| update (the ratio is 1 if either norm is 0), and plain lr where weight_decay is 0."""

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
    """EMA of the parameters, from the initial ones on; the decay rises from 0.9 decay to decay over `ramp` steps, as released.

    BatchNorm statistics stay the model's."""
    def average(averages, current, n):                       # ema.n_averaged is n on the CPU: no wait for a GPU
        get_ema_multi_avg_fn(decay * (0.9 + 0.1 * min(1.0, (int(ema.n_averaged) - 1) / ramp)))(averages, current, n)
    ema = AveragedModel(model, multi_avg_fn=average, use_buffers=False)
    ema.n_averaged += 1                                      # at 0 torch would take its first update for the start
    return ema
