"""Runs a trained net on a folder of new pictures: a classifier, a segmenter or a detector.

    python extras/predict.py runs/tuned/best.pt /path/to/photos
    python extras/predict.py runs/set-resnet18-segment-small/best.pt /path/to/photos --out predicted

best.pt is of finetune.py, extras/segment.py or extras/detect.py, with its model.json beside it.
Pictures may have any size, with sides up to 100 : 1. Writes into --out, a new folder:

    predictions.csv    classifier: file, class, probability; then the next likely classes
    labels/            segmenter: PNG files of class numbers, which a palette shows in colours
    overlays/          the pictures under these colours; legend.png names the colours
    pictures/          detector: the pictures with boxes, and with masks if it has learnt some
    predictions.json   COCO's results, with the name of the file; predictions-masks.json: of masks
    broken.txt         the files that cannot be read, with the reasons
"""

import csv
import json
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as tvf
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import MEAN, STD, Folder, eval_transform, ignore_signals, normalise, open_images
from engine.command import Distributed, command_line
from engine.description import KINDS, read_description
from engine.files import printable, replace_atomically, write_text_atomically
from engine.flags import AMP, DATA_FLAGS, FRACTION, RUN_FLAGS, Parser, defaults, path
from engine.images import UNREADABLE, reason
from engine.weights import load_backbone, load_head
from extras.coco import check_installed, is_too_slim, results_of
from extras.dense import layout_for, load_state, read_state
from extras.detect import as_float, drawn, has_masks, longest_side, sure_of
from extras.mask_rcnn import detector
from extras.output import check_folder, free_name
from extras.pixels import Segmenter, fitted, legend, overlay, save_labels
from extras.segment import predict
from model import Classifier, build_encoder


class Pictures(Dataset):
    """The pictures of a folder: (index, picture as `prepare` makes it, or None, reason)."""

    def __init__(self, source: Folder, prepare):
        self.source = source
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        try:
            image = self.source.read(index)
            return index, self.prepare(image), ""
        except UNREADABLE as error:
            return index, None, reason(error)


# ---- one kind of net each: what is done to a picture, and what is written ----

def unchanged(image: Tensor) -> Tensor:
    return image


class Predictor:
    """What the kinds have in common. A subclass has

    build       makes the model, with its weights
    __call__    predicts some pictures
    finish      writes what belongs to all pictures, and returns the names of what was written"""
    at_once = 1                                              # pictures in a forward pass
    prepare = staticmethod(unchanged)                        # in the loader, uint8 (3, H, W)

    def __init__(self, about: SimpleNamespace, args: SimpleNamespace, world: Distributed):
        self.about, self.args, self.world = about, args, world
        self.size = tuple(about.image_size)                  # (H, W)
        self.encoder = build_encoder(about.arch, self.size, None, about.patch_size, about.window,
                                     about.stem)
        # the settings that the functions of segment.py and mask_rcnn.py ask for
        self.settings = SimpleNamespace(**{**vars(about), "amp": args.amp,
                                           "channels_last": args.channels_last})
        self.model = self.build().eval()
        self.memory_format = layout_for(self.settings, world)
        self.model = self.model.to(world.device).to(memory_format=self.memory_format)

    def start(self, out: Path, names: list[str]) -> None:
        """names: the pictures' paths below their folder."""
        self.out, self.names = out, names
        self.png_names = as_png(names)

    def state(self) -> dict[str, Tensor]:
        """The weights of a segmenter or of a detector."""
        return read_state(self.args.weights, f"does not hold the {self.about.kind} of {MODEL}")


MODEL = "the model.json beside it; copy both from the folder of one run"


class ClassifierPredictor(Predictor):
    at_once = 64

    def build(self) -> Classifier:
        model = Classifier(self.about.arch, self.encoder, len(self.about.classes))
        load_head(model, self.args.weights)
        found = load_backbone(self.encoder, self.args.weights, self.about.image_size)
        if found["missing"]:
            raise ValueError(f"{self.args.weights}: lacks {', '.join(found['missing'][:3])} of "
                             f"{MODEL}")
        self.prepare = eval_transform(self.size, self.about.test_crop)
        self.rows = []
        return model

    def __call__(self, indices: list[int], images: list[Tensor]) -> None:
        batch = normalise(torch.stack(images), self.world.device)
        batch = batch.contiguous(memory_format=self.memory_format)
        amp = self.args.amp
        with torch.autocast(self.world.device.type, AMP[amp], enabled=amp != "off"):
            logits = self.model(batch)                       # (B, classes)
        shares = logits.float().softmax(1)
        best, labels = shares.topk(min(5, shares.shape[1]))  # (B, 5)
        for i, row_shares, row_labels in zip(indices, best.tolist(), labels.tolist()):
            row = [self.names[i]]
            for share, label in zip(row_shares, row_labels):
                row += [self.about.classes[label], f"{share:.6f}"]
            self.rows.append(row)

    def finish(self) -> str:
        columns = ["file", "class", "probability"]
        for k in range(2, min(5, len(self.about.classes)) + 1):
            columns += [f"class {k}", f"probability {k}"]
        with (replace_atomically(self.out / "predictions.csv") as beside,
              # a name that is not UTF-8 keeps its bytes
              open(beside, "w", newline="", encoding="utf-8", errors="surrogateescape") as file):
            csv.writer(file).writerows([columns, *self.rows])
        return "predictions.csv"


