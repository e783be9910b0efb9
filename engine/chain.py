"""torchvision's classification nets as chains of modules, so that a mask token can enter between
two of them.

    split_into_stages  a net by name, cut into stages
    set_drop_path      stochastic depth
"""

from operator import attrgetter
from types import MethodType

import torch
import torchvision.models as tv
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from .files import is_out_of_memory

SIDE = 224                                                   # of the image that finds the stages


def split_into_stages(arch: str, image_size: tuple[int, int], drop_path: float
                      ) -> tuple[nn.Module, list[list[str]], int, str, str]:
    """(net, stages, token stage, layout, name of its head), for model.Encoder.

    The net must run its children one after another, then pool. A stage starts where the resolution
    falls. The token enters before the last stage (Swin: after the patch embedding), as in the
    paper. The head becomes nn.Identity.

    Raises ValueError if running the modules in order gives other features than the net itself, if
    the net has no stochastic depth, or if it cannot take the image (H, W)."""
    H, W = image_size
    is_maxvit = arch.startswith("maxvit")                    # built for one image size
    near = "vit_base" if "vit" in arch else "resnet50"
    no_chain = ValueError(f"arch {arch!r}: does not run its modules one after another, so a token "
                          f"cannot enter between them; use {near}, or split it yourself: "
                          f"model.Encoder([...])")
    if arch.startswith(("vit_", "googlenet", "inception")):  # known, so they need not be built
        raise no_chain
    if is_maxvit and H != W:
        raise ValueError(f"arch {arch!r} at {H}x{W} px: torchvision's MaxViT takes squares alone; "
                         f"give one side")
    options = {"input_size": (H, W)} if is_maxvit else {}
    try:
        net = tv.get_model(arch, **options)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"arch {arch!r} at {H}x{W} px: {reason}") from None
    set_drop_path(arch, net, drop_path)

    if isinstance(net, tv.DenseNet):                         # its forward ends in F.relu
        net.features.add_module("relu5", nn.ReLU(inplace=True))
    head = next(name for name in ("fc", "classifier", "head", "heads") if hasattr(net, name))
    setattr(net, head, nn.Identity())
    layout = "nhwc" if isinstance(net, tv.SwinTransformer) else "nchw"
    try:
        stages = find_stages(net, head, layout, image_size if is_maxvit else (SIDE, SIDE))
    except (RuntimeError, TypeError, IndexError) as error:   # shapes or arguments do not fit
        if is_out_of_memory(error):
            raise
        stages = []
    if not stages:
        raise no_chain
    token_stage = 1 if layout == "nhwc" else len(stages) - 1
    return net.train(), stages, token_stage, layout, head


@torch.no_grad()
def find_stages(net: nn.Module, head: str, layout: str, size: tuple[int, int]) -> list[list[str]]:
    """The names of the modules of each stage.

    [] if the modules, one after another, do not give what the net hands to its head."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, *size, generator=generator)
    to_head = net.eval()(image)                              # pooled, but some heads pool
    dims = (1, 2) if layout == "nhwc" else (2, 3)            # height and width
    stages = []
    z, rows = image, None
    for name in chain_of(net, head):
        z = attrgetter(name)(net)(z)
        is_after_embedding = layout == "nhwc" and len(stages) == 1
        if not stages or z.shape[dims[0]] < rows or is_after_embedding:
            stages.append([])
        stages[-1].append(name)
        rows = z.shape[dims[0]]

    # VGG ends in a pooling; a token before it would meet no weights
    for k in range(len(stages) - 1, 0, -1):
        if not any(has_parameters(attrgetter(name)(net)) for name in stages[k]):
            stages[k - 1] += stages.pop(k)

    pooled = z.mean(dims)[0]                                 # (C,)
    expected = to_head.reshape(len(pooled), -1).mean(1)      # (C,)
    tolerance = 1e-4 * float(pooled.abs().max())
    is_same = torch.allclose(expected, pooled, rtol=1e-3, atol=tolerance)
    return stages if is_same else []


def chain_of(net: nn.Module, head: str) -> list[str]:
    """The names of the modules that the net runs before it pools. Containers are opened."""
    names = []
    for name, child in net.named_children():
        if name in (head, "avgpool", "permute"):
            break
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            names += [f"{name}.{inner}" for inner, _ in child.named_children()]
        else:
            names.append(name)
    return names


def has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


# ---- stochastic depth ----

def set_drop_path(arch: str, net: nn.Module, drop_path: float) -> None:
    """Scales torchvision's rates of stochastic depth so that the deepest, the largest, is
    `drop_path`.

    Raises ValueError if the net has no stochastic depth and the rate is not 0."""
    drops = [module for module in net.modules() if isinstance(module, StochasticDepth)]
    deepest = max((drop.p for drop in drops), default=0.0)
    for drop in drops:
        drop.p *= drop_path / deepest
    if drop_path and isinstance(net, tv.ResNet):             # ResNeXt and Wide ResNet
        drop_residuals(net, drop_path)
    elif drop_path and not drops:
        raise ValueError(f"arch {arch!r}: has no stochastic depth; use --drop-path 0, not "
                         f"{drop_path:g}")


def drop_residuals(net: tv.ResNet, drop_path: float) -> None:
    """Adds stochastic depth to the residual branches of torchvision's ResNet. The rates rise
    linearly from 0 to `drop_path`."""
    kinds = (tv.resnet.BasicBlock, tv.resnet.Bottleneck)
    blocks = [module for module in net.modules() if isinstance(module, kinds)]
    rates = torch.linspace(0, drop_path, len(blocks)).tolist()
    for block, rate in zip(blocks, rates):
        block.drop_path = StochasticDepth(rate, mode="row")
        block.forward = MethodType(forward_with_drop, block)


def forward_with_drop(block: nn.Module, x: Tensor) -> Tensor:
    """The forward of a BasicBlock or a Bottleneck, with `drop_path` on its residual branch."""
    z = block.relu(block.bn1(block.conv1(x)))
    z = block.bn2(block.conv2(z))
    if hasattr(block, "conv3"):                              # a Bottleneck
        z = block.bn3(block.conv3(block.relu(z)))
    shortcut = x if block.downsample is None else block.downsample(x)
    return block.relu(block.drop_path(z) + shortcut)
