"""Facts about detection: COCO's files, its masks and its AP, Mask R-CNN on every family of backbones, whole runs.

    python -m pytest -q extras/test_detect.py
"""

import contextlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import ImageDataset
from engine.command import Distributed
from extras import coco, dense, detect
from extras.mask_rcnn import detector
from model import build_encoder

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


# ---- a folder in COCO's format ----

NAMES = {90: "z", 3: "a", 7: "b"}                            # ids with gaps, not in order: labels 1, 2, 3 are a, b, z


def polygon(x1, y1, x2, y2):
    return [[x1, y1, x2, y1, x2, y2, x1, y2]]


@pytest.fixture
def folder(tmp_path):
    """Twelve images of two sizes. Of training: one without objects, one with a crowd alone, one with a thin box alone.

    Each other one has a bright square, of class a, b or z; the first also a ring by run lengths, and a crowd."""
    for split, count in (("train2017", 7), ("val2017", 5)):
        images, objects = [], []
        for i in range(count):
            h, w, place = (48, 64, 8 * i) if i % 2 else (64, 48, 4 * i)
            canvas = np.full((h, w, 3), 60, np.uint8)
            canvas[10:40, place:place + 16] = 220
            (tmp_path / "coco" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(canvas).save(tmp_path / "coco" / split / f"{i}.png")
            images.append(dict(id=100 - i, file_name=f"{i}.png", height=h, width=w))         # read from the last on
            one = dict(image_id=100 - i, category_id=list(NAMES)[i % 3], bbox=[place, 10, 16, 30], iscrowd=0, area=480,
                       segmentation=polygon(place, 10, place + 16, 40))
            objects += [one] * (i != 2) if split == "val2017" or i not in (3, 4) else []
            if i == 0:
                ring = np.zeros((h, w), bool)
                ring[44:60, 20:40], ring[50:54, 26:34] = True, False
                objects.append(one | dict(category_id=3, bbox=[20, 44, 20, 16], area=288,
                                          segmentation=dict(size=[h, w], counts=encode(ring, True))))
            if i in (0, 3):
                crowd = dict(size=[h, w], counts=[0, h * 8, h * (w - 8)])                    # the first eight columns
                objects.append(one | dict(iscrowd=1, bbox=[0, 0, 8, h], area=8 * h, segmentation=crowd))
            if i == 4 and split == "train2017":
                objects.append(one | dict(bbox=[place, 10, 1, 30], area=30, segmentation=polygon(place, 10, 17, 40)))
        objects = [one | dict(id=k + 1) for k, one in enumerate(objects)]
        content = dict(images=images, annotations=objects, categories=[dict(id=k, name=v) for k, v in NAMES.items()])
        (tmp_path / "coco" / "annotations").mkdir(exist_ok=True)
        (tmp_path / "coco" / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return tmp_path / "coco"


def test_a_folder_in_cocos_format(folder):
    train, val = coco.Coco(folder, "train"), coco.Coco(folder, "val")
    assert train.classes == val.classes == ["a", "b", "z"]
    assert [Path(train.name(i)).stem for i in range(len(train))] == ["6", "5", "1", "0"]     # without 2, 3 and 4
    assert [Path(val.name(i)).stem for i in range(len(val))] == ["4", "3", "2", "1", "0"]
    image, objects = train.read(3)                           # the first image: without its crowd
    assert image.shape == (3, 64, 48) and objects["labels"].tolist() == [3, 1] and not objects["crowd"].any()
    assert objects["boxes"].tolist() == [[0, 10, 16, 40], [20, 44, 40, 60]] and objects["boxes"].dtype == torch.float32
    square, ring = objects["masks"].bool()
    assert torch.equal(square, image[0] > 128)               # what is drawn bright
    assert ring.sum() == 20 * 16 - 4 * 8 and not ring[52, 30] and ring[45, 21]
    image, objects = val.read(4)
    assert objects["crowd"].tolist() == [False, False, True] and objects["area"].tolist() == [480, 288, 512]
    assert objects["masks"][2, :, :8].all() and not objects["masks"][2, :, 8:].any()
    assert val.read(2)[1]["boxes"].shape == (0, 4) and val.read(2)[1]["masks"].shape == (0, 64, 48)
    flipped = ImageDataset(train, detect.v2.RandomHorizontalFlip(1), 0)[0, 3][0][1]
    assert flipped["boxes"].tolist() == [[32, 10, 48, 40], [8, 44, 28, 60]]
    assert torch.equal(flipped["masks"], objects["masks"][:2].flip(-1))


def spoil(folder, split, change):
    file = folder / "annotations" / f"instances_{split}2017.json"
    content = json.loads(file.read_text())
    content = change(content) or content
    file.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize("change, reason", [
    (dict(category_id=4), "an object of class 4, which is not in the list"),
    (dict(category_id=[1]), "an object of class [1], which is not in the list"),
    (dict(category_id="d" * 100), f"an object of class '{'d' * 39}..., which is not in the list"),
    (dict(segmentation=[]), "an object without an outline"),
    (dict(segmentation=None), "an object without an outline"),
    (dict(segmentation="here"), "an outline is neither a list of polygons nor run lengths"),
    (dict(segmentation=[[5, 5, 20, 25]]),
     "a polygon needs three points or more, x and y of each; one holds 4 numbers"),
    (dict(segmentation=[[5, 5, 20, 25, 9, 9, 1]]),
     "a polygon needs x and y of every point; one holds 7 numbers"),
    (dict(segmentation=[["a"] * 6]), "a polygon is not a list of numbers x, y, x, y ..."),
    (dict(segmentation=[[10**400] * 6]), "a polygon holds a number that is no place in pixels"),
    (dict(segmentation=dict(size=[1, 2], counts=[2])),
     "run lengths of size [1, 2] do not fill an image of 64 x 48"),
    (dict(bbox=[]), "an object without a box"),
    (dict(bbox=None), "an object without a box"),
    (dict(bbox=[1, 2, float("nan"), 4]),
     "an object whose box is not four numbers: x, y, width, height"),
    (dict(bbox=[1, 2, 3]), "an object whose box is not four numbers: x, y, width, height"),
    (dict(area="large"), "an object whose area is 'large'"),
    (dict(area=10**400), f"an object whose area is 1{'0' * 39}..."),
    (dict(width=500), "the image has 48 x 64 pixels, its annotation says 500 x 64"),
    (dict(file_name="gone.png"), "not a regular file")])
def test_an_image_whose_objects_make_no_sense_is_broken_and_its_reason_told(change, reason, folder):
    part = "images" if set(change) & {"width", "file_name"} else "annotations"
    spoil(folder, "train", lambda content: content[part][-1].update(change))
    source = coco.Coco(folder, "train")
    file = change.get("file_name", "6.png")
    assert source.name(0) == f"{folder}/train2017/{file} ({reason})"
    assert source.name(1) == f"{folder}/train2017/5.png"
    assert len(source) == 4
    samples = ImageDataset(source, nn.Identity(), 0)
    assert samples[0, 0][1:] == (1, 0)                       # the next one is taken, this one is named
    assert [samples[0, i][1:] for i in (1, 2, 3)] == [(1, -1), (2, -1), (3, -1)]


@pytest.mark.parametrize("change, words", [
    (lambda content: "{", "cannot be read as COCO's annotations"),
    (lambda content: "[" * 100_000, "cannot be read as COCO's annotations"),
    (lambda content: "[]", "cannot be read as COCO's annotations"),
    (lambda content: content.pop("categories") * 0, "cannot be read as COCO's annotations ('categories' is missing)"),
    (lambda content: content["annotations"][0].update(image_id=57),
     "an annotation is of image 57, which is not listed"),
    (lambda content: content["annotations"][0].update(image_id="a\nb"),
     r"is of image 'a\nb', which is not listed"),
    (lambda content: content["images"][1].update(id=98), "two of the images have the id 98"),
    (lambda content: content["categories"][1].update(id=90),
     "two of the categories have the id 90"),
    (lambda content: content["annotations"][1].update(iscrowd="no"),
     "iscrowd of annotation 2 is 'no'; it must be 0 or 1"),
    (lambda content: content["annotations"][1].update(iscrowd=2),
     "iscrowd of annotation 2 is 2; it must be 0 or 1"),
    (lambda content: [one.pop("bbox") for one in content["annotations"]] * 0,
     "images for training can be used: FOLDER/train2017/6.png (an object without a box)"),
    (lambda content: content["annotations"].clear(), "holds no images with objects"),
    (lambda content: [one.pop("segmentation") for one in content["annotations"]] * 0, "holds boxes alone"),
    (lambda content: content["categories"].pop() and None, "list different classes"),
    (lambda content: content["images"][0].update(file_name=3), "cannot be read as COCO's annotations")])
def test_annotations_that_cannot_be_used_get_one_line(change, words, folder, capsys, tmp_path):
    spoil(folder, "train", lambda content: change(content) or content)
    words = words.replace("FOLDER", str(folder))
    complaint(capsys, words, "--data", folder, "--init", "scratch", "--arch", "resnet18", "--out", tmp_path / "run")


@pytest.mark.parametrize("given", [dict(area=None), dict(iscrowd=None)])
def test_an_area_or_crowd_of_null_is_one_that_is_not_given(given, folder):
    spoil(folder, "val", lambda content: content["annotations"][0].update(given))
    objects = coco.Coco(folder, "val").read(4)[1]
    assert objects["area"].tolist() == [16 * 30, 288, 512]
    assert objects["crowd"].tolist() == [False, False, True]


def test_names_in_annotations_are_made_printable(folder):
    """A file may be named by bytes that are no UTF-8; any text may hold control characters."""
    def change(part, place, **values):
        spoil(folder, "train", lambda content: content[part][place].update(values))

    change("annotations", -1, category_id="\x1b[2K")
    assert r"(an object of class '\x1b[2K', which is not" in coco.Coco(folder, "train").name(0)
    change("images", -1, file_name="\udcff.png")
    named = rf"{folder}/train2017/\xff.png (not a regular file)"
    assert coco.Coco(folder, "train").name(0) == named
    change("categories", 0, name="half \ud83d")
    assert coco.Coco(folder, "train").classes == ["a", "b", r"half \ud83d"]


def complaint(capsys, words, *flags):
    with pytest.raises(SystemExit) as exit:
        detect.main([*map(str, flags)])
    said = capsys.readouterr().err
    assert exit.value.code == 2 and words in said and said.startswith("detect.py: error: ") and said.count("\n") == 1


HUGE = "9" * 21
LIMITED = ("iterations epochs batch-size accum lr-batch warmup power weight-decay width convs "
           "anchor proposals rois detections eval-every").split()


def test_mistakes_on_the_command_line_get_one_line(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = ["--init", "scratch", "--arch", "resnet18"]
    (folder / "val2017").rename(folder / "elsewhere")
    (tmp_path / "empty").mkdir()
    torch.save({}, tmp_path / "best.pt")
    for words, flags in (
            ("no folder", ["--data", folder, *start]),
            ("no files annotations/instances_val*.json", ["--data", "empty", *start]),
            ("no such folder; give a folder in COCO's format, or shapes", ["--data", "none", *start]),
            ("cifar10: has no boxes", ["--data", "cifar10", *start]),
            ("--neck c4: its head is stage 4 of a ResNet of 50", ["--data", "shapes", *start, "--neck", "c4"]),
            ("give --weights FILE, or --init scratch", ["--data", "shapes", "--arch", "resnet18"]),
            ("--arch is missing", ["--data", "shapes", "--init", "scratch"]),
            ("not a multiple of the 16-pixel patch", ["--data", "shapes", "--init", "scratch", "--arch", "deit_tiny",
                                                      "--image-size", "72"]),
            ("must be an integer from 32 to 8192", ["--image-size", "0"]),
            ("--eval-only: needs --weights", ["--data", "shapes", *start, "--eval-only"]),
            ("best.pt: does not hold this detector", ["--data", "shapes", "--weights", "best.pt", "--arch", "resnet18",
                                                      "--eval-only"]),
            ("--weight-decay: 1e308: must be a number from 0 to 1000", ["--weight-decay", "1e308"]),
            *((f"--{name}: {HUGE}: must be ", [f"--{name}", HUGE]) for name in LIMITED)):
        complaint(capsys, words, *flags)
    assert {p.name for p in tmp_path.iterdir()} == {"coco", "empty", "best.pt"}              # nothing is left


# ---- the detector ----

TINY = ("--data shapes --init scratch --image-size 64 --batch-size 4 --workers 0 --amp off --log-every 1 --width 16 "
        "--convs 1 --proposals 20 --rois 8").split()


def settings(*flags):
    args = detect.parse([*TINY, *map(str, flags)])
    args.amp = "off" if args.amp is None else args.amp
    args.smallest, args.longest = min(args.smallest or 64, 64), max(args.longest or 106, 64)
    torch.manual_seed(0)
    return args, detector(build_encoder(args.arch, args.image_size, args.drop_path), 11, args, Distributed())


@pytest.fixture
def few_scenes(monkeypatch):
    """Eight scenes to train on, five to evaluate."""
    init = dense.Scenes.__init__
    def small(self, split, *rest, **more):
        init(self, split, *rest, **more)
        self.count = 8 if split == "train" else 5
    monkeypatch.setattr(dense.Scenes, "__init__", small)


@pytest.mark.parametrize("flags", ["--arch resnet18", "--arch convnext_tiny", "--arch swin_tiny", "--arch deit_tiny",
                                   "--arch resnet50 --neck c4"])
def test_every_family_learns_and_an_image_may_be_empty(flags):
    args, model = settings(*flags.split())
    (image, objects), (other, _) = (dense.Scenes("train", (64, 64)).read(i) for i in (0, 1))
    empty = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long),
                 masks=torch.zeros(0, 64, 64, dtype=torch.uint8))
    losses = model([image / 255, other / 255], [objects, empty])
    assert len(losses) == 5 and all(loss.isfinite() and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing
    if "c4" in flags:
        heads, stage4 = model.roi_heads, model.backbone.maps.encoder.backbone.layer4
        assert heads.box_head[0][0] is heads.mask_head[0] is stage4
        assert stage4[0].downsample[0].weight.grad.abs().sum() > 0           # it works for the regions
        assert model.backbone(torch.zeros(1, 3, 64, 64))["0"].shape == (1, 1024, 4, 4)
    else:
        maps = model.backbone(torch.zeros(1, 3, 64, 64))
        assert [tuple(z.shape) for z in maps.values()] == [(1, 16, n, n) for n in (16, 8, 4, 2, 1)]


@pytest.mark.parametrize("arch, size", [("resnet18", (64, 96)), ("deit_tiny", (48, 64))])
def test_boxes_and_masks_are_in_the_pixels_of_each_image(arch, size):
    """An image and the same at twice its size look alike to the net: its boxes are at twice the place.

    A ViT sees a square of 64 px: the longer side is 64, the rest is padded."""
    _, model = settings("--arch", arch)
    image = dense.Scenes("val", size).read(0)[0] / 255
    once, twice = model.eval()([image, image.repeat_interleave(2, 1).repeat_interleave(2, 2)])
    assert len(once["boxes"]) == len(twice["boxes"]) > 5
    torch.testing.assert_close(2 * once["boxes"], twice["boxes"], atol=1e-3, rtol=1e-4)
    H, W = size
    assert once["masks"].shape[1:] == (1, H, W) and twice["masks"].shape[1:] == (1, 2 * H, 2 * W)


def test_half_precision_stays_in_the_backbone():
    seen = {}
    args, model = settings("--arch", "resnet18", "--amp", "bf16")
    model.backbone.maps.encoder.backbone.layer1.register_forward_hook(lambda m, x, z: seen.update(inside=z.dtype))
    model.roi_heads.register_forward_pre_hook(lambda m, given: seen.update(maps=given[0]["0"], boxes=given[1][0]))
    model.eval()([dense.Scenes("val", (64, 64)).read(0)[0] / 255])
    assert seen["inside"] == torch.bfloat16 and seen["maps"].dtype == seen["boxes"].dtype == torch.float32
    assert (seen["boxes"] != seen["boxes"].bfloat16()).any()                 # not rounded on the way, either


# ---- whole runs ----

def run(out, *flags, start=TINY):
    """Returns (log lines without the clock, checkpoint, result)."""
    detect.main([*start, "--out", str(out), *map(str, flags)])
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if k not in ("images_per_s", "peak_memory_mb")} for line in lines]
    return lines, torch.load(out / "checkpoint.pt", weights_only=True), json.loads((out / "result.json").read_text())


