"""Masking: which patches are hidden, what fills them, and the mask token that marks them.

Two of A2MIM's three ideas are here (Li et al., ICML 2023, arXiv 2205.13943, Fig. 3):

    fill_hidden   idea 1: hidden pixels take the image's own mean colour
    MaskToken     idea 2: a learned token joins the feature map in the middle of the network

A mask is boolean, (B, gh, gw), with one entry per square mask unit of the image. True = hidden.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

FILLS = ("mean", "zero", "random", "blur")
TOKENS = ("gamma", "add", "replace")


# ---- which patches are hidden ----

def mask_grid(image_size: tuple[int, int], mask_size: int) -> tuple[int, int]:
    """(H, W) in pixels -> (gh, gw), the number of mask units down and across.

    mask_size: side of a mask unit in pixels. Raises ValueError if it does not divide a side."""
    for side in image_size:
        if mask_size < 1 or side < mask_size or side % mask_size:
            close = []
            if mask_size > 0:
                below = side // mask_size * mask_size
                close = [str(n) for n in (below, below + mask_size) if n]
            fix = f"; use {' or '.join(close)}" if close else ""
            raise ValueError(f"image side {side}: not a multiple of the {mask_size}-pixel mask "
                             f"unit{fix}")
    return image_size[0] // mask_size, image_size[1] // mask_size


def hidden_count(units: int, ratio: float) -> int:
    """ceil(ratio * units), how many units of each image are hidden: 30 of 49 at the default 0.6. At
    least 1.

    Raises ValueError unless 0 < ratio < 1, or if no unit would stay visible."""
    if not 0 < ratio < 1:
        raise ValueError(f"mask ratio {ratio}: must lie between 0 and 1, both excluded; the paper "
                         f"uses 0.6")
    hidden = math.ceil(round(ratio * units, 6))              # 0.55 * 100 is 55.000000000000007
    hidden = max(1, hidden)
    if hidden >= units:
        raise ValueError(f"mask ratio {ratio}: hides all of {units} mask units; use a smaller "
                         f"--mask-size, a larger --image-size or a smaller --mask-ratio")
    return hidden


def random_mask(batch: int, grid: tuple[int, int], ratio: float = 0.6,
                device: torch.device | str = "cpu",
                generator: torch.Generator | None = None) -> Tensor:
    """Masks (B, gh, gw): exactly `hidden_count` units of each image, uniformly at random.

    `generator` must be on `device`. Raises ValueError as `hidden_count` does."""
    units = grid[0] * grid[1]
    count = hidden_count(units, ratio)
    noise = torch.rand(batch, units, device=device, generator=generator)
    chosen = noise.topk(count, dim=1).indices                # (B, count), a uniform subset
    mask = torch.zeros(batch, units, dtype=torch.bool, device=device)
    return mask.scatter_(1, chosen, True).view(batch, *grid)


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, gh, gw) -> (B, 1, h, w) by nearest neighbour: to the pixels, or to a feature map.

    If h, w are no multiples of gh, gw, each place takes the unit nearest to it. Raises ValueError
    if the target is coarser than the mask."""
    gh, gw = mask.shape[-2:]
    h, w = size
    if h < gh or w < gw:
        raise ValueError(f"mask of {gh}x{gw} units on {h}x{w} features: a mask unit is smaller "
                         f"than the stride where the token enters; use a larger --mask-size or "
                         f"an earlier --token-stage")
    mask = mask.bool()
    if h % gh == 0 and w % gw == 0:                          # each unit is a whole block
        rows = mask.repeat_interleave(h // gh, 1)
        return rows.repeat_interleave(w // gw, 2).unsqueeze(1)
    return F.interpolate(mask.unsqueeze(1).float(), size, mode="nearest").bool()


# ---- idea 1: hidden pixels take the mean colour ----

def fill_hidden(images: Tensor, mask: Tensor, fill: str = "mean",
                generator: torch.Generator | None = None) -> Tensor:
    """Fills the hidden patches of normalised images (B, C, H, W). Visible pixels stay bit-equal.

    fill  'mean': each image's mean per channel over all its pixels, hidden ones included (the
          method). 'zero': ImageNet's mean colour, which is 0 after normalisation. 'random': one
          random colour per image. 'blur': a blur of the visible pixels, sigma 3/4 of a mask unit

    `generator` feeds 'random' and is on the images' device. Raises ValueError for another fill.
    Source: paper, Fig. 3; `mask_color` of the released configs. Only 'mean' is the method."""
    hidden = resize_mask(mask, images.shape[-2:])            # (B, 1, H, W)
    if fill == "mean":
        colour = images.mean((2, 3), keepdim=True)           # (B, C, 1, 1)
    elif fill == "zero":
        colour = images.new_zeros(1, 1, 1, 1)
    elif fill == "random":
        colour = torch.randn(*images.shape[:2], 1, 1, device=images.device, generator=generator)
        colour = colour.to(images.dtype)
    elif fill == "blur":
        colour = blur_of_visible(images, hidden, sigma=0.75 * images.shape[-1] / mask.shape[-1])
    else:
        raise ValueError(f"fill {fill!r}: must be one of {', '.join(FILLS)}")
    return torch.where(hidden, colour, images)


def blur_of_visible(images: Tensor, hidden: Tensor, sigma: float) -> Tensor:
    """The Gaussian mean of the visible pixels around each pixel, (B, C, H, W); sigma in pixels."""
    visible = (~hidden).to(images.dtype)                     # (B, 1, H, W)
    H, W = images.shape[-2:]
    kx, ky = (2 * min(math.ceil(3 * sigma), side - 1) + 1 for side in (W, H))
    # in float32, and along rows, then columns: 27 times as fast as both at once at 224 px
    with torch.autocast(images.device.type, enabled=False):
        weight, blurred = visible, images * visible
        for size in ([kx, 1], [1, ky]):
            weight = gaussian_blur(weight, size, [sigma, sigma])
            blurred = gaussian_blur(blurred, size, [sigma, sigma])
    mean = images.mean((2, 3), keepdim=True)                 # where no visible pixel is near
    return torch.where(weight > 1e-4, blurred / weight.clamp(min=1e-4), mean)


# ---- idea 2: the mask token, in the middle of the network ----

def expand_mask(mask: Tensor, features: Tensor, layout: str = "nchw") -> Tensor:
    """Brings a mask (B, gh, gw) to the shape of `features`, with one channel.

    layout 'nchw': (B, C, h, w) -> (B, 1, h, w)
    layout 'nhwc': (B, h, w, C) -> (B, h, w, 1), Swin
    a sequence:    (B, N, C) -> (B, N, 1). N is the number of patches, gh gw s^2 for s patches
                   across a mask unit, plus 1 for a class token, which is never hidden

    Raises ValueError if the features do not fit the mask."""
    if features.dim() == 4:
        h, w = features.shape[1:3] if layout == "nhwc" else features.shape[2:]
        hidden = resize_mask(mask, (h, w))                   # (B, 1, h, w)
        return hidden.permute(0, 2, 3, 1) if layout == "nhwc" else hidden
    n = features.shape[1]
    gh, gw = mask.shape[-2:]
    for class_tokens in (0, 1):
        s = math.isqrt((n - class_tokens) // (gh * gw))      # patches across a mask unit
        if s and s * s * gh * gw == n - class_tokens:
            hidden = resize_mask(mask, (s * gh, s * gw)).flatten(1)          # (B, N)
            return F.pad(hidden, (class_tokens, 0), value=False).unsqueeze(-1)
    raise ValueError(f"a sequence of {n} tokens does not fit a mask of {gh}x{gw} units: a mask "
                     f"unit must be a whole number of patches")


class MaskToken(nn.Module):
    """A learned token (C,) that joins the features z at hidden positions m (paper, Fig. 3).
    The paper writes 'add'; the authors' code for CNNs, and the default here, is 'gamma':

    'gamma'    z (1 - m) + gamma z m + token m   the released CNN configs. gamma (C,) is learned
                                                 and starts at 1e-6: a hidden feature starts as
                                                 the token alone, and training decides how much
                                                 of the feature comes through
    'add'      z + token m                       the paper's formula; released ViT and Swin configs
    'replace'  z (1 - m) + token m               SimMIM

    The token starts truncated normal with std 0.02. (In the released code ConvNeXt's starts at 0.)
    Raises ValueError for another form."""

    def __init__(self, channels: int, form: str = "gamma", layout: str = "nchw"):
        super().__init__()
        if form not in TOKENS:
            raise ValueError(f"mask token {form!r}: must be one of {', '.join(TOKENS)}")
        self.form = form
        self.layout = layout
        self.token = nn.Parameter(nn.init.trunc_normal_(torch.empty(channels), std=0.02))
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6)) if form == "gamma" else None

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        """z (B, C, h, w), (B, h, w, C) or (B, N, C); mask (B, gh, gw). Visible features stay."""
        m = expand_mask(mask, z, self.layout)
        is_map = z.dim() == 4 and self.layout == "nchw"
        shape = (1, -1, 1, 1) if is_map else (-1,)
        at_hidden = self.token.view(shape).to(z.dtype)       # under autocast z may be bf16
        if self.form == "gamma":
            at_hidden = torch.addcmul(at_hidden, self.gamma.view(shape).to(z.dtype), z)
        elif self.form == "add":
            at_hidden = z + at_hidden
        return torch.where(m, at_hidden, z)
