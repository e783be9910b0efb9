"""COCO without pycocotools: annotations in its format, masks from polygons and run lengths, and its AP.

    Coco                 images and their objects, from a json that a few workers can share
    decode_mask          polygons or run lengths -> pixels
    judge, summarise     AP, equal to pycocotools (cocoeval.py of github.com/cocodataset/cocoapi)
"""

import functools
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from engine.files import printable
from data import read_image
from extras.dense import name_and_reason

# ---- masks: True inside, (h, w) ----

def decode_mask(segmentation: list | dict, h: int, w: int) -> np.ndarray:
    """A list of polygons, flat x, y, x, y ..., whose union it is; or run lengths {size, counts}. bool (h, w).

    Raises ValueError if it is neither, or of another size."""
    if isinstance(segmentation, dict):
        size, runs = segmentation.get("size"), segmentation.get("counts")
        runs = read_counts(runs) if isinstance(runs, str) else np.asarray(runs if isinstance(runs, list) else [])
        whole = runs.dtype.kind == "i" and runs.min(initial=0) >= 0 and runs.max(initial=0) <= h * w
        if size != [h, w] or not whole or runs.sum() != h * w:
            raise ValueError(f"run lengths of size {short(size)} do not fill an image of {h} x {w}")
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(w, h).T    # down the columns, 0 comes first
    if not isinstance(segmentation, list):
        raise ValueError("an outline is neither a list of polygons nor run lengths")
    mask = np.zeros((h, w), bool)
    for polygon in segmentation:
        mask |= fill(points_of(polygon), h, w)
    return mask


def points_of(polygon: list) -> np.ndarray:
    """Flat x, y, x, y ... -> (k, 2). Raises ValueError for anything but three or more points."""
    is_flat = isinstance(polygon, list) and all(isinstance(n, (int, float)) for n in polygon)
    if not is_flat:
        raise ValueError("a polygon is not a list of numbers x, y, x, y ...")
    holds = f"one holds {len(polygon)} numbers"
    if len(polygon) < 6:
        raise ValueError(f"a polygon needs three points or more, x and y of each; {holds}")
    if len(polygon) % 2:
        raise ValueError(f"a polygon needs x and y of every point; {holds}")
    if not all(abs(number) < 1e6 for number in polygon):     # nan is not, either
        raise ValueError("a polygon holds a number that is no place in pixels")
    return np.array(polygon, float).reshape(-1, 2)


def fill(polygon: np.ndarray, h: int, w: int) -> np.ndarray:
    """Even-odd: the pixels (h, w) whose centre lies inside the polygon (k, 2), x and y in pixels.

    pycocotools rounds the outline to fifths of a pixel first: here and there a border pixel differs."""
    a, b = polygon - 0.5, np.roll(polygon, -1, 0) - 0.5      # an edge each; pixel centres are now whole numbers
    a, b = np.where(a[:, :1] < b[:, :1], (a, b), (b, a))     # from left to right
    columns = np.arange(w)
    edge, x = np.nonzero((a[:, :1] <= columns) & (columns < b[:, :1]))       # the columns that an edge crosses
    (x0, y0), (x1, y1) = a[edge].T, b[edge].T
    y = np.ceil(y0 + (x - x0) * (y1 - y0) / (x1 - x0)).clip(0, h).astype(int)
    flips = np.zeros((h + 1, w), np.int32)                   # from that pixel downwards: in becomes out, out in
    np.add.at(flips, (y, x), 1)
    return flips.cumsum(0)[:h] % 2 == 1


def read_counts(text: str) -> np.ndarray:
    """Run lengths from their string: five bits a character, the lowest first, from '0' on; 32 says that more follow,
    16 in the last one that the number is negative. From the fourth on it is the change against the one before last."""
    runs, value, bits = [], 0, 0
    for code in text.encode():
        value, bits = value | (code - 48 & 31) << bits, bits + 5
        if not code - 48 & 32:
            value -= (code - 48 & 16) << bits - 4            # minus 2^bits if the sign bit, 2^(bits - 1), is set
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, bits = 0, 0
    return np.array(runs, np.int64) if all(abs(run) < 2**40 for run in runs) else np.array([-1])


# ---- the annotations ----

