"""The loss, L = L_spatial + lambda * L_fourier (paper, Fig. 3 and the loss of its approach section).

    spatial_loss   the painted pixels against the true ones, over hidden pixels only
    fourier_loss   move 3: the same error seen as frequencies, where the large ones are weighted up
    a2mim_loss     both, with their parts for the log
    mix_batch, class_loss, erase    fine-tuning's: mixed images and targets, cross-entropies, random erasing

Images are normalised, (B, 3, H, W); masks (B, gh, gw), True = hidden. All runs in float32, whatever autocast says.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from masking import resize_mask

STAND_INS = ("mixed", "prediction", "target", "mean")
SPECTRA = ("batch", "image")


# ---- over pixels ----

def focal_l1(d: Tensor, alpha: float = 0.2) -> Tensor:
    """|d| (2 sigmoid(alpha |d|) - 1) = d tanh(alpha d / 2), elementwise, >= 0: small errors count less than in |d|.

    Source: Yang et al. 2021 (gamma 1), as in the released CNN configs; the ViT configs use plain L1."""
    return d * torch.tanh(alpha / 2 * d)


def spatial_loss(pred: Tensor, image: Tensor, mask: Tensor, focal: bool = True) -> Tensor:
    """sum(|pred - image| m) / (sum(m) + 1e-5) / C over hidden pixels m; `focal` puts focal_l1 for |.|. A scalar."""
    m = resize_mask(mask, image.shape[-2:])                  # (B, 1, H, W)
    d = pred.float() - image.float()
    error = focal_l1(d) if focal else d.abs()
    return (error * m).sum() / (m.sum() + 1e-5) / image.shape[1]


# ---- move 3: over frequencies ----

def residual(pred: Tensor, image: Tensor, mask: Tensor, stand_in: str, visible_weight: float) -> Tensor:
    """What the Fourier loss looks at: the prediction at hidden pixels, a stand-in at visible ones, minus the image.

    p - image with p = w pred + (1 - w) stand_in, and w = 1 at hidden, `visible_weight` at visible pixels. (B, 3, H, W)
    The stand-in is detached: the network was given the visible pixels, so to paint them teaches nothing."""
    d = pred - image
    if stand_in == "mean":                                   # of the true image's colours
        stand = image.mean((2, 3), keepdim=True) - image
    elif stand_in in STAND_INS:
        stand = {"prediction": 1.0, "mixed": 0.5, "target": 0.0}[stand_in] * d.detach()
    else:
        raise ValueError(f"stand-in {stand_in!r}: must be one of {', '.join(STAND_INS)}")
    w = torch.where(resize_mask(mask, image.shape[-2:]), 1.0, visible_weight)            # (B, 1, H, W)
    return torch.lerp(stand, d, w)                           # stand + w (d - stand)


def fourier_loss(pred: Tensor, image: Tensor, mask: Tensor, *, stand_in: str = "mixed", visible_weight: float = 1e-3,
                 spectrum: str = "batch", focal: bool = True, alpha: float = 1.0, log_weight: bool = True) -> Tensor:
    """Focal frequency loss (Jiang et al., ICCV 2021) with A2MIM's stand-in for visible pixels. A scalar.

    D = F(p) - F(image), F = orthonormal 2-D FFT per channel; weight = log(1 + |D|^alpha) (log_weight=False: |D|^alpha)
    over its maximum, in [0, 1], detached; loss = mean(weight |D|^2). focal=False: mean of focal_l1(|D|) over the full
    plane, as released for ResNet-101, whose head takes its pixel criterion again.

    stand_in        'mixed' (released): half prediction, half image; 'prediction': the paper; 'target'; 'mean' colour
    visible_weight  share of the gradient that visible pixels keep: 1e-3 (ResNet), 0 (ViT, ConvNeXt, Swin)
    spectrum        'batch' (released): the spectra are averaged over the local batch before D is formed, one maximum
                    over all. Errors of different images then cancel: the term sees the batch's mean residual only, and
                    depends on the batch per process and on accumulation. 'image' (the paper): one D and one maximum per
                    image and channel. The default is the released one, so that a run here is a run there; small runs
                    take 'image', as a mean over few images says little.
    Raises ValueError for another stand-in or spectrum."""
    if spectrum not in SPECTRA:
        raise ValueError(f"spectrum {spectrum!r}: must be one of {', '.join(SPECTRA)}")
    with torch.autocast(image.device.type, enabled=False):
        r = residual(pred.float(), image.float(), mask, stand_in, visible_weight)
        if spectrum == "batch":
            r = r.mean(0, keepdim=True)                      # F is linear: mean of spectra = spectrum of the mean
        D = torch.fft.rfft2(r, norm="ortho")                 # (B or 1, 3, H, W//2 + 1)
        power = D.real.square() + D.imag.square()            # |D|^2
        if focal:
            weight = power.detach().sqrt() ** alpha
            weight = torch.log1p(weight) if log_weight else weight
            peak = weight.amax() if spectrum == "batch" else weight.amax((2, 3), keepdim=True)
            error = (weight / peak).nan_to_num(0).clamp(0, 1) * power        # 0/0 if nothing is wrong: no loss
        else:
            error = focal_l1(D.abs())
        # a real image's spectrum is symmetric, and rfft2 keeps half of its columns: count the inner ones twice
        times = torch.full((D.shape[-1],), 2.0, device=D.device)
        times[0] = 1
        if image.shape[-1] % 2 == 0:
            times[-1] = 1
        return (error * times).sum() / r.numel()


# ---- together ----

def a2mim_loss(pred: Tensor, image: Tensor, mask: Tensor, *, fourier_weight: float = 0.5, focal_pixels: bool = True,
               focal_fourier: bool = True, stand_in: str = "mixed", visible_weight: float = 1e-3,
               spectrum: str = "batch", alpha: float = 1.0, log_weight: bool = True
               ) -> tuple[Tensor, dict[str, Tensor]]:
    """L_spatial + fourier_weight * L_fourier, and {'spatial', 'fourier'}, the detached parts (unweighted).

    The target is the true image, hidden pixels included. The defaults are the released ResNet-50 configuration.
    With fourier_weight 0 (ConvNeXt, SimMIM) the transform is not computed and its part is absent."""
    total = spatial_loss(pred, image, mask, focal_pixels)
    parts = {"spatial": total.detach()}
    if fourier_weight:
        fourier = fourier_loss(pred, image, mask, stand_in=stand_in, visible_weight=visible_weight, spectrum=spectrum,
                               focal=focal_fourier, alpha=alpha, log_weight=log_weight)
        total = total + fourier_weight * fourier
        parts["fourier"] = fourier.detach()
    return total, parts


def skill(loss: float, mean_colour: float, blur: float, error: float = 0.0) -> str:
    """A sentence that compares the pixel loss of the model on held-out images with two baselines.

    mean_colour  the pixel loss if hidden patches are filled with the image's mean colour
    blur         the pixel loss if they are filled with a blur of the visible pixels
    error        the standard error of loss - blur; a difference of up to two of it counts as none"""
    of_mean = loss / max(mean_colour, 1e-9)
    of_blur = loss / max(blur, 1e-9)
    margin = 2 * error / max(blur, 1e-9)
    if not of_mean <= 0.95:                                  # a loss of NaN, too
        verdict = "no better than the mean colour: it has learned nothing yet"
    elif abs(loss - blur) <= 2 * error:
        verdict = "level with a blur"
    elif of_blur > 1:
        verdict = "worse than a blur: it does not reconstruct objects yet"
    elif of_blur > 0.85:
        verdict = "better than a blur"
    else:
        verdict = "clearly better than a blur"
    scatter = f" +/- {margin:.2f}" if error else ""
    shares = f"{of_mean:.2f} of the mean colour's error, {of_blur:.2f}{scatter} of a blur's"
    return f"{shares}: {verdict}"


# ---- fine-tuning ----

def mix_batch(images: Tensor, labels: Tensor, classes: int, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) and (B,) -> mixed images and targets (B, classes), lam * one_hot(a) + (1 - lam) * one_hot(b).

    With both alphas, mixup or cutmix with even odds per batch, always one; cutmix's lam is the share really pasted."""
    both = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
    choices = [make(alpha=alpha, num_classes=classes) for make, alpha in both if alpha]
    if not choices:
        return images, F.one_hot(labels, classes).float()
    return choices[int(torch.randint(len(choices), ()))](images, labels)


def class_loss(logits: Tensor, targets: Tensor, loss: str, smoothing: float) -> Tensor:
    """logits, targets (B, classes). 'ce': cross-entropy with label smoothing. 'bce': binary cross-entropy, mean over
    classes and samples as in the RSB paper and timm (the released code sums over classes)."""
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(logits, targets)
    return F.cross_entropy(logits, targets, label_smoothing=smoothing)


def erase(images: Tensor, probability: float) -> Tensor:
    """Random erasing (Zhong et al. 2020) of normalised images (B, 3, H, W): a box of normal noise, as released."""
    if not probability:
        return images
    one = v2.RandomErasing(probability, value="random")
    return torch.stack([one(image) for image in images])
