"""A2MIM on one page: the whole method for torchvision's ResNet-18, on a CPU, in about a minute.

    python extras/mini.py                  drawn shapes
    python extras/mini.py FOLDER           your images, FOLDER/any-subfolder/*.jpg

The three ideas of the paper are marked 1, 2, 3. The full version starts at ../pretrain.py.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import v2

SIDE, UNIT, BATCH, STEPS = 64, 8, 32, 150                    # pixels, pixels, images, steps


class MiniA2MIM(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = resnet18(zero_init_residual=True)
        self.backbone.fc = nn.Identity()
        self.token = nn.Parameter(0.02 * torch.randn(128, 1, 1))
        self.gamma = nn.Parameter(torch.full((128, 1, 1), 1e-6))
        self.decoder = nn.Sequential(nn.Conv2d(512, 3 * 32**2, 1), nn.PixelShuffle(32))

    def forward(self, images, mask):                         # (B, 3, 64, 64), (B, 1, 8, 8)
        net = self.backbone
        hidden = F.interpolate(mask, scale_factor=UNIT)      # (B, 1, 64, 64), 1 = hidden
        mean = images.mean((2, 3), keepdim=True)
        z = images * (1 - hidden) + mean * hidden            # 1. hidden pixels := mean colour
        z = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(z)))))
        z = net.layer2(z)                                    # (B, 128, 8, 8)
        z = z * (1 - mask) + (self.gamma * z + self.token) * mask            # 2. a late mask token
        return self.decoder(net.layer4(net.layer3(z)))       # (B, 512, 2, 2) -> (B, 3, 64, 64)


def loss(pred, images, hidden):
    d = pred - images
    focal = d * torch.tanh(0.1 * d)                          # like |d|, but small errors count less
    pixels = (focal * hidden).sum() / (hidden.sum() + 1e-5) / 3

    constant = 0.5 * d.detach()                              # no gradient at visible pixels
    spectrum = torch.fft.fft2(torch.where(hidden > 0, d, constant), norm="ortho")
    power = spectrum.real**2 + spectrum.imag**2
    weight = torch.log1p(power.detach().sqrt())
    weight = weight / weight.amax((2, 3), keepdim=True)
    return pixels + 0.5 * (weight * power).mean()            # 3. large errors count more


def random_mask(batch, units=64, share=0.6):
    """(B, 1, 8, 8): 60 % of the units of each image are 1."""
    order = torch.rand(batch, units).argsort(1)
    return (order < math.ceil(round(share * units, 6))).float().view(batch, 1, 8, 8)


def batches(folder):
    if folder is None:                                       # the only import from this project
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        from engine.shapes import Shapes
        shapes = Shapes("train", (SIDE, SIDE))
        images = torch.stack([shapes.read(i) for i in range(1000)]) / 255
    else:
        crop = v2.Compose([v2.RandomResizedCrop(SIDE, (0.8, 1)), v2.ToImage(),
                           v2.ToDtype(torch.float32, scale=True)])
        images = torch.stack([image for image, _ in ImageFolder(folder, crop)])
    images = (images - images.mean((0, 2, 3), keepdim=True)) / images.std()
    while True:
        yield images[torch.randint(len(images), (BATCH,))]


def main(folder=None):
    torch.manual_seed(0)
    model = MiniA2MIM()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    for step, images in zip(range(STEPS), batches(folder)):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 15, 2 * (1 - step / STEPS))
        mask = random_mask(len(images))
        error = loss(model(images, mask), images, F.interpolate(mask, scale_factor=UNIT))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        if step % 10 == 0 or step == STEPS - 1:
            print(f"step {step:3d}  loss {error.item():.3f}")
    torch.save(model.backbone.state_dict(), "backbone.pt")
    print("backbone.pt: for torchvision.models.resnet18(), with strict=False because it has no fc")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="images in subfolders; none: drawn shapes")
    folder = parser.parse_args(argv).folder
    if folder:
        try:
            ImageFolder(folder)
        except OSError:
            parser.error(f"{folder}: has no images in subfolders, such as {folder}/a/1.jpg")
    return folder


if __name__ == "__main__":
    main(parse())