class Coco:
    """Images with objects in COCO's layout: annotations/instances_train2017.json and train2017/, or other train*, val*.

    Training leaves out crowds, boxes of a pixel or less, and images in which nothing remains; evaluation keeps all.
    Classes are numbered from 1 in the order of their ids, 0 is the background. Raises ValueError if it is not there."""

    def __init__(self, root: Path, split: str, longest: int | None = None):
        """longest: px that the longer side may have in the detector. An image so slim that its
        shorter side would vanish is refused."""
        here = sorted((root / "annotations").glob(f"instances_{split}*.json"))
        if len(here) != 1:
            raise ValueError(f"--data {root}: {len(here) or 'no'} files annotations/instances_{split}*.json; expected "
                             f"one, as COCO's instances_{split}2017.json beside {split}2017/*.jpg; or give shapes")
        self.file, self.train, self.longest = here[0], split == "train", longest
        self.root = root / self.file.stem.removeprefix("instances_")
        told = printable(str(self.file))
        if not self.root.is_dir():
            raise ValueError(f"--data {root}: no folder {printable(str(self.root))}/ for the "
                             f"images of {printable(self.file.name)}")
        try:
            content = json.loads(self.file.read_bytes())
            images = by_id(content["images"], "images")
            names = {}
            for i, one in by_id(content["categories"], "categories").items():
                # json may hold half of a surrogate pair, which no terminal and no file takes
                names[i] = str(one["name"]).encode(errors="backslashreplace").decode()
            objects = {i: [] for i in images}
            for one in content["annotations"]:
                image, crowd = one["image_id"], one.get("iscrowd")
                if image not in objects:
                    raise ValueError(f"an annotation is of image {short(image)}, which is not "
                                     f"listed; list the image, or remove its annotations")
                if crowd not in (None, 0, 1):
                    raise ValueError(f"iscrowd of annotation {short(one.get('id'))} is "
                                     f"{short(crowd)}; it must be 0 or 1")
                objects[image].append(one)
            if self.train:
                images = {i: image for i, image in images.items() if any(map(self.wanted, objects[i]))}
            files = [os.fsencode(image["file_name"]) for image in images.values()]
            sizes = [(image.get("height", 0), image.get("width", 0)) for image in images.values()]
            self.sizes = np.array(sizes, np.int64).reshape(-1, 2)            # (N, 2), 0 if not given
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            why = printable(why)
            raise ValueError(f"{told}: cannot be read as COCO's annotations ({why})") from None
        if not images or not names:
            what = "classes" if images else "images with objects" if self.train else "images"
            raise ValueError(f"{told}: holds no {what}")
        if content["annotations"] and not any(one.get("segmentation") for one in content["annotations"]):
            raise ValueError(f"{told}: holds boxes alone; Mask R-CNN learns from outlines, too: "
                             f"'segmentation'")
        self.classes, self.label_of = list(names.values()), {i: label for label, i in enumerate(names, 1)}
        # one text and arrays, not objects: these would be copied into every worker as their reference counts change
        texts = [json.dumps(objects[i]).encode() for i in images]
        self.text, self.starts = b"".join(texts), np.cumsum([0, *map(len, texts)])
        self.names = np.array(files)

    def __len__(self) -> int:
        return len(self.names)

    @functools.cache
    def name(self, index: int) -> str:
        """The file, and what is wrong with it or with its objects, if something is."""
        return name_and_reason(self, index, os.path.join(self.root, os.fsdecode(self.names[index])))

    @staticmethod
    def wanted(one: dict) -> bool:
        """Is it trained on? One that cannot be read is, so that its image is counted among the broken ones."""
        return not one.get("iscrowd") and (not well_formed(one.get("bbox")) or min(one["bbox"][2:]) > 1)

    def read(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Image uint8 (3, H, W); boxes (G, 4) XYXY, labels (G,), masks (G, H, W), crowd (G,), area (G,) as annotated.

        Raises ValueError for an annotation that makes no sense, and as `read_image` does."""
        image = read_image(os.path.join(self.root, os.fsdecode(self.names[index])))
        H, W = image.shape[1:]
        if self.sizes[index].all() and self.sizes[index].tolist() != [H, W]:
            h, w = self.sizes[index].tolist()
            raise ValueError(f"the image has {W} x {H} pixels, its annotation says {w} x {h}")
        # the detector rounds the shorter side down to whole pixels, in float32: hence 1.01
        if self.longest and min(H, W) * self.longest < 1.01 * max(H, W):
            raise ValueError(f"{W} x {H} pixels are too slim: with --longest {self.longest} "
                             f"nothing would be left of the shorter side")
        objects = json.loads(self.text[self.starts[index]:self.starts[index + 1]])
        for one in objects:
            self.check(one)
        boxes = np.array([one["bbox"] for one in objects], float).reshape(-1, 4)
        areas = boxes[:, 2] * boxes[:, 3]
        boxes[:, 2:] += boxes[:, :2]                         # x, y, w, h -> x1, y1, x2, y2
        if self.train:
            boxes = boxes.clip(0, (W, H, W, H))
            kept = [k for k, one in enumerate(objects)
                    if not one.get("iscrowd") and (boxes[k, 2:] - boxes[k, :2]).min() > 1]
            boxes, areas, objects = boxes[kept], areas[kept], [objects[k] for k in kept]
        masks = np.zeros((len(objects), H, W), np.uint8)
        for mask, one in zip(masks, objects):
            mask[:] = decode_mask(one["segmentation"], H, W)
        annotated = []                                       # of the box where no area is given
        for one, of_box in zip(objects, areas):
            annotated.append(of_box if one.get("area") is None else one["area"])
        return tv_tensors.Image(image), dict(
            boxes=tv_tensors.BoundingBoxes(torch.from_numpy(boxes.astype("float32" if self.train else "float64")),
                                           format="XYXY", canvas_size=(H, W)),
            labels=torch.tensor([self.label_of[one["category_id"]] for one in objects], dtype=torch.long),
            masks=tv_tensors.Mask(torch.from_numpy(masks)),
            crowd=torch.tensor([bool(one.get("iscrowd")) for one in objects], dtype=torch.bool),
            area=torch.tensor(annotated, dtype=torch.double))

    def check(self, one: dict) -> None:
        """Raises ValueError, with the reason, for an object that cannot be learnt from."""
        kind = one.get("category_id")
        if kind not in list(self.label_of):
            raise ValueError(f"an object of class {short(kind)}, which is not in the list")
        if one.get("bbox") in (None, []):
            raise ValueError("an object without a box")
        if not well_formed(one["bbox"]):
            raise ValueError("an object whose box is not four numbers: x, y, width, height")
        if not one.get("segmentation"):
            raise ValueError("an object without an outline")
        area = one.get("area")
        if area is not None and not (isinstance(area, (int, float)) and abs(area) < 1e12):
            raise ValueError(f"an object whose area is {short(area)}")


def by_id(entries: list[dict], what: str) -> dict:
    """{id: entry} in the order of the ids. Raises ValueError if two entries have one id."""
    found = {}
    for one in sorted(entries, key=lambda one: one["id"]):
        if one["id"] in found:
            raise ValueError(f"two of the {what} have the id {short(one['id'])}; every id must be "
                             f"given once")
        found[one["id"]] = one
    return found


def short(value) -> str:
    """A value from a file, for a message: a text in quotes, 40 characters at most."""
    text = printable(repr(value))
    return text if len(text) <= 40 else text[:40] + "..."


def well_formed(box) -> bool:
    """Four numbers: x, y, width, height."""
    return (isinstance(box, list) and len(box) == 4
            and all(isinstance(v, (int, float)) and abs(v) < 1e6 for v in box) and min(box[2:]) >= 0)


# ---- AP ----

THRESHOLDS, RECALLS = np.linspace(0.5, 0.95, 10), np.linspace(0, 1, 101)
RANGES = np.array([(0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10)])    # of areas, px: all, S, M, L
ANY = 0                                                      # the label of all classes taken together
MOST = 100                                                   # detections of a class that count, per image


def box_iou(d: np.ndarray, g: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """d (D, 4), g (G, 4), XYXY -> (D, G): intersection over union, over the detection alone if g is a crowd."""
    sides = np.minimum(d[:, None, 2:], g[:, 2:]) - np.maximum(d[:, None, :2], g[:, :2])      # (D, G, 2)
    shared, (of_d, of_g) = sides.clip(0).prod(-1), ((b[:, 2:] - b[:, :2]).prod(-1) for b in (d, g))
    return shared / np.maximum(of_d[:, None] + np.where(crowd, 0, of_g - shared), 1e-12)


def mask_iou(d: np.ndarray, g: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """The same for bool masks (D, H, W), (G, H, W)."""
    pixels, shared = math.prod(d.shape[1:]), 0
    d, g = d.reshape(-1, pixels), g.reshape(-1, pixels)
    for i in range(0, pixels, 2**16):                        # in parts: as float32 the whole would fill the memory
        shared = shared + (d[:, i:i + 2**16].astype("f") @ g[:, i:i + 2**16].astype("f").T).astype(float)
    return shared / np.maximum(d.sum(1)[:, None] + np.where(crowd, 0, g.sum(1) - shared), 1e-12)


def match(iou: np.ndarray, size: np.ndarray, area: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, ...]:
    """One class in one image, at every range A and threshold T: right (A, T, D), dropped (A, T, D), real objects (A,).

    iou (D, G), detections by falling score; size (D,) of the detections, area and crowd (G,) of the objects, px.
    A detection takes the object it overlaps most that is still free (of equals the last), a real one before one that
    does not count: a crowd, which is never used up, or of an area out of range. With the latter, or alone and itself
    out of range, it is dropped: neither right nor wrong."""
    (D, G), (low, high) = iou.shape, RANGES.T[:, :, None]    # (A, 1) each
    aside = crowd | (area < low) | (area > high)             # (A, G)           objects that do not count
    taken, right = np.zeros((len(RANGES), len(THRESHOLDS), G), bool), np.zeros((len(RANGES), len(THRESHOLDS), D), bool)
    dropped = np.repeat(((size < low) | (size > high))[:, None], len(THRESHOLDS), 1)         # (A, T, D)
    for d in range(D if G else 0):
        fits = (iou[d] >= np.minimum(THRESHOLDS, 1 - 1e-10)[:, None]) & (crowd | ~taken)     # (A, T, G)
        real = fits & ~aside[:, None]
        fits = np.where(real.any(-1, keepdims=True), real, fits)
        best = G - 1 - np.where(fits, iou[d], -1)[..., ::-1].argmax(-1)[..., None]           # (A, T, 1)
        found = fits.any(-1)                                 # (A, T)
        taken |= found[..., None] & (np.arange(G) == best)
        void = np.take_along_axis(np.broadcast_to(aside[:, None], fits.shape), best, -1)[..., 0]
        right[..., d] = found & ~void
        dropped[..., d] = np.where(found, void, dropped[..., d])
    return right, dropped, (~aside).sum(1)


def judge(found: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> dict[tuple, tuple]:
    """One image: {(kind, label): (scores (D,), right, dropped, objects)} as `match` says, for kind 'box' and 'mask'.

    found: boxes (D, 4), scores, labels (D,), masks (D, H, W); truth: boxes (G, 4), labels, masks, crowd, area (G,)."""
    record, order = {}, np.argsort(-found["scores"], kind="stable")
    found, crowd = {name: values[order] for name, values in found.items()}, truth["crowd"]
    for kind, overlap in (("box", box_iou), ("mask", mask_iou)):
        d, g = (part["boxes" if kind == "box" else "masks"] for part in (found, truth))
        sizes = (d[:, 2:] - d[:, :2]).prod(-1) if kind == "box" else d.sum((1, 2))
        iou = overlap(d, g, crowd)                           # (D, G)
        for label in {ANY, *found["labels"].tolist(), *truth["labels"].tolist()}:
            mine, its = (np.flatnonzero((part["labels"] == label) | (label == ANY)) for part in (found, truth))
            mine = mine[:MOST]
            record[kind, label] = found["scores"][mine], *match(iou[mine][:, its], sizes[mine], truth["area"][its],
                                                                crowd[its])
    return record


def average_precision(records: list[tuple]) -> np.ndarray:
    """What `match` found of one class in every image, ordered by image -> (A, T): the mean over RECALLS of the best
    precision at that recall or above. nan where there is no object."""
    scores, right, dropped, objects = zip(*records)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    right, dropped = (np.concatenate(part, -1)[..., order] for part in (right, dropped))     # (A, T, D)
    objects, ap = np.sum(objects, 0), np.full(right.shape[:2], math.nan)
    for a, t in np.argwhere(np.broadcast_to(objects[:, None] > 0, ap.shape)):
        hits = right[a, t][~dropped[a, t]].cumsum()          # true positives among the first 1, 2, ... detections
        precision = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
        first = np.searchsorted(hits / objects[a], RECALLS)
        ap[a, t] = np.append(precision, 0)[first].mean()     # 0 at a recall that is never reached
    return ap


def summarise(records: list[dict], classes: list[str]) -> dict:
    """Of `judge` for every image, ordered by image: {kind: AP, AP50, AP75, S, M, L over all classes, 'any class' for
    class-agnostic AP, 'per class'}, 0 to 1; -1 where there is no object."""
    def whole(values) -> float:
        values = np.asarray(values)[~np.isnan(values)]
        return float(values.mean()) if values.size else -1.0

    result = {}
    for kind in ("box", "mask"):
        aps = []                                             # of ANY, then of every class: (A, T)
        for label in range(len(classes) + 1):
            mine = [record[kind, label] for record in records if (kind, label) in record]
            aps.append(average_precision(mine) if mine else np.full((len(RANGES), len(THRESHOLDS)), math.nan))
        each = np.stack(aps[1:])                             # (classes, A, T)
        result[kind] = dict(AP=whole(each[:, 0]), AP50=whole(each[:, 0, 0]), AP75=whole(each[:, 0, 5]),
                            **{name: whole(each[:, i]) for i, name in enumerate("SML", 1)})
        result[kind] |= {"any class": whole(aps[0][0]),
                         "per class": {name: whole(ap[0]) for name, ap in zip(classes, aps[1:])}}
    return result
