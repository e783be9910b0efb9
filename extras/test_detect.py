"""Facts about detection: COCO's and VOC's layouts, masks, AP, the detectors, whole runs.

    python -m pytest -q extras/test_detect.py
"""

import contextlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import MEAN, STD, ImageDataset
from engine import testing
from engine.command import Distributed
from engine.description import describe
from engine.testing import close, read_log, same_weights, torchrun
from extras import coco, dense, detect
from extras.mask_rcnn import detector, mask_loss
from extras.testing import interrupted, limit_scenes, needs_pycocotools
from model import build_encoder

pytestmark = [
    pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning"),
    # pycocotools calls numpy in the way of numpy 1
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


# ---- masks ----

def run_lengths(mask):
    """By brute force, down the columns: the numbers of pixels outside, inside, outside, ..."""
    runs, value = [], False
    pixels = mask.T.ravel().tolist()
    while pixels or not runs:
        n = next((i for i, pixel in enumerate(pixels) if pixel != value), len(pixels))
        runs.append(n)
        pixels = pixels[n:]
        value = not value
    return runs


def as_text(runs):
    """COCO's text of run lengths: five bits a character, differences from the fourth run on."""
    text = ""
    for i, run in enumerate(runs):
        number = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            low, number = number % 32, number // 32          # rounds down: -1 stays -1
            more = number != (-1 if low & 16 else 0)
            text += chr(low + 32 * more + 48)
    return text


@needs_pycocotools
@pytest.mark.parametrize("form", [list, as_text])
def test_run_lengths_come_back_as_the_mask_they_were_made_of(form):
    rng = np.random.default_rng(0)
    sizes = ((7, 5, 0.5), (40, 9, 0.02), (9, 60, 0.97), (3, 3, 1), (3, 3, 0))
    masks = [rng.random((h, w)) < share for h, w, share in sizes]
    large = np.zeros((90, 80), bool)
    large[3:88, 4:70] = True                 # runs of several characters, and negative differences
    large[40:44, 30] = False
    for mask in [*masks, large]:
        counts = run_lengths(mask)
        runs = dict(size=list(mask.shape), counts=form(counts))
        assert (coco.to_mask(runs, *mask.shape) == mask).all()
        assert coco.run_lengths(torch.from_numpy(mask)[None])[0]["counts"] == as_text(counts)
        with pytest.raises(ValueError, match="do not fill"):
            coco.to_mask(runs, mask.shape[0], mask.shape[1] + 1)
        for h, w in ((90, 90), (3, 1)):                      # too few run lengths, or too many
            if h * w != mask.size:
                with pytest.raises(ValueError, match="do not fill"):
                    coco.to_mask(runs | {"size": [h, w]}, h, w)


@needs_pycocotools
def test_a_polygon_holds_the_pixels_whose_centre_lies_inside():
    square = coco.to_mask([[2, 1, 6, 1, 6, 4, 2, 4]], 6, 8)
    assert square[1:4, 2:6].all() and square.sum() == 12     # rows 1 to 3, columns 2 to 5
    shifted = [[2.6, 1.6, 6.4, 1.6, 6.4, 4.4, 2.6, 4.4]]
    assert coco.to_mask(shifted, 6, 8).sum() == 3 * 2        # centres at .5
    triangle = coco.to_mask([[0, 0, 8, 0, 0, 8]], 8, 8)
    inside = np.add.outer(np.arange(8), np.arange(8)) + 1    # x + y of the centres; 8 on the border
    assert triangle[inside < 8].all() and not triangle[inside > 8].any()
    both = coco.to_mask([[0, 0, 4, 0, 4, 4, 0, 4], [2, 2, 6, 2, 6, 6, 2, 6]], 8, 8)
    assert both.sum() == 16 + 16 - 4                         # a union of polygons, not even-odd
    ring = coco.to_mask([[0, 0, 8, 0, 8, 8, 0, 8, 0, 0, 2, 2, 2, 6, 6, 6, 6, 2, 2, 2]], 8, 8)
    assert ring.sum() == 64 - 16 and not ring[3, 3]          # even-odd within one: a hole
    assert coco.to_mask([[-5, -5, 20, -5, 20, 20, -5, 20]], 6, 8).all()      # cut at the border


@needs_pycocotools
def test_polygons_against_a_ray_from_every_pixel():
    """pycocotools rounds outlines to fifths of a pixel: pixels whose centre is near may differ."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        polygon = rng.uniform(-3, 20, (rng.integers(3, 9), 2))
        inside, near = np.zeros((2, 16, 18), bool)
        for y, x in np.ndindex(16, 18):                      # crossings of the ray upwards
            cx, cy = x + 0.5, y + 0.5
            for (ax, ay), (bx, by) in zip(polygon, np.roll(polygon, 1, 0)):
                if (ax <= cx) != (bx <= cx):
                    inside[y, x] ^= ay + (cx - ax) / (bx - ax) * (by - ay) <= cy
                side = np.array([bx - ax, by - ay])
                share = np.clip(side @ (cx - ax, cy - ay) / (side @ side), 0, 1)
                near[y, x] |= np.hypot(*(share * side - (cx - ax, cy - ay))) < 0.3
        mask = coco.to_mask([polygon.flatten().tolist()], 16, 18).astype(bool)
        assert (mask == inside)[~near].all() and near.mean() < 0.5


@needs_pycocotools
@pytest.mark.parametrize("bad", [
    # polygons
    [[]], [[math.nan] * 6], [5],
    # run lengths
    {}, dict(size=[4, 4], counts=[20, -4]), dict(size=[4, 4], counts="~~"),
    dict(size=[4, 4], counts=[2**70]), dict(size=[4, 4], counts=[1.5, 14.5])])
def test_what_is_no_outline_is_refused(bad):
    with pytest.raises(ValueError):
        coco.to_mask(bad, 4, 4)


# ---- AP ----

def objects_at(boxes, labels, side=120, **more):
    """Boxes XYXY, and their filled rectangles as masks."""
    masks = torch.zeros(len(boxes), side, side, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes):
        mask[int(y1):int(y2), int(x1):int(x2)] = True
    boxes = torch.tensor(boxes, dtype=torch.double).view(-1, 4)
    labels = torch.tensor(labels, dtype=torch.long)
    more = {name: torch.tensor(values) for name, values in more.items()}
    return dict(boxes=boxes, labels=labels, masks=masks, **more)


def ap_of(found, truth, classes):
    """The average precisions of one image."""
    image = [{"id": 0, "height": 120, "width": 120}]
    sides = coco.truth_of(truth, 0), coco.results_of(found, 0)
    return coco.average_precision(image, *sides, classes, with_masks=True)


@needs_pycocotools
def test_ap_by_pencil(capsys):
    """Two objects of class 1.

    The detections by score: right (IoU 0.81), wrong, right (IoU 0.925). The precision is 1, 1/2,
    2/3 at recall 1/2, 1/2, 1; interpolated it is 1 up to recall 0.5 (51 points), then 2/3 (50
    points)."""
    truth = objects_at([(0, 0, 40, 40), (60, 60, 100, 100)], [1, 1])
    boxes = [(60, 60, 97, 100), (0, 0, 36, 36), (0, 80, 20, 100)]
    found = objects_at(boxes, [1, 1, 1], scores=[0.5, 0.9, 0.7])
    result = ap_of(found, truth, ["thing", "absent"])
    # two right at the seven thresholds up to 0.8
    both = (51 + 50 * 2 / 3) / 101
    # at 0.85 and 0.9 the first one is wrong: precision 0, 0, 1/3. At 0.95 all are wrong
    only_last = 51 / 101 / 3
    for kind in ("box", "mask"):
        assert result[kind]["AP50"] == pytest.approx(both)
        assert result[kind]["AP"] == pytest.approx((7 * both + 2 * only_last) / 10)
        # both objects are of middle size, and the wrong detection is small and does not count:
        # precision 1, 1 and 0, 1/2
        assert result[kind]["M"] == pytest.approx((7 * 1 + 2 * 51 / 101 / 2) / 10)
        assert result[kind]["S"] == result[kind]["L"] == -1
        assert result[kind]["per class"] == {"thing": result[kind]["AP"], "absent": -1}
    other = found | {"labels": torch.tensor([2, 2, 2])}      # wrong classes, right boxes
    result = ap_of(other, truth, ["thing", "absent"])
    assert result["box"]["AP"] == 0
    assert result["box"]["any class"] == pytest.approx((7 * both + 2 * only_last) / 10)
    assert capsys.readouterr().out == ""


@needs_pycocotools
def test_a_crowd_takes_any_number_of_detections_and_none_of_them_counts():
    truth = objects_at([(0, 0, 100, 50), (60, 60, 100, 100)], [1, 1], crowd=[True, False],
                       area=[5000.0, 1600.0])
    boxes = [(0, 0, 20, 20), (30, 0, 60, 20), (60, 60, 100, 100)]
    found = objects_at(boxes, [1, 1, 1], scores=[0.9, 0.8, 0.7])
    assert ap_of(found, truth, ["thing"])["mask"]["AP"] == pytest.approx(1)


@needs_pycocotools
def test_of_an_object_without_an_outline_the_box_counts_and_the_mask_is_passed_over():
    """Its mask has a higher score than the other mask, and covers a fifth of its box."""
    truth = objects_at([(0, 0, 40, 40), (60, 60, 100, 100)], [1, 1], outlined=[False, True])
    truth["masks"][0] = False
    found = objects_at([(0, 0, 40, 40), (60, 60, 100, 100)], [1, 1], scores=[0.9, 0.8])
    found["masks"][0, 8:] = False
    result = ap_of(found, truth, ["thing"])
    assert result["mask"]["AP"] == pytest.approx(1) and result["box"]["AP"] == pytest.approx(1)
    alone = {name: values[1:] for name, values in found.items()}
    result = ap_of(alone, truth, ["thing"])
    assert result["mask"]["AP"] == pytest.approx(1)
    assert result["box"]["AP"] == pytest.approx(51 / 101)    # recall 1/2


@needs_pycocotools
def test_where_nothing_is_found_ap_is_0_and_where_nothing_is_there_it_is_absent():
    thing, nothing = objects_at([(0, 0, 40, 40)], [1]), objects_at([], [])
    none = nothing | {"scores": torch.zeros(0)}
    assert ap_of(none, thing, ["thing"])["mask"]["AP"] == 0
    assert ap_of(thing | {"scores": torch.ones(1)}, nothing, ["thing"])["box"]["AP"] == -1


# ---- a folder in COCO's format ----

# ids with gaps, and not in order: labels 1, 2, 3 are a, b, z
NAMES = {90: "z", 3: "a", 7: "b"}


def polygon(x1, y1, x2, y2):
    return [[x1, y1, x2, y1, x2, y2, x1, y2]]


def ring_in(h, w):
    """A ring: 16 x 20 pixels with a hole of 4 x 8."""
    ring = np.zeros((h, w), bool)
    ring[44:60, 20:40] = True
    ring[50:54, 26:34] = False
    return dict(size=[h, w], counts=as_text(run_lengths(ring)))


def objects_of(split, i, h, w, place):
    """The annotations of image i, without their ids."""
    square = dict(image_id=100 - i, category_id=list(NAMES)[i % 3], bbox=[place, 10, 16, 30],
                  iscrowd=0, area=480, segmentation=polygon(place, 10, place + 16, 40))
    objects = []
    without_square = (2,) if split == "val2017" else (2, 3, 4)
    if i not in without_square:
        objects.append(square)
    if i == 0:
        objects.append(square | dict(category_id=3, bbox=[20, 44, 20, 16], area=288,
                                     segmentation=ring_in(h, w)))
    if i in (0, 3):                                          # a crowd: the first eight columns
        first_columns = dict(size=[h, w], counts=[0, h * 8, h * (w - 8)])
        objects.append(square | dict(iscrowd=1, bbox=[0, 0, 8, h], area=8 * h,
                                     segmentation=first_columns))
    if i == 4 and split == "train2017":
        objects.append(square | dict(bbox=[place, 10, 1, 30], area=30,
                                     segmentation=polygon(place, 10, 17, 40)))
    return objects


@pytest.fixture
def folder(tmp_path):
    """Seven images for training and five for validation, of two sizes.

    An image has a bright square of class a, b or z. Image 0 also has a ring by run lengths. Images
    0 and 3 have a crowd. Image 2 has no objects. For training, image 3 has only its crowd, and
    image 4 only a thin box."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train2017", 7), ("val2017", 5)):
        images, objects = [], []
        (root / split).mkdir()
        for i in range(count):
            h, w, place = (48, 64, 8 * i) if i % 2 else (64, 48, 4 * i)
            canvas = np.full((h, w, 3), 60, np.uint8)
            canvas[10:40, place:place + 16] = 220
            Image.fromarray(canvas).save(root / split / f"{i}.png")
            # by their ids the images are read from the last on
            images.append(dict(id=100 - i, file_name=f"{i}.png", height=h, width=w))
            objects += objects_of(split, i, h, w, place)
        objects = [one | dict(id=k) for k, one in enumerate(objects, 1)]
        categories = [dict(id=k, name=name) for k, name in NAMES.items()]
        content = dict(images=images, annotations=objects, categories=categories)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def names_of(source):
    return [Path(source.name(i)).stem for i in range(len(source))]


