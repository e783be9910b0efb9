"""Facts about compare.py, plans.py, many_runs.py and scores.py.

    pytest extras/test_compare.py
"""

import json
import math
import os
import runpy
import shlex
import signal
import statistics
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import finetune
import model
import pretrain
from engine.command import Distributed, Failed, Stopped
from engine.testing import CLOCK, complaint, labelled_folder, read_log
from extras import chart, compare, detect, many_runs, plans, scores, segment
from extras.dense import Scenes
from extras.many_runs import Run, Speed
from extras.scores import Column

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
close = pytest.approx
NET = ["--arch", "shufflenet_v2_x0_5", "--image-size", "32"]


class PoolInThisProcess:
    """Makes each run at once, in this process."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *given):
        future = Future()
        try:
            future.set_result(function(*given))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(many_runs, "ProcessPoolExecutor", PoolInThisProcess)


@pytest.fixture
def classes(tmp_path) -> Path:
    """Two classes of 20 images to train on and 4 for validation, in a folder with a space."""
    folder = tmp_path / "my set"
    labelled_folder(folder, {"train": (20, 20), "val": (4, 4)})
    return folder


def runs_of(*flags: str) -> dict[str, Run]:
    return {run.name: run for run in compare.plan(compare.parse([*flags]))}


def write_scores(out: Path, folder: str, scores: dict[str, list[float]]) -> None:
    """result.json of each arm and label seed; scores are shares."""
    for arm, values in scores.items():
        for seed, value in enumerate(values):
            run = out / folder / f"{arm}-{seed}"
            run.mkdir(parents=True)
            (run / "result.json").write_text(json.dumps({"top1": value, "best_top1": 0.99}))


# ---- averages and intervals ----

def test_label_seeds_are_averaged_within_their_pre_training_seed_first():
    """Seeds 0 and 3 share weights, so do 1 and 4; seed 2 is alone and weighs as much as a pair."""
    found = {0: 60.0, 1: 50.0, 2: 80.0, 3: 64.0, 4: 52.0}
    assert scores.by_pretraining(found, 3) == [62.0, 51.0, 80.0]
    assert scores.by_pretraining(found, 5) == [60.0, 50.0, 80.0, 64.0, 52.0]
    assert scores.by_pretraining({2: 80.0, 4: 52.0}, 3) == [52.0, 80.0]      # some are missing
    assert scores.mean_and_spread([62.0, 51.0, 80.0]) == "64.3 ± 14.6"


def test_the_published_tables_follow_from_the_stored_results():
    tables = runpy.run_path(str(ROOT / "docs/results/tables.py"))
    rows, gains = tables["score_table"]()[2:], tables["difference_table"]()[2:]
    published = (ROOT / "docs/results.md").read_text().splitlines()
    assert {*rows, *gains, *tables["compute_table"](), *tables["larger_table"]()} <= {*published}
    analysis = (ROOT / "docs/analysis.md").read_text().splitlines()
    assert {*tables["analysis_table"]()} <= {*analysis}
    readme = (ROOT / "README.md").read_text()
    for row in rows:
        start, ten, one, _, probe, _, camvid, _, _, bccd = row.strip("| ").split(" | ")
        start = start.split(" (")[0]
        assert f"| {start} | {ten} | {one} | {probe} | {camvid} | {bccd} |" in readme
    assert (ROOT / "docs/results/table.md").read_text() == tables["all_tables"]()


def test_the_interval_is_students_over_the_pre_training_seeds_by_hand():
    """Gains 4, 1, 3, 2, 3 of label seeds 0 to 4. Over the seeds mod 3: (4 + 2) / 2 = 3,
    (1 + 3) / 2 = 2 and 3. Their mean is 8/3. Their squared deviations are 1/9, 4/9, 1/9, so the
    variance is (6/9) / 2 = 1/3. With t(2) = 4.303 half the interval is 4.303 sqrt(1/3) / sqrt(3),
    which is 4.303 / 3."""
    b = {0: 50.0, 1: 61.0, 2: 55.0, 3: 58.0, 4: 70.0}
    a = {seed: b[seed] + gain for seed, gain in enumerate([4.0, 1.0, 3.0, 2.0, 3.0])}
    found = scores.difference(a, b, 3)
    assert found.seeds == 3 and found.mean == close(8 / 3)
    assert found.high - found.mean == close(4.303 / 3, rel=1e-3)
    assert found.mean - found.low == close(found.high - found.mean)
    assert "better than scratch" in scores.sentence("x", found, "scratch")
    worse = scores.difference(b, a, 3)
    assert (worse.low, worse.high) == close((-found.high, -found.low))
    assert "worse than A2MIM" in scores.sentence("x", worse, "A2MIM")


def test_what_both_arms_of_a_label_seed_share_drops_out():
    """5 pairs: half the interval is 2.776 standard errors of the gains, however the scores
    themselves scatter."""
    a = dict(enumerate([60.0, 70.0, 65.0, 80.0, 75.0]))
    b = dict(enumerate([58.0, 69.0, 62.0, 76.0, 70.0]))      # gains 2, 1, 3, 4, 5
    found = scores.difference(a, b, 5)
    assert found.mean == close(3.0)
    assert found.high - found.mean == close(2.776 * math.sqrt(2.5 / 5), rel=2e-3)
    noisy = {seed: value + (-1) ** seed for seed, value in a.items()}
    unclear = scores.difference(a, noisy, 5)
    assert "not clearly different from" in scores.sentence("x", unclear, "scratch")


def test_label_seeds_that_one_arm_lacks_enter_no_difference():
    a = {0: 60.0, 1: 99.0, 2: 64.0}
    b = {0: 50.0, 2: 58.0, 3: 7.0}
    found = scores.difference(a, b, 4)
    assert (found.mean, found.seeds) == (close(8.0), 2)
    assert scores.difference({0: 1.0}, {1: 1.0}, 4) is None


def test_one_pre_training_seed_decides_nothing():
    """However many label seeds it has: their scatter is not that of pre-training."""
    found = scores.difference({0: 70.0, 1: 71.0}, {0: 50.0, 1: 51.0}, 1)
    words = scores.sentence("x", found, "scratch")
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert "not clearly different" in words and "gives no interval" in words and "inf" not in words


def test_the_quantiles_of_students_t_leave_a_fortieth_above():
    """The density is (1 + x^2 / n)^(-(n + 1) / 2) / (sqrt(n) B(1/2, n/2)), summed up from 0."""
    for n, quantile in enumerate(scores.T975, 1):
        log_beta = math.lgamma(0.5) + math.lgamma(n / 2) - math.lgamma((n + 1) / 2)
        x = np.linspace(0, quantile, 100_001)
        density = (1 + x**2 / n) ** (-(n + 1) / 2) / (math.sqrt(n) * math.exp(log_beta))
        area = ((density[1:] + density[:-1]) / 2 * np.diff(x)).sum()
        assert area == close(0.475, abs=1e-4)
    gains = {seed: float(seed % 2) for seed in range(16)}    # 15 degrees: the last one is taken
    found = scores.difference(gains, dict.fromkeys(range(16), 0.0), 16)
    spread = statistics.stdev(gains.values())
    assert found.high - found.mean == close(scores.T975[-1] * spread / 4)


def test_scores_of_the_last_epoch_are_read_and_missing_ones_are_left_out(tmp_path):
    write_scores(tmp_path, "few", {"a2mim": [0.5, 0.6, 0.7]})
    (tmp_path / "few" / "a2mim-1" / "result.json").write_text('{"top1": null}')
    column = Column("few", "few", ("top1",), 5)
    assert scores.read_scores(tmp_path, column, "a2mim") == close({0: 50.0, 2: 70.0})
    assert scores.read_scores(tmp_path, column, "simmim") == {}
    column = Column("few", "few", ("mask", "AP"), 5)         # a set without outlines
    assert scores.read_scores(tmp_path, column, "a2mim") == {}
    (tmp_path / "few" / "a2mim-2" / "result.json").write_text('{"mask": {"AP": -1.0}}')
    assert scores.read_scores(tmp_path, column, "a2mim") == {}               # no object to find


# ---- what is planned ----

def test_label_seed_s_starts_from_pre_training_seed_s_mod_n(classes):
    runs = runs_of("--data", str(classes), *NET, "--few", "0.1", "3/class", "--out", "out")
    assert {name for name in runs if name.startswith("pretrained/a2mim")} == {
        f"pretrained/a2mim-{seed}" for seed in range(3)}
    for seed in range(5):
        for labels in ("labels-0.1", "labels-3-per-class"):
            for arm in ("a2mim", "simmim"):
                run = runs[f"{labels}/{arm}-{seed}"]
                typed = finetune.make_parser().parse_args(run.argv)
                first = f"pretrained/{arm}-{seed % 3}"
                assert (run.needs, typed.weights) == (first, f"out/{first}/backbone.pt")
                assert typed.seed == seed
            assert runs[f"{labels}/scratch-{seed}"].start[:2] == ("--init", "scratch")
    for seed in range(3):                                    # one probe for each net
        for probe in ("linear", "knn"):
            run = runs[f"{probe}/scratch-{seed}"]
            assert run.needs == f"pretrained/scratch-{seed}"
            assert runs[run.needs].program == "random"
    assert "linear/a2mim-3" not in runs

    order = [*runs]                                          # all rows of a seed before the next
    assert order.index("knn/scratch-0") < order.index("pretrained/a2mim-1")
    assert order.index("labels-0.1/a2mim-3") < order.index("labels-0.1/a2mim-1")


def test_a_folder_has_the_small_recipes_and_only_the_start_of_an_arm_differs(classes):
    arms = ["a2mim", "simmim", "scratch", "scratch-long"]
    runs = runs_of("--data", str(classes), *NET, "--arms", *arms,
                   "--few", "0.05", "0.04", "1/class", "20/class", "all")
    a, b = (runs[f"pretrained/{arm}-2"].argv for arm in ("a2mim", "simmim"))
    assert b == [*a, "--baseline", "simmim"]
    typed = pretrain.parse(a)
    assert typed == dict(data=str(classes), arch="shufflenet_v2_x0_5", image_size=32, epochs=60.0,
                         recipe="small", seed=2, workers=0)

    # 40 labels: a share of 0.05 or more has 60 epochs, fewer 200; a batch is at most all labels
    expected = {"0.05": (60, 2), "0.04": (200, 2), "1-per-class": (60, 2), "20-per-class": (60, 32),
                "all": (60, 32)}
    for amount, (epochs, batch) in expected.items():
        flags = {runs[f"labels-{amount}/{arm}-3"].flags for arm in arms[:3]}
        assert len(flags) == 1                               # the start is all that differs
        typed = vars(finetune.make_parser().parse_args([*flags.pop()]))
        assert typed.pop("labels", None) == (None if amount == "all" else
                                             amount.replace("-per-", "/"))
        assert typed == dict(data=str(classes), arch="shufflenet_v2_x0_5", image_size=32,
                             recipe="small", epochs=epochs, batch_size=batch, lr_batch=batch,
                             eval_every=1_000_000, seed=3, workers=0)

    # the images of pre-training, 60 x 40, are added to those of fine-tuning: 60 x 2 of 2 labels
    long = finetune.make_parser().parse_args([*runs["labels-0.05/scratch-long-3"].flags])
    assert long.epochs * 2 == 60 * 2 + 60 * 40


def test_epochs_of_fine_tuning_are_typed_once_or_for_each_amount_of_labels(classes):
    def epochs(*flags):
        runs = runs_of("--data", str(classes), *NET, "--few", "0.1", "all", *flags)
        of_run = [finetune.make_parser().parse_args([*runs[f"labels-{few}/scratch-0"].flags])
                  for few in ("0.1", "all")]
        return [one.epochs for one in of_run]
    assert epochs("--tune-epochs", "7") == [7, 7]
    assert epochs("--tune-epochs", "7", "3") == [7, 3]
    assert epochs("--quick") == [7.5, 7.5]
    assert epochs("--quick", "--tune-epochs", "7") == [7, 7]


@pytest.mark.parametrize("size", [64, [48, 64]])
def test_every_run_is_made_at_the_image_size_asked_for(size):
    typed = [str(side) for side in (size if isinstance(size, list) else [size])]
    for run in runs_of("--image-size", *typed, "--seeds", "1").values():
        if run.program == "finetune":
            assert finetune.make_parser().parse_args(run.argv).image_size == size
        else:
            assert pretrain.asked_for(pretrain.parse(run.argv))["image_size"] == size


@pytest.mark.parametrize("arch", ["resnet18", "resnet101", "resnet152", "convnext_tiny",
                                  "deit_tiny", "deit_small", "swin_tiny"])
def test_every_ablation_of_drawn_shapes_changes_the_setting_of_its_name_alone(arch):
    runs = runs_of("--arch", arch, "--seeds", "1", "--ablation-seeds", "1")
    asked = {name.removeprefix("pretrained/"): pretrain.asked_for(pretrain.parse(run.argv))
             for name, run in runs.items() if run.program == "pretrain"}
    base = asked["none-0"]
    assert base["fourier_weight"] == 0.5 and base["fourier_focal"]
    titles = [f"token at stage {base['token_stage']}", f"token {base['token']}"]
    assert titles == [*plans.OWN[model.get_family(arch).name]]
    for title in plans.ABLATIONS:
        other = asked.get(f"{plans.slug(title)}-0", base)
        changed = {name for name in base if base[name] != other[name]} - {"typed"}
        assert changed or title in titles, title
        assert changed <= {"token_stage", "mask_size", "fill", "fourier_weight", "stand_in",
                           "spectrum", "token"} and len(changed) <= 2


def test_an_ablation_whose_mask_units_do_not_fit_is_left_out():
    name = "pretrained/token-at-stage-4-mask-units-of-32-px-0"
    assert name in runs_of("--image-size", "64") and name not in runs_of("--image-size", "32")


def test_the_same_comparison_may_be_typed_in_another_way(classes, tmp_path):
    flags = [*NET, "--few", "0.1", "--out", str(tmp_path / "out")]
    plain = compare.parse(["--data", str(classes), *flags])
    slashes = ["--data", f"{classes}/", *flags[:-1], f"{tmp_path}/out/"]
    again = compare.parse([*slashes, "--workers", "3"])
    runs, same = plans.plan(plain), plans.plan(again)
    file = tmp_path / "out" / runs[0].name / "flags.txt"
    file.parent.mkdir(parents=True)
    file.write_text(shlex.join(runs[0].argv))
    many_runs.check_flags(same, tmp_path / "out")
    other = plans.plan(compare.parse(["--data", str(classes), *flags, "--pretrain-epochs", "7"]))
    with pytest.raises(ValueError, match="was made with other flags"):
        many_runs.check_flags(other, tmp_path / "out")


def test_drawn_shapes_see_the_images_of_their_tables():
    """10,000 in pre-training (half of them in an ablation), 3,200 in fine-tuning; 10 classes of
    1,000 to train on."""
    runs = runs_of("--seeds", "2")
    assert {run.name.split("/")[0] for run in runs.values()} == {
        "pretrained", "labels-0.05", "labels-all", "linear", "knn"}

    def images(name):
        flags = runs[name].flags
        typed = (pretrain.parse if "pretrained" in name else
                 finetune.make_parser().parse_args)([*flags])
        epochs = typed["epochs"] if isinstance(typed, dict) else typed.epochs
        labels = 500 if "0.05" in flags else 10_000
        return epochs * labels
    assert images("pretrained/a2mim-1") == images("pretrained/simmim-1") == 10_000
    assert images("pretrained/fill-zero-0") == 5_000
    assert images("labels-0.05/a2mim-1") == images("labels-all/scratch-1") == close(3_200)
    # 31 batches of 16 of the 500 labels, 312 of 32 of the 10,000 images: the rest is dropped
    seen = 31 * 16 / 500
    assert images("labels-0.05/scratch-long-1") * seen == close(3_200 * seen + 312 * 32)
    assert runs["labels-0.05/a2mim-1"].needs == "pretrained/a2mim-1"         # a seed for a seed
    assert "pretrained/fill-zero-1" not in runs and "pretrained/token-gamma-0" not in runs
    vit = runs_of("--arch", "deit_tiny", "--seeds", "3", "--ablation-seeds", "0")
    assert pretrain.parse(vit["pretrained/a2mim-2"].argv)["epochs"] == 2.4
    assert len(vit) == 3 * (3 + 3 * 2 + 3 * 2 + 2)           # starts, fine-tuning, probes, long


# ---- segmentation and detection ----

@pytest.mark.parametrize("task, parse", [("segment", segment.parse), ("detect", detect.parse)])
def test_in_scenes_every_arm_has_the_same_training_and_only_its_start_differs(task, parse):
    runs = runs_of("--task", task, "--seeds", "2", "--out", "out")
    arms = {}
    for arm in ("a2mim", "simmim", "scratch"):
        settings = vars(parse(runs[f"{task}/{arm}-1"].argv))
        assert (settings.pop("init") == "scratch") == (settings.pop("weights") is None)
        assert settings.pop("given") and settings.pop("typed") and settings["recipe"] == "shapes"
        arms[arm] = settings
        # what a start needs is made before it
        needs = runs[f"{task}/{arm}-1"].needs
        assert needs == ("" if arm == "scratch" else f"pretrained/{arm}-1")
        if needs:
            assert [*runs].index(needs) < [*runs].index(f"{task}/{arm}-1")
            assert f"out/{needs}/backbone.pt" in runs[f"{task}/{arm}-1"].start
    assert arms["a2mim"] == arms["simmim"] == arms["scratch"]
    a, b = (pretrain.asked_for(pretrain.parse(runs[f"pretrained/{arm}-0"].argv))
            for arm in ("a2mim", "simmim"))
    assert a["data"] == b["data"] == "out/scenes-10000-96x96"
    assert a["epochs"] * plans.SCENES == 12_800
    # fewer scenes, or scenes of another size, are another folder
    for more, name in ((["--quick"], "1250-96x96"), (["--image-size", "64"], "10000-64x64")):
        runs = runs_of("--task", task, "--seeds", "1", *more)
        assert f"scenes-{name}" in " ".join(runs["pretrained/a2mim-0"].flags)
    assert (a["baseline"], b["baseline"]) == (None, "simmim")


def test_in_scenes_the_random_net_has_the_stem_or_patch_of_the_pretrained_ones():
    for arch, flags in (("resnet18", ["--stem", "small"]), ("deit_tiny", ["--patch-size", "4"])):
        runs = runs_of("--task", "segment", "--arch", arch, "--image-size", "48", "--seeds", "1")
        asked = pretrain.asked_for(pretrain.parse(runs["pretrained/a2mim-0"].argv))
        assert str(asked[flags[0].removeprefix("--").replace("-", "_")]) == flags[1]
        assert runs["segment/scratch-0"].start == ("--init", "scratch", *flags)


@pytest.mark.parametrize("arch", ["resnet18", "convnext_tiny", "deit_tiny"])
def test_on_drawn_shapes_a2mim_and_simmim_see_the_same_crops_at_the_same_lr(arch):
    runs = runs_of("--arch", arch, "--seeds", "1", "--ablation-seeds", "0")
    a, b = (pretrain.asked_for(pretrain.parse(runs[f"pretrained/{arm}-0"].argv))
            for arm in ("a2mim", "simmim"))
    differ = {name for name in a if a[name] != b[name]} - {"out", "typed"}
    assert differ <= {"baseline", "token", "token_stage", "fill", "focal_pixels", "fourier_weight",
                      "visible_weight"}


def pretrained(root: Path, seeds: dict[str, int], **settings) -> Path:
    """A folder as of a comparison that has pre-trained so many seeds of each arm."""
    for arm, count in seeds.items():
        for seed in range(count):
            folder = root / "pretrained" / f"{arm}-{seed}"
            folder.mkdir(parents=True)
            (folder / "backbone.pt").touch()
            (folder / "args.json").write_text(json.dumps(settings))
    return root


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_a_dense_task_starts_from_the_weights_of_another_comparison(task, tmp_path):
    made = pretrained(tmp_path / "made", {"a2mim": 3, "simmim": 2}, arch="resnet18", stem="small")
    flags = ["--task", task, "--data", "set", "--weights-of", str(made), "--seeds", "5"]
    runs = runs_of(*flags, "--split-val", "test")
    assert len(runs) == 3 * 5 and {run.program for run in runs.values()} == {task}
    for seed in range(5):
        for arm in ("a2mim", "simmim"):                      # two seeds are there of both
            weights = made / "pretrained" / f"{arm}-{seed % 2}" / "backbone.pt"
            run = runs[f"{task}/{arm}-{seed}"]
            assert run.start == ("--weights", str(weights)) and not run.needs
        assert runs[f"{task}/scratch-{seed}"].start == (
            "--init", "scratch", "--stem", "small")          # the same net
    same = {run.flags[:6] for run in runs.values()}
    assert same == {("--data", "set", "--arch", "resnet18", "--workers", "0")}
    assert all("test" in run.flags for run in runs.values())

    alone = compare.parse([*flags, "--arms", "a2mim", "scratch"])
    assert (alone.pretrain_seeds, alone.arch, alone.image_size) == (3, "resnet18", None)
    chosen = runs_of(*flags, "--split-val", "val", "--split-test", "test")
    best = chosen[f"{task}-test/a2mim-4"]                    # the best epoch on val
    assert best.needs == f"{task}/a2mim-4" and best.start[1].endswith(f"{task}/a2mim-4/best.pt")
    assert "--eval-only" in best.flags and best.flags[-1] == "test"
    assert "--eval-every" not in chosen[f"{task}/a2mim-4"].flags


def test_the_unlabelled_scenes_are_those_of_the_training_split(tmp_path):
    plans.draw_scenes(tmp_path / "scenes", 3, (32, 32))
    files = sorted((tmp_path / "scenes").iterdir())
    for i, file in enumerate(files):
        expected = Scenes("train", (32, 32)).draw(i)[0].permute(1, 2, 0)
        assert np.array_equal(Image.open(file), expected)
    assert len(files) == 3 and not (tmp_path / "scenes.part").exists()


# ---- the runs themselves ----

@pytest.mark.parametrize("arm", ["a2mim", "simmim"])
def test_pre_training_is_the_plain_command_bit_for_bit(arm, classes, tmp_path):
    """The same log, but for the clock, and the same weights."""
    run = runs_of("--data", str(classes), *NET, "--pretrain-epochs", "3")[f"pretrained/{arm}-1"]
    assert many_runs.make_run(run, tmp_path / "it's here") is None
    plain = ["--data", str(classes), *NET, "--epochs", "3", "--seed", "1"]
    plain += ["--baseline", "simmim"] if arm == "simmim" else []
    pretrain.main([*plain, "--out", str(tmp_path / "plain")])
    made = tmp_path / "it's here" / "pretrained" / f"{arm}-1"
    log = read_log(tmp_path / "plain")
    assert read_log(made) == log and "loss" in log[0] and not {*CLOCK} & {*log[0]}
    assert any("held_out" in line for line in log)
    expected = torch.load(tmp_path / "plain" / "backbone.pt", weights_only=True)
    found = torch.load(made / "backbone.pt", weights_only=True)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_random_features_are_those_that_pre_training_starts_from(classes, tmp_path, monkeypatch):
    runs = runs_of("--data", str(classes), *NET, "--pretrain-epochs", "1", "--out", str(tmp_path))
    many_runs.make_run(runs["pretrained/scratch-1"], tmp_path)
    many_runs.make_run(runs["knn/scratch-1"], tmp_path)
    first = {}

    def note(step, batches, settings, world, state):
        backbone = state.model.encoder.backbone.state_dict()
        first.update({name: value.clone() for name, value in backbone.items()})
        raise Failed("that is enough")

    monkeypatch.setattr(pretrain, "train_step", note)
    assert "that is enough" in many_runs.make_run(runs["pretrained/a2mim-1"], tmp_path)
    found = torch.load(tmp_path / "pretrained" / "scratch-1" / "backbone.pt", weights_only=True)
    assert found.keys() == first.keys()
    assert all(torch.equal(found[name], value) for name, value in first.items())
    result = json.loads((tmp_path / "knn" / "scratch-1" / "result.json").read_text())
    assert result["images"] == 8                             # of val/


def test_random_features_of_a_resnet_pass_through_its_residual_branches(tmp_path):
    """Before training their last BatchNorm is 0, so that the blocks do nothing. Features of the
    shortcuts alone would be too weak a baseline."""
    flags = "--data shapes --arch resnet18 --image-size 32 --out".split()
    many_runs.save_random_backbone([*flags, str(tmp_path)])
    found = torch.load(tmp_path / "backbone.pt", weights_only=True)
    last = [found[f"layer{stage}.{block}.bn2.weight"] for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert all((weight == 1).all() for weight in last)


TINY = ["--pretrain-epochs", "1", "--tune-epochs", "1", "--few", "5/class", "--jobs", "1"]


def test_a_comparison_writes_its_table_and_a_second_start_makes_only_what_is_missing(
        classes, tmp_path, monkeypatch, in_this_process, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "time_steps", lambda *_, **__: Speed(2.0, 1))
    monkeypatch.setitem(finetune.RECIPES["linear"], "epochs", 1)
    flags = ["--data", str(classes), *NET, *TINY, "--seeds", "3", "--pretrain-seeds", "2"]
    compare.main(flags)
    out = Path("runs/compare-my set-shufflenet_v2_x0_5")
    printed = capsys.readouterr()
    assert "27 runs in" in printed.err and "27 to make" in printed.err
    assert "about" in printed.err and "27/27" in printed.err
    table = (out / "table.md").read_text()
    assert table.strip() in printed.out
    found = json.loads((out / "results.json").read_text())
    assert [*found["scores"]] == ["5 labels per class", "linear probe, 5 labels per class", "20-NN"]
    a2mim = found["scores"]["5 labels per class"]["a2mim"]
    for seed in range(3):                                    # by what finetune.py itself wrote
        result = json.loads((out / f"labels-5-per-class/a2mim-{seed}/result.json").read_text())
        assert result["labels"] == 10 and a2mim[str(seed)] == close(100 * result["top1"])
    means = [(a2mim["0"] + a2mim["2"]) / 2, a2mim["1"]]
    assert f"| A2MIM | {scores.mean_and_spread(means)} |" in table
    assert table.count("A2MIM: ") == 6                       # two other arms, three columns
    assert Image.open(out / "plot.png").width == 800

    # what is missing is made, and nothing else
    times = {path: path.stat().st_mtime_ns for path in out.rglob("log.jsonl")}
    gone = out / "labels-5-per-class" / "simmim-2"
    gone.rename(tmp_path / "before")
    compare.main(flags)
    assert "27 runs in" in (said := capsys.readouterr().err) and ", 1 to make" in said
    made = {path for path in times if path.stat().st_mtime_ns != times[path]}
    assert made == {gone / "log.jsonl"}
    assert read_log(gone) == read_log(tmp_path / "before")

    code, said = complaint(capsys, *flags, "--tune-epochs", "2", main=compare.main)
    assert code == 2 and "was made with other flags (" in said


def test_a_run_that_was_stopped_is_continued_and_equals_one_that_was_not(classes, tmp_path,
                                                                        monkeypatch):
    run = runs_of("--data", str(classes), *NET, "--pretrain-epochs", "4")["pretrained/a2mim-0"]
    assert many_runs.make_run(run, tmp_path / "whole") is None
    step = pretrain.train_step
    made = []

    def stop_at_2(number, *rest):
        made.append(number)
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(number, *rest)

    monkeypatch.setattr(pretrain, "train_step", stop_at_2)
    out = tmp_path / "stopped"
    assert "stopped by SIGTERM" in many_runs.make_run(run, out)
    part = out / f"{run.name}.part"
    assert not run.is_done(out) and (part / "checkpoint.pt").exists()
    # as a kill leaves them while a checkpoint is replaced
    (part / "checkpoint.pt").rename(part / "checkpoint-previous.pt")
    with pytest.raises(ValueError, match="was made with other flags"):
        many_runs.check_flags([Run(run.name, run.program, (*run.flags, "--val", "0"))], out)
    many_runs.check_flags([run], out)
    assert many_runs.make_run(run, out) is None
    assert made == [0, 1, 2, 3]                              # no step twice
    assert read_log(out / run.name) == read_log(tmp_path / "whole" / run.name)


def test_a_run_that_died_before_its_first_checkpoint_is_made_again(classes, tmp_path):
    run = runs_of("--data", str(classes), *NET, "--pretrain-epochs", "4")["pretrained/a2mim-0"]
    part = tmp_path / f"{run.name}.part"
    part.mkdir(parents=True)
    for name in ("log.jsonl", "backbone.pt", "best.pt", "result.json"):
        (part / name).touch()
    assert many_runs.make_run(run, tmp_path) is None
    assert not (tmp_path / run.name / "result.json").exists()


def test_a_folder_with_the_name_of_a_set_is_a_folder():
    assert compare.folder_or_name("shapes") == "shapes"
    assert compare.folder_or_name("shapes/") == compare.folder_or_name("./shapes") == "./shapes"
    assert compare.folder_or_name("set/") == compare.folder_or_name("./set") == "set"


def test_a_run_waits_for_the_one_it_needs_and_a_failure_holds_up_no_other(tmp_path, monkeypatch,
                                                                         in_this_process, capsys):
    made = []

    def make_run(run, out):
        made.append(run.name)
        if run.name == "bad":
            return "bad: no space left"
        (out / run.name).mkdir()

    monkeypatch.setattr(many_runs, "make_run", make_run)
    plan = [Run("c", "finetune", (), needs="b"), Run("bad", "pretrain", ()),
            Run("d", "finetune", (), needs="bad"), Run("b", "pretrain", ()),
            Run("e", "finetune", (), needs="c")]
    with pytest.raises(Failed, match=r"1 of 5 runs failed, see above, and 1 that need them"):
        many_runs.make_all(plan, tmp_path, 1, Distributed())
    assert made == ["bad", "b", "c", "e"]
    assert "bad: no space left" in capsys.readouterr().err


def test_a_comparison_whose_runs_fail_says_so_and_ends_with_1(tmp_path, monkeypatch, capsys,
                                                              in_this_process):
    pytest.importorskip("matplotlib")

    def full(*_):
        raise OSError(28, "No space left on device")

    programs = dict.fromkeys(many_runs.PROGRAMS, full)
    monkeypatch.setattr(many_runs, "PROGRAMS", programs)
    monkeypatch.setattr(compare, "time_steps", lambda *_, **__: None)
    flags = ["--quick", "--ablation-seeds", "0", "--out", str(tmp_path)]
    code, said = complaint(capsys, *flags, main=compare.main)
    assert code == 1 and "No space left on device" in said and "Traceback" not in said
    # 3 starts, scratch twice, scratch-long twice; the others need the starts
    assert said.splitlines()[-1].startswith(
        "compare.py: 7 of 17 runs failed, see above, and 10 that need them were not begun")


def test_a_signal_stops_the_runs_in_their_processes_and_they_are_saved(classes, tmp_path):
    """A real pool: the worker that trains gets SIGTERM, finishes its step and saves."""
    flags = ["--data", str(classes), *NET, "--pretrain-epochs", "500", "--seeds", "1"]
    run = runs_of(*flags)["pretrained/a2mim-0"]
    log = tmp_path / f"{run.name}.part" / "log.jsonl"

    def stop_once_it_trains():
        deadline = time.time() + 120
        while not log.exists() and time.time() < deadline:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_once_it_trains, daemon=True).start()
    with pytest.raises(Stopped, match="the same command runs what is missing") as stopped:
        many_runs.make_all([run], tmp_path, 1, Distributed())
    assert stopped.value.code == 128 + signal.SIGTERM
    assert (log.parent / "checkpoint.pt").exists() and not run.is_done(tmp_path)


# ---- how long it takes ----

def test_steps_are_timed_by_the_log_of_a_run_that_is_thrown_away(tmp_path, monkeypatch):
    """A made program logs a slow first step of 9 s, then steps of 0.5 s: 25 in an epoch."""
    script = tmp_path / "made.py"
    script.write_text(
        "import json, pathlib, sys\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "assert sys.argv[1:6] == ['--seed', '3', '--init', 'scratch', '--log-every']\n"
        "out.mkdir()\n"
        "(out / 'args.json').write_text(json.dumps({'epochs': 4, 'iterations': None}))\n"
        "lines = [dict(step=i + 1, epoch=(i + 1) / 25, loss=1, time=100 + 0.5 * i + 9 * (i > 0))\n"
        "         for i in range(9)]\n"
        "(out / 'log.jsonl').write_text(''.join(json.dumps(line) + '\\n' for line in lines))\n")
    monkeypatch.setitem(many_runs.SCRIPTS, "finetune", str(script))
    run = Run("x", "finetune", ("--seed", "3"), ("--weights", "not there yet"))
    found = many_runs.time_steps(run, ("--init", "scratch"), one_thread=True)
    assert found == Speed(close(0.5), 100)

    script.write_text("import sys; sys.exit('made.py: error: --seed 3: is odd') or sys.exit(2)")
    with pytest.raises(Failed, match="--seed 3: is odd"):
        many_runs.time_steps(run, (), one_thread=True)
    script.write_text("import sys; print('made.py: error: --seed 3: is odd'); sys.exit(2)")
    with pytest.raises(ValueError, match="^finetune: --seed 3: is odd$"):
        many_runs.time_steps(run, (), one_thread=True)


def test_a_real_run_is_timed(classes):
    settings = compare.parse(["--data", str(classes), *NET, "--pretrain-epochs", "20"])
    run = next(run for run in compare.plan(settings) if run.program == "pretrain")
    found = many_runs.time_steps(run, (), one_thread=True)
    assert found.steps == 20 * 1 == run.steps and 0.01 < found.seconds < 10


def test_the_time_of_all_runs_is_that_of_their_steps():
    speeds = {"pretrain": Speed(2.0, 50), "segment": Speed(3.0, 10)}
    plan = [Run("a", "pretrain", (), steps=100), Run("b", "segment", ()),
            Run("c", "random", (), steps=0), Run("d", "segment", (), steps=0)]
    assert many_runs.seconds_of(plan, speeds) == 200 + 30
    assert [many_runs.in_words(t) for t in (0.23, 99, 600, 7200)] == [
        "0.23 seconds", "99 seconds", "10 minutes", "2.0 hours"]


# ---- the tables ----

def test_the_table_of_a_task_holds_every_arms_mean_spread_and_difference(tmp_path):
    pytest.importorskip("matplotlib")
    by_arm = {"a2mim": (0.5, 0.6), "simmim": (0.5, 0.58), "scratch": (0.1, 0.21)}
    for arm, values in by_arm.items():
        for seed, score in enumerate(values):
            folder = tmp_path / f"detect/{arm}-{seed}"
            folder.mkdir(parents=True)
            ap = {"AP": score / 2, "AP50": score, "any class": 0.9}
            (folder / "result.json").write_text(json.dumps({"box": ap}))
    settings = compare.parse(["--task", "detect", "--seeds", "2", "--out", str(tmp_path)])
    text = compare.summarise(settings)
    assert "| start | box AP50 | box AP | box AP, any class |" in text       # no outlines
    assert "| A2MIM | 55.0 ± 7.1 | 27.5 ± 3.5 | 90.0 ± 0.0 |" in text
    assert "box AP50, A2MIM: better than scratch (+39.5 points" in text
    assert "both stages" not in text
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"detect", "detect-table.md", "detect-results.json", "detect-plot.png"}
    assert Image.open(tmp_path / "detect-plot.png").width == 800


def test_the_table_of_drawn_shapes_has_the_ablations(tmp_path):
    pytest.importorskip("matplotlib")
    write_scores(tmp_path, "labels-0.05", {"a2mim": [0.66, 0.68], "scratch": [0.5, 0.6],
                                           "none": [0.562], "fill-zero": [0.609]})
    text = compare.summarise(compare.parse(["--seeds", "2", "--out", str(tmp_path)]))
    assert "| A2MIM | 67.0 ± 1.4 | - | - | - |" in text
    assert "| scratch; probes: random features | 55.0 ± 7.1 |" in text
    assert "| fill zero | 60.9 | +4.7 |" in text and "pre-training of 0.5 epochs" in text
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["ablations"] == {"none": [close(56.2)], "fill zero": [close(60.9)]}


# ---- mistakes ----

@pytest.mark.parametrize("flags, words", [
    ("--data nowhere", "--data nowhere: no such folder"),
    ("--data file", "--data file: no such folder"),
    ("--data .", "--data .: needs train/<class>/ and val/<class>/"),
    ("--data set --few 30/class", "--few 30/class: class c0 has 4 images"),
    ("--jobs -1", "--jobs: -1: must be an integer from 1"),
    ("--jobs 0", "--jobs: 0: must be an integer from 1"),
    ("--seeds -1", "--seeds: -1: must be an integer from 1"),
    ("--seeds 2 --pretrain-seeds 3", "--pretrain-seeds 3: must be at most --seeds, 2"),
    ("--few 0", "--few: 0: must be a share such as 0.1, a count such as 9/class, or all"),
    ("--few 0.1 0/class", "--few: 0/class: must be a share"),
    ("--few 0.1 all --tune-epochs 1 2 3", "--tune-epochs: 3 numbers for 2 amounts of labels"),
    ("--arms a2mim mae", "--arms: mae: must be one of a2mim, simmim, scratch, scratch-long"),
    ("--pretrain-epochs 0", "--pretrain-epochs: 0: must be a number from"),
    ("--workers -1", "--workers: -1: must be an integer from 0"),
    ("--arch alexnet", "--arch alexnet: on drawn shapes must be one of resnet18"),
    ("--arch resnet19", "did you mean resnet18"),
    ("--data set --ablation-seeds 1", "--ablation-seeds: has no effect on --task classify"),
    ("--weights-of set", "--weights-of: has no effect on --task classify"),
    ("--task segment --few 0.1", "--few: has no effect on --task segment"),
    ("--task segment --split-val test", "--split-val: has no effect on --task segment --data sha"),
    ("--task segment --data set", "--task segment --data set: needs --weights-of DIR"),
    ("--task segment --data set --weights-of set",
     "--weights-of set: no set/pretrained/a2mim-0/backbone.pt"),
    ("--task detect --data set --weights-of made --arms scratch",
     "--arms scratch: needs one of a2mim, simmim beside --weights-of"),
    ("--task detect --data set --weights-of odd",
     "odd/pretrained/a2mim-0/args.json: cannot be read as the settings of a run"),
    ("--task detect --data set --weights-of made --arch vit_base",
     "--arch vit_base: the weights in --weights-of are of resnet18"),
    ("--task detect --data set --weights-of made --pretrain-seeds 2",
     "--pretrain-seeds 2: --weights-of has 1; give at most 1"),
    ("--task detect --arms scratch-long", "--arms scratch-long: is not there for --task detect"),
    ("--task detect --split-val ../x", "--split-val: ../x: must be a name such as test"),
    ("--out file", "--out file: cannot be written"),
    ("--task detect --out file/x", "--out file/x: cannot be written")])
def test_the_flags_are_checked_before_the_work_begins(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    labelled_folder(Path("set"), {"train": (4, 4), "val": (1, 1)})
    pretrained(Path("made"), {"a2mim": 1, "simmim": 1}, arch="resnet18")
    pretrained(Path("odd"), {"a2mim": 1, "simmim": 1}, stem="small")         # of no known net
    before = {*Path().rglob("*")}

    def began(*_, **__):
        pytest.fail("the work began")

    for name in ("make_all", "draw_scenes", "time_steps"):
        monkeypatch.setattr(compare, name, began)
    code, said = complaint(capsys, *flags.split(), main=compare.main)
    assert code == 2 and words in said and said.count("\n") == 1
    assert {*Path().rglob("*")} == before


def test_without_matplotlib_one_line_says_so_before_the_work_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chart.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(compare, "time_steps", lambda *_, **__: pytest.fail("the work began"))
    code, said = complaint(capsys, "--quick", main=compare.main)
    assert code == 2 and "matplotlib is missing" in said
    assert "pip install -r extras/requirements.txt" in said and not os.listdir(tmp_path)