def test_three_steps_and_three_resumed_are_six(few_scenes, tmp_path, monkeypatch, capsys):
    flags = ["--arch", "resnet18", "--iterations", "6", "--save-every", "3"]
    log, whole, result = run(tmp_path / "whole", *flags)
    assert len(log) == 6 and {"loss_mask", "loss_objectness", "loss_box_reg"} < set(log[0])
    assert result["images"] == 5 and set(result["box"]["per class"]) == set(dense.SHAPES)
    for name in ("detections.png", "loss.png", "best.pt", "args.json"):
        assert (tmp_path / "whole" / name).is_file()
    alone = ["--data", "shapes", "--weights", tmp_path / "whole" / "best.pt", "--eval-only", "--workers", "0"]
    detect.main([*map(str, alone), "--amp", "off", "--out", str(tmp_path / "alone")])        # the rest is in args.json
    evaluated = json.loads((tmp_path / "alone" / "result.json").read_text())
    assert evaluated["box"] == result["box"] and evaluated["mask"] == result["mask"]
    step = detect.train_step
    monkeypatch.setattr(detect, "train_step", lambda number, *rest: step(number, *rest) if number < 3 else 1 / 0)
    with pytest.raises(SystemExit):
        run(tmp_path / "cut", *flags)
    assert "ZeroDivisionError" in capsys.readouterr().err
    monkeypatch.setattr(detect, "train_step", step)
    resumed, cut, again = run(tmp_path / "cut", "--resume", start=[])
    assert resumed == log and again == result
    for name, value in whole["model"].items():
        assert torch.equal(value, cut["model"][name]), name


