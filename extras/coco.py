"""Objects in images: annotations in COCO's or Pascal VOC's layout, and their AP, by pycocotools.

    open_objects         a folder in one of the layouts -> Objects
    Objects              images and their objects, which loader workers share
    truth_of, results_of, average_precision       AP of boxes and masks
"""

import contextlib
import functools
import io
import json
import os
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_convert

try:
    from pycocotools import mask as mask_utils
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
except ImportError:
    COCO = None

from data import SUFFIXES, read_image
from engine.files import printable
from engine.images import reason
from extras.dense import FEW_IMAGES, name_and_reason


def check_installed() -> None:
    """Raises ValueError without pycocotools."""
    if COCO is None:
        raise ValueError("pycocotools is not installed, which reads masks and counts AP; "
                         "pip install -r extras/requirements.txt")


# ---- a folder in one of three layouts ----

def open_objects(root: Path, part: str, held_out: str | None = None,
                 longest: int | None = None) -> "Objects":
    """The images of a folder to train on (part 'train') or to evaluate on ('val').

    COCO      annotations/instances_train*.json beside train*/
    Roboflow  train*/_annotations.coco.json, among the images
    VOC       Annotations/*.xml, JPEGImages/, ImageSets/Main/train.txt
    held_out: the name of the part to evaluate on, instead of val; see --split-val.
    longest: see Objects. Raises ValueError if the part is not there, or cannot be read."""
    if is_voc(root):
        folder, content, notes = voc_content(root, part, held_out)
        told = printable(str(voc_list(root, part, held_out)))
    else:
        file, folder = coco_file(root, "train" if part == "train" else held_out or "val")
        told, notes = printable(str(file)), []
        content = load_json(file)
    objects = Objects(content, folder, told, part == "train", longest)
    objects.notes += notes
    return objects


def has_few_images(root: Path) -> bool:
    """Are there fewer than FEW_IMAGES to train on? The annotations are not read: files are counted.

    False if there is nothing to count; what is wrong is told when the folder is opened."""
    with contextlib.suppress(ValueError, OSError):
        if is_voc(root):
            return len(listed(root, "train", None)) < FEW_IMAGES
        _, folder = coco_file(root, "train")
        return len(os.listdir(folder)) < FEW_IMAGES
    return False


# ---- COCO's layout ----

def coco_file(root: Path, split: str) -> tuple[Path, Path]:
    """The json of a split, and the folder of its images. Raises ValueError if one is not there."""
    shown = printable(str(root))
    files = sorted((root / "annotations").glob(f"instances_{split}*.json"))
    if not files:                                            # Roboflow's
        files = sorted(root.glob(f"{split}*/_annotations.coco.json"))
    if len(files) != 1:
        raise ValueError(
            f"--data {shown}: {len(files) or 'no'} files annotations/instances_{split}*.json; "
            f"expected one, as COCO's instances_{split}2017.json beside {split}2017/*.jpg, or "
            f"{split}/_annotations.coco.json, or Pascal VOC's ImageSets/Main/; or give shapes")
    file = files[0]
    if file.name == "_annotations.coco.json":
        return file, file.parent
    folder = root / file.stem.removeprefix("instances_")
    if not folder.is_dir():
        raise ValueError(f"--data {shown}: no folder {printable(str(folder))}/ for the images of "
                         f"{printable(file.name)}")
    return file, folder


def load_json(file: Path) -> dict:
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{printable(str(file))}: cannot be read as COCO's annotations "
                         f"({printable(str(error))})") from None


# ---- Pascal VOC's layout ----

def is_voc(root: Path) -> bool:
    return (root / "ImageSets" / "Main").is_dir()


def voc_list(root: Path, part: str, held_out: str | None) -> Path:
    """The file ImageSets/Main/<name>.txt that lists a part. Raises ValueError if it is not there.

    val     held_out, or val.txt, or test.txt
    train   train.txt. If val.txt is not held out, then trainval.txt comes first, as in VOC 2007."""
    folder = root / "ImageSets" / "Main"
    there = [name for name in ("train", "trainval", "val", "test")
             if (folder / f"{name}.txt").is_file()]
    if held_out is None:
        held_out = "val" if "val" in there else "test"
    if part == "val":
        names = [held_out]
    elif held_out == "val":
        names = ["train", "trainval"]
    else:
        names = ["trainval", "train"]
    for name in names:
        if (folder / f"{name}.txt").is_file():
            return folder / f"{name}.txt"
    flag = "; choose another with --split-val" if part == "val" else ""
    raise ValueError(f"--data {printable(str(root))}: no {' or '.join(names)}.txt in "
                     f"{printable(str(folder))}; there is {', '.join(there) or 'none'}{flag}")


