"""The measures of analyze.py, and the images and models for them.

    load_images, load, gather                      validation images, weights; results of all processes
    log_amplitude, tapped                          frequencies of feature maps, at every depth
    log_odds, interactions_of, relative_strength   interactions of two patches, given others
    patch_orders, hidden_first, shuffled           images with patches hidden, or moved
    bands, spectrum, pulls                         spectra of the error, gradients of the loss terms

Sources: Park & Kim, ICLR 2022 (spectra of features); Deng et al., ICLR 2022 (interactions); Naseer
et al., NeurIPS 2021 (occlusion). Masks are boolean, (B, gh, gw). Sets of patches are boolean, too,
(B, patches).
"""

import contextlib
import itertools
import math
from operator import attrgetter
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d
from torchvision.models import convnext, resnet, swin_transformer as swin
from tqdm import tqdm

from data import ImageDataset, eval_transform, open_images, seed_for
from engine.command import Distributed
from engine.files import printable
from engine.shapes import Shapes
from engine.weights import load_backbone, load_head, summary_of
from loss import fourier_loss, spatial_loss
from masking import resize_mask
from model import A2MIM, Block, Classifier, Encoder, build_encoder, get_family

# ---- what is looked at: images and models ----

def load_images(args: SimpleNamespace, size: tuple[int, int], count: int, labelled: bool = True) -> SimpleNamespace:
    """`count` validation images, drawn by the seed: images (N, 3, H, W) uint8, labels, indices, the number of classes,
    and covered (N, 1, H, W) uint8: where the object of a drawn image is; None for other images."""
    source = open_images(args.data, "val", size, args.data_root, labelled=labelled)
    order = np.random.default_rng(args.seed).permutation(len(source))[:count]
    samples = ImageDataset(source, eval_transform(size), args.seed)
    read = [samples[0, int(i)] for i in tqdm(order, "images", leave=False, disable=args.quiet)]
    read = [(image, used) for image, used, broken in read if broken < 0]
    if not read:
        raise ValueError(f"--data {printable(args.data)}: none of {len(order)} images can be read")
    images, used = zip(*read)
    covered = isinstance(source, Shapes) and [samples.transform(source.read(i, mask=True)) for i in used]
    return SimpleNamespace(images=torch.stack(images), labels=torch.from_numpy(source.labels).long()[list(used)],
                           indices=used, classes=len(source.classes), covered=torch.stack(covered) if covered else None)


def load(file: str, args: SimpleNamespace, size: tuple[int, int], world: Distributed, classes: int = 0) -> nn.Module:
    """An Encoder, or a Classifier for so many classes, with the weights of a file, or random ones; in eval mode."""
    torch.manual_seed(seed_for(args.seed))
    own = args.settings[file]
    encoder = build_encoder(own["arch"], size, 0.0, own["patch_size"], own["window"],
                            own["stem"])
    model = Classifier(own["arch"], encoder, classes) if classes else encoder
    if file != "random":
        head = load_head(model, file) if classes else None
        world.print0(f"{printable(file)}: {summary_of(load_backbone(encoder, file), head)}")
    else:  # training starts ResNet's blocks at 0: shortcuts alone
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and not m.weight.any()):
            nn.init.ones_(norm.weight)
    layout = torch.channels_last if get_family(own["arch"]).convolutional else torch.contiguous_format
    return model.eval().requires_grad_(False).to(world.device).to(memory_format=layout)


def gather(rows: list[Tensor], count: int, world: Distributed) -> Tensor:
    """A row for every image of this process, rank, rank + world, ... -> of all `count` images, in their order."""
    joined = world.all_gather(torch.stack(rows) if rows else torch.empty(0)).cpu().double()
    return joined[torch.cat([torch.arange(rank, count, world.size) for rank in range(world.size)]).argsort()]


# ---- spectra of features ----

BLOCKS = (resnet.BasicBlock, resnet.Bottleneck, convnext.CNBlock, swin.SwinTransformerBlock, Block)


def log_amplitude(z: Tensor) -> Tensor:
    """A map (B, C, h, w) -> (B, K): log |F| along the diagonal, k = 0 .. K - 1 of frequency 2k/side pi, over that at 0.

    The mean of logs over channels, as released; the Nyquist frequency of an even side is not among them."""
    k = torch.arange(math.ceil(min(z.shape[2:]) / 2), device=z.device)
    log = torch.log(torch.fft.fft2(z.float())[:, :, k, k].abs() + 1e-6).mean(1)
    return log - log[:, :1]


