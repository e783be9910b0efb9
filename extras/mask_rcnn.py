"""The detector: torchvision's Mask R-CNN around any encoder, with one of two necks, as released.

    fpn   a feature pyramid: four maps and a fifth pooled one, each with one size of anchors
          (Lin et al. 2017)
    c4    for ResNet: one map of stride 16, and stage 4 runs on every region
          (Ren et al. 2015, He et al. 2017)

Without outlines to learn from it is Faster R-CNN, the same without the head of masks. All layers
learn, BatchNorm too: its statistics from pre-training are of images with 60 % hidden."""

from collections import OrderedDict
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, roi_heads
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

from data import MEAN, STD
from engine.command import Distributed
from engine.flags import AMP
from extras.dense import Maps, layout_for
from model import Encoder, get_family


class FirstStages(nn.Module):
    """Stem to stage 3 of a ResNet: one map of stride 16. Stage 4 is for the regions."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder
        self.channels = [encoder.backbone.layer3[-1].conv3.out_channels]

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> [(B, 1024, H/16, W/16)]."""
        z = images
        for stage in range(4):
            z = self.encoder.run_stage(stage, z)
        return [z]


class Backbone(nn.Module):
    """Normalised images (B, 3, H, W) -> {name: map (B, C, h, w), float32}, for the heads.

    Autocast is here and not around the detector, where it would round boxes to 8 bits: at 600 px to
    steps of 4."""

    def __init__(self, encoder: Encoder, args: SimpleNamespace, world: Distributed):
        super().__init__()
        self.amp = args.amp
        self.memory_format = layout_for(args, world)
        self.fpn = None
        self.maps = FirstStages(encoder) if args.neck == "c4" else Maps(encoder)
        if args.neck == "fpn":
            self.fpn = FeaturePyramidNetwork(self.maps.channels, args.width, LastLevelMaxPool(),
                                             nn.BatchNorm2d)
        self.out_channels = args.width if self.fpn else self.maps.channels[-1]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        images = images.contiguous(memory_format=self.memory_format)
        with torch.autocast(images.device.type, AMP[self.amp], enabled=self.amp != "off"):
            maps = OrderedDict((str(i), z) for i, z in enumerate(self.maps(images)))
            if self.fpn:                                     # "0" to "3": strides 4 to 32; "pool"
                maps = self.fpn(maps)
        return OrderedDict((name, z.float()) for name, z in maps.items())


def mask_loss(logits: Tensor, regions: list[Tensor], masks: list[Tensor], labels: list[Tensor],
              matched: list[Tensor]) -> Tensor:
    """torchvision's mask loss, over the regions whose object has an outline (a mask not empty).

    logits (R, classes, M, M) for all regions of the batch. Of each image with G objects: regions
    (r, 4), masks (G, H, W), labels (G,), matched (r,): the object of each region."""
    known = [mask.flatten(1).bool().any(1)[index] for mask, index in zip(masks, matched)]
    regions = [boxes[keep] for boxes, keep in zip(regions, known)]
    matched = [index[keep] for index, keep in zip(matched, known)]
    return torchvision_mask_loss(logits[torch.cat(known)], regions, masks, labels, matched)


# torchvision's RoIHeads calls this function by its name, and has no argument to replace it
torchvision_mask_loss, roi_heads.maskrcnn_loss = roi_heads.maskrcnn_loss, mask_loss


def region_pool(names: list[str], strides: tuple[int, ...], side: int,
                canonical: int) -> MultiScaleRoIAlign:
    """RoIAlign to side x side from the maps of these names and strides.

    A region of `canonical` px is taken from the third map (stride 16). torchvision would infer the
    strides from the first image. It would be wrong if much of a side is padding: 65 px are padded
    to 96."""
    pool = MultiScaleRoIAlign(names, side, 2, canonical_scale=canonical)
    pool.scales = [1 / stride for stride in strides]
    levels = [stride.bit_length() - 1 for stride in strides]                 # 4 is 2**2
    pool.map_levels = initLevelMapper(levels[0], levels[-1], canonical, canonical_level=4)
    return pool