@needs_pycocotools
def test_a_folder_in_cocos_format(folder):
    train, val = coco.open_objects(folder, "train"), coco.open_objects(folder, "val")
    assert train.classes == val.classes == ["a", "b", "z"]
    assert names_of(train) == ["6", "5", "1", "0"]           # without 2, 3 and 4
    assert names_of(val) == ["4", "3", "2", "1", "0"]
    image, objects = train.read(3)                           # the first image: without its crowd
    assert image.shape == (3, 64, 48)
    assert objects["labels"].tolist() == [3, 1] and not objects["crowd"].any()
    assert objects["boxes"].tolist() == [[0, 10, 16, 40], [20, 44, 40, 60]]
    assert objects["boxes"].dtype == torch.float32
    square, ring = objects["masks"].bool()
    assert torch.equal(square, image[0] > 128)               # what is drawn bright
    assert ring.sum() == 20 * 16 - 4 * 8 and not ring[52, 30] and ring[45, 21]
    image, objects = val.read(4)
    assert objects["crowd"].tolist() == [False, False, True]
    assert objects["area"].tolist() == [480, 288, 512]
    assert objects["masks"][2, :, :8].all() and not objects["masks"][2, :, 8:].any()
    nothing = val.read(2)[1]
    assert nothing["boxes"].shape == (0, 4) and nothing["masks"].shape == (0, 64, 48)
    flipped = ImageDataset(train, detect.v2.RandomHorizontalFlip(1), 0)[0, 3][0][1]
    assert flipped["boxes"].tolist() == [[32, 10, 48, 40], [8, 44, 28, 60]]
    assert torch.equal(flipped["masks"], objects["masks"][:2].flip(-1))


