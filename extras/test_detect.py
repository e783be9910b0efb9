"""Facts about detection: COCO's files, its masks and its AP, Mask R-CNN on every family of backbones, whole runs.

    python -m pytest -q extras/test_detect.py
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from extras import coco

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


# ---- masks ----

def encode(mask, as_text):
    """Run lengths by brute force, down the columns; as text: five bits a character, differences from the fourth on."""
    runs, value = [], False
    pixels = [bool(mask[y, x]) for x in range(mask.shape[1]) for y in range(mask.shape[0])]
    while pixels or not runs:
        n = next((i for i, p in enumerate(pixels) if p != value), len(pixels))
        runs, pixels, value = [*runs, n], pixels[n:], not value
    if not as_text:
        return runs
    text = ""
    for i, run in enumerate(runs):
        number, more = run - (runs[i - 2] if i > 2 else 0), True
        while more:
            low, number = number % 32, number // 32          # rounds down: -1 goes on as -1
            more = number != (-1 if low & 16 else 0)
            text += chr(low + 32 * more + 48)
    return text


@pytest.mark.parametrize("as_text", [False, True])
def test_run_lengths_come_back_as_the_mask_they_were_made_of(as_text):
    rng = np.random.default_rng(0)
    sizes = ((7, 5, 0.5), (40, 9, 0.02), (9, 60, 0.97), (3, 3, 1), (3, 3, 0))
    masks = [rng.random((h, w)) < share for h, w, share in sizes]
    large = np.zeros((90, 80), bool)
    large[3:88, 4:70] = True                                 # runs of more than one character, and negative changes
    large[40:44, 30] = False
    for mask in [*masks, large]:
        runs = dict(size=list(mask.shape), counts=encode(mask, as_text))
        assert (coco.decode_mask(runs, *mask.shape) == mask).all()
        with pytest.raises(ValueError, match="do not fill"):
            coco.decode_mask(runs, mask.shape[0], mask.shape[1] + 1)


def test_a_polygon_holds_the_pixels_whose_centre_lies_inside():
    square = coco.decode_mask([[2, 1, 6, 1, 6, 4, 2, 4]], 6, 8)
    assert square[1:4, 2:6].all() and square.sum() == 12                     # rows 1 to 3, columns 2 to 5
    assert coco.decode_mask([[2.6, 1.6, 6.4, 1.6, 6.4, 4.4, 2.6, 4.4]], 6, 8).sum() == 3 * 2     # centres at .5
    triangle = coco.decode_mask([[0, 0, 8, 0, 0, 8]], 8, 8)
    assert [row.sum() for row in triangle] == [7, 6, 5, 4, 3, 2, 1, 0]       # x + y < 7 in whole numbers: centres < 8
    both = coco.decode_mask([[0, 0, 4, 0, 4, 4, 0, 4], [2, 2, 6, 2, 6, 6, 2, 6]], 8, 8)
    assert both.sum() == 16 + 16 - 4                         # a union, not even-odd between polygons
    ring = coco.decode_mask([[0, 0, 8, 0, 8, 8, 0, 8, 0, 0, 2, 2, 2, 6, 6, 6, 6, 2, 2, 2]], 8, 8)
    assert ring.sum() == 64 - 16 and not ring[3, 3]          # even-odd within one: a hole
    assert coco.decode_mask([[-5, -5, 20, -5, 20, 20, -5, 20]], 6, 8).all()  # cut at the border


def test_polygons_against_a_ray_from_every_pixel():
    rng = np.random.default_rng(1)
    for _ in range(20):
        polygon = rng.uniform(-3, 20, (rng.integers(3, 9), 2))
        inside = np.zeros((16, 18), bool)
        for y, x in np.ndindex(16, 18):                      # crossings of the ray upwards from (x + 0.5, y + 0.5)
            for (ax, ay), (bx, by) in zip(polygon, np.roll(polygon, 1, 0)):
                if (ax <= x + 0.5) != (bx <= x + 0.5):
                    inside[y, x] ^= ay + (x + 0.5 - ax) / (bx - ax) * (by - ay) <= y + 0.5
        assert (coco.decode_mask([polygon.flatten().tolist()], 16, 18) == inside).all()


@pytest.mark.parametrize("bad", [[[]], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], [[math.nan] * 6], [["a"] * 6], [5], "a",
                                 {}, dict(size=[4, 4], counts=[20, -4]), dict(size=[4, 4], counts="~~"),
                                 dict(size=[4, 4], counts=[2**70]), dict(size=[4, 4], counts=[1.5, 14.5])])
def test_what_is_no_outline_is_refused(bad):
    with pytest.raises(ValueError):
        coco.decode_mask(bad, 4, 4)


# ---- AP ----

def arrays(boxes, labels, side=120, **more):
    """Boxes XYXY and their filled rectangles as masks, as `judge` takes them."""
    masks = np.zeros((len(boxes), side, side), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes):
        mask[int(y1):int(y2), int(x1):int(x2)] = True
    return dict(boxes=np.array(boxes, float).reshape(-1, 4), labels=np.array(labels, int), masks=masks, **more)


def test_ap_by_pencil():
    """Two objects of class 1. By score: right (IoU 0.81), wrong, right (IoU 0.925): precision 1, 1/2, 2/3 at
    recall 1/2, 1/2, 1. Interpolated 1 up to recall 0.5 (51 points), 2/3 beyond (50 points)."""
    truth = arrays([(0, 0, 40, 40), (60, 60, 100, 100)], [1, 1], crowd=np.zeros(2, bool), area=np.array([1600.0] * 2))
    found = arrays([(60, 60, 97, 100), (0, 0, 36, 36), (0, 80, 20, 100)], [1, 1, 1], scores=np.array([0.5, 0.9, 0.7]))
    record = coco.judge(found, truth)
    result = coco.summarise([record], ["thing", "absent"])
    for kind in ("box", "mask"):
        both = (51 + 50 * 2 / 3) / 101                       # at the seven thresholds up to 0.8; none at 0.95
        only_last = 51 / 101 / 3                             # at 0.85 and 0.9 the first is wrong: precision 0, 0, 1/3
        assert result[kind]["AP50"] == pytest.approx(both)
        assert result[kind]["AP"] == pytest.approx((7 * both + 2 * only_last) / 10)
        # both objects are of middle size; the wrong detection is small and drops out: precision 1, 1, and 0, 1/2
        assert result[kind]["M"] == pytest.approx((7 * 1 + 2 * 51 / 101 / 2) / 10)
        assert result[kind]["S"] == result[kind]["L"] == -1
        assert result[kind]["per class"] == {"thing": result[kind]["AP"], "absent": -1}
    other = arrays(found["boxes"], [2, 2, 2], scores=found["scores"])        # all classes wrong: boxes alone are right
    result = coco.summarise([coco.judge(other, truth)], ["thing", "absent"])
    assert result["box"]["AP"] == 0 and result["box"]["any class"] == pytest.approx((7 * both + 2 * only_last) / 10)


def test_a_crowd_takes_any_number_of_detections_and_none_of_them_counts():
    truth = arrays([(0, 0, 100, 50), (60, 60, 100, 100)], [1, 1], crowd=np.array([True, False]),
                   area=np.array([5000.0, 1600.0]))
    found = arrays([(0, 0, 20, 20), (30, 0, 60, 20), (60, 60, 100, 100)], [1, 1, 1], scores=np.array([0.9, 0.8, 0.7]))
    assert coco.summarise([coco.judge(found, truth)], ["thing"])["mask"]["AP"] == 1


def random_set(seed, images=8, classes=3, side=120):
    """Images with objects, crowds, areas on the bounds of S, M, L, detections near them, wrong classes, tied scores."""
    rng = np.random.default_rng(seed)
    def boxes(n):
        corner = rng.integers(0, side - 4, (n, 2))
        return np.concatenate([corner, np.minimum(corner + rng.choice([4, 8, 16, 32, 96, 110], (n, 2)), side)], 1)
    sets = []
    for _ in range(images):
        truth = boxes(rng.integers(0, 6)).tolist()
        near = [b for b in truth for _ in range(rng.integers(0, 4))]
        near = [[max(0, a + rng.integers(-3, 4)) for a in b[:2]] + [min(side, a + rng.integers(-3, 4)) for a in b[2:]]
                for b in near] + boxes(rng.integers(0, 5)).tolist()
        near = [b for b in near if b[0] < b[2] and b[1] < b[3]]
        g = arrays(truth, rng.integers(1, classes + 1, len(truth)), side, crowd=rng.random(len(truth)) < 0.25)
        g["area"] = np.array([(m.sum() if rng.random() < 0.7 else rng.choice([1024.0, 9216.0])) for m in g["masks"]])
        g["area"] = g["area"].astype(float).reshape(-1)
        d = arrays(near, rng.integers(1, classes + 1, len(near)), side, scores=rng.integers(1, 8, len(near)) / 8)
        d["masks"] &= rng.random(d["masks"].shape) < 0.9     # no longer the whole box
        sets.append((d, g))
    return sets


def official(sets, classes, kind):
    """pycocotools on the same objects: stats AP, AP50, AP75, S, M, L."""
    mask_api, COCO = pytest.importorskip("pycocotools.mask"), pytest.importorskip("pycocotools.coco").COCO
    from pycocotools.cocoeval import COCOeval
    runs = lambda mask: mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))
    xywh = lambda box: [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    objects, found = [], []
    for i, (d, g) in enumerate(sets):
        objects += [dict(id=len(objects) + k + 1, image_id=i, category_id=int(g["labels"][k]), bbox=xywh(g["boxes"][k]),
                         area=g["area"][k], iscrowd=int(g["crowd"][k]), segmentation=runs(g["masks"][k]))
                    for k in range(len(g["labels"]))]
        for k in range(len(d["labels"])):
            one = dict(image_id=i, category_id=int(d["labels"][k]), score=d["scores"][k])
            found.append(one | (dict(bbox=xywh(d["boxes"][k])) if kind == "bbox" else
                                dict(segmentation=runs(d["masks"][k]))))
    truth = COCO()
    truth.dataset = dict(info={}, images=[dict(id=i, height=120, width=120) for i in range(len(sets))],
                         annotations=objects, categories=[dict(id=c, name=str(c)) for c in range(1, classes + 1)])
    truth.createIndex()
    measure = COCOeval(truth, truth.loadRes(found), kind)
    measure.evaluate(), measure.accumulate(), measure.summarize()
    return measure.stats[:6]


@pytest.mark.parametrize("kind, official_kind", [("box", "bbox"), ("mask", "segm")])
def test_ap_is_that_of_pycocotools(kind, official_kind, capsys):
    pytest.importorskip("pycocotools")
    seen = set()
    for seed in range(20):
        sets = random_set(seed)
        ours = coco.summarise([coco.judge(*pair) for pair in sets], ["1", "2", "3"])[kind]
        theirs = official(sets, 3, official_kind)
        np.testing.assert_allclose([ours[k] for k in ("AP", "AP50", "AP75", "S", "M", "L")], theirs, atol=1e-9, rtol=0)
        seen |= {round(v, 3) for v in theirs}
    assert len(seen) > 60                                    # the sets differ, and hardly any score is 0, 1 or -1
    crowded = [(arrays(np.tile([[10, 10, 40, 40]], (130, 1)), [1] * 130, scores=np.linspace(0.2, 0.9, 130)),
                arrays([(10, 10, 40, 40)] * 2, [1, 1], crowd=np.array([False] * 2), area=np.array([900.0] * 2)))]
    crowded[0][0]["boxes"][-110:] += 50                      # what is right has the lowest scores: beyond the 100th
    crowded[0][0]["masks"][-110:] = np.roll(crowded[0][0]["masks"][-110:], 50, (1, 2))
    assert coco.summarise([coco.judge(*crowded[0])], ["1"])[kind]["AP"] == official(crowded, 1, official_kind)[0] == 0