def listed(root: Path, part: str, held_out: str | None) -> list[str]:
    """The names of a part's images, without .jpg. What is held out is not trained on."""
    def names_in(file: Path) -> list[str]:
        lines = os.fsdecode(file.read_bytes().removeprefix(b"\xef\xbb\xbf")).splitlines()
        return [line.strip() for line in lines if line.strip()]

    names = dict.fromkeys(names_in(voc_list(root, part, held_out)))
    if part == "train":
        for name in names_in(voc_list(root, "val", held_out)):
            names.pop(name, None)
    return list(names)


def voc_content(root: Path, part: str, held_out: str | None) -> tuple[Path, dict, list[str]]:
    """A part of a folder in VOC's layout -> (folder of the images, COCO's content, notes).

    Classes: classes.txt, a name a line, or else all names in Annotations/*.xml, sorted.
    An object that is `difficult` becomes a crowd: it is not trained on, and in an evaluation it is
    neither asked for nor wrong. The id of an image is its name, the ids of classes count from 1.
    Raises ValueError if something listed cannot be read."""
    told = printable(str(voc_list(root, part, held_out)))
    names = listed(root, part, held_out)
    pictures = {}
    folder = root / "JPEGImages"
    files = sorted(os.listdir(folder)) if folder.is_dir() else []
    for file in files:
        stem, suffix = os.path.splitext(file)
        if suffix.lower() in SUFFIXES:
            pictures[stem] = file
    missing = [name for name in names if name not in pictures]
    if missing:
        raise ValueError(f"{told}: lists {len(missing)} of {len(names)} images that are not in "
                         f"JPEGImages/, the first is {printable(missing[0])}; add them, or take "
                         f"them off the list")

    parsed, failed = {}, {}
    others = [file.stem for file in (root / "Annotations").glob("*.xml")]    # for their classes
    for name in dict.fromkeys([*names, *others]):
        try:
            parsed[name] = read_xml(root / "Annotations" / f"{name}.xml")
        except ValueError as error:
            failed[name] = str(error)
    is_listed = set(names)
    failed = {name: why for name, why in failed.items() if name in is_listed}
    if failed:
        name, why = next(iter(failed.items()))
        raise ValueError(f"{told}: {len(failed)} of {len(names)} annotations cannot be read, the "
                         f"first is Annotations/{printable(name)}.xml ({printable(why)}); repair "
                         f"them, or take them off the list")

    found = {one["name"] for picture in parsed.values() for one in picture["objects"]}
    classes = class_names(root / "classes.txt", found) or sorted(found)
    label_of = {name: label for label, name in enumerate(classes, 1)}
    content = {"images": [], "annotations": []}
    content["categories"] = [{"id": label, "name": name} for name, label in label_of.items()]
    clipped = dropped = 0
    for name in names:
        W, H = parsed[name]["size"]
        image = {"id": name, "file_name": pictures[name], "width": W, "height": H}
        content["images"].append(image)
        for one in parsed[name]["objects"]:
            # VOC counts pixels from 1, and its last column and row are inside. Tools that count
            # from 0 write a 0 here, which is no mistake.
            xmin, ymin, xmax, ymax = one["corners"]
            x1, y1 = max(xmin - 1, 0), max(ymin - 1, 0)
            x2, y2 = (min(xmax, W), min(ymax, H)) if W and H else (xmax, ymax)
            if x2 <= x1 or y2 <= y1:
                dropped += 1
                continue
            if xmin < 0 or ymin < 0 or (x2, y2) != (xmax, ymax):
                clipped += 1
            content["annotations"].append({
                "image_id": name, "category_id": label_of[one["name"]],
                "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": one["difficult"]})

    notes = [f"{told}: {len(names)} images"]
    if clipped:
        notes.append(f"{told}: {clipped} boxes reach out of their image and are clipped")
    if dropped:
        notes.append(f"{told}: {dropped} boxes are empty, or outside of their image, and left out")
    return root / "JPEGImages", content, notes