def test_best_pt_that_could_not_be_written_is_made_by_resume(few_scenes, tmp_path, monkeypatch):
    """A folder is in the place of the temporary file. The second AP is no better than the first."""
    evaluate, out = detect.evaluate, tmp_path / "run"

    def same(*given):
        result = evaluate(*given)
        result["box"]["AP"] = 0.25
        return result

    monkeypatch.setattr(detect, "evaluate", same)
    (out / "best.pt.tmp").mkdir(parents=True)
    with contextlib.suppress(SystemExit):
        run(out, "--arch", "resnet18", "--epochs", 2, "--eval-every", 1)
    assert (out / "checkpoint.pt").is_file() and not (out / "best.pt").exists()
    (out / "best.pt.tmp").rmdir()
    _, _, result = run(out, "--resume", start=[])
    assert (out / "best.pt").is_file() and (result["best_AP"], result["best_epoch"]) == (0.25, 2)


def test_an_image_too_slim_for_the_detector_is_skipped_and_named(folder, tmp_path, capsys):
    """At most 106 px of 3000 are kept, and of 2 px 0.07."""
    for split in ("train2017", "val2017"):
        Image.new("RGB", (3000, 2)).save(folder / split / "0.png")
        slim = dict(width=3000, height=2)
        spoil(folder, split.removesuffix("2017"), lambda content: content["images"][0].update(slim))
    flags = ["--arch", "resnet18", "--epochs", 1, "--batch-size", 2, "--max-bad", 1]
    _, _, result = run(tmp_path / "run", "--data", folder, *flags)
    reason = "0.png (3000 x 2 pixels are too slim: with --longest 106 nothing would be left of the "
    broken, said = (tmp_path / "run" / "broken.txt").read_text(), capsys.readouterr().err
    assert result["images"] == 4 and f"{folder}/train2017/{reason}shorter side)" in broken
    assert f"are left out of the count: {folder}/val2017/{reason}" in said
    slim = coco.Coco(folder, "val", longest=1600)            # 2 px become 1.07: one is left
    with pytest.raises(ValueError, match="do not fill"):     # now it is the crowd that does not fit
        slim.read(4)