def spoil(folder, split, change):
    """Changes the annotations of a part in place. The change may return other content or text."""
    file = folder / "annotations" / f"instances_{split}2017.json"
    content = json.loads(file.read_text())
    content = change(content) or content
    file.write_text(content if isinstance(content, str) else json.dumps(content))


@needs_pycocotools
def test_training_boxes_end_at_the_border_of_the_image(folder):
    """Image 0 is 48 wide. One of its objects reaches out of it, and another lies outside."""
    def reach_out(content):
        square, ring, _ = [one for one in content["annotations"] if one["image_id"] == 100]
        square["bbox"] = [40, 10, 30, 30]
        ring["bbox"] = [50, 10, 10, 10]

    spoil(folder, "train", reach_out)
    _, objects = coco.open_objects(folder, "train").read(3)
    assert objects["boxes"].tolist() == [[40, 10, 48, 40]] and len(objects["masks"]) == 1


@needs_pycocotools
@pytest.mark.parametrize("change, reason", [
    (dict(category_id=4), "an object of class 4, which is not in the list"),
    (dict(category_id=[1]), "an object of class [1], which is not in the list"),
    (dict(category_id="d" * 100), f"an object of class '{'d' * 39}..., which is not in the list"),
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
    (dict(file_name="gone.png"), "no such file")])
def test_an_image_whose_objects_make_no_sense_is_broken_and_its_reason_told(change, reason, folder):
    part = "images" if set(change) & {"width", "file_name"} else "annotations"
    spoil(folder, "train", lambda content: content[part][-1].update(change))
    source = coco.open_objects(folder, "train")
    file = change.get("file_name", "6.png")
    assert source.name(0) == f"{folder}/train2017/{file} ({reason})"
    assert source.name(1) == f"{folder}/train2017/5.png"
    assert len(source) == 4
    samples = ImageDataset(source, nn.Identity(), 0)
    assert samples[0, 0][1:] == (1, 0)                       # image 1 replaces it, 0 is named
    assert [samples[0, i][1:] for i in (1, 2, 3)] == [(1, -1), (2, -1), (3, -1)]


@needs_pycocotools
@pytest.mark.parametrize("change, words", [
    (lambda content: "{", "cannot be read as COCO's annotations"),
    (lambda content: "[" * 100_000, "cannot be read as COCO's annotations"),
    (lambda content: "[]", "cannot be read as COCO's annotations"),
    (lambda content: content.pop("categories") * 0,
     "cannot be read as COCO's annotations ('categories' is missing)"),
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
    (lambda content: content["categories"].pop() and None, "list different classes"),
    (lambda content: content["images"][0].update(file_name=3),
     "cannot be read as COCO's annotations")])
def test_annotations_that_cannot_be_used_get_one_line(change, words, folder, capsys, tmp_path):
    spoil(folder, "train", change)
    words = words.replace("FOLDER", str(folder))
    complaint(capsys, words, "--data", folder, *SCRATCH, "--out", tmp_path / "run")


@needs_pycocotools
def test_annotations_of_images_that_are_not_listed_are_left_out_and_counted(folder):
    """As after taking a part of a set: some images are no longer listed."""
    whole = coco.open_objects(folder, "val")

    def change(content):
        content["images"] = content["images"][:3]
        content["annotations"][-1].update(image_id="a\nb")

    spoil(folder, "val", change)
    part = coco.open_objects(folder, "val")
    for i in range(3):
        assert torch.equal(part.read(i)[1]["labels"], whole.read(i + 2)[1]["labels"])
    file = f"{folder}/annotations/instances_val2017.json"
    assert part.notes == [f"{file}: 3 annotations are of images that are not listed, such as 97, "
                          f"and left out"]


@needs_pycocotools
def test_polygons_filled_inside_their_box_are_those_filled_in_the_whole_image():
    """pycocotools rounds coordinates to fifths of a pixel, so many of them are halves of a fifth.

    Some polygons reach out of the image, or lie outside. Some masks have two polygons."""
    rng = np.random.default_rng(0)
    for k in range(400):
        h, w = rng.integers(20, 60, 2)
        centre = rng.uniform(-20, 80, 2)
        polygons = []
        for _ in range(1 + k % 2):
            points = centre + rng.uniform(-1, 1, (rng.integers(3, 9), 2)) * rng.uniform(1, 30)
            polygons.append(points.round(1 + k % 3).ravel().tolist())
        whole = coco.mask_utils.frPyObjects(polygons, int(h), int(w))
        whole = coco.mask_utils.decode(coco.mask_utils.merge(whole))
        assert np.array_equal(coco.to_mask(polygons, int(h), int(w)), whole)


@needs_pycocotools
@pytest.mark.parametrize("given", [dict(area=None), dict(iscrowd=None)])
def test_an_area_or_crowd_of_null_is_one_that_is_not_given(given, folder):
    spoil(folder, "val", lambda content: content["annotations"][0].update(given))
    objects = coco.open_objects(folder, "val").read(4)[1]
    assert objects["area"].tolist() == [16 * 30, 288, 512]
    assert objects["crowd"].tolist() == [False, False, True]


@needs_pycocotools
def test_names_in_annotations_are_made_printable(folder):
    """A file name may not be UTF-8, and any text may hold control characters."""
    def change(part, place, **values):
        spoil(folder, "train", lambda content: content[part][place].update(values))

    change("annotations", -1, category_id="\x1b[2K")
    name = coco.open_objects(folder, "train").name(0)
    assert r"(an object of class '\x1b[2K', which is not" in name
    change("images", -1, file_name="\udcff.png")
    named = rf"{folder}/train2017/\xff.png (no such file)"
    assert coco.open_objects(folder, "train").name(0) == named
    change("categories", 0, name="half \ud83d")
    assert coco.open_objects(folder, "train").classes == ["a", "b", r"half \ud83d"]


