"""Masking: which pixels are hidden, what is painted over them, and where the mask token enters.

Two of A2MIM's three moves live here (Li et al., ICML 2023, arXiv 2205.13943, Fig. 3):

    fill_hidden   move 1: hidden pixels take the image's own mean colour
    MaskToken     move 2: a learnable token joins the feature map in the middle of the network

A mask is boolean everywhere, (B, gh, gw), one entry per square cell of the image, True = hidden.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

FILLS = ("mean", "zero", "random", "blur")
TOKENS = ("gamma", "add", "replace")


# ---- which cells are hidden ----

def mask_grid(image_size: tuple[int, int], cell: int) -> tuple[int, int]:
    """(H, W) in pixels -> (gh, gw), the number of `cell` x `cell` pixel cells down and across.

    Raises ValueError if a side is not a multiple of the cell."""
    for side in image_size:
        if cell < 1 or side < cell or side % cell:
            near = [n * cell for n in (side // cell, side // cell + 1) if n] if cell > 0 else []
            fix = f"; use {' or '.join(map(str, near))}" if near else ""
            raise ValueError(f"image side {side}: not a multiple of the {cell}-pixel mask cell{fix}")
    return image_size[0] // cell, image_size[1] // cell


def hidden_count(cells: int, ratio: float) -> int:
    """ceil(ratio * cells), how many cells of each image are hidden: 30 of 49 at the default 0.6.

    Raises ValueError unless 0 < ratio < 1, or if no cell would stay visible."""
    if not 0 < ratio < 1:
        raise ValueError(f"mask ratio {ratio}: must lie between 0 and 1, both excluded; the paper uses 0.6")
    hidden = math.ceil(round(ratio * cells, 6))              # rounded: 0.55 * 100 is 55.000000000000007 in floats
    if hidden >= cells:
        raise ValueError(f"mask ratio {ratio}: hides all of {cells} mask cells; use a smaller --mask-cell, a larger "
                         f"--image-size or a smaller --mask-ratio")
    return hidden


def random_mask(batch: int, grid: tuple[int, int], ratio: float = 0.6, device: torch.device | str = "cpu",
                generator: torch.Generator | None = None) -> Tensor:
    """Masks for a whole batch, (B, gh, gw): exactly `hidden_count` cells of each image, uniformly at random.

    `generator` must live on `device`. Raises ValueError as `hidden_count` does."""
    cells = grid[0] * grid[1]
    hidden = hidden_count(cells, ratio)
    noise = torch.rand(batch, cells, device=device, generator=generator)
    chosen = noise.topk(hidden, dim=1).indices               # (B, hidden)  the largest of iid noise: a uniform subset
    mask = torch.zeros(batch, cells, dtype=torch.bool, device=device).scatter_(1, chosen, True)
    return mask.view(batch, *grid)


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, gh, gw) -> (B, 1, h, w) by nearest neighbour: to the pixels, or to any feature grid.

    Raises ValueError if the target is coarser than the mask: one feature would be hidden and visible at once."""
    gh, gw = mask.shape[-2:]
    h, w = size
    if h < gh or w < gw:
        raise ValueError(f"mask of {gh}x{gw} cells on a {h}x{w} feature grid: the mask cell is smaller than the stride "
                         f"at the injection point; use a larger --mask-cell or an earlier --mask-stage")
    mask = mask.bool()
    if h % gh == 0 and w % gw == 0:                          # the usual case: every cell is a whole block of features
        return mask.repeat_interleave(h // gh, 1).repeat_interleave(w // gw, 2).unsqueeze(1)
    return F.interpolate(mask.unsqueeze(1).float(), size, mode="nearest").bool()


# ---- move 1: hidden pixels take the mean colour ----

def fill_hidden(images: Tensor, mask: Tensor, fill: str = "mean", generator: torch.Generator | None = None) -> Tensor:
    """Paints over the hidden cells of normalised images (B, C, H, W); visible pixels stay bit-equal.

    fill: 'mean' (the method): each image's per-channel mean over all its pixels, hidden ones included; 'zero', that of
          ImageNet; 'random', one colour per image; 'blur' of the visible pixels, sigma 3/4 of a cell: interpolation.
    The last three are not the method. `generator` feeds 'random', on the images' device. Raises ValueError for another
    fill. Source: paper, Fig. 3; `mask_color` of the released configs."""
    if fill == "mean":
        colour = images.mean((2, 3), keepdim=True)           # (B, C, 1, 1)
    elif fill == "zero":
        colour = images.new_zeros(1, 1, 1, 1)
    elif fill == "random":
        colour = torch.randn(*images.shape[:2], 1, 1, device=images.device, generator=generator).to(images.dtype)
    elif fill == "blur":
        seen = (~resize_mask(mask, images.shape[-2:])).to(images.dtype)      # (B, 1, H, W)
        sigma = 0.75 * images.shape[-1] / mask.shape[-1]
        size = [2 * min(math.ceil(3 * sigma), side - 1) + 1 for side in images.shape[:-3:-1]]    # across, down
        blurred, weight = (gaussian_blur(x, size, [sigma, sigma]) for x in (images * seen, seen))
        colour = torch.where(weight > 1e-4, blurred / weight.clamp(min=1e-4), images.mean((2, 3), keepdim=True))
    else:
        raise ValueError(f"fill {fill!r}: must be one of {', '.join(FILLS)}")
    return torch.where(resize_mask(mask, images.shape[-2:]), colour, images)


# ---- move 2: the mask token, in the middle of the network ----

def spread_mask(mask: Tensor, features: Tensor, layout: str = "nchw") -> Tensor:
    """Brings a mask (B, gh, gw) to the shape of `features`, with one channel.

    layout 'nchw': (B, C, h, w) -> (B, 1, h, w);  'nhwc' (Swin): (B, h, w, C) -> (B, h, w, 1);
    a sequence (B, N, C) -> (B, N, 1), with s x s patches per mask cell: N = cells s^2, or one more if a class token
    stands first (it is never hidden). Whether it is there follows from N.
    Raises ValueError if the features do not fit the mask."""
    if features.dim() == 4:
        h, w = features.shape[1:3] if layout == "nhwc" else features.shape[2:]
        spread = resize_mask(mask, (h, w))                   # (B, 1, h, w)
        return spread.permute(0, 2, 3, 1) if layout == "nhwc" else spread
    n, (gh, gw) = features.shape[1], mask.shape[-2:]
    for first in (0, 1):                                     # without a class token, with one
        side = math.isqrt((n - first) // (gh * gw))
        if side and side * side * gh * gw == n - first:
            patches = resize_mask(mask, (side * gh, side * gw)).flatten(1)      # (B, N)
            return F.pad(patches, (first, 0), value=False).unsqueeze(-1)        # (B, first + N, 1)
    raise ValueError(f"a sequence of {n} tokens does not fit a mask of {gh}x{gw} cells: "
                     f"the mask cell must be a whole number of patches")


class MaskToken(nn.Module):
    """The learnable token (C,), mixed into the features at hidden positions m (paper, Fig. 3):

    'gamma'    z(1-m) + gamma z m + token m   the released CNN configs; gamma (C,) starts at 1e-6, so a hidden
                                              feature starts as the token alone, and training decides how much
                                              of the blurred feature comes through
    'add'      z + token m                    the paper's formula, and the released ViT and Swin configs
    'replace'  z(1-m) + token m               SimMIM
    The token starts truncated normal, std 0.02 (so too for ConvNeXt, where the released code leaves it at 0).
    Raises ValueError for another form."""

    def __init__(self, channels: int, form: str = "gamma", layout: str = "nchw"):
        super().__init__()
        if form not in TOKENS:
            raise ValueError(f"mask token {form!r}: must be one of {', '.join(TOKENS)}")
        self.form, self.layout = form, layout
        self.token = nn.Parameter(nn.init.trunc_normal_(torch.empty(channels), std=0.02))
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6)) if form == "gamma" else None

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        """z (B, C, h, w), (B, h, w, C) or (B, N, C); mask (B, gh, gw), True = hidden. Visible features stay."""
        m = spread_mask(mask, z, self.layout)
        shape = (1, -1, 1, 1) if z.dim() == 4 and self.layout == "nchw" else (-1,)
        token = self.token.view(shape).to(z.dtype)           # under autocast the features may be bf16
        if self.form == "gamma":
            token = torch.addcmul(token, self.gamma.view(shape).to(z.dtype), z)
        elif self.form == "add":
            token = z + token
        return torch.where(m, token, z)