def test_a_range_of_areas_without_objects_is_a_dash(folder, tmp_path):
    ap = ask_oracle((), "--data", folder, "--out", tmp_path)["box"]
    assert ap["L"] == -1                                     # no object has more than 96 x 96 px
    assert detect.percent(ap, "AP", "S", "L") == "AP 100.0, S 100.0, L -"


def test_a_vit_keeps_2000_proposals_in_training_as_released_and_others_1000():
    """max_per_img in A2MIM's mask_rcnn_vit_fpn.py and mask_rcnn_r50_fpn.py; 1000 in all tests."""
    for arch, kept in (("deit_tiny", 2000), ("resnet18", 1000)):
        _, model = settings("--arch", arch, "--proposals", 1000)
        most = lambda training: model.rpn.train(training).post_nms_top_n()
        assert (most(True), most(False)) == (kept, 1000)


class Oracle(nn.Module):
    """Finds what the annotations say, crowds too; in the images of `wrong` it says another class. Scores are tied."""

    def __init__(self, source, wrong):
        super().__init__()
        known = [source.read(i) for i in range(len(source)) if "broken" not in source.name(i)]
        self.known = [(image / 255, objects, i in wrong) for i, (image, objects) in enumerate(known)]

    def forward(self, images):
        found = []
        for image in images:
            objects, wrong = next(rest for known, *rest in self.known if torch.equal(known, image))
            labels = objects["labels"] % 3 + 1 if wrong else objects["labels"]
            found.append(dict(boxes=objects["boxes"], labels=labels, scores=torch.ones(len(labels)),
                              masks=objects["masks"][:, None]))
        return found