def class_names(file: Path, found: set[str]) -> list[str] | None:
    """The lines of classes.txt; None if there is no such file. ValueError: a class is missing."""
    if not file.is_file():
        return None
    lines = file.read_text(encoding="utf-8-sig", errors="backslashreplace").splitlines()
    names = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    unknown = sorted(found - set(names))
    if unknown:
        raise ValueError(f"{printable(str(file))}: lists no class {printable(unknown[0])}, which "
                         f"Annotations/ has; add it to the list")
    return names


def read_xml(file: Path) -> dict:
    """VOC's annotation of an image: its size (W, H), 0 if not given, and its objects.

    Each has name, corners (xmin, ymin, xmax, ymax) and difficult (0 or 1).
    Raises ValueError, with the reason, if it cannot be read."""
    try:
        tree = ElementTree.parse(file).getroot()
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except (OSError, SyntaxError, ValueError, LookupError) as error:         # LookupError: encoding
        raise ValueError(f"not xml: {reason(error)}") from None

    def numbers(element, *paths: str) -> list[float]:
        values = [float(element.findtext(path)) for path in paths]
        if not all(abs(value) < 1e6 for value in values):    # nan is not, either
            raise ValueError
        return values

    try:
        size = numbers(tree, "size/width", "size/height")
    except (TypeError, ValueError):
        size = (0, 0)
    objects = []
    for one in tree.findall("object"):
        name = (one.findtext("name") or "").strip()
        if not name:
            raise ValueError("an object without a name")
        try:
            sides = ("bndbox/xmin", "bndbox/ymin", "bndbox/xmax", "bndbox/ymax")
            corners = numbers(one, *sides)
        except (TypeError, ValueError):
            raise ValueError(f"an object {short(name)} whose bndbox is not four numbers: xmin, "
                             f"ymin, xmax, ymax") from None
        difficult = (one.findtext("difficult") or "").strip() == "1"
        objects.append({"name": name, "corners": corners, "difficult": int(difficult)})
    return {"size": [int(side) for side in size], "objects": objects}


# ---- images and their objects ----

def is_too_slim(image: Tensor, longest: int) -> bool:
    """Would nothing be left of the shorter side of (3, H, W) in a detector, whose longer side is at
    most `longest`?"""
    H, W = image.shape[1:]
    # the detector rounds the shorter side down to whole pixels, in float32: hence 1.01
    return min(H, W) * longest < 1.01 * max(H, W)