@needs_pycocotools
def test_roboflows_layout_and_another_part_to_evaluate_on(folder, capsys):
    """Roboflow's json lies among the images, and its part for validation is called valid."""
    whole = coco.open_objects(folder, "train")
    (folder / "annotations" / "instances_val2017.json").rename(
        folder / "annotations" / "instances_test2017.json")
    (folder / "val2017").rename(folder / "test2017")
    assert len(coco.open_objects(folder, "val", held_out="test")) == 5
    for split, name in (("train2017", "train"), ("test2017", "valid")):
        (folder / split).rename(folder / name)
        (folder / "annotations" / f"instances_{split}.json").rename(
            folder / name / "_annotations.coco.json")
    train, val = coco.open_objects(folder, "train"), coco.open_objects(folder, "val")
    assert len(val) == 5 and train.classes == whole.classes
    assert [Path(train.name(i)).name for i in range(4)] == ["6.png", "5.png", "1.png", "0.png"]


# ---- a folder in VOC's layout ----

def voc_object(name, corners, difficult=0):
    names = ("xmin", "ymin", "xmax", "ymax")
    sides = "".join(f"<{side}>{n}</{side}>" for side, n in zip(names, corners))
    part = "<part><name>head</name></part>"                  # has a name, and is no object
    return (f"<object><name>{name}</name><difficult>{difficult}</difficult>"
            f"<bndbox>{sides}</bndbox>{part}</object>")


def voc_xml(*objects, size="<size><width>64</width><height>48</height></size>"):
    return f"<annotation>{size}{''.join(objects)}</annotation>"


@pytest.fixture
def voc(tmp_path):
    """Images 0 to 7 of 64 x 48 px, each with a bright dog, and a cat, which is difficult if odd."""
    root = tmp_path / "voc"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    for i in range(8):
        canvas = np.full((48, 64, 3), 60, np.uint8)
        canvas[4:34, 2 * i:2 * i + 16] = 220
        suffix = "png" if i % 2 else "jpg"
        Image.fromarray(canvas).save(root / "JPEGImages" / f"{i}.{suffix}", quality=95)
        dog = voc_object("dog", (2 * i + 1, 5, 2 * i + 16, 34))  # from 1, ends inside
        cat = voc_object("cat", (41, 5, 60, 20), i % 2)
        (root / "Annotations" / f"{i}.xml").write_text(voc_xml(dog, cat))
    for name, lines in dict(train="0123", trainval="01234", val="4", test="567").items():
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(lines) + "\n\n")
    return root


@needs_pycocotools
def test_a_folder_in_vocs_layout(voc):
    train, val = coco.open_objects(voc, "train"), coco.open_objects(voc, "val")
    assert train.classes == val.classes == ["cat", "dog"]
    assert names_of(train) == ["0", "1", "2", "3"] and names_of(val) == ["4"]
    image, objects = train.read(3)                           # its cat is difficult: not trained on
    assert objects["labels"].tolist() == [2] and "masks" not in objects and train.outlines == 0
    rows, columns = np.nonzero((image[0] > 128).numpy())
    bright = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert objects["boxes"].tolist() == [bright]
    assert objects["area"].tolist() == [16 * 30]
    test = coco.open_objects(voc, "val", held_out="test")
    assert names_of(test) == ["5", "6", "7"]
    assert test.read(0)[1]["crowd"].tolist() == [False, True]
    assert test.read(1)[1]["crowd"].tolist() == [False, False]
    assert names_of(coco.open_objects(voc, "train", held_out="test")) == ["0", "1", "2", "3", "4"]
    (voc / "classes.txt").write_text("dog\ncat\ncow\n")
    assert coco.open_objects(voc, "train").classes == ["dog", "cat", "cow"]


@needs_pycocotools
def test_what_is_held_out_is_not_trained_on_and_test_is_held_out_if_there_is_no_val(voc):
    lists = voc / "ImageSets" / "Main"
    (lists / "train.txt").unlink()                           # trainval less val
    assert names_of(coco.open_objects(voc, "train")) == ["0", "1", "2", "3"]
    (lists / "val.txt").unlink()
    assert names_of(coco.open_objects(voc, "val")) == ["5", "6", "7"]
    assert names_of(coco.open_objects(voc, "train")) == ["0", "1", "2", "3", "4"]


@needs_pycocotools
def test_boxes_out_of_the_image_are_clipped_and_counted(voc):
    """A 0 is no mistake: some tools count from it."""
    boxes = [(0, 0, 10, 10), (-3, 5, 10, 10), (50, 40, 70, 48), (70, 5, 80, 10), (9, 9, 5, 20)]
    (voc / "Annotations" / "4.xml").write_text(voc_xml(*(voc_object("dog", box) for box in boxes)))
    val = coco.open_objects(voc, "val")
    assert val.read(0)[1]["boxes"].tolist() == [[0, 0, 10, 10], [0, 4, 10, 10], [49, 39, 64, 48]]
    file = f"{voc}/ImageSets/Main/val.txt"
    assert val.notes == [f"{file}: 1 images",
                         f"{file}: 2 boxes reach out of their image and are clipped",
                         f"{file}: 2 boxes are empty, or outside of their image, and left out"]


@needs_pycocotools
@pytest.mark.parametrize("place, text, words", [
    ("Annotations/2.xml", "<annotation><obj",
     "train.txt: 1 of 4 annotations cannot be read, the first is Annotations/2.xml (not xml: "),
    ("Annotations/2.xml", '<?xml version="1.0" encoding="none"?><annotation/>', "2.xml (not xml: "),
    ("Annotations/2.xml", None, "Annotations/2.xml (no such file)"),
    ("Annotations/2.xml", voc_xml("<object><name> </name></object>"), "(an object without a name)"),
    ("Annotations/2.xml", voc_xml("<object><name>a</name></object>"),
     "(an object 'a' whose bndbox is not four numbers"),
    ("Annotations/2.xml", voc_xml(voc_object("a", (1, "nan", 3, 4))),
     "whose bndbox is not four numbers"),
    ("JPEGImages/2.jpg", None,
     "train.txt: lists 1 of 4 images that are not in JPEGImages/, the first is 2; add"),
    ("ImageSets/Main/val.txt", "4\n8\n",
     "val.txt: lists 1 of 2 images that are not in JPEGImages/, the first is 8"),
    ("ImageSets/Main/val.txt", "", "val.txt: holds no images"),
    ("classes.txt", "dog\n", "classes.txt: lists no class cat, which Annotations/ has"),
    ("ImageSets/Main/val2.txt", "4", "no holiday.txt in")])