def detector(encoder: Encoder, classes: int, args: SimpleNamespace, world: Distributed,
             with_masks: bool = True) -> FasterRCNN:
    """Mask R-CNN, or Faster R-CNN without masks, for `classes` classes, background (0) included.

    Raises ValueError if the neck does not fit. The detector takes lists of images (3, H, W) in
    [0, 1], normalises and resizes them itself, and gives boxes in their pixels.
    In training: {name: loss}, whose sum is minimised."""
    last_block = getattr(encoder.backbone, "layer4", [None])[-1]
    if args.neck == "c4" and not isinstance(last_block, Bottleneck):
        raise ValueError(f"--neck c4: its head is stage 4 of a ResNet of 50 or more layers, not "
                         f"{args.arch}; use fpn")
    backbone = Backbone(encoder, args, world)
    n, C = args.proposals, args.width
    anchors = tuple(args.anchor * 2**i for i in range(5))
    if args.neck == "c4":
        sizes = (anchors,)                                   # five sizes at one stride
        names, strides = ["0"], (16,)
        box_side = mask_side = 14                            # of a region
        wide, hidden = 2 * backbone.out_channels, 256
        # the extra norm is the authors'
        mask_head = nn.Sequential(encoder.backbone.layer4, nn.BatchNorm2d(wide))
        box_head = nn.Sequential(mask_head, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        before, before_test, after = 12 * n, 6 * n, 2 * n
    else:
        sizes = tuple((side,) for side in anchors)           # one size at each stride
        names, strides = ["0", "1", "2", "3"], (4, 8, 16, 32)
        if get_family(args.arch).name == "vit":
            p = args.patch_size
            if p not in (4, 8, 16, 32):
                raise ValueError(f"--patch-size {p}: a detector needs patches of 4, 8, 16 or 32 px")
            strides = (p // 4, p // 2, p, 2 * p)
        box_side, mask_side = 7, 14                          # of a region
        wide, hidden = 4 * C, C
        box_head = FastRCNNConvFCHead((C, 7, 7), [C] * args.convs, [wide], nn.BatchNorm2d)
        mask_head = MaskRCNNHeads(C, [C] * args.convs, 1, nn.BatchNorm2d)
        before, before_test, after = 2 * n, n, n
    most = args.image_size
    shorter, longer, multiple = range(args.smallest, most, 32), args.longest, 32
    if get_family(args.arch).name == "vit":
        # one grid of positions: each image becomes a square, padded by the mean colour
        shorter, longer, multiple = (), most, most
        after = 2 * n                                        # 2,000 in training, as released
    # a region of 7 anchors' side, 224 px as released, is taken from the map of stride 16
    box_pool = region_pool(names, strides, box_side, 7 * args.anchor)
    mask_pool = region_pool(names, strides, mask_side, 7 * args.anchor)
    settings = {
        "min_size": (*shorter, most), "max_size": longer, "size_divisible": multiple,
        "image_mean": MEAN, "image_std": STD,
        "rpn_anchor_generator": AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        "rpn_pre_nms_top_n_train": before, "rpn_pre_nms_top_n_test": before_test,
        "rpn_post_nms_top_n_train": after, "rpn_post_nms_top_n_test": n,
        "rpn_batch_size_per_image": min(256, args.rois), "box_batch_size_per_image": args.rois,
        "box_roi_pool": box_pool, "box_head": box_head,
        "box_predictor": FastRCNNPredictor(wide, classes),
        "box_detections_per_img": args.detections,
    }
    if not with_masks:
        return FasterRCNN(backbone, **settings)
    mask_predictor = MaskRCNNPredictor(wide if args.neck == "c4" else C, hidden, classes)
    return MaskRCNN(backbone, **settings, mask_roi_pool=mask_pool, mask_head=mask_head,
                    mask_predictor=mask_predictor)