@contextlib.contextmanager
def tapped(encoder: Encoder, see):
    """While it lasts, running the encoder calls see(title, map (B, C, h, w)) at every depth, in order.

    Depths: what enters the first block, then every block's output, with attention its middle too. A net of torchvision
    that has none of BLOCKS: every module of its stages. A class token is dropped."""
    def tell(title: str, z: Tensor) -> None:
        if z.dim() == 3:                                     # (B, N, C)
            h, w = encoder.backbone.grid
            z = z[:, -h * w:].transpose(1, 2).unflatten(2, (h, w))
        elif encoder.layout == "nhwc":
            z = z.permute(0, 3, 1, 2)
        see(title, z)

    before = lambda title: lambda module, inputs: tell(title, inputs[0])
    after = lambda title: lambda module, inputs, output: tell(title, output)
    blocks = [(name, module) for name, module in encoder.backbone.named_modules() if isinstance(module, BLOCKS)]
    hooks = [blocks[0][1].register_forward_pre_hook(before("stem"))] if blocks else []
    for name, block in blocks or [(n, attrgetter(n)(encoder.backbone)) for stage in encoder.stages for n in stage]:
        # Swin V2 normalises behind its branches
        if isinstance(block, (Block, swin.SwinTransformerBlock)):
            middle = block.mlp if isinstance(block, swin.SwinTransformerBlockV2) else block.norm2
            hooks.append(middle.register_forward_pre_hook(before(f"{name} attention")))
        hooks.append(block.register_forward_hook(after(name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# ---- interactions of pairs of patches, by order ----

def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, classes), (B,) -> log(p / (1 - p)) of the true class (B,): its score over the log-sum-exp of the others."""
    true, others = logits.gather(1, labels[:, None]), logits.scatter(1, labels[:, None], -math.inf)
    return true[:, 0] - others.logsumexp(1)


def near_pairs(grid: tuple[int, int], count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Distinct pairs (i, j) of patches: i anywhere, j at most two rows and two columns away.

    A j outside the image is moved to the border."""
    (h, w), pairs = grid, []
    there_are = sum(abs(i // w - j // w) < 3 and abs(i % w - j % w) < 3 for i in range(h * w) for j in range(i))
    while len(pairs) < min(count, there_are):
        r, c, dr, dc = *rng.integers((h, w)), *rng.integers(-2, 3, 2)
        i, j = int(r * w + c), int(np.clip(r + dr, 0, h - 1) * w + np.clip(c + dc, 0, w - 1))
        if i != j and not {(i, j), (j, i)} & set(pairs):
            pairs.append((i, j))
    return pairs


def contexts(patches: int, pair: tuple[int, int], order: int, count: int,
             rng: np.random.Generator) -> Tensor:
    """`count` random sets of `order` patches without the pair, (count, patches).

    If there are no more than `count` sets, all of them are returned."""
    others = [c for c in range(patches) if c not in pair]
    if math.comb(len(others), order) <= count:
        chosen = list(itertools.combinations(others, order))
    else:
        chosen = [rng.permutation(others)[:order].tolist() for _ in range(count)]
    sets = torch.zeros(len(chosen), patches, dtype=torch.bool)
    for row, members in zip(sets, chosen):
        row[list(members)] = True
    return sets


def interactions_of(v, patches: int, pairs: list[tuple[int, int]], order: int, count: int,
                    rng: np.random.Generator) -> Tensor:
    """I^(m)(i, j): the mean over contexts S of m patches of v(S+i+j) - v(S+i) - v(S+j) + v(S).

    (pairs, 3): by all contexts drawn, and by either half of them. If all there are were taken, the value is exact, and
    the three are equal. v: kept patches (B, patches) -> what the net says of them (B,)."""
    kept = []
    for i, j in pairs:
        none = contexts(patches, (i, j), order, count, rng)
        with_i, with_j, both = none.clone(), none.clone(), none.clone()
        with_i[:, i] = with_j[:, j] = both[:, i] = both[:, j] = True
        kept.append(torch.stack([none, with_i, with_j, both], 1))
    kept = torch.stack(kept)                                 # (pairs, contexts, 4, patches)
    none, with_i, with_j, both = v(kept.flatten(0, 2)).view(kept.shape[:3]).unbind(2)
    delta = both - with_i - with_j + none                    # (pairs, contexts)
    exact, half = math.comb(patches - 2, order) <= count, delta.shape[1] // 2
    parts = (delta, delta, delta) if exact else (delta, delta[:, :half], delta[:, half:])
    return torch.stack([part.mean(1) for part in parts], 1)


def relative_strength(rows: Tensor) -> Tensor:
    """Means over pairs of |I| and of the product of the halves, (..., images, orders, 2) -> J (..., orders, 2): the
    strength of an order over the mean of all.

    First the released J, of |I|: with few contexts it is too large, most where they differ most. Then of the root of
    the mean product: two independent estimates, so their product has no such bias."""
    absolute, product = rows.mean(-3).unbind(-1)             # (..., orders)
    strength = torch.stack([absolute, product.clamp(min=0).sqrt()], -1)
    return strength / strength.mean(-2, keepdim=True).clamp(min=1e-12)


# ---- occlusion ----

def patch_orders(matter: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """The orders in which patches are hidden, (B, patches) each: at random, those that matter first
    ('salient'), or those that matter last ('rest').

    matter (B, patches), at least 0; noise (B, patches) in [0, 1) breaks ties."""
    matter = matter / matter.amax(1, keepdim=True).clamp(min=1e-12)
    return {"random": noise.argsort(1), "salient": (1e-9 * noise - matter).argsort(1),
            "rest": (1e-9 * noise + matter).argsort(1)}


def relevance(images: Tensor, labels: Tensor, grid: tuple[int, int], judge) -> Tensor:
    """How much each patch matters to a classifier, (B, patches): the mean over its pixels of
    |gradient of the true class's score|."""
    images = images.clone().requires_grad_()
    score = judge(images).gather(1, labels[:, None]).sum()
    return per_patch(torch.autograd.grad(score, images)[0].abs().sum(1, keepdim=True), grid)


def per_patch(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, 1, H, W) -> its mean over every patch, (B, patches)."""
    return adaptive_avg_pool2d(pixels.cpu().double(), grid).flatten(1)


def hidden_first(order: Tensor, count: int, grid: tuple[int, int]) -> Tensor:
    """Cells in some order (B, patches) -> a mask (B, gh, gw) of the first `count` of each row."""
    mask = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :count], True)
    return mask.view(-1, *grid)


def shuffled(images: Tensor, parts: int, noise: Tensor) -> Tensor:
    """Images (B, C, H, W) cut into parts x parts pieces, put back in the order of noise (B, parts^2)."""
    B, C, H, W = images.shape
    pieces = images.view(B, C, parts, H // parts, parts, W // parts).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    # (B, p, p, C, h, w)
    pieces = pieces[torch.arange(B)[:, None], noise.argsort(1)].unflatten(1, (parts, parts))
    return pieces.permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)


# ---- what the loss sees ----

def bands(power: Tensor, count: int = 14) -> tuple[list[float], Tensor, Tensor]:
    """A plane of frequencies (H, W), the zero one first -> of bands 0.1 pi wide in |frequency|: their middles in pi,
    their means and their sums (count,). The corner, at 1.41 pi, belongs to the last."""
    fy, fx = (2 * torch.fft.fftfreq(side, dtype=torch.double) for side in power.shape)
    band = ((fy[:, None] ** 2 + fx**2).sqrt() * 10 + 1e-9).long().clamp(max=count - 1).flatten()
    total = torch.zeros(count, dtype=torch.double).index_add_(0, band, power.cpu().double().flatten())
    return [k / 10 + 0.05 for k in range(count)], total / band.bincount(minlength=count).clamp(min=1), total


def spectrum(r: Tensor) -> Tensor:
    """(B, C, H, W) -> its power |F|^2, orthonormal, mean over images and colours (H, W): they add up as r^2 does."""
    return torch.fft.fft2(r.cpu().double(), norm="ortho").abs().square().mean((0, 1))


def pulls(model: A2MIM, run: SimpleNamespace, images: Tensor, mask: Tensor) -> list[tuple[float, Tensor]]:
    """The gradients of the terms of the loss. For each term: the norm of its gradient on the
    decoder, and its gradient on the reconstructions (B, 3, H, W).

    The terms are the pixel loss, the Fourier loss with one spectrum per image, and the Fourier loss
    with the spectrum of the batch. Both are weighted as in the run (0.5 if the run has none)."""
    pred = model(images, mask)                               # (B, 3, H, W)
    weight = run.fourier_weight or 0.5
    hidden = resize_mask(mask, images.shape[-2:])            # (B, 1, H, W)
    losses = [spatial_loss(pred, images, hidden, run.focal_pixels)]
    for kind in ("image", "batch"):
        fourier = fourier_loss(pred, images, hidden, stand_in=run.stand_in, spectrum=kind,
                               visible_weight=run.visible_weight, focal=run.fourier_focal)
        losses.append(weight * fourier)
    found = []
    for loss in losses:
        inputs = (pred, *model.decoder.parameters())
        on_pred, *on_decoder = torch.autograd.grad(loss, inputs, retain_graph=True)
        norm = torch.cat([gradient.flatten() for gradient in on_decoder]).norm().item()
        found.append((norm, on_pred))
    return found
