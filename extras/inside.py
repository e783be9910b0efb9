"""The measures of analyze.py, and the images and models for them.

    load_images, load, gather                      validation images, weights, results of all ranks
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

def load_images(args: SimpleNamespace, size: tuple[int, int], count: int,
                labelled: bool = True) -> SimpleNamespace:
    """`count` validation images, drawn by the seed.

    images   (N, 3, H, W) uint8
    labels   (N,)
    indices  of the images in their set
    classes  how many there are
    covered  (N, 1, H, W) uint8: where the object of a drawn image is; None for other images"""
    source = open_images(args.data, "val", size, args.data_root, labelled=labelled)
    order = np.random.default_rng(args.seed).permutation(len(source))[:count]
    samples = ImageDataset(source, eval_transform(size), args.seed)
    images, indices = [], []
    for i in tqdm(order, "images", leave=False, disable=args.quiet):
        image, used, broken = samples[0, int(i)]
        if broken < 0:
            images.append(image)
            indices.append(used)
    if not images:
        raise ValueError(f"--data {printable(args.data)}: none of {len(order)} images can be read")
    covered = None
    if isinstance(source, Shapes):
        covered = [samples.transform(source.read(i, mask=True)) for i in indices]
        covered = torch.stack(covered)
    labels = torch.from_numpy(source.labels).long()[indices]
    return SimpleNamespace(images=torch.stack(images), labels=labels, indices=tuple(indices),
                           classes=len(source.classes), covered=covered)


def load(file: str, args: SimpleNamespace, size: tuple[int, int], world: Distributed,
         classes: int = 0) -> nn.Module:
    """An Encoder, or a Classifier for so many classes, with the weights of a file or random
    weights, in eval mode."""
    torch.manual_seed(seed_for(args.seed))
    own = args.settings[file]
    encoder = build_encoder(own["arch"], size, 0.0, own["patch_size"], own["window"], own["stem"])
    model = Classifier(own["arch"], encoder, classes) if classes else encoder
    if file != "random":
        head = load_head(model, file) if classes else None
        world.print0(f"{printable(file)}: {summary_of(load_backbone(encoder, file), head)}")
    else:
        open_residual_branches(model)
    is_cnn = get_family(own["arch"]).convolutional
    memory_format = torch.channels_last if is_cnn else torch.contiguous_format
    model = model.eval().requires_grad_(False)
    return model.to(world.device).to(memory_format=memory_format)


def open_residual_branches(net: nn.Module, value: float = 1.0) -> None:
    """For random features: training starts the blocks of a ResNet with a last BatchNorm of 0, so
    that only their shortcuts compute. Sets it to `value`."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
            nn.init.constant_(module.weight, value)


def gather(rows: list[Tensor], count: int, world: Distributed) -> Tensor:
    """A row for each image of this process -> a row for each of all `count` images, in their order.

    The images of a process are rank, rank + world.size, rank + 2 world.size, ..."""
    joined = world.all_gather(torch.stack(rows) if rows else torch.empty(0)).cpu().double()
    of_rank = [torch.arange(rank, count, world.size) for rank in range(world.size)]
    return joined[torch.cat(of_rank).argsort()]


# ---- spectra of features ----

BLOCKS = (resnet.BasicBlock, resnet.Bottleneck, convnext.CNBlock, swin.SwinTransformerBlock, Block)


def log_amplitude(z: Tensor) -> Tensor:
    """log |F| along the diagonal, less its value at frequency 0: (B, C, h, w) -> (B, K).

    Entry k = 0 .. K - 1 is frequency 2k/side pi, and the value is the mean of the logs over
    channels, as released. The Nyquist frequency of an even side is not among them."""
    k = torch.arange(math.ceil(min(z.shape[2:]) / 2), device=z.device)
    log = torch.log(torch.fft.fft2(z.float())[:, :, k, k].abs() + 1e-6).mean(1)
    return log - log[:, :1]


@contextlib.contextmanager
def tapped(encoder: Encoder, see):
    """While it lasts, running the encoder calls see(title, map (B, C, h, w)) at each depth.

    The depths are, in order, the input of the first block and the output of every block, and in a
    Transformer also the middle of every block, after attention. In a net of torchvision without
    BLOCKS they are the outputs of all modules of its stages. A class token is dropped."""
    def tell(title: str, z: Tensor) -> None:
        if z.dim() == 3:                                     # (B, N, C)
            h, w = encoder.backbone.grid
            z = z[:, -h * w:].transpose(1, 2).unflatten(2, (h, w))
        elif encoder.layout == "nhwc":
            z = z.permute(0, 3, 1, 2)
        see(title, z)

    def before(title: str):
        return lambda module, inputs: tell(title, inputs[0])

    def after(title: str):
        return lambda module, inputs, output: tell(title, output)

    modules = encoder.backbone.named_modules()
    blocks = [(name, module) for name, module in modules if isinstance(module, BLOCKS)]
    hooks = []
    if blocks:
        hooks.append(blocks[0][1].register_forward_pre_hook(before("stem")))
    else:
        names = itertools.chain.from_iterable(encoder.stages)
        blocks = [(name, attrgetter(name)(encoder.backbone)) for name in names]
    for name, block in blocks:
        if isinstance(block, (Block, swin.SwinTransformerBlock)):
            # the middle is the input of the second branch: Swin V2 has its norm behind the branch
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
    """log(p / (1 - p)) of the true class, its logit less the log-sum-exp of the other logits.

    logits (B, classes), labels (B,) -> (B,)"""
    true = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -math.inf)
    return true - others.logsumexp(1)


