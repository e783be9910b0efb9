"""Facts about predict.py and model.json: predictions of a folder score as the evaluation does.

    python -m pytest -q extras/test_predict.py
"""

import csv
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.models as tv
from PIL import Image

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

import finetune
from data import MEAN, STD
from engine import testing
from engine.description import read_description
from extras import detect, predict, segment
from extras.testing import SMALL_NET, camvid, miou_by_numpy, needs_pycocotools, noise
from model import Classifier, build_encoder

pytestmark = [
    pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning"),
    # pycocotools calls numpy in the way of numpy 1
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


def predicted(out, weights, folder, *flags):
    """Runs predict.py in this process."""
    flags = [weights, folder, "--out", out, "--amp", "off", "--workers", 0, *flags]
    predict.main([*map(str, flags)])
    return out


def complaint(capsys, *flags):
    """(exit code, last line of stderr) of predict.py with flags that must be refused."""
    code, printed = testing.complaint(capsys, *flags, main=predict.main)
    return code, printed.strip().splitlines()[-1]


# ---- a classifier ----

CLASSIFIER = "--image-size 64 --test-size 48 --test-crop 0.9 --workers 0 --amp off".split()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """(data, run): three classes of pictures of many sizes and kinds, and a short run."""
    root, rng = tmp_path_factory.mktemp("classifier"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 7)):
        for label, name in enumerate(("dark", "middle", "bright, and more")):
            for i in range(count):
                size = rng.integers(20, 90, 2)
                values = rng.integers(0, 200, (*size, 3)) + 15 * label
                picture = Image.fromarray(values.astype(np.uint8))
                picture = picture.convert("L") if i == 1 else picture
                file = root / "data" / split / name / f"{i}.{'png' if i % 2 else 'jpg'}"
                file.parent.mkdir(parents=True, exist_ok=True)
                picture.save(file)
    flags = [*CLASSIFIER, "--data", root / "data", "--init", "scratch", "--arch", "resnet18",
             "--epochs", 2, "--batch-size", 12, "--out", root / "run"]
    finetune.main([*map(str, flags)])
    return root / "data", root / "run"


def evaluated(data, run, out):
    """The result of evaluating best.pt."""
    flags = [*CLASSIFIER, "--weights", run / "best.pt", "--data", data, "--eval-only", "--out", out]
    finetune.main([*map(str, flags)])
    return json.loads((out / "result.json").read_text())


