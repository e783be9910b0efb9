"""The loss, L = L_spatial + lambda * L_fourier (paper, Fig. 3).

    spatial_loss   the reconstruction against the image, over hidden pixels only
    fourier_loss   idea 3: the error of all pixels as frequencies, where large errors weigh more
    a2mim_loss     their sum, and both parts for the log
    skill          what a loss on held-out images says, in words

Images are normalised, (B, 3, H, W). `hidden` is the mask at the size of the pixels, (B, 1, H, W),
True = hidden. Everything is computed in float32, also under autocast.
"""

import math

import torch
from torch import Tensor

STAND_INS = ("mixed", "prediction")
SPECTRA = ("batch", "image")


# ---- over pixels ----

def focal_l1(d: Tensor, alpha: float = 0.2) -> Tensor:
    """|d| (2 sigmoid(alpha |d|) - 1) = d tanh(alpha d / 2), elementwise, >= 0.

    Small errors count less than in L1. Source: Yang et al. 2021 (gamma 1), as in the released CNN
    configs; the ViT configs use plain L1."""
    return d * torch.tanh(alpha / 2 * d)


def spatial_loss(pred: Tensor, image: Tensor, hidden: Tensor, focal: bool = True) -> Tensor:
    """sum(|pred - image| m) / (sum(m) + 1e-5) / C with m = hidden pixels. A scalar.

    focal: focal_l1 in place of the absolute value."""
    d = pred.float() - image.float()
    error = focal_l1(d) if focal else d.abs()
    return (error * hidden).sum() / (hidden.sum() + 1e-5) / image.shape[1]


# ---- idea 3: over frequencies ----

def residual(pred: Tensor, image: Tensor, hidden: Tensor, stand_in: str,
             visible_weight: float) -> Tensor:
    """The error that the FFT sees, p - image, (B, 3, H, W).

    At hidden pixels p is the prediction. An FFT needs the visible pixels as well, but the network
    should not be trained on pixels that it was shown. So at visible pixels p is a stand-in without
    gradient:

    'mixed'       halfway between prediction and image, half the error; as released
    'prediction'  the prediction, detached, the full error; as in the paper

    The image itself would be no good stand-in: the error would fall to 0 at the edge of every mask
    unit, and the spectrum would show these edges.

    visible_weight: the share of the gradient that visible pixels keep all the same.
    Raises ValueError for another stand-in."""
    if stand_in not in STAND_INS:
        raise ValueError(f"stand-in {stand_in!r}: must be one of {', '.join(STAND_INS)}")
    d = pred - image
    constant = d.detach() * (0.5 if stand_in == "mixed" else 1.0)
    weight = torch.where(hidden, 1.0, visible_weight)        # (B, 1, H, W)
    return torch.lerp(constant, d, weight)                   # constant + weight (d - constant)


def fourier_loss(pred: Tensor, image: Tensor, hidden: Tensor, *, stand_in: str = "mixed",
                 visible_weight: float = 1e-3, spectrum: str = "batch",
                 focal: bool = True) -> Tensor:
    """The mean of w |D|^2 over all frequencies, images and channels. A scalar.

    D = FFT(p - image), orthonormal, per channel, with p from `residual`. The weight
    w = log(1 + |D|) / max log(1 + |D|) has no gradient and lies in [0, 1].

    stand_in        at visible pixels, see `residual`
    visible_weight  share of the gradient that visible pixels keep: 1e-3 in the released ResNet
                    configs, 0 in the others
    spectrum        'batch' (default, as released): p - image is averaged over the images of this
                    forward pass, then there is one D per channel, and one maximum over all
                    channels. Errors that differ between images cancel. 'image' (the paper): one D
                    and one maximum for each image and channel
    focal           False: mean focal_l1(|D|), without w, as in the released ResNet-101 config,
                    which applies its pixel loss to |D|

    Raises ValueError for another stand-in or spectrum. Source: focal frequency loss (Jiang et al.
    2021), with A2MIM's rule for visible pixels."""
    if spectrum not in SPECTRA:
        raise ValueError(f"spectrum {spectrum!r}: must be one of {', '.join(SPECTRA)}")
    with torch.autocast(image.device.type, enabled=False):
        r = residual(pred.float(), image.float(), hidden, stand_in, visible_weight)
        if spectrum == "batch":
            r = r.mean(0, keepdim=True)                      # the FFT is linear
        D = torch.fft.fft2(r, norm="ortho")                  # (B or 1, 3, H, W), complex
        if not focal:
            return focal_l1(D.abs()).mean()
        power = D.real.square() + D.imag.square()            # |D|^2
        weight = torch.log1p(power.detach().sqrt())
        largest = weight.amax() if spectrum == "batch" else weight.amax((2, 3), keepdim=True)
        weight = (weight / largest).nan_to_num(0).clamp(0, 1)                # 0/0: no error
        return (weight * power).mean()


# ---- together ----

def a2mim_loss(pred: Tensor, image: Tensor, hidden: Tensor, *, fourier_weight: float = 0.5,
               focal_pixels: bool = True, focal_fourier: bool = True, stand_in: str = "mixed",
               visible_weight: float = 1e-3,
               spectrum: str = "batch") -> tuple[Tensor, dict[str, Tensor]]:
    """L_spatial + fourier_weight * L_fourier, and both as {'spatial', 'fourier'}, detached.

    The target is the true image. The defaults are the released ResNet-50 configuration. With
    fourier_weight 0, as for ConvNeXt and SimMIM, no FFT is computed, and there is no 'fourier'."""
    total = spatial_loss(pred, image, hidden, focal_pixels)
    parts = {"spatial": total.detach()}
    if fourier_weight:
        fourier = fourier_loss(pred, image, hidden, stand_in=stand_in, spectrum=spectrum,
                               visible_weight=visible_weight, focal=focal_fourier)
        total = total + fourier_weight * fourier
        parts["fourier"] = fourier.detach()
    return total, parts


# ---- what a loss on held-out images says ----

def skill(loss: float, mean_colour: float, blur: float,
          standard_error: float = 0.0) -> tuple[str, bool]:
    """Compares the pixel loss of the model on held-out images with two baselines.

    mean_colour     the pixel loss if hidden patches are filled with the image's mean colour
    blur            the pixel loss if they are filled with a blur of the visible pixels
    standard_error  of (loss - blur); a difference of less than twice that counts as equal

    Returns a sentence, and whether the model is better than the blur."""
    of_mean = loss / max(mean_colour, 1e-9)
    of_blur = loss / max(blur, 1e-9)
    margin = 2 * standard_error / max(blur, 1e-9)
    is_better = False
    if not of_mean <= 0.95:                                  # a loss of NaN, too
        verdict = "not clearly better than the mean colour: it has learned nothing yet"
    elif abs(loss - blur) <= 2 * standard_error:
        verdict = "level with a blur"
    elif of_blur > 1:
        verdict = "worse than a blur: it does not reconstruct objects yet"
    else:
        is_better = True
        verdict = "better than a blur" if of_blur > 0.85 else "clearly better than a blur"
    scatter = f" +/- {margin:.2f}" if 0 < margin < math.inf else ""
    shares = f"{of_mean:.2f} of the mean colour's error, {of_blur:.2f}{scatter} of a blur's"
    return f"{shares}: {verdict}", is_better