def near_pairs(grid: tuple[int, int], count: int,
               rng: np.random.Generator) -> list[tuple[int, int]]:
    """Distinct pairs (i, j) of patches: i anywhere, j at most two rows and two columns away.

    A j outside the image is moved to the border. If there are fewer pairs, all are returned."""
    h, w = grid

    def are_near(i: int, j: int) -> bool:
        return abs(i // w - j // w) < 3 and abs(i % w - j % w) < 3

    there_are = sum(are_near(i, j) for i, j in itertools.combinations(range(h * w), 2))
    pairs = []
    while len(pairs) < min(count, there_are):
        r, c = rng.integers((h, w))
        dr, dc = rng.integers(-2, 3, 2)
        i = int(r * w + c)
        j = int(np.clip(r + dr, 0, h - 1) * w + np.clip(c + dc, 0, w - 1))
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

    Returns (pairs, 3): the mean over all contexts that were drawn, and over each half of them. If
    the contexts are all there are, the value is exact, and the three are equal. v maps kept patches
    (B, patches) to what the net says of them (B,)."""
    kept = []
    for i, j in pairs:
        none = contexts(patches, (i, j), order, count, rng)
        with_i, with_j, both = none.clone(), none.clone(), none.clone()
        with_i[:, i] = with_j[:, j] = both[:, i] = both[:, j] = True
        kept.append(torch.stack([none, with_i, with_j, both], 1))
    kept = torch.stack(kept)                                 # (pairs, contexts, 4, patches)
    none, with_i, with_j, both = v(kept.flatten(0, 2)).view(kept.shape[:3]).unbind(2)
    delta = both - with_i - with_j + none                    # (pairs, contexts)
    is_exact = math.comb(patches - 2, order) <= count
    half = delta.shape[1] // 2
    parts = (delta, delta[:, :half], delta[:, half:])
    if is_exact:
        parts = (delta, delta, delta)
    return torch.stack([part.mean(1) for part in parts], 1)


def relative_strength(rows: Tensor) -> Tensor:
    """J, the strength of an order over the mean strength of all orders.

    rows (..., images, orders, 2): means over pairs of |I|, and of the product of the two halves
    -> (..., orders, 2): the released J, of the mean |I|, and one of the root mean square of I, from
    the product. With few contexts |I| is too large, most where the contexts differ most. The halves
    are independent estimates, so their product has no such bias. The two versions differ even with
    all contexts, where |I| differs between pairs."""
    absolute, product = rows.mean(-3).unbind(-1)             # (..., orders)
    strength = torch.stack([absolute, product.clamp(min=0).sqrt()], -1)
    return strength / strength.mean(-2, keepdim=True).clamp(min=1e-12)


# ---- occlusion ----

def patch_orders(matter: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """The orders in which patches are hidden, (B, patches) each: at random, those that matter first
    ('salient'), or those that matter last ('rest').

    matter (B, patches), at least 0; noise (B, patches) in [0, 1) breaks ties."""
    matter = matter / matter.amax(1, keepdim=True).clamp(min=1e-12)
    return {
        "random": noise.argsort(1),
        "salient": (1e-9 * noise - matter).argsort(1),
        "rest": (1e-9 * noise + matter).argsort(1),
    }


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
    """A mask (B, gh, gw) that hides the first `count` patches of each order (B, patches)."""
    mask = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :count], True)
    return mask.view(-1, *grid)


def shuffled(images: Tensor, parts: int, noise: Tensor) -> Tensor:
    """Images (B, C, H, W), cut into parts x parts pieces, in the order of noise (B, parts^2)."""
    B, C, H, W = images.shape
    pieces = images.view(B, C, parts, H // parts, parts, W // parts)
    pieces = pieces.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (B, p^2, C, h, w)
    pieces = pieces[torch.arange(B)[:, None], noise.argsort(1)]
    pieces = pieces.unflatten(1, (parts, parts))             # (B, p, p, C, h, w)
    return pieces.permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)


# ---- what the loss sees ----

def bands(power: Tensor, count: int = 14) -> tuple[list[float], Tensor, Tensor]:
    """The power of bands 0.1 pi wide in |frequency|, of a plane of frequencies (H, W), zero first.

    Returns the middles of the bands in pi, their means and their sums (count,). The corner, at
    1.41 pi, belongs to the last band."""
    fy, fx = (2 * torch.fft.fftfreq(side, dtype=torch.double) for side in power.shape)
    frequency = (fy[:, None] ** 2 + fx**2).sqrt()            # (H, W), in pi
    band = (10 * frequency + 1e-9).long().clamp(max=count - 1).flatten()
    total = torch.zeros(count, dtype=torch.double)
    total.index_add_(0, band, power.cpu().double().flatten())
    middles = [k / 10 + 0.05 for k in range(count)]
    return middles, total / band.bincount(minlength=count).clamp(min=1), total


def spectrum(r: Tensor) -> Tensor:
    """The power |F|^2 of (B, C, H, W), orthonormal, its mean over images and colours: (H, W).

    Its sum over frequencies is the sum of r^2 over pixels."""
    return torch.fft.fft2(r.cpu().double(), norm="ortho").abs().square().mean((0, 1))


def pulls(model: A2MIM, run: SimpleNamespace, images: Tensor,
          mask: Tensor) -> list[tuple[float, Tensor]]:
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
