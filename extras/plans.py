"""The runs of a comparison: see compare.py.

    Settings       what is compared
    plan           all runs, in their order
    count_weights  what another comparison has pre-trained

A folder of classes has the recipes `small`. Drawn shapes have settings of their own. Segmentation
and detection start from weights that are there, or pre-train on drawn scenes.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import finetune
import pretrain
from data import NAMED, open_images, some_labels, split_folder
from engine.files import printable
from engine.flags import height_width
from extras.dense import Scenes
from extras.many_runs import Run
from model import get_family, settings_for_size

# ---- what is run ----

ARMS = {
    "a2mim": "A2MIM",
    "simmim": "SimMIM",
    "scratch": "scratch",
    "scratch-long": "scratch, compute of both stages",
}
PRETRAINED = {"a2mim": "", "simmim": "--baseline simmim"}    # arm -> flags of its own

# a folder of classes: the recipes `small`
PRETRAIN_EPOCHS = pretrain.LONG_EPOCHS
TUNE = "--recipe small --eval-every 1000000"
TUNE_BATCH = 32
TUNE_EPOCHS = 60
TUNE_EPOCHS_OF_FEW = 200                                     # with less than FEW of the labels
FEW = 0.05
PROBE = "--recipe linear --eval-every 1000000"

# drawn shapes: A2MIM and SimMIM have the same settings; lr is per 512 images
DRAWN_PRETRAIN = {
    "resnet": "--recipe imagenet --mask-size 8 --spectrum image --lr 0.032 --token-lr 1 "
              "--crop-min 0.8",
    "convnext": "--recipe imagenet --mask-size 16 --spectrum image --lr 0.032 --token-lr 1 "
                "--crop-min 0.8",
    "vit": "--recipe imagenet --patch-size 16 --mask-size 16 --spectrum image --lr 0.016 "
           "--schedule cosine --drop-path 0",
    "swin": "--recipe imagenet --mask-size 16 --spectrum image --lr 0.016 --schedule cosine",
}
DRAWN_BATCH = 32
DRAWN_TUNE = {
    "resnet": "--crop-min 0.8 --layer-decay 1 --eval-every 1000000 --lr 1e-3",
    "convnext": "--crop-min 0.8 --layer-decay 1 --eval-every 1000000 --lr 1e-3",
    "vit": "--crop-min 0.8 --layer-decay 1 --eval-every 1000000 --lr 5e-4",
    "swin": "--crop-min 0.8 --layer-decay 1 --eval-every 1000000 --lr 5e-4",
}
DRAWN_TUNE_BATCH = 16
DRAWN_PROBE = ("--recipe linear --crop-min 0.8 --optimizer adamw --lr 0.01 --lr-batch 64 "
               "--batch-size 64 --schedule cosine --epochs 20 --eval-every 1000000")
# images seen in pre-training and in fine-tuning; a Transformer learns slower, and is faster
BUDGETS = {
    "resnet": (10_000, 3_200),
    "convnext": (10_000, 3_200),
    "vit": (24_000, 9_600),
    "swin": (12_000, 9_600),
}
SHAPES = 10_000                                              # images to train on

BASE = "none"
ABLATIONS = {  # title -> flags over those of A2MIM
    "token at stage 1": "--token-stage 1",
    "token at stage 2": "--token-stage 2",
    "token at stage 3": "--token-stage 3",
    "token at stage 4, mask units of 32 px": "--token-stage 4 --mask-size 32",
    "fill zero": "--fill zero",
    "fill random": "--fill random",
    "no Fourier term": "--fourier-weight 0",
    "Fourier, the paper's stand-in": "--stand-in prediction",
    "Fourier, batch spectrum": "--spectrum batch",
    "token gamma": "--token gamma",
    "token add": "--token add",
    "token replace": "--token replace",
}
OWN = {  # what A2MIM has here already
    "resnet": ("token at stage 3", "token gamma"),
    "convnext": ("token at stage 3", "token gamma"),
    "vit": ("token at stage 1", "token add"),
    "swin": ("token at stage 1", "token add"),
}
ABLATION_SHARE = 0.5                                         # of the epochs of pre-training

# drawn scenes: pre-training, then the demo of extras/segment.py or extras/detect.py
SCENES = 10_000                                              # different ones
SCENE_BATCH = 16
SCENE_EPOCHS = 1.28
TASKS = {  # task -> columns of the table: title -> keys of result.json
    "segment": {
        "mIoU": ("miou",),
        "pixel accuracy": ("pixel_accuracy",),
        "IoU of any object": ("found",),
    },
    "detect": {
        "box AP50": ("box", "AP50"),
        "box AP": ("box", "AP"),
        "box AP, any class": ("box", "any class"),
        "mask AP50": ("mask", "AP50"),
        "mask AP": ("mask", "AP"),
    },
}


@dataclass(frozen=True)
class Settings:
    """What a comparison does. Resolved once, from the flags."""
    data: str                                                # folder or name; scenes: "shapes"
    arch: str
    task: str
    arms: tuple[str, ...]
    image_size: int | list[int] | None                       # None: that of the task's recipe
    few: tuple[str, ...]                                     # amounts of labels
    seeds: int                                               # label seeds
    pretrain_seeds: int
    pretrain_epochs: float
    tune_epochs: tuple[float, ...]                           # of each amount; (): by their share
    ablation_seeds: int
    weights_of: str | None
    split_val: str | None
    split_test: str | None
    quick: bool
    jobs: int
    workers: int
    out: str

    @property
    def is_dense(self) -> bool:
        return self.task != "classify"

    @property
    def is_drawn(self) -> bool:
        """Drawn shapes, or with --task drawn scenes."""
        return self.data == "shapes"

    @property
    def family(self) -> str:
        return get_family(self.arch).name


def plan(settings: Settings) -> list[Run]:
    """All runs of a comparison, in their order. Raises ValueError if the data do not fit."""
    return plan_dense(settings) if settings.is_dense else plan_classes(settings)


def slug(title: str) -> str:
    return title.replace("the paper's", "paper").replace(",", "").replace(" ", "-")


def as_text(value: float) -> str:
    """A number as it would be typed: '60', '0.32'."""
    return f"{value:.10g}"


def pretraining(settings: Settings, name: str, seed: int, images: int, more: str = "",
                share: float = 1.0) -> Run:
    """A run of pretrain.py on drawn shapes, or on a folder.

    images  in the data set
    more    flags of this arm
    share   of the epochs"""
    epochs = settings.pretrain_epochs * share
    flags = [*common_flags(settings), "--epochs", as_text(epochs), "--seed", str(seed)]
    if settings.is_drawn:
        flags += DRAWN_PRETRAIN[settings.family].split()
        flags += f"--batch-size {DRAWN_BATCH} --sheets 2 --val 0 --log-every 50".split()
    else:                                                    # the recipe's own settings
        flags += ["--recipe", "small"]
    flags += more.split()
    batch = batch_of_pretraining(settings, images)
    return Run(f"pretrained/{name}-{seed}", "pretrain", tuple(flags),
               steps=epochs * (images // batch))


def batch_of_pretraining(settings: Settings, images: int) -> int:
    return min(DRAWN_BATCH if settings.is_drawn else pretrain.SMALL_BATCH, images)


def batch_of_tuning(settings: Settings, labels: int) -> int:
    return min(DRAWN_TUNE_BATCH if settings.is_drawn else TUNE_BATCH, labels)


def common_flags(settings: Settings) -> list[str]:
    """Of all runs on drawn shapes, or on a folder of classes."""
    return ["--data", settings.data, "--arch", settings.arch, *size_flags(settings.image_size),
            "--workers", str(settings.workers)]


def size_flags(image_size: int | list[int]) -> list[str]:
    """--image-size 64, or --image-size 48 64."""
    H, W = height_width(image_size)
    return ["--image-size", str(H)] if H == W else ["--image-size", str(H), str(W)]


def from_weights(settings: Settings, arm: str, seed: int) -> dict:
    """Start of a run from the weights of a pre-training seed: fields of Run."""
    needs = f"pretrained/{arm}-{seed}"
    return dict(start=("--weights", f"{settings.out}/{needs}/backbone.pt"), needs=needs)


def from_scratch(settings: Settings) -> dict:
    """Start of a run from random weights, with the net that pre-training has: fields of Run."""
    start = ["--init", "scratch"]
    if settings.weights_of:
        about = first_settings(settings.weights_of, settings.arms)
        if settings.family == "resnet" and about.get("stem"):
            start += ["--stem", about["stem"]]
        if settings.family == "vit" and about.get("patch_size"):
            start += ["--patch-size", str(about["patch_size"])]
        if settings.family == "swin" and about.get("window"):
            start += ["--window", str(about["window"])]
    elif settings.is_dense and settings.is_drawn:            # as pre-training chooses them
        usual = settings_for_size(settings.arch, 224)
        for name, value in settings_for_size(settings.arch, settings.image_size).items():
            if value != usual[name]:                         # below 64 px
                start += ["--" + name.replace("_", "-"), str(value)]
    elif settings.is_drawn and settings.family == "vit":
        start += ["--patch-size", "16"]
    return dict(start=tuple(start))


# ---- classification ----

@dataclass(frozen=True)
class Counts:
    """How many images the data have."""
    unlabelled: int                                          # for pre-training
    labelled: int                                            # for fine-tuning
    val: int
    labels: dict[str, int]                                   # of each amount


def count_images(settings: Settings) -> Counts:
    """Opens the data. Raises ValueError if they cannot be used."""
    data, named = settings.data, printable(settings.data)
    if data not in NAMED and not Path(data).is_dir():
        raise ValueError(f"--data {named}: no such folder; give a folder of images or one of "
                         f"{', '.join(NAMED)}")
    if data not in NAMED and not split_folder(Path(data), "train"):
        raise ValueError(f"--data {named}: needs train/<class>/ and val/<class>/; pre-training "
                         "must not see what is tested on")
    size = height_width(settings.image_size)
    source = open_images(data, "train", size, labelled=True)
    labels = {}
    for amount in settings.few:
        try:
            labels[amount] = len(some_labels(source, typed_labels(amount), seed=0))
        except ValueError as error:
            raise ValueError(str(error).replace("--labels", "--few")) from None
    return Counts(unlabelled=len(open_images(data, "train", size)), labelled=len(source),
                  val=len(open_images(data, "val", size, labelled=True)), labels=labels)


def typed_labels(amount: str) -> str | None:
    """An amount of labels as --labels of finetune.py."""
    return None if amount == "all" else amount


def folder_of(amount: str) -> str:
    """Folder of the runs with an amount of labels: labels-0.1, labels-9-per-class, labels-all."""
    return "labels-" + amount.replace("/", "-per-")


def title_of(amount: str) -> str:
    """An amount of labels in words."""
    if amount == "all":
        return "all labels"
    if "/" in amount:
        return f"{amount.partition('/')[0]} labels per class"
    return f"{100 * float(amount):g} % of labels"


def epochs_of(settings: Settings, counts: Counts, amount: str) -> float:
    """Epochs of fine-tuning with an amount of labels."""
    if settings.tune_epochs:
        return dict(zip(settings.few, settings.tune_epochs))[amount]
    if settings.is_drawn:
        epochs = BUDGETS[settings.family][1] / counts.labels[amount]
    else:
        is_share = amount != "all" and "/" not in amount
        share = float(amount) if is_share else counts.labels[amount] / counts.labelled
        epochs = TUNE_EPOCHS if share >= FEW else TUNE_EPOCHS_OF_FEW
    return epochs / 8 if settings.quick else epochs


def fine_tuning(settings: Settings, counts: Counts, amount: str, name: str, seed: int, start: dict,
                more_epochs: float = 0.0) -> Run:
    """A run of finetune.py. start: see from_weights and from_scratch."""
    labels = counts.labels[amount]
    epochs = epochs_of(settings, counts, amount) + more_epochs
    recipe = f"{DRAWN_TUNE[settings.family]} --log-every 50" if settings.is_drawn else TUNE
    batch = batch_of_tuning(settings, labels)
    flags = [*common_flags(settings), *recipe.split(), *label_flags(amount),
             "--batch-size", str(batch), "--lr-batch", str(batch),
             "--epochs", as_text(epochs), "--seed", str(seed)]
    steps = epochs * (labels // batch) + passes(settings, counts.val)
    return Run(f"{folder_of(amount)}/{name}-{seed}", "finetune", tuple(flags), steps=steps, **start)


def epochs_of_pretraining(settings: Settings, counts: Counts, amount: str) -> float:
    """The epochs of fine-tuning that take as many images as pre-training. The last, incomplete
    batch of an epoch is dropped in both."""
    images, labels = counts.unlabelled, counts.labels[amount]
    batch = batch_of_pretraining(settings, images)
    seen = settings.pretrain_epochs * (images // batch * batch)
    batch = batch_of_tuning(settings, labels)
    return seen / (labels // batch * batch)


def label_flags(amount: str) -> list[str]:
    labels = typed_labels(amount)
    return ["--labels", labels] if labels else []


def passes(settings: Settings, images: float) -> float:
    """Forward passes of so many images, as training steps: a pass takes about a third."""
    batch = DRAWN_TUNE_BATCH if settings.is_drawn else TUNE_BATCH
    return images / 3 / batch


def probes(settings: Settings, counts: Counts, arm: str, seed: int) -> list[Run]:
    """Linear probe on the first amount of labels, and k-NN, from frozen features."""
    start = from_weights(settings, arm, seed)
    amount = settings.few[0]
    recipe = DRAWN_PROBE if settings.is_drawn else PROBE
    epochs = 20 if settings.is_drawn else finetune.RECIPES["linear"]["epochs"]
    linear = [*common_flags(settings), *recipe.split(), *label_flags(amount), "--seed", str(seed)]
    knn = [*common_flags(settings), "--recipe", "knn", "--seed", str(seed)]
    linear_images = epochs * counts.labels[amount] + counts.val
    return [
        Run(f"linear/{arm}-{seed}", "finetune", tuple(linear),
            steps=passes(settings, linear_images), **start),
        Run(f"knn/{arm}-{seed}", "finetune", tuple(knn),
            steps=passes(settings, counts.labelled + counts.val), **start),
    ]


def token_flags(settings: Settings) -> str:
    """Of A2MIM on drawn shapes: the same token and loss for every backbone of a family, although
    some have released exceptions. On a folder the recipe chooses."""
    if not settings.is_drawn:
        return ""
    stage = {"resnet": 3, "convnext": 3}.get(settings.family, 1)
    return f"--token-stage {stage} --fourier-weight 0.5 --fourier-focal"


def plan_classes(settings: Settings) -> list[Run]:
    """All runs on labelled images: every run of a pre-training seed before the next seed."""
    counts = count_images(settings)
    own_flags = {**PRETRAINED, "a2mim": token_flags(settings)}
    frozen = [arm for arm in settings.arms if arm != "scratch-long"]
    runs = []
    for first in range(settings.pretrain_seeds):
        for arm in frozen:
            more = own_flags.get(arm, "")
            run = pretraining(settings, arm, first, counts.unlabelled, more)
            if arm == "scratch":                             # random features for the probes
                run = Run(run.name, "random", run.flags, steps=0)
            runs.append(run)
        for seed in range(first, settings.seeds, settings.pretrain_seeds):
            for amount in settings.few:
                for arm in frozen:
                    start = from_weights(settings, arm, first)
                    if arm == "scratch":
                        start = from_scratch(settings)
                    runs.append(fine_tuning(settings, counts, amount, arm, seed, start))
        for arm in frozen:
            runs += probes(settings, counts, arm, first)
    if "scratch-long" in settings.arms:
        for seed in range(settings.seeds):
            for amount in settings.few:
                more = epochs_of_pretraining(settings, counts, amount)
                runs.append(fine_tuning(settings, counts, amount, "scratch-long", seed,
                                        from_scratch(settings), more))
    return runs + plan_ablations(settings, counts)


def plan_ablations(settings: Settings, counts: Counts) -> list[Run]:
    runs = []
    for seed in range(settings.ablation_seeds):
        for title, flags in {BASE: "", **ABLATIONS}.items():
            if title in OWN[settings.family]:
                continue
            sides = height_width(settings.image_size)
            fits = min(sides) >= 64 and not any(side % 32 for side in sides)
            if "--mask-size 32" in flags and not fits:
                continue
            name = slug(title)
            more = f"{token_flags(settings)} {flags}"
            runs.append(pretraining(settings, name, seed, counts.unlabelled, more, ABLATION_SHARE))
            start = from_weights(settings, name, seed)
            runs.append(fine_tuning(settings, counts, settings.few[0], name, seed, start))
    return runs


# ---- segmentation and detection ----

def plan_dense(settings: Settings) -> list[Run]:
    """Segmentation or detection, from weights that are there, or pre-trained on drawn scenes."""
    runs = []
    for first in range(settings.pretrain_seeds):
        for arm in settings.arms:
            if arm in PRETRAINED and not settings.weights_of:
                runs.append(pretraining_on_scenes(settings, arm, first))
        for seed in range(first, settings.seeds, settings.pretrain_seeds):
            for arm in settings.arms:
                runs += dense_runs(settings, arm, seed, first)
    return runs


def pretraining_on_scenes(settings: Settings, arm: str, seed: int) -> Run:
    flags = ["--data", str(scenes_folder(settings)), "--arch", settings.arch,
             *size_flags(settings.image_size), "--workers", str(settings.workers),
             "--batch-size", str(SCENE_BATCH),
             *"--recipe small --sheets 2 --val 0 --log-every 50".split(),
             "--epochs", as_text(settings.pretrain_epochs), "--seed", str(seed),
             *PRETRAINED[arm].split()]
    steps = settings.pretrain_epochs * (scene_count(settings) // SCENE_BATCH)
    return Run(f"pretrained/{arm}-{seed}", "pretrain", tuple(flags), steps=steps)


def scenes_folder(settings: Settings) -> Path:
    """Its name says how many scenes it holds, of which size: other scenes are another folder."""
    H, W = height_width(settings.image_size)
    return Path(settings.out) / f"scenes-{scene_count(settings)}-{H}x{W}"


def scene_count(settings: Settings) -> int:
    return SCENES // 8 if settings.quick else SCENES


def dense_runs(settings: Settings, arm: str, seed: int, first: int) -> list[Run]:
    """Training from pre-training seed `first`, and with --split-test the score of its best
    epoch."""
    task = settings.task
    data = ["--data", settings.data, "--arch", settings.arch, "--workers", str(settings.workers)]
    flags = [*data, "--seed", str(seed)]
    if not settings.split_test:                              # the last epoch is always evaluated
        flags += ["--eval-every", "100000"]
    if settings.image_size and not settings.is_drawn:
        flags += size_flags(settings.image_size)
    if settings.split_val:
        flags += ["--split-val", settings.split_val]
    if settings.quick:
        flags += ["--epochs", "0.08" if settings.is_drawn else "1"]

    if arm not in PRETRAINED:
        start = from_scratch(settings)
    elif settings.weights_of:
        weights = weights_file(settings.weights_of, arm, first)
        start = dict(start=("--weights", str(weights)))
    else:
        start = from_weights(settings, arm, first)
    training = Run(f"{task}/{arm}-{seed}", task, tuple(flags), **start)
    if not settings.split_test:
        return [training]
    best = ("--weights", f"{settings.out}/{training.name}/best.pt")
    flags = [*data, "--eval-only", "--split-val", settings.split_test]
    test = Run(f"{task}-test/{arm}-{seed}", task, tuple(flags), best, training.name, steps=0)
    return [training, test]


def draw_scenes(folder: Path, count: int, size: tuple[int, int]) -> None:
    """The first scenes of the training split as files without labels, for pretrain.py."""
    if folder.exists():
        return
    part = folder.with_name(folder.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    scenes = Scenes("train", size)
    for i in tqdm(range(count), desc="drawing scenes", unit="scene"):
        pixels = scenes.draw(i)[0].permute(1, 2, 0).numpy()  # (H, W, 3)
        Image.fromarray(pixels).save(part / f"{i:05d}.png", compress_level=1)
    part.rename(folder)


def weights_file(runs: str, arm: str, seed: int) -> Path:
    return Path(runs) / "pretrained" / f"{arm}-{seed}" / "backbone.pt"


def count_weights(runs: str, arms: tuple[str, ...]) -> int:
    """How many pre-training seeds 0, 1, ... have weights for each arm.

    Raises ValueError if there is none."""
    needed = [arm for arm in arms if arm in PRETRAINED]
    if not needed:
        raise ValueError(f"--arms {' '.join(arms)}: needs one of {', '.join(PRETRAINED)} beside "
                         f"--weights-of")
    for seed in range(1000):
        missing = [arm for arm in needed if not weights_file(runs, arm, seed).is_file()]
        if missing and seed == 0:
            wanted = printable(str(weights_file(runs, missing[0], 0)))
            raise ValueError(f"--weights-of {printable(runs)}: no {wanted}; give the --out of a "
                             f"comparison that has pre-trained these --arms")
        if missing:
            return seed
    return 1000


def first_settings(runs: str, arms: tuple[str, ...]) -> dict:
    """args.json of the first pre-training. Raises ValueError if it cannot be read."""
    arm = next(arm for arm in arms if arm in PRETRAINED)
    file = weights_file(runs, arm, 0).with_name("args.json")
    try:
        settings = json.loads(file.read_text())
        get_family(settings["arch"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{printable(str(file))}: cannot be read as the settings of a run; give "
                         f"another --weights-of") from None
    return settings