def ask_oracle(wrong, *flags):
    args, world = detect.parse([*TINY, "--arch", "resnet18", *map(str, flags)]), Distributed()
    return detect.evaluate(Oracle(coco.Coco(Path(args.data), "val"), wrong), args, world,
                           detect.prepare(args, world, None))


@pytest.mark.parametrize("wrong", [False, True])
def test_the_annotations_themselves_have_ap_1_and_with_other_classes_0_but_1_as_any_class(wrong, folder, tmp_path):
    result = ask_oracle(range(5) if wrong else (), "--data", folder, "--out", tmp_path)
    assert result["images"] == 5
    for kind in ("box", "mask"):
        assert result[kind]["AP"] == pytest.approx(0 if wrong else 1) and result[kind]["any class"] == pytest.approx(1)


TWO = """
import json, sys
sys.path.insert(0, "ROOT")
import torch.distributed as dist
from extras import detect, test_detect
dist.init_process_group("gloo")
result = test_detect.ask_oracle((1, 3), *sys.argv[1:])
if dist.get_rank() == 0:
    print("oracle", json.dumps(result))
detect.main([*test_detect.TINY, "--arch", "resnet18", "--epochs", "1", *sys.argv[1:]])
"""


def test_two_processes_count_every_image_once_and_agree_with_one(folder, tmp_path):
    """Five images on two processes, one of them unreadable; then a whole run, on two processes, too."""
    spoil(folder, "val", lambda content: content["images"][1].update(file_name="broken.png"))
    flags = ["--data", str(folder), "--batch-size", "2", "--out", str(tmp_path / "run")]
    one = ask_oracle((1, 3), *flags)
    assert one["images"] == 4 and all(0.1 < one[kind]["AP"] < 0.9 for kind in ("box", "mask"))
    (tmp_path / "two.py").write_text(TWO.replace("ROOT", str(ROOT)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launch, str(tmp_path / "two.py"), *flags], capture_output=True, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.split("oracle ")[1].splitlines()[0]) == one
    assert done.stderr.count("1 images cannot be read and are left out") == 2
    assert json.loads((tmp_path / "run" / "result.json").read_text())["images"] == 4