class Objects:
    """Images with objects, from the content of a json in COCO's format.

    Training leaves out crowds, boxes of a pixel or less, and images in which nothing remains;
    evaluation keeps all. Classes count from 1 in the order of their ids, 0 is the background.
    outlines, count: the numbers of objects with an outline, and of all; without crowds."""

    def __init__(self, content: dict, folder: Path, told: str, train: bool,
                 longest: int | None = None):
        """told: what the content is called in messages. longest: px that the longer side may have
        in the detector. An image so slim that its shorter side would vanish is refused.

        Raises ValueError for a content that cannot be used."""
        self.root, self.train, self.longest, self.notes = folder, train, longest, []
        try:
            images = by_id(content["images"], "images")
            names = {}
            for i, one in by_id(content["categories"], "categories").items():
                # json may hold half of a surrogate pair, which no terminal and no file takes
                names[i] = str(one["name"]).encode(errors="backslashreplace").decode()
            if len({*names.values()}) < len(names):
                raise ValueError("two classes have the same name")
            objects = {i: [] for i in images}
            unlisted = []                                    # images that only annotations name
            for one in content["annotations"]:
                image, crowd = one["image_id"], one.get("iscrowd")
                if image not in objects:
                    unlisted.append(image)
                    continue
                if crowd not in (None, 0, 1):
                    raise ValueError(f"iscrowd of annotation {short(one.get('id'))} is "
                                     f"{short(crowd)}; it must be 0 or 1")
                objects[image].append(one)
            if train:
                images = {i: image for i, image in images.items()
                          if any(map(self.wanted, objects[i]))}
            files = [os.fsencode(image["file_name"]) for image in images.values()]
            sizes = [(image.get("height", 0), image.get("width", 0)) for image in images.values()]
            self.sizes = np.array(sizes, np.int64).reshape(-1, 2)        # (N, 2), 0: not given
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{told}: cannot be read as COCO's annotations "
                             f"({printable(why)})") from None
        if not images or not names:
            what = "classes"
            if not images:
                what = "images with objects" if train else "images"
            raise ValueError(f"{told}: holds no {what}")
        if unlisted:
            self.notes.append(f"{told}: {len(unlisted)} annotations are of images that are not "
                              f"listed, such as {short(unlisted[0])}, and left out")
        self.classes, self.class_ids = list(names.values()), list(names)
        self.label_of = {i: label for label, i in enumerate(names, 1)}
        asked = [one for i in images for one in objects[i] if not one.get("iscrowd")]
        self.count = len(asked)
        self.outlines = sum(bool(one.get("segmentation")) for one in asked)
        # One text and arrays, not objects: these would be copied into every worker as their
        # reference counts change.
        texts = [json.dumps({"id": i, "objects": objects[i]}).encode() for i in images]
        self.text, self.starts = b"".join(texts), np.cumsum([0, *map(len, texts)])
        self.names = np.array(files)

    def __len__(self) -> int:
        return len(self.names)

    def record(self, index: int) -> dict:
        """{id: of the image, objects: its annotations, as they stand in the file}."""
        return json.loads(self.text[self.starts[index]:self.starts[index + 1]])

    @functools.cache
    def name(self, index: int) -> str:
        """The file, and what is wrong with it or with its objects, if something is."""
        return name_and_reason(self, index, self.file(index))

    def file(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    @staticmethod
    def wanted(one: dict) -> bool:
        """Is it trained on? If it cannot be read, too: its image is then counted as broken."""
        if one.get("iscrowd"):
            return False
        return not well_formed(one.get("bbox")) or min(one["bbox"][2:]) > 1

    def read(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Image uint8 (3, H, W), and of its G objects

        boxes (G, 4) XYXY    labels (G,)    crowd (G,)    area (G,) as annotated, or of the box
        masks (G, H, W), empty for an object without an outline, and outlined (G,): has it one?
        Both are there if any object of the set has an outline.
        Raises ValueError for an annotation that makes no sense, and as `read_image` does."""
        if not os.path.isfile(self.file(index)):
            raise OSError("no such file")
        image = read_image(self.file(index))
        H, W = image.shape[1:]
        if self.sizes[index].all() and self.sizes[index].tolist() != [H, W]:
            h, w = self.sizes[index].tolist()
            raise ValueError(f"the image has {W} x {H} pixels, its annotation says {w} x {h}")
        if self.longest and is_too_slim(image, self.longest):
            raise ValueError(f"{W} x {H} pixels are too slim: with --longest {self.longest} "
                             f"nothing would be left of the shorter side")
        objects = self.record(index)["objects"]
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
        boxes = torch.from_numpy(boxes.astype("float32" if self.train else "float64"))
        annotated = []
        for one, of_box in zip(objects, areas):
            annotated.append(of_box if one.get("area") is None else one["area"])
        labels = [self.label_of[one["category_id"]] for one in objects]
        crowd = [bool(one.get("iscrowd")) for one in objects]
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(H, W)),
            "labels": torch.tensor(labels, dtype=torch.long),
            "crowd": torch.tensor(crowd, dtype=torch.bool),
            "area": torch.tensor(annotated, dtype=torch.double),
        }
        if self.outlines:
            outlined = [bool(one.get("segmentation")) for one in objects]
            masks = np.zeros((len(objects), H, W), np.uint8)
            for mask, one, known in zip(masks, objects, outlined):
                if known:
                    mask[:] = to_mask(one["segmentation"], H, W)
            target["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
            target["outlined"] = torch.tensor(outlined, dtype=torch.bool)
        return tv_tensors.Image(image), target

    def check(self, one: dict) -> None:
        """Raises ValueError, with the reason, for an object that cannot be learnt from."""
        kind = one.get("category_id")
        if kind not in list(self.label_of):                  # a list: a file may give any type
            raise ValueError(f"an object of class {short(kind)}, which is not in the list")
        if one.get("bbox") in (None, []):
            raise ValueError("an object without a box")
        if not well_formed(one["bbox"]):
            raise ValueError("an object whose box is not four numbers: x, y, width, height")
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
            and all(isinstance(v, (int, float)) and abs(v) < 1e6 for v in box)
            and min(box[2:]) >= 0)


# ---- outlines ----

def to_mask(outline: list | dict, h: int, w: int) -> np.ndarray:
    """Polygons, flat x, y, x, y ..., or run lengths {size, counts} -> uint8 (h, w), 1 inside.

    Raises ValueError for anything else: pycocotools would crash, or return what was in memory."""
    if isinstance(outline, list):
        for polygon in outline:
            check_polygon(polygon)
        return fill(outline, h, w)
    if not isinstance(outline, dict):
        raise ValueError("an outline is neither a list of polygons nor run lengths")
    size, counts = outline.get("size"), outline.get("counts")
    wrong = ValueError(f"run lengths of size {short(size)} do not fill an image of {h} x {w}")
    if size != [h, w] or not isinstance(counts, (list, str)):
        raise wrong
    if isinstance(counts, list):
        whole = all(isinstance(run, int) and run >= 0 for run in counts)
        if not whole or sum(counts) != h * w:
            raise wrong
        return mask_utils.decode(mask_utils.frPyObjects(outline, h, w))
    try:
        runs = {"size": size, "counts": counts.encode("ascii")}
        mask = mask_utils.decode(runs)
    except ValueError:                                       # too many pixels, or not ascii
        raise wrong from None
    if mask_utils.encode(mask)["counts"] != runs["counts"]:  # too few: the rest was never written
        raise wrong
    return mask


def fill(polygons: list[list[float]], h: int, w: int) -> np.ndarray:
    """Flat polygons x, y, x, y ... -> uint8 (h, w), 1 inside any of them.

    pycocotools fills them inside their common box: 0.06 ms for an object of 100 px in 640 x 480,
    and 0.23 ms over the whole image."""
    points = np.concatenate([np.array(polygon, float) for polygon in polygons])
    (left, right), (top, bottom) = span(points[::2], w), span(points[1::2], h)
    mask = np.zeros((h, w), np.uint8)
    if left >= right or top >= bottom:                       # outside of the image
        return mask
    moved = []
    for polygon in polygons:
        flat = np.array(polygon, float)
        flat[::2] = moved_by(left, flat[::2])
        flat[1::2] = moved_by(top, flat[1::2])
        moved.append(flat.tolist())
    parts = mask_utils.frPyObjects(moved, bottom - top, right - left)
    mask[top:bottom, left:right] = mask_utils.decode(mask_utils.merge(parts))
    return mask


def span(values: np.ndarray, limit: int) -> tuple[int, int]:
    """The whole pixels (first, last + 1) that coordinates reach, with a margin, inside 0 to
    `limit`."""
    low, high = int(np.floor(values.min())) - 1, int(np.ceil(values.max())) + 2
    return max(0, low), min(limit, high)


def moved_by(pixels: int, values: np.ndarray) -> np.ndarray:
    """values - pixels, so that pycocotools rounds them as it would round the values: it takes
    int(5 value + 0.5) fifths of a pixel."""
    if pixels == 0:
        return values
    return (np.floor(5 * values + 0.5) - 5 * pixels) / 5


def check_polygon(polygon: list) -> None:
    """Raises ValueError for anything but three or more points x, y in pixels."""
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


def run_lengths(masks: Tensor) -> list[dict]:
    """bool (N, H, W) -> COCO's {size, counts} of each, which json can hold."""
    by_column = masks.byte().transpose(1, 2).contiguous().cpu().numpy()      # (N, W, H)
    runs = mask_utils.encode(by_column.transpose(2, 1, 0))   # (H, W, N), in Fortran's order
    return [{"size": one["size"], "counts": one["counts"].decode()} for one in runs]


# ---- AP ----

def truth_of(target: dict[str, Tensor], image: int) -> list[dict]:
    """The objects of an image (see Objects.read) as COCO's annotations, with labels for classes.

    Drawn scenes have no crowds; the area of their objects is their mask's."""
    boxes = to_xywh(target["boxes"])
    masks = target["masks"].as_subclass(Tensor).bool() if "masks" in target else None
    count = len(boxes)
    crowd = target.get("crowd", torch.zeros(count, dtype=torch.bool))
    area = target["area"] if "area" in target else masks.sum((1, 2)).double()
    outlined = target.get("outlined", torch.full((count,), masks is not None))
    runs = run_lengths(masks) if masks is not None and count else [None] * count
    columns = (boxes, target["labels"], crowd, area, outlined)
    annotations = []
    for box, label, is_crowd, size, known, outline in zip(*(c.tolist() for c in columns), runs):
        one = {"image_id": image, "category_id": label, "bbox": box, "area": size,
               "iscrowd": int(is_crowd)}
        annotations.append(one | {"segmentation": outline} if known else one)
    return annotations


def results_of(found: dict[str, Tensor], image: int) -> list[dict]:
    """What was found in an image, as COCO's results, with labels for classes.

    found: boxes (D, 4) XYXY, labels (D,), scores (D,), and of Mask R-CNN masks bool (D, H, W)."""
    columns = to_xywh(found["boxes"]), found["labels"], found["scores"]
    results = []
    for box, label, score in zip(*(column.tolist() for column in columns)):
        results.append({"image_id": image, "category_id": label, "bbox": box, "score": score})
    if "masks" in found and results:
        for one, outline in zip(results, run_lengths(found["masks"])):
            one["segmentation"] = outline
    return results


def to_xywh(boxes: Tensor) -> Tensor:
    """XYXY (N, 4) -> x, y, width, height, float64."""
    return box_convert(boxes.as_subclass(Tensor).cpu().double(), "xyxy", "xywh")


def average_precision(images: list[dict], truth: list[dict], found: list[dict],
                      classes: list[str], with_masks: bool) -> dict:
    """{"box": figures, "mask": figures} by pycocotools; without masks, boxes alone.

    images: {id, height, width}. truth, found: see truth_of and results_of.
    figures: AP, AP50, AP75, S, M, L over all classes; "any class": AP if classes do not matter;
    "per class". All are 0 to 1, and -1 where there is no object.
    For AP of masks, the box of an object without an outline is a crowd: it cannot be judged."""
    scores = {"box": figures(images, truth, found, classes, "bbox")}
    if with_masks:
        known = [one if "segmentation" in one else as_crowd(one) for one in truth]
        scores["mask"] = figures(images, known, found, classes, "segm")
    return scores


def as_crowd(one: dict) -> dict:
    x, y, w, h = one["bbox"]
    corners = [x, y, x + w, y, x + w, y + h, x, y + h]
    return one | {"iscrowd": 1, "segmentation": [corners]}


def figures(images: list[dict], truth: list[dict], found: list[dict],
            classes: list[str], kind: str) -> dict:
    """The figures of one kind, bbox or segm. See average_precision."""
    results = []
    for one in found:
        w, h = one["bbox"][2:]
        area = w * h if kind == "bbox" else float(mask_utils.area(one["segmentation"]))
        results.append(one | {"area": area, "iscrowd": 0})
    with contextlib.redirect_stdout(io.StringIO()):          # pycocotools prints
        sides = as_coco(images, truth, classes), as_coco(images, results, classes)
        by_class = precision(COCOeval(*sides, kind), use_classes=True)       # (T, R, classes, A)
        any_class = precision(COCOeval(*sides, kind), use_classes=False)     # (T, R, 1, A)
    return {
        "AP": mean(by_class[..., 0]),
        "AP50": mean(by_class[0, ..., 0]),
        "AP75": mean(by_class[5, ..., 0]),
        "S": mean(by_class[..., 1]),
        "M": mean(by_class[..., 2]),
        "L": mean(by_class[..., 3]),
        "any class": mean(any_class[..., 0]),
        "per class": {name: mean(by_class[:, :, c, 0]) for c, name in enumerate(classes)},
    }


def as_coco(images: list[dict], annotations: list[dict], classes: list[str]) -> "COCO":
    """Annotations or results as a COCO object. Ids count from 1: for pycocotools 0 is no match."""
    api = COCO()
    api.dataset = {
        "images": images,
        "annotations": [one | {"id": number} for number, one in enumerate(annotations, 1)],
        "categories": [{"id": label, "name": name} for label, name in enumerate(classes, 1)],
    }
    api.createIndex()
    return api


def precision(judge: "COCOeval", use_classes: bool) -> np.ndarray:
    """Precision (T, R, classes, A), of at most 100 detections an image.

    T = 10 thresholds of IoU (0.5 to 0.95), R = 101 recalls, A = 4 ranges of area (all, S, M, L)."""
    judge.params.useCats = int(use_classes)
    judge.params.maxDets = [100]
    judge.evaluate()
    judge.accumulate()
    return judge.eval["precision"][..., 0]


def mean(values: np.ndarray) -> float:
    """Of those that are not -1; -1 if there is none."""
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0
