"""torchvision's classification nets as chains of modules, so that a mask token can enter between
two of them.

    split_into_stages  a net by name: its stages, and where the token enters
    drop_residuals     stochastic depth for ResNet, which has none
"""

from operator import attrgetter
from types import MethodType

import torch
import torchvision.models as tv
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

SIDE = 224                                                   # pixels at which a net is looked at


def split_into_stages(arch: str, image_size: tuple[int, int], drop_path: float) -> tuple[nn.Module, list[list[str]], int, str, str]:
    """A net that runs its children one after another, then pools: (net, stages, token_stage,
    layout, name of its head).

    A stage opens where the resolution falls; the token enters before the last one (Swin: after the
    patch embedding), as in the paper. The head becomes Identity. What the chain gives must be what
    torchvision's own forward pools. Raises ValueError if the net is no chain, lacks stochastic
    depth, or cannot take the image."""
    (H, W), by_size = image_size, arch.startswith("maxvit")  # MaxViT is built for one image size
    near = "vit_base" if "vit" in arch else "resnet50"
    no_chain = ValueError(f"arch {arch!r}: does not run its modules one after another, so a token cannot enter between "
                          f"them; use {near}, or cut it yourself: model.Encoder([...])")
    if arch.startswith(("vit_", "googlenet", "inception")):  # known: not built for nothing
        raise no_chain
    if by_size and H != W:
        raise ValueError(f"arch {arch!r} at {H}x{W} px: torchvision's MaxViT takes squares alone; give one side")
    try:
        net = tv.get_model(arch, **({"input_size": (H, W)} if by_size else {}))
    except ValueError as error:
        raise ValueError(f"arch {arch!r} at {H}x{W} px: {str(error).splitlines()[0]}") from None
    set_drop_path(arch, net, drop_path)
    if isinstance(net, tv.DenseNet):  # its forward ends in a ReLU that is no module
        net.features.add_module("relu5", nn.ReLU(inplace=True))
    head = next(name for name in ("fc", "classifier", "head", "heads") if hasattr(net, name))
    setattr(net, head, nn.Identity())
    layout = "nhwc" if isinstance(net, tv.SwinTransformer) else "nchw"
    try:
        stages = find_stages(net, head, layout, image_size if by_size else (SIDE, SIDE))
    # shapes do not fit, or a child is a list of modules
    except (RuntimeError, TypeError, IndexError):
        stages = []
    if not stages:
        raise no_chain
    return net.train(), stages, 1 if layout == "nhwc" else len(stages) - 1, layout, head


@torch.no_grad()
def find_stages(net: nn.Module, head: str, layout: str, size: tuple[int, int]) -> list[list[str]]:
    """The names of the modules of each stage; [] if their chain does not give what the net hands to
    its head."""
    names, stages, rows, dims = [], [], None, (1, 2) if layout == "nhwc" else (2, 3)
    for name, child in net.named_children():
        if name in (head, "avgpool", "permute"):
            break
        opened = isinstance(child, (nn.Sequential, nn.ModuleList))
        names += [f"{name}.{inner}" for inner, _ in child.named_children()] if opened else [name]
    image = z = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    pooled = net.eval()(image)  # what torchvision hands to its head (some heads pool)
    for name in names:
        z = attrgetter(name)(net)(z)
        if not stages or z.shape[dims[0]] < rows or layout == "nhwc" and len(stages) == 1:
            stages.append([])
        stages[-1].append(name)
        rows = z.shape[dims[0]]
    # VGG ends in a pooling: a token there would see nothing
    for k in range(len(stages) - 1, 0, -1):
        if not any(True for name in stages[k] for _ in attrgetter(name)(net).parameters()):
            stages[k - 1] += stages.pop(k)
    z = z.mean(dims)[0]                                      # (C,)
    same = torch.allclose(pooled.reshape(len(z), -1).mean(1), z, rtol=1e-3, atol=1e-4 * float(z.abs().max()))
    return stages if same else []


def set_drop_path(arch: str, net: nn.Module, drop_path: float) -> None:
    """Scales torchvision's rates, which rise with depth, to `drop_path`. Raises ValueError if the
    net has none."""
    drops = [module for module in net.modules() if isinstance(module, StochasticDepth)]
    deepest = max((drop.p for drop in drops), default=0.0)
    for drop in drops:
        drop.p *= drop_path / deepest
    if drop_path and isinstance(net, tv.ResNet):             # ResNeXt and Wide ResNet
        drop_residuals(net, drop_path)
    elif drop_path and not drops:
        raise ValueError(f"arch {arch!r}: has no stochastic depth; use --drop-path 0, not {drop_path:g}")


def drop_residuals(net: tv.ResNet, drop_path: float) -> None:
    """Stochastic depth for torchvision's ResNet, which has none: on residual branches, 0 to
    `drop_path` over depth."""
    def forward(block: nn.Module, x: Tensor) -> Tensor:
        z = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
        if hasattr(block, "conv3"):
            z = block.bn3(block.conv3(block.relu(z)))
        return block.relu(block.drop_path(z) + (x if block.downsample is None else block.downsample(x)))
    blocks = [block for block in net.modules() if isinstance(block, (tv.resnet.BasicBlock, tv.resnet.Bottleneck))]
    for block, rate in zip(blocks, torch.linspace(0, drop_path, len(blocks)).tolist()):
        block.drop_path, block.forward = StochasticDepth(rate, mode="row"), MethodType(forward, block)