def test_the_demo_takes_the_weights_of_the_readmes_demo_if_they_are_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (detect.parse([]).init, detect.parse([]).weights, detect.parse([]).arch) == ("scratch", None, "resnet18")
    (tmp_path / "runs" / "shapes-resnet18").mkdir(parents=True)
    torch.save({}, tmp_path / "runs" / "shapes-resnet18" / "backbone.pt")
    args = detect.parse([])
    assert (args.init, args.weights, args.recipe, args.data) == (None, detect.DEMO_WEIGHTS, "shapes", "shapes")


def test_the_released_recipes():
    """lr 0.02 at batch 16; x0.1 at epochs 8 and 11 of 12 (C4: 16 and 22 of 24; ViT: 9 and 11); 640 to 800, 1333."""
    folder = ["--data", "coco", "--init", "scratch"]
    for flags, falls, lr in ((["--arch", "resnet50"], (8, 11), 0.02), (["--arch", "vit_base"], (9, 11), 3e-4),
                             (["--arch", "resnet50", "--recipe", "c4_2x"], (8, 11), 0.02)):
        args = detect.parse([*folder, *flags])
        assert args.lr == lr and args.global_batch == args.lr_batch == 16
        steps = dense.StepPlan(16, 16, 100, 1200, 0, 0)
        rates = [dense.rate(100 * epoch, steps, lr, args) for epoch in range(12)]
        assert rates == pytest.approx([lr * 0.1 ** sum(epoch >= fall for fall in falls) for epoch in range(12)])
    args = detect.parse([*folder, "--arch", "resnet18", "--width", "8"])
    args.smallest, args.longest, args.amp = 640, 1333, "off"
    resize = detector(build_encoder("resnet18"), 81, args, Distributed()).transform
    assert resize.min_size == (640, 672, 704, 736, 768, 800) and resize.max_size == 1333


def test_the_files_of_weights_fit_torchvisions_own_mask_rcnn(tmp_path):
    """The six lines of the README for people with a detector of their own."""
    torch.save(build_encoder("resnet50").backbone.state_dict(), tmp_path / "backbone.pt")
    net = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)
    found = net.backbone.body.load_state_dict(torch.load(tmp_path / "backbone.pt"), strict=False)
    assert not found.missing_keys and all(name.startswith("fc.") for name in found.unexpected_keys)
    assert torch.equal(net.backbone.body.conv1.weight, torch.load(tmp_path / "backbone.pt")["conv1.weight"])