class SegmenterPredictor(Predictor):
    def build(self) -> Segmenter:
        about, state = self.about, self.state()
        model = Segmenter(self.encoder, about.head, about.width, len(about.classes), 0.0, about.aux)
        load_state(model, state, self.args.weights, f"does not hold the segmenter of {MODEL}")
        self.colours = np.full((256, 3), 255, np.uint8)
        self.colours[:len(about.colours)] = about.colours
        return model

    def __call__(self, indices: list[int], images: list[Tensor]) -> None:
        for i, image in zip(indices, images):
            small = fitted(image, min(self.size))[None]
            size = tuple(image.shape[1:])
            [predicted] = predict(self.model, small, size, self.settings, self.world)    # (H, W)
            labels = self.out / "labels" / self.png_names[i]
            save_labels(labels, predicted, self.about.numbers, self.colours)
            save_picture(overlay(image, predicted, self.colours),
                         self.out / "overlays" / self.png_names[i])

    def finish(self) -> str:
        classes = range(len(self.about.classes))
        legend(self.about.classes, self.colours, classes, 480).save(self.out / "legend.png")
        return "labels/, overlays/, legend.png"


class DetectorPredictor(Predictor):
    def build(self):
        check_installed()
        state = self.state()
        self.settings.image_size = self.size[0]
        self.with_masks = has_masks(state)
        model = detector(self.encoder, len(self.about.classes) + 1, self.settings, self.world,
                         self.with_masks)
        load_state(model, state, self.args.weights, f"does not hold the detector of {MODEL}")
        self.prepare = partial(refuse_slim, longest=longest_side(self.settings))
        self.boxes, self.masks = [], []
        return model

    def __call__(self, indices: list[int], images: list[Tensor]) -> None:
        for i, image in zip(indices, images):
            [found] = self.model([as_float(image, self.world)])
            if self.with_masks:
                found["masks"] = found["masks"][:, 0] > 0.5  # (D, H, W)
            sure = sure_of(found, self.args.score)
            picture = drawn(image, sure, self.about.classes, max(image.shape))
            picture = tvf.to_dtype(picture, torch.uint8, scale=True)
            save_picture(picture, self.out / "pictures" / self.png_names[i])
            name = printable(self.names[i], None)
            for one in results_of(found, i + 1):
                one |= {"category_id": self.about.class_ids[one["category_id"] - 1],
                        "file_name": name}
                outline = one.pop("segmentation", None)
                self.boxes.append(one)
                if outline:
                    # without `bbox`: pycocotools would take its area for S, M and L
                    mask = {key: value for key, value in one.items() if key != "bbox"}
                    self.masks.append(mask | {"segmentation": outline})

    def finish(self) -> str:
        write_text_atomically(self.out / "predictions.json", json.dumps(self.boxes) + "\n")
        if not self.with_masks:
            return "pictures/, predictions.json"
        write_text_atomically(self.out / "predictions-masks.json", json.dumps(self.masks) + "\n")
        return "pictures/, predictions.json, predictions-masks.json"


PREDICTORS = {"classifier": ClassifierPredictor, "segmenter": SegmenterPredictor,
              "detector": DetectorPredictor}
assert set(PREDICTORS) == set(KINDS)


def refuse_slim(image: Tensor, longest: int) -> Tensor:
    """The image. Raises ValueError if a detector whose longer side is at most `longest` would leave
    nothing of it."""
    H, W = image.shape[1:]
    if is_too_slim(image, longest):
        raise ValueError(f"{W} x {H} pixels are too slim")
    return image