def test_what_is_wrong_in_vocs_layout_gets_one_line(place, text, words, voc, capsys, tmp_path):
    if text is None:
        (voc / place).unlink()
    else:
        (voc / place).write_text(text)
    split = ["--split-val", "holiday"] if "holiday" in words else []
    complaint(capsys, words, "--data", voc, *SCRATCH, *split, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@needs_pycocotools
def test_a_broken_xml_that_no_list_names_and_a_size_that_is_not_given_do_no_harm(voc):
    (voc / "Annotations" / "7.xml").write_text("<annotation")
    dog = voc_object("dog", (1, 1, 70, 60))
    (voc / "Annotations" / "4.xml").write_text(voc_xml(dog, size=""))
    val = coco.open_objects(voc, "val")
    assert val.classes == ["cat", "dog"] and val.read(0)[1]["boxes"].tolist() == [[0, 0, 70, 60]]


SCRATCH = ["--init", "scratch", "--arch", "resnet18"]


def complaint(capsys, words, *flags):
    """Runs detect.py with flags that must be refused in one line that holds these words."""
    code, printed = testing.complaint(capsys, *flags, main=detect.main)
    assert code == 2 and words in printed and printed.startswith("detect.py: error: "), printed
    assert printed.count("\n") == printed.count("error: ") == 1, printed


@needs_pycocotools
def test_a_detector_of_other_classes_is_not_scored_on_these(voc, capsys, tmp_path):
    """As many classes under other names: their labels would be exchanged."""
    about = SimpleNamespace(arch="resnet18", patch_size=16, window=7, stem="imagenet")
    content = describe("detector", about, ["dog", "horse"], 64, MEAN, STD)
    (tmp_path / "model.json").write_text(json.dumps(content))
    torch.save({}, tmp_path / "best.pt")
    flags = ["--data", voc, "--arch", "resnet18", "--eval-only", "--weights", tmp_path / "best.pt"]
    code, said = testing.complaint(capsys, *flags, "--out", tmp_path / "run", main=detect.main)
    assert code == 2
    assert f"its classes (cat, dog) are not those of {tmp_path}/best.pt (dog, horse)" in said


HUGE = "9" * 21
LIMITED = ("iterations epochs batch-size accum lr-batch warmup power weight-decay width convs "
           "anchor proposals rois detections eval-every").split()


@needs_pycocotools
def test_mistakes_on_the_command_line_get_one_line(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "val2017").rename(folder / "elsewhere")
    (tmp_path / "empty").mkdir()
    torch.save({}, tmp_path / "best.pt")
    shapes = ["--data", "shapes"]
    mistakes = [
        ("no folder", ["--data", folder, *SCRATCH]),
        ("no files annotations/instances_val*.json", ["--data", "empty", *SCRATCH]),
        ("no such folder; give a folder in COCO's or Pascal VOC's layout, or shapes",
         ["--data", "none", *SCRATCH]),
        ("no files annotations/instances_holiday*.json",
         ["--data", folder, *SCRATCH, "--split-val", "holiday"]),
        ("--split-val: ../x: must be a name such as test", ["--split-val", "../x"]),
        ("--split-val: drawn scenes have one part", [*shapes, *SCRATCH, "--split-val", "test"]),
        ("--split-val train: these images are trained on; choose another part",
         ["--data", folder, *SCRATCH, "--split-val", "train"]),
        ("cifar10: has no boxes", ["--data", "cifar10", *SCRATCH]),
        ("--neck c4: its head is stage 4 of a ResNet of 50", [*shapes, *SCRATCH, "--neck", "c4"]),
        ("give --weights FILE, or --init scratch", [*shapes, "--arch", "resnet18"]),
        ("--arch is missing", [*shapes, "--init", "scratch"]),
        ("give --weights FILE",
         ["--resume", "--out", "new", *shapes, "--arch", "resnet18"]),
        ("not a multiple of the 16-pixel patch",
         [*shapes, "--init", "scratch", "--arch", "deit_tiny", "--image-size", "72"]),
        ("must be an integer from 32 to 8192", ["--image-size", "0"]),
        ("--eval-only: needs --weights", [*shapes, *SCRATCH, "--eval-only"]),
        ("best.pt: does not hold this detector",
         [*shapes, "--weights", "best.pt", "--arch", "resnet18", "--eval-only"]),
        ("--weight-decay: 1e308: must be a number from 0 to 1000", ["--weight-decay", "1e308"]),
    ]
    mistakes += [(f"--{name}: {HUGE}: must be ", [f"--{name}", HUGE]) for name in LIMITED]
    for words, flags in mistakes:
        complaint(capsys, words, *flags)
    assert {file.name for file in tmp_path.iterdir()} == {"coco", "empty", "best.pt"}


def test_without_pycocotools_one_line_says_how_to_install_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(coco, "COCO", None)
    flags = [*TINY, "--arch", "resnet18", "--out", tmp_path / "run"]
    complaint(capsys, "pip install -r extras/requirements.txt", *flags)
    assert not (tmp_path / "run").exists()


# ---- the detector ----

TINY = ("--data shapes --init scratch --image-size 64 --batch-size 4 --workers 0 --amp off "
        "--log-every 1 --width 16 --convs 1 --proposals 20 --rois 8").split()


def built(*flags, with_masks=True):
    """(settings, detector) of these flags."""
    args = detect.parse([*TINY, *map(str, flags)])
    args.amp = "off" if args.amp is None else args.amp
    torch.manual_seed(0)
    encoder = build_encoder(args.arch, args.image_size, args.drop_path)
    return args, detector(encoder, 11, args, Distributed(), with_masks)


@pytest.fixture
def few_scenes(monkeypatch):
    limit_scenes(monkeypatch, train=8, val=5)


@pytest.mark.parametrize("flags", [
    "--arch resnet18", "--arch convnext_tiny", "--arch swin_tiny", "--arch deit_tiny",
    "--arch resnet50 --neck c4"])
def test_every_family_learns_and_an_image_may_be_empty(flags):
    _, model = built(*flags.split())
    scenes = dense.Scenes("train", (64, 64))
    image, objects = scenes.read(0)
    other, _ = scenes.read(1)
    empty = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long),
                 masks=torch.zeros(0, 64, 64, dtype=torch.uint8))
    losses = model([image / 255, other / 255], [objects, empty])
    assert len(losses) == 5 and all(loss.isfinite() and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    missing = [name for name, p in model.named_parameters()
               if p.grad is None or not p.grad.isfinite().all()]
    assert not missing
    if "c4" in flags:
        heads, stage4 = model.roi_heads, model.backbone.maps.encoder.backbone.layer4
        assert heads.box_head[0][0] is heads.mask_head[0] is stage4
        # stage 4 learns from the regions
        assert stage4[0].downsample[0].weight.grad.abs().sum() > 0
        assert model.backbone(torch.zeros(1, 3, 64, 64))["0"].shape == (1, 1024, 4, 4)
    else:
        maps = model.backbone(torch.zeros(1, 3, 64, 64))
        shapes = [tuple(z.shape) for z in maps.values()]
        assert shapes == [(1, 16, n, n) for n in (16, 8, 4, 2, 1)]


@pytest.mark.parametrize("arch, size", [("resnet18", (64, 96)), ("deit_tiny", (48, 64))])
def test_boxes_and_masks_are_in_the_pixels_of_each_image(arch, size):
    """The detector resizes an image and its enlargement to the same pixels: boxes are doubled.

    A ViT sees a square of 64 px: the longer side is 64, the rest is padded."""
    _, model = built("--arch", arch)
    image = dense.Scenes("val", size).read(0)[0] / 255
    once, twice = model.eval()([image, image.repeat_interleave(2, 1).repeat_interleave(2, 2)])
    assert len(once["boxes"]) == len(twice["boxes"]) > 5
    close(2 * once["boxes"], twice["boxes"], atol=1e-3, rtol=1e-4)
    H, W = size
    assert once["masks"].shape[1:] == (1, H, W)
    assert twice["masks"].shape[1:] == (1, 2 * H, 2 * W)


def test_what_is_found_in_an_image_does_not_depend_on_the_image_before():
    """65 px are padded to 96: torchvision would infer that the finest map has stride 2."""
    torch.manual_seed(0)
    image, tall = torch.rand(3, 64, 80), torch.rand(3, 65, 64)
    first, again = (built("--arch", "resnet18")[1].eval() for _ in range(2))
    expected = first([image])[0]
    again([tall])
    found = again([image])[0]
    close(found["boxes"], expected["boxes"])
    close(found["scores"], expected["scores"])


@pytest.mark.parametrize("patch", [4, 8, 16, 32])
def test_regions_are_pooled_from_their_own_place_whatever_the_patches_of_a_vit(patch):
    """Maps that hold the place x of their pixels: the pooled region holds its own centre."""
    args = detect.parse([*TINY, "--arch", "deit_tiny", "--patch-size", str(patch)])
    encoder = build_encoder("deit_tiny", 64, 0.0, patch)
    model = detector(encoder, 11, args, Distributed())
    maps = model.eval().backbone(torch.zeros(1, 3, 64, 64))
    for name, z in maps.items():
        stride = 64 / z.shape[-1]
        places = (torch.arange(z.shape[-1]) + 0.5) * stride  # of the centres, in pixels
        maps[name] = places.expand_as(z)
    box = torch.tensor([[32.0, 32.0, 48.0, 48.0]])           # its centre is at 40
    pooled = model.roi_heads.box_roi_pool(maps, [box], [(64, 64)])
    # torchvision's RoIAlign is off by half a pixel of the map, which is 16 px wide at most
    assert abs(pooled.mean().item() - 40) <= 8


@needs_pycocotools
def test_patches_that_are_no_power_of_two_are_refused(capsys, tmp_path):
    flags = [*TINY, "--arch", "deit_tiny", "--image-size", 48, "--patch-size", 12]
    complaint(capsys, "--patch-size 12: a detector needs patches of 4, 8, 16 or 32 px", *flags,
              "--out", tmp_path / "run")


def test_the_schedule_in_steps_has_milestones_in_every_recipe():
    for recipe in detect.RECIPES:
        flags = f"--arch resnet18 --recipe {recipe} --schedule steps".split()
        args = detect.parse([*TINY, *flags])
        plan = SimpleNamespace(total=24, warmup=0)
        last = dense.rate(23, plan, 1.0, args)
        assert last == pytest.approx(0.01), recipe


@needs_pycocotools
@pytest.mark.parametrize("flags, words", [
    ("--longest 32", "--longest 32: is below --image-size 64"),
    ("--smallest 128", "--smallest 128: is above --image-size 64")])
def test_typed_sides_are_used_or_refused(flags, words, capsys, tmp_path):
    complaint(capsys, words, *TINY, "--arch", "resnet18", *flags.split(), "--out", tmp_path / "run")


def test_sides_follow_the_image_size_of_a_resumed_run():
    """Its recipe gives none, and nobody typed them."""
    args = detect.parse("--data coco --init scratch --arch resnet18 --recipe small".split())
    assert (args.image_size, args.smallest, args.longest) == (480, 384, 800)
    args.image_size, args.given = 800, {"image_size": 800}   # as after --resume --image-size 800
    args = detect.with_sides(args)
    assert (args.smallest, args.longest) == (640, 1333)


def test_an_evaluation_cannot_be_resumed(capsys, tmp_path):
    complaint(capsys, "--resume continues a training", "--resume", "--eval-only", "--out", tmp_path)


def test_the_loss_of_masks_passes_over_objects_without_an_outline():
    """Two images, three regions each; the first object of the first image has no outline."""
    torch.manual_seed(0)
    logits = torch.randn(6, 3, 4, 4, requires_grad=True)
    whole = torch.tensor([0.0, 0, 8, 8])
    regions = [whole.repeat(3, 1)] * 2
    labels = [torch.tensor([1, 2]), torch.tensor([2])]
    masks = [torch.zeros(2, 8, 8, dtype=torch.uint8), torch.ones(1, 8, 8, dtype=torch.uint8)]
    masks[0][1] = 1
    matched = [torch.tensor([0, 1, 1]), torch.tensor([0, 0, 0])]
    loss = mask_loss(logits, regions, masks, labels, matched)
    close(loss, -logits[1:, 2].sigmoid().log().mean())       # of full masks
    loss.backward()
    assert not logits.grad[0].any() and logits.grad[1:, 2].abs().min() > 0
    masks[0][:] = masks[1][:] = 0                            # none has one: no gradient, but no nan
    assert mask_loss(logits, regions, masks, labels, matched) == 0


@pytest.mark.parametrize("flags", ["--arch resnet18", "--arch resnet50 --neck c4"])
def test_without_outlines_every_weight_learns_from_boxes_alone(flags):
    _, model = built(*flags.split(), with_masks=False)
    image, objects = dense.Scenes("train", (64, 64)).read(0)
    boxes_alone = {name: objects[name] for name in ("boxes", "labels")}
    losses = model([image / 255] * 2, [boxes_alone] * 2)
    assert len(losses) == 4
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert "masks" not in model.eval()([image / 255])[0]


def test_half_precision_stays_in_the_backbone():
    seen = {}

    def look_inside(module, inputs, output):
        seen["inside"] = output

    def look_at_heads(module, inputs):
        maps, proposals, *_ = inputs
        seen["maps"] = maps["0"]
        seen["boxes"] = proposals[0]

    _, model = built("--arch", "resnet18", "--amp", "bf16")
    model.backbone.maps.encoder.backbone.layer1.register_forward_hook(look_inside)
    model.roi_heads.register_forward_pre_hook(look_at_heads)
    model.eval()([dense.Scenes("val", (64, 64)).read(0)[0] / 255])
    assert seen["inside"].dtype == torch.bfloat16
    assert seen["maps"].dtype == seen["boxes"].dtype == torch.float32
    assert (seen["boxes"] != seen["boxes"].bfloat16()).any()                 # never rounded to bf16


# ---- whole runs ----

def run(out, *flags, start=TINY):
    """Returns (log lines without the clock, checkpoint, result)."""
    detect.main([*start, "--out", str(out), *map(str, flags)])
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    return read_log(out), checkpoint, result_of(out)


def result_of(out):
    return json.loads((out / "result.json").read_text())


@needs_pycocotools
def test_three_steps_and_three_resumed_are_six(few_scenes, tmp_path, capsys):
    flags = ["--arch", "resnet18", "--iterations", "6", "--save-every", "3"]
    log, whole, result = run(tmp_path / "whole", *flags)
    assert len(log) == 6 and {"loss_mask", "loss_objectness", "loss_box_reg"} < set(log[0])
    assert result["images"] == 5 and set(result["box"]["per class"]) == set(dense.SHAPES)
    for name in ("detections.png", "loss.png", "best.pt", "args.json"):
        assert (tmp_path / "whole" / name).is_file()
    # the other settings are in args.json
    alone = ["--data", "shapes", "--weights", tmp_path / "whole" / "best.pt", "--eval-only",
             "--workers", "0", "--amp", "off", "--out", tmp_path / "alone"]
    detect.main([*map(str, alone)])
    evaluated = result_of(tmp_path / "alone")
    assert evaluated["box"] == result["box"] and evaluated["mask"] == result["mask"]
    with interrupted(detect, at=3):
        run(tmp_path / "cut", *flags)
    assert "ZeroDivisionError" in capsys.readouterr().err
    resumed, cut, again = run(tmp_path / "cut", "--resume", start=[])
    assert resumed == log and again == result
    same_weights(whole, cut)


@needs_pycocotools
def test_best_pt_that_could_not_be_written_is_made_by_resume(few_scenes, tmp_path, monkeypatch):
    """A folder is in the place of the temporary file. The second AP is no better than the first."""
    evaluate = detect.evaluate
    out = tmp_path / "run"

    def same(*given):
        result, found = evaluate(*given)
        result["box"]["AP"] = 0.25
        return result, found

    monkeypatch.setattr(detect, "evaluate", same)
    (out / "best.pt.tmp").mkdir(parents=True)
    with contextlib.suppress(SystemExit):
        run(out, "--arch", "resnet18", "--epochs", 2, "--eval-every", 1)
    assert (out / "checkpoint.pt").is_file() and not (out / "best.pt").exists()
    (out / "best.pt.tmp").rmdir()
    _, _, result = run(out, "--resume", start=[])
    assert (out / "best.pt").is_file() and (result["best_AP"], result["best_epoch"]) == (0.25, 2)


@needs_pycocotools
def test_an_image_too_slim_for_the_detector_is_skipped_and_named(folder, tmp_path, capsys):
    """At most 106 px of 3000 are kept, and of 2 px 0.07."""
    for split in ("train2017", "val2017"):
        Image.new("RGB", (3000, 2)).save(folder / split / "0.png")
        slim = dict(width=3000, height=2)
        spoil(folder, split.removesuffix("2017"), lambda content: content["images"][0].update(slim))
    flags = ["--arch", "resnet18", "--epochs", 1, "--batch-size", 2, "--max-bad", 1]
    _, _, result = run(tmp_path / "run", "--data", folder, *flags)
    reason = "0.png (3000 x 2 pixels are too slim: with --longest 106 nothing would be left of the "
    broken = (tmp_path / "run" / "broken.txt").read_text()
    printed = capsys.readouterr().err
    assert result["images"] == 4 and f"{folder}/train2017/{reason}shorter side)" in broken
    assert f"are left out of the count: {folder}/val2017/{reason}" in printed
    slim = coco.open_objects(folder, "val", longest=1600)            # 2 px become 1.07: one is left
    with pytest.raises(ValueError, match="do not fill"):     # now it is the crowd that does not fit
        slim.read(4)


@needs_pycocotools
def test_a_range_of_areas_without_objects_is_a_dash(folder, tmp_path):
    ap = ask_oracle((), "--data", folder, "--out", tmp_path)["box"]
    assert ap["L"] == -1                                     # no object has more than 96 x 96 px
    assert [detect.percent(ap[name]) for name in ("AP", "S", "L")] == ["100.0", "100.0", "-"]


def test_a_vit_keeps_2000_proposals_in_training_as_released_and_others_1000():
    """max_per_img in A2MIM's mask_rcnn_vit_fpn.py and mask_rcnn_r50_fpn.py; 1000 in all tests."""
    for arch, kept in (("deit_tiny", 2000), ("resnet18", 1000)):
        _, model = built("--arch", arch, "--proposals", 1000)
        assert model.rpn.train().post_nms_top_n() == kept
        assert model.rpn.eval().post_nms_top_n() == 1000


@needs_pycocotools
def test_boxes_alone_are_learnt_by_faster_rcnn_and_evaluated_from_its_file(voc, tmp_path, capsys):
    flags = ["--arch", "resnet18", "--epochs", 1, "--batch-size", 2]
    _, whole, result = run(tmp_path / "run", "--data", voc, *flags)
    printed = capsys.readouterr().err
    assert printed.count("no outlines: Faster R-CNN, boxes only\n") == 1 and "mask" not in printed
    assert "mask" not in result and set(result["box"]["per class"]) == {"cat", "dog"}
    assert not any("mask" in name for name in whole["model"])
    assert (tmp_path / "run" / "detections.png").is_file()
    assert not (tmp_path / "run" / "predictions.json").exists()
    alone = ["--data", voc, "--weights", tmp_path / "run" / "best.pt", "--eval-only",
             "--split-val", "test", "--save-predictions", "--workers", 0,
             "--out", tmp_path / "alone"]
    detect.main([*map(str, alone)])
    assert result_of(tmp_path / "alone")["images"] == 3
    found = json.loads((tmp_path / "alone" / "predictions.json").read_text())
    assert {one["image_id"] for one in found} == {"5", "6", "7"}
    assert {one["category_id"] for one in found} <= {1, 2}
    assert not (tmp_path / "alone" / "predictions-masks.json").exists()


@needs_pycocotools
def test_a_set_of_which_some_objects_have_an_outline_is_learnt_with_masks(folder, tmp_path, capsys):
    def change(content):
        content["annotations"][0].update(segmentation=None)
        content["annotations"][-1].update(segmentation=[])

    for split in ("train", "val"):
        spoil(folder, split, change)
    train = coco.open_objects(folder, "train")
    objects = train.read(3)[1]
    assert objects["outlined"].tolist() == [False, True]
    assert [bool(mask.any()) for mask in objects["masks"]] == [False, True]
    flags = ["--arch", "resnet18", "--epochs", 1, "--batch-size", 2]
    _, _, result = run(tmp_path / "run", "--data", folder, *flags)
    printed = capsys.readouterr().err
    assert "2 of 5 objects have no outline and are not used for the loss of masks" in printed
    assert "2 of 5 objects have no outline and are not used for the AP of masks" in printed
    assert result["images"] == 5 and min(result["box"]["AP"], result["mask"]["AP"]) >= 0


class Oracle(nn.Module):
    """Finds the annotated objects, crowds included, with equal scores.

    In the images of `wrong` it gives them another class."""

    def __init__(self, source, wrong):
        super().__init__()
        readable = [i for i in range(len(source)) if "broken" not in source.name(i)]
        self.known = []
        for number, i in enumerate(readable):
            image, objects = source.read(i)
            self.known.append((image / 255, objects, number in wrong))

    def forward(self, images):
        found = []
        for image in images:
            objects, wrong = next(rest for known, *rest in self.known if torch.equal(known, image))
            labels = objects["labels"] % 3 + 1 if wrong else objects["labels"]
            found.append(dict(boxes=objects["boxes"], labels=labels, scores=torch.ones(len(labels)),
                              masks=objects["masks"][:, None]))
        return found


def ask_oracle(wrong, *flags):
    """The result of evaluating the oracle on the part for validation."""
    args = detect.parse([*TINY, "--arch", "resnet18", *map(str, flags)])
    world = Distributed()
    oracle = Oracle(coco.open_objects(Path(args.data), "val"), wrong)
    return detect.evaluate(oracle, args, world, detect.prepare(args, world, None))[0]


@needs_pycocotools
@pytest.mark.parametrize("wrong", [False, True])
def test_the_annotations_themselves_have_ap_1_and_with_other_classes_0_but_1_as_any_class(
        wrong, folder, tmp_path):
    result = ask_oracle(range(5) if wrong else (), "--data", folder, "--out", tmp_path)
    assert result["images"] == 5
    for kind in ("box", "mask"):
        assert result[kind]["AP"] == pytest.approx(0 if wrong else 1)
        assert result[kind]["any class"] == pytest.approx(1)


class Unsure(Oracle):
    """Boxes are a little off, masks have holes, some classes are wrong, scores are random."""

    def forward(self, images):
        rng = torch.Generator().manual_seed(len(self.known) + int(images[0].sum()))
        found = super().forward(images)
        for one in found:
            n = len(one["labels"])
            one["boxes"] = one["boxes"] + 3 * torch.rand(n, 4, generator=rng)
            one["masks"] = one["masks"] * (torch.rand(one["masks"].shape, generator=rng) < 0.8)
            one["scores"] = torch.rand(n, generator=rng)
        return found


@needs_pycocotools
def test_pycocotools_itself_gives_saved_predictions_the_same_ap(folder, tmp_path):
    """Against the file of annotations. One object is of middle size by its area."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    spoil(folder, "val", lambda content: content["annotations"][0].update(area=5000))
    flags = ["--data", folder, "--arch", "resnet18", "--out", tmp_path, "--save-predictions"]
    args, world = detect.parse([*TINY, *map(str, flags)]), Distributed()
    prepared = detect.prepare(args, world, None)
    unsure = Unsure(coco.open_objects(folder, "val"), (1,))
    result, found = detect.evaluate(unsure, args, world, prepared)
    detect.report(result, found, args, world, prepared)
    seen = set()
    for kind, name, file in (("bbox", "box", "predictions.json"),
                             ("segm", "mask", "predictions-masks.json")):
        truth = COCO(str(folder / "annotations" / "instances_val2017.json"))
        judge = COCOeval(truth, truth.loadRes(str(tmp_path / file)), kind)
        judge.evaluate(), judge.accumulate(), judge.summarize()
        ours = [result[name][figure] for figure in ("AP", "AP50", "AP75", "S", "M", "L")]
        np.testing.assert_allclose(ours, judge.stats[:6], atol=1e-9, rtol=0)
        seen |= {round(value, 3) for value in ours}
    assert len(seen) >= 7
    assert json.loads((tmp_path / "result.json").read_text()) == result | {"weights": "scratch"}


def test_a_line_for_every_class():
    boxes = {"per class": {"cell": 0.5, "x\ny": -1.0}}
    result = {"box": boxes, "mask": {"per class": {"cell": 0.25, "x\ny": -1.0}}, "images": 3}
    table = detect.class_table(result, ["cell", "x\ny"]).splitlines()
    assert [line.split() for line in table] == [["class", "box", "AP", "mask", "AP"],
                                                ["cell", "50.0", "25.0"], [r"x\x0ay", "-", "-"]]
    assert "mask" not in detect.class_table({"box": boxes}, ["cell", "x\ny"])


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


@needs_pycocotools
def test_two_processes_count_every_image_once_and_agree_with_one(folder, tmp_path):
    """Five images on two processes, one of them unreadable; then a whole run on two processes."""
    spoil(folder, "val", lambda content: content["images"][1].update(file_name="broken.png"))
    flags = ["--data", folder, "--batch-size", 2, "--out", tmp_path / "run"]
    one = ask_oracle((1, 3), *flags)
    assert one["images"] == 4 and all(0.1 < one[kind]["AP"] < 0.9 for kind in ("box", "mask"))
    (tmp_path / "two.py").write_text(TWO.replace("ROOT", str(ROOT)))
    done = torchrun(tmp_path / "two.py", *flags)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.split("oracle ")[1].splitlines()[0]) == one
    assert done.stderr.count("1 images cannot be read and are left out") == 2
    assert result_of(tmp_path / "run")["images"] == 4


def test_the_demo_takes_the_weights_of_the_readmes_demo_if_they_are_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = detect.parse([])
    assert (args.init, args.weights, args.arch) == ("scratch", None, "resnet18")
    (tmp_path / "runs" / "shapes-resnet18").mkdir(parents=True)
    torch.save({}, tmp_path / "runs" / "shapes-resnet18" / "backbone.pt")
    args = detect.parse([])
    assert (args.init, args.weights) == (None, detect.DEMO_WEIGHTS)
    assert args.recipe == args.data == "shapes"


def test_the_released_recipes():
    """The lr is 0.02 at batch 16 (ViT: 3e-4). It falls to a tenth at epochs 8 and 11 of 12 (ViT: 9
    and 11; C4: 16 and 22 of 24). The shorter side is 640 to 800, the longer at most 1333."""
    folder = ["--data", "coco", "--init", "scratch"]
    steps = dense.StepPlan(16, 16, 100, 1200, 0, 0)
    for flags, epochs, falls, lr in (
            (["--arch", "resnet50"], 12, (8, 11), 0.02),
            (["--arch", "vit_base"], 12, (9, 11), 3e-4),
            (["--arch", "resnet50", "--recipe", "c4_2x"], 24, (8, 11), 0.02)):
        args = detect.parse([*folder, *flags])
        assert args.epochs == epochs and args.lr == lr and args.recipe_batch == args.lr_batch == 16
        first, second = falls
        expected = [lr] * first + [0.1 * lr] * (second - first) + [0.01 * lr] * (12 - second)
        rates = [dense.rate(100 * epoch, steps, lr, args) for epoch in range(12)]
        assert rates == pytest.approx(expected)
    args = detect.parse([*folder, "--arch", "resnet18", "--width", "8"])
    args.amp = "off"
    resize = detector(build_encoder("resnet18"), 81, args, Distributed()).transform
    assert resize.min_size == (640, 672, 704, 736, 768, 800) and resize.max_size == 1333


@pytest.mark.parametrize("layout", ["folder", "voc"])
def test_few_images_have_a_recipe_of_their_own(layout, request, monkeypatch):
    data = str(request.getfixturevalue(layout))
    flags = ["--data", data, "--init", "scratch", "--arch", "vit_base"]
    args = detect.parse(flags)
    assert (args.recipe, args.optimizer, args.image_size) == ("small", "adamw", 480)
    assert detect.parse([*flags, "--recipe", "vit"]).recipe == "vit"
    assert detect.parse([*flags, "--lr", "1"]).lr == 1
    monkeypatch.setattr(coco, "FEW_IMAGES", 4)
    assert detect.parse(flags).recipe == "vit"


def test_the_files_of_weights_fit_torchvisions_own_mask_rcnn(tmp_path):
    """The lines of the README for people with a detector of their own."""
    torch.save(build_encoder("resnet50").backbone.state_dict(), tmp_path / "backbone.pt")
    state = torch.load(tmp_path / "backbone.pt")
    net = torchvision.models.detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3)
    found = net.backbone.body.load_state_dict(state, strict=False)
    assert not found.missing_keys and all(name.startswith("fc.") for name in found.unexpected_keys)
    assert torch.equal(net.backbone.body.conv1.weight, state["conv1.weight"])