def rows_of(out):
    with open(out / "predictions.csv", newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_a_classifiers_table_has_the_accuracy_of_the_evaluation(classifier, tmp_path):
    data, run = classifier
    result = evaluated(data, run, tmp_path / "eval")
    out = predicted(tmp_path / "out", run / "best.pt", data / "val")
    titles, *rows = rows_of(out)
    assert titles == ["file", "class", "probability", "class 2", "probability 2", "class 3",
                      "probability 3"]
    right = [os.path.dirname(row[0]) == row[1] for row in rows]
    assert len(rows) == result["images"] == 21
    assert np.mean(right) == pytest.approx(result["top1"]) and 0.3 < np.mean(right) < 1
    for name, accuracy in result["per_class"].items():
        of_class = [ok for row, ok in zip(rows, right) if os.path.dirname(row[0]) == name]
        assert np.mean(of_class) == pytest.approx(accuracy, abs=1e-4)
    shares = np.array([row[2::2] for row in rows], float)
    np.testing.assert_allclose(shares.sum(1), 1, atol=2e-6)  # three classes in all
    assert (np.diff(shares) <= 0).all()
    assert rows_of(predicted(tmp_path / "all", run / "best.pt", data))[-1][0].startswith("val/")


def test_best_pt_of_a_classifier_loads_strictly_into_torchvision_and_model_json_tells_the_rest(
        classifier):
    data, run = classifier
    about = read_description(run / "best.pt")
    assert (about.kind, about.arch, about.image_size) == ("classifier", "resnet18", [48, 48])
    assert about.classes == ["bright, and more", "dark", "middle"] and about.test_crop == 0.9
    assert (tuple(about.mean), tuple(about.std)) == (MEAN, STD)
    state = torch.load(run / "best.pt", weights_only=True)
    tv.resnet18(num_classes=len(about.classes)).load_state_dict(state, strict=True)


@pytest.mark.parametrize("arch", ["deit_tiny", "convnext_tiny", "regnet_y_400mf"])
def test_classifiers_of_every_family_are_loaded_whole(arch, tmp_path):
    """A picture of the size of the test crop: the logits are those of the model itself."""
    torch.manual_seed(0)
    model = Classifier(arch, build_encoder(arch, 64), 4).eval()
    torch.save(model.torchvision_state_dict(), tmp_path / "best.pt")
    about = dict(kind="classifier", arch=arch, patch_size=16, window=7, stem=None,
                 classes=list("abcd"), image_size=[64, 64], mean=MEAN, std=STD, test_crop=1.0)
    (tmp_path / "model.json").write_text(json.dumps(about))
    noise(tmp_path / "photos" / "a.png", (64, 64), np.random.default_rng(0))
    image = torch.from_numpy(np.array(Image.open(tmp_path / "photos" / "a.png")))
    image = image.permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    shares = model((image - mean) / std).softmax(1)[0]
    _, row = rows_of(predicted(tmp_path / "out", tmp_path / "best.pt", tmp_path / "photos"))
    found = dict(zip(row[1::2], map(float, row[2::2])))
    for name, share in zip("abcd", shares.tolist()):
        assert found[name] == pytest.approx(share, abs=2e-5)


# ---- a segmenter ----

def test_a_segmenters_label_pictures_have_the_miou_of_the_evaluation(tmp_path):
    root = camvid(tmp_path / "CamVid")
    flags = [*SMALL_NET, "--data", root, "--ignore", 1, 11, "--iterations", 3,
             "--out", tmp_path / "run"]
    segment.main([*map(str, flags)])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    out = predicted(tmp_path / "out", tmp_path / "run" / "best.pt", root / "val")
    miou = miou_by_numpy(root / "valannot", out / "labels", [0, 2], [1, 11])
    assert result["miou"] == pytest.approx(miou, abs=1e-9) and 0.1 < miou < 1
    about = read_description(tmp_path / "run" / "best.pt")
    assert about.kind == "segmenter" and about.numbers == [0, 2]
    photo = np.array(Image.open(root / "val" / "val-2.png"))
    numbers = np.array(Image.open(out / "labels" / "val-2.png"))
    shown = np.array(Image.open(out / "overlays" / "val-2.png"))
    colours = np.array(about.colours)[numbers // 2]          # numbers 0 and 2: classes 0 and 1
    assert np.array_equal(shown, (photo.astype(int) + colours) // 2)
    assert Image.open(out / "legend.png").width == 480


@pytest.mark.parametrize("most", [1, 4 * 20 * 30, 2**27])
def test_the_likeliest_class_is_the_same_for_any_number_of_classes_at_a_time(most):
    torch.manual_seed(0)
    logits = torch.randn(2, 9, 5, 6)
    wanted = torch.nn.functional.interpolate(logits, (20, 30), mode="bilinear").argmax(1)
    assert torch.equal(segment.likeliest(logits, (20, 30), most), wanted)


# ---- a detector ----

def two_kinds(root):
    """COCO's layout: a picture holds a bright wide thing (class 7), or a dark tall one (3)."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 6)):
        images, objects = [], []
        (root / split).mkdir(parents=True)
        for i in range(count):
            H, W = rng.integers(60, 80, 2).tolist()
            h, w = (16, 36) if i % 2 else (40, 20)
            y, x = int(rng.integers(0, H - h)), int(rng.integers(0, W - w))
            # on a plain ground scores would be tied, and rounding would choose among them
            canvas = rng.integers(70, 150, (H, W, 3), dtype=np.uint8)
            canvas[y:y + h, x:x + w] //= 8
            canvas[y:y + h, x:x + w] += 230 * (i % 2)
            Image.fromarray(canvas).save(root / split / f"{i}.png")
            images.append(dict(id=50 - i, file_name=f"{i}.png", height=H, width=W))
            outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            objects.append(dict(id=i + 1, image_id=50 - i, category_id=7 if i % 2 else 3,
                                bbox=[x, y, w, h], area=h * w, iscrowd=0, segmentation=outline))
        kinds = [dict(id=3, name="tall"), dict(id=7, name="wide")]
        content = dict(images=images, annotations=objects, categories=kinds)
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def ask_for_the_third_best(root, run):
    """The annotations for validation become what the detector finds, without its first two: then
    its AP is neither 0 nor 1, however little it has learnt."""
    file = root / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    objects = []
    masks = json.loads((run / "predictions-masks.json").read_text())
    boxes = json.loads((run / "predictions.json").read_text())
    for image in content["images"]:
        found = [(box, mask) for box, mask in zip(boxes, masks) if box["image_id"] == image["id"]]
        for box, mask in found[2:3]:
            x, y, w, h = box["bbox"]
            objects.append(dict(id=len(objects) + 1, image_id=image["id"], bbox=[x, y, w, h],
                                category_id=box["category_id"], area=w * h, iscrowd=0,
                                segmentation=mask["segmentation"]))
    file.write_text(json.dumps(content | {"annotations": objects}))


@needs_pycocotools
def test_a_detectors_boxes_and_masks_have_the_ap_of_the_evaluation(tmp_path):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    root = two_kinds(tmp_path / "set")
    tiny = ["--data", root, "--workers", 0, "--amp", "off", "--save-predictions"]
    flags = [*tiny, "--init", "scratch", "--arch", "resnet18", "--recipe", "shapes", "--image-size",
             64, "--smallest", 64, "--longest", 106, "--epochs", 1, "--width", 16, "--convs", 1,
             "--proposals", 20, "--rois", 16, "--out", tmp_path / "run"]
    detect.main([*map(str, flags)])
    ask_for_the_third_best(root, tmp_path / "run")
    alone = [*tiny, "--weights", tmp_path / "run" / "best.pt", "--eval-only", "--out",
             tmp_path / "eval"]
    detect.main([*map(str, alone)])
    result = json.loads((tmp_path / "eval" / "result.json").read_text())
    out = predicted(tmp_path / "out", tmp_path / "run" / "best.pt", root / "val")
    truth = COCO(str(root / "annotations" / "instances_val.json"))
    id_of = {one["file_name"]: one["id"] for one in truth.dataset["images"]}
    for kind, name, file in (("bbox", "box", "predictions.json"),
                             ("segm", "mask", "predictions-masks.json")):
        found = json.loads((out / file).read_text())
        assert {one["category_id"] for one in found} <= {3, 7}
        found = [one | {"image_id": id_of[one["file_name"]]} for one in found]
        judge = COCOeval(truth, truth.loadRes(found), kind)
        judge.evaluate(), judge.accumulate(), judge.summarize()
        ours = [result[name][figure] for figure in ("AP", "AP50", "AP75")]
        np.testing.assert_allclose(ours, judge.stats[:3], atol=1e-6, rtol=0)
        assert 0.05 < result[name]["AP50"] < 1
    shown = Image.open(out / "pictures" / "3.png")
    assert shown.size == Image.open(root / "val" / "3.png").size


# ---- what goes wrong ----

def test_files_that_cannot_be_read_are_named_and_counted(classifier, tmp_path, capsys):
    _, run = classifier
    photos = tmp_path / "photos"
    rng = np.random.default_rng(0)
    noise(photos / "a" / "good.png", (30, 40), rng)
    noise(photos / os.fsdecode(b"\xff.png"), (30, 40), rng)
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "cut.png").write_bytes((photos / "a" / "good.png").read_bytes()[:200])
    Image.new("RGB", (4000, 2)).save(photos / "slim.png")
    (photos / "notes.txt").write_text("no image")
    out = predicted(tmp_path / "out", run / "best.pt", photos)
    printed = capsys.readouterr().err
    assert "3 of 5 images cannot be read: cut.png (" in printed
    assert "2 images: wrote pred" in printed
    listed = (out / "broken.txt").read_text().splitlines()
    assert [line.split(" ")[0] for line in listed] == ["cut.png", "empty.jpg", "slim.png"]
    assert listed[2] == "slim.png (4000 x 2 pixels are too slim)"
    names = [line.split(b",")[0] for line in (out / "predictions.csv").read_bytes().splitlines()]
    assert names == [b"file", b"a/good.png", b"\xff.png"]    # its bytes as they are
    for file in ("a/good.png", os.fsdecode(b"\xff.png")):
        (photos / file).unlink()
    code, printed = complaint(capsys, run / "best.pt", photos, "--out", tmp_path / "none",
                           "--workers", 0)
    assert code == 2 and "none of its 3 images can be read: cut.png (" in printed
    assert not (tmp_path / "none").exists()


def test_pictures_of_one_name_do_not_overwrite_each_other():
    assert predict.as_png(["a.jpg", "b/a.jpg", "c.bmp"]) == ["a.png", "b/a.png", "c.png"]
    assert predict.as_png(["a.jpg", "a.png", "b.png"]) == ["a.jpg.png", "a.png.png", "b.png"]
    clash = predict.as_png(["a.jpg", "a.png", "a.jpg.bmp"])
    assert len(set(clash)) == 3


def test_the_default_folder_is_new_each_time(classifier, tmp_path, monkeypatch):
    data, run = classifier
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        predict.main([str(run / "best.pt"), str(data / "val"), "--workers", "0"])
    assert sorted(os.listdir("runs")) == ["val-predictions", "val-predictions-2"]


def test_mistakes_get_one_line_and_leave_no_folder(classifier, tmp_path, capsys, monkeypatch):
    data, run = classifier
    monkeypatch.chdir(tmp_path)
    state = torch.load(run / "best.pt", weights_only=True)
    about = json.loads((run / "model.json").read_text())

    def put(name, **changes):
        """A folder with the weights, and a model.json with some changes."""
        (tmp_path / name).mkdir()
        torch.save(state, tmp_path / name / "best.pt")
        (tmp_path / name / "model.json").write_text(json.dumps(about | changes))
        return tmp_path / name / "best.pt"

    alone = put("alone")
    (tmp_path / "alone" / "model.json").unlink()
    damaged = put("damaged", classes=3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "there").mkdir()
    val = data / "val"
    of_a_detector = []
    if find_spec("pycocotools"):                             # without it another line comes first
        weights = put("less", kind="detector")
        of_a_detector = [("does not fit the model.json beside it", weights, val)]
    for words, *flags in (
            ("alone/model.json: no such file; finetune.py, extras/segment.py", alone, val),
            ("damaged/model.json: is damaged, or of another program", damaged, val),
            ("its head tells 3 classes apart", put("four", classes=list("abcd")), val),
            ("does not hold the segmenter", put("other", kind="segmenter", head="upernet", width=8,
                                                aux=False, numbers=[0, 1, 2], colours=[]), val),
            *of_a_detector,
            ("was trained with mean [0, 0, 0]", put("mean", mean=[0, 0, 0]), val),
            ("nowhere: no such folder; give a folder of images", run / "best.pt", "nowhere"),
            ("empty: no images below it", run / "best.pt", "empty"),
            ("--out there: is there already; choose another", run / "best.pt", val, "--out",
             "there"),
            ("--score: 2: must be a number from 0 to 1", run / "best.pt", val, "--score", 2)):
        code, printed = complaint(capsys, *flags, "--workers", 0)
        assert code == 2 and printed.startswith("predict.py: error: ") and words in printed, printed
    assert not (tmp_path / "runs").exists() and os.listdir("there") == []