def save_picture(picture: Tensor, file: Path) -> None:
    """uint8 (3, H, W) as a PNG file. Raises OSError if it cannot be written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "PNG")


def as_png(names: list[str]) -> list[str]:
    """The names that pictures made of these files get: a.jpg becomes a.png, unless there is a.bmp,
    too; then they become a.jpg.png and a.bmp.png."""
    count = Counter(os.path.splitext(name)[0] for name in names)
    result = []
    for name in names:
        stem = os.path.splitext(name)[0]
        result.append(f"{stem}.png" if count[stem] == 1 else f"{name}.png")
    if len(set(result)) < len(names):
        result = [f"{name}.png" for name in names]
    return result


# ---- the command ----

@torch.inference_mode()
def run(args: SimpleNamespace, world: Distributed) -> None:
    """Writes the predictions for a folder. Raises ValueError for a mistake."""
    if world.size > 1:
        raise ValueError(f"{world.size} processes: predict.py runs as one; start it without "
                         f"torchrun")
    world.set_device(args.device, fixed_sizes=False)
    args.amp = args.amp or world.default_amp()
    about = read_description(args.weights)
    if (tuple(about.mean), tuple(about.std)) != (MEAN, STD):
        raise ValueError(f"{args.weights}: was trained with mean {about.mean} and std {about.std} "
                         f"of the input, data.py has {MEAN} and {STD}")
    source = open_folder(args.folder, about)
    out = choose_out(args)
    try:
        predictor = PREDICTORS[about.kind](about, args, world)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{args.weights}: does not fit {MODEL} ({reason(error)})") from None
    names = [os.fsdecode(name) for name in source.names]
    predictor.start(out, names)
    print(f"{about.kind} {about.arch}, {len(about.classes)} classes; {len(names)} images in "
          f"{printable(args.folder)}; {world.device.type}, amp {args.amp}; writing "
          f"{printable(str(out))}/", file=sys.stderr)

    workers = 1 if args.workers is None else args.workers
    loader = DataLoader(Pictures(source, predictor.prepare), predictor.at_once,
                        num_workers=workers, collate_fn=list, worker_init_fn=ignore_signals)
    broken, done = [], 0
    with tqdm(total=len(names), unit="image", disable=not sys.stderr.isatty()) as bar:
        for batch in loader:
            good = [(index, image) for index, image, _ in batch if image is not None]
            for index, image, why in batch:
                if image is None:
                    broken.append(f"{printable(names[index], None)} ({why})")
            if good:
                out.mkdir(parents=True, exist_ok=True)
                predictor(*zip(*good))
            done += len(good)
            bar.update(len(batch))

    if not done:
        raise ValueError(f"{printable(args.folder)}: none of its {len(names)} images can be read: "
                         f"{printable(broken[0])}" + " and the others" * (len(names) > 1))
    written = predictor.finish()
    if broken:
        write_text_atomically(out / "broken.txt", "\n".join(broken) + "\n")
        others = f" and {len(broken) - 3} more, see broken.txt" if len(broken) > 3 else ""
        print(f"{len(broken)} of {len(names)} images cannot be read: {', '.join(broken[:3])}"
              f"{others}", file=sys.stderr)
    print(f"{done} images: wrote {written}", file=sys.stderr)


def open_folder(folder: str, about: SimpleNamespace) -> Folder:
    """The images at any depth below a folder. Raises ValueError if there is none.

    A classifier's JPEG files may be decoded smaller, as in its evaluation."""
    if not os.path.isdir(folder):
        raise ValueError(f"{printable(folder)}: no such folder; give a folder of images")
    share = about.test_crop**2 if about.kind == "classifier" else None
    try:
        return open_images(os.path.abspath(folder), "all", tuple(about.image_size), crop_min=share)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("--data ")) from None


def choose_out(args: SimpleNamespace) -> Path:
    """--out, which must not be there yet. Raises ValueError if it is, or cannot be written."""
    if args.out is None:
        name = os.path.basename(os.path.abspath(args.folder))
        out = free_name(Path("runs") / f"{name}-predictions")
    else:
        out = Path(args.out)
    if os.path.lexists(out):
        raise ValueError(f"--out {printable(str(out))}: is there already; choose another name")
    check_folder(out)
    return out


FLAGS = {
    "what is written": {
        "out": (None, path("DIR"), "a new folder (runs/<folder>-predictions, numbered if taken)"),
        "score": (0.5, FRACTION, "detector: least score of a box that is drawn")},
    "how it runs": {
        "device": RUN_FLAGS["device"],
        "amp": RUN_FLAGS["amp"],
        "channels_last": RUN_FLAGS["channels_last"],
        "workers": (None, DATA_FLAGS["workers"][1], "loader processes (1)")},
}


def parse(argv: list[str] | None) -> SimpleNamespace:
    """Raises ValueError for a wrong value."""
    parser = Parser("predict.py", "%(prog)s BEST.PT FOLDER [options]", __doc__, FLAGS, {})
    parser.add_argument("weights", metavar="BEST.PT", help="of a run, with model.json beside it")
    parser.add_argument("folder", metavar="FOLDER", help="of JPEG, PNG, WebP or BMP files")
    return SimpleNamespace(**{**defaults(FLAGS), **vars(parser.parse_args(argv))})


def main(argv: list[str] | None = None) -> None:
    command_line("predict.py", parse, run, argv)


if __name__ == "__main__":
    main()
