"""The slow faults, for real: runs are killed, disks fill up, users mistype. Under 20 minutes on 2 CPU cores:

    python extras/faults.py

Prints, and writes to --out: kills survived, finals that are bit-identical to the uninterrupted run, and a table of bad
input: what was given, what was printed, exit code. Exit code 1 if anything is not as it should be.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PRE = ("--data {images} --arch deit_tiny --image-size 64 --mask-cell 16 --batch-size 8 --epochs 6 --log-every 1 "
       "--sheets 0 --amp off --workers 2 --save-every 1 --val 0")
TUNE = ("--data {classes} --init scratch --arch resnet18 --image-size 32 --batch-size 8 --epochs 6 --log-every 1 "
        "--amp off --workers 2 --save-every 1 --ema 0.9 --mixup 0.5")


def start(program: str, flags: str, world: int = 1, restarts: int = 0, **options) -> subprocess.Popen:
    """A run as a user starts it, in a process group of its own."""
    launch = (
        [sys.executable]
        if world == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={world}",
            f"--max-restarts={restarts}",
        ]
    )
    return subprocess.Popen(
        [*launch, program, *flags.split()],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def finish(run: subprocess.Popen, limit: float = 300) -> tuple[int, str]:
    """(exit code, what it said, without the progress bar)."""
    said, _ = run.communicate(timeout=limit)
    return run.returncode, "\n".join(
        line
        for part in said.split("\n")
        if (line := part.split("\r")[-1]) and "step/s" not in line and "s/step" not in line
    )


def kill(run: subprocess.Popen) -> None:
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()


def log_of(out: Path) -> list[dict]:
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("images_per_s", "peak_memory_mb")}
        for line in (out / "log.jsonl").read_text().splitlines()
    ]


def weights_of(out: Path) -> dict:
    saved = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
    return {name: tensor for part in ("model", "ema") for name, tensor in saved.get(part, {}).items()} | {
        "step": torch.tensor(saved["step"])
    }


def same(a: Path, b: Path) -> bool:
    """Bit by bit: every weight, and every line of the log."""
    first, second = weights_of(a), weights_of(b)
    return (
        set(first) == set(second)
        and all(torch.equal(v, second[k]) for k, v in first.items())
        and log_of(a) == log_of(b)
    )


# ---- runs that are killed ----

def kills(work: Path, rng: random.Random, count: int) -> tuple[int, int, int]:
    """SIGKILL at random moments until the run is through: (kills, loadable after, identical finals)."""
    done, loadable, identical, runs = 0, 0, 0, 0
    while done < count:
        program, flags = (("pretrain.py", PRE), ("finetune.py", TUNE))[runs % 2]
        whole, cut = work / f"whole-{program}", work / f"cut-{runs}"
        if not whole.exists():
            code, said = finish(start(program, f"{flags} --out {whole}"))
            assert code == 0, said
        while True:
            run = start(program, f"{flags} --out {cut} --resume")
            before = (cut / "log.jsonl").stat().st_mtime if (cut / "log.jsonl").exists() else 0.0
            while run.poll() is None and not (
                (cut / "log.jsonl").exists() and (cut / "log.jsonl").stat().st_mtime > before
            ):
                time.sleep(0.05)                             # until it trains; from then on, any moment
            try:
                run.wait(timeout=rng.uniform(0.0, 2.0))
                break
            except subprocess.TimeoutExpired:
                kill(run)
                done += 1
                try:
                    weights_of(cut)
                    loadable += 1
                except FileNotFoundError:
                    loadable += 1                            # killed before the first was there: none is lost
                except (RuntimeError, EOFError, OSError) as error:
                    print(f"  {cut}: not loadable: {error}")
        code, said = finish(run)
        runs += 1
        identical += code == 0 and same(whole, cut)
        print(f"  {program}: {done} kills so far, final {'identical' if same(whole, cut) else 'DIFFERENT'}", flush=True)
    return done, loadable, identical - runs


def preemption(work: Path) -> list[tuple[str, bool]]:
    """SIGTERM and SIGINT to a run and its workers, one process and two; a rank that dies under --max-restarts."""
    checks = []
    for world in (1, 2):
        whole = work / f"whole-{world}"
        code, said = finish(start("pretrain.py", f"{PRE} --out {whole}", world))
        assert code == 0, said
        for number in (signal.SIGTERM, signal.SIGINT):
            cut = work / f"signal-{world}-{number.name}"
            run = start("pretrain.py", f"{PRE} --out {cut}", world)
            while run.poll() is None and not (cut / "log.jsonl").exists():
                time.sleep(0.05)
            time.sleep(1.0)
            os.killpg(run.pid, number)                       # as a terminal does it: everyone gets it
            code, said = finish(run)
            told = f"stopped by {number.name} after step" in said
            finish(start("pretrain.py", f"{PRE} --out {cut} --resume", world))
            checks.append(
                (
                    f"{number.name}, {world} process{'es' * (world > 1)}: exit {code}, says how to resume, "
                    "resumed run identical",
                    told and (code == 128 + number if world == 1 else code != 0) and same(whole, cut),
                )
            )
    cut = work / "restart"
    run = start("pretrain.py", f"{PRE} --out {cut} --resume", 2, restarts=3)
    while run.poll() is None and not (cut / "checkpoint.pt").exists():
        time.sleep(0.05)
    ranks = subprocess.run(["pgrep", "-f", f"pretrain.py.*{cut}"], capture_output=True, text=True).stdout.split()
    victims = [
        int(p) for p in ranks if int(p) != run.pid and Path(f"/proc/{p}/stat").read_text().split()[3] == str(run.pid)
    ]
    os.kill(victims[-1], signal.SIGKILL)
    code, said = finish(run)
    checks.append(
        (
            "a rank killed under torchrun --max-restarts=3 --resume: recovers by itself, identical",
            code == 0 and same(work / "whole-2", cut),
        )
    )
    return checks


# ---- a disk that fills up, memory that grows ----

def full_disk(work: Path) -> tuple[str, bool]:
    """A limit on the size of a file, reached in a run: it says so, keeps the old checkpoint, is not called done."""
    out = work / "full"
    flags = PRE.replace("--epochs 6", "--epochs 2")
    code, said = finish(start("pretrain.py", f"{flags} --out {out}"))
    before = (out / "checkpoint.pt").read_bytes()
    run = start(
        "pretrain.py",
        f"{flags} --epochs 3 --out {out} --resume",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)),
    )
    code, said = finish(run)
    return (
        f"no room for the last checkpoint: exit {code}, says so, the old one is kept",
        code == 1 and "checkpoint not written" in said and "make room, then go on with" in said
        and (out / "checkpoint.pt").read_bytes() == before,
    )


def memory(work: Path) -> tuple[str, bool]:
    """Resident memory of all processes of a run, after 200 steps and after 2,000."""
    out = work / "long"
    run = start(
        "pretrain.py", f"{PRE} --out {out} --epochs 500 --image-size 32 --patch-size 16 --save-every 500 --log-every 20"
    )
    at = {}
    threading.Thread(target=run.stdout.read, daemon=True).start()  # or its pipe would fill up, and the run wait
    while run.poll() is None and 2000 not in at:
        time.sleep(0.2)
        step = (
            json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"]
            if (out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_size
            else 0
        )
        for mark in (200, 2000):
            if step >= mark and mark not in at:
                group = subprocess.run(
                    ["ps", "-o", "rss=", "-g", str(run.pid)], capture_output=True, text=True
                ).stdout.split()
                at[mark] = sum(map(int, group)) / 1024
    os.killpg(run.pid, signal.SIGKILL)
    return (
        f"resident memory with workers: {at.get(200, 0):.0f} MB after 200 steps, {at.get(2000, 0):.0f} MB after 2,000",
        2000 in at and at[2000] <= 1.05 * at[200],
    )


# ---- bad input ----

def paint(folder: Path, count: int, size: int = 48) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{i}.png")


class Evil:
    def __reduce__(self):
        return print, ("THIS MUST NEVER RUN",)


def bad_inputs(work: Path, images: Path, classes: Path) -> list[tuple[str, str, str]]:
    """(program, flags, words that must be in the one line of complaint)."""
    (work / "empty").mkdir()
    paint(work / "train_only/train/a", 2), paint(work / "train_only/train/b", 2)
    (
        paint(work / "odd/train/a", 2),
        paint(work / "odd/train/b", 2),
        paint(work / "odd/val/a", 2),
        paint(work / "odd/val/c", 2),
    )
    paint(work / "hollow/a", 3), (work / "hollow/b").mkdir()
    paint(work / "one_class/a", 3)
    for i in range(20):
        (images / f"bad{i}.jpg").unlink(missing_ok=True)
    shutil.copytree(images, work / "half_bad")
    for i in range(20):
        (work / "half_bad" / f"bad{i}.jpg").write_text("no image")
    good = work / "whole-pretrain.py"
    run = lambda name: shutil.copytree(good, work / name)
    (
        (run("corrupt") / "checkpoint.pt").write_bytes(b"junk"),
        (work / "corrupt/checkpoint-previous.pt").write_bytes(b"junk"),
    )
    (
        (run("cut") / "checkpoint.pt").write_bytes((good / "checkpoint.pt").read_bytes()[:9999]),
        (work / "cut/checkpoint-previous.pt").unlink(),
    )
    torch.save(Evil(), run("evil") / "checkpoint.pt"), (work / "evil/checkpoint-previous.pt").unlink()
    (
        torch.save(Evil(), work / "evil.pt"),
        torch.save([1, 2], work / "list.pt"),
        (work / "text.pt").write_text("hello"),
        (work / "cut.pt").write_bytes((good / "backbone.pt").read_bytes()[:9999]),
    )
    (work / "file").write_text("")
    p, w = f"--data {images}", f"--weights {good}/backbone.pt"
    fresh = (f"--out {work}/fresh-{i}" for i in range(100))
    table = [
        ("pretrain.py", "--arch resnet51", "--arch"),
        ("pretrain.py", "--lr -1", "--lr"),
        ("pretrain.py", "--lr fast", "--lr"),
        ("pretrain.py", "--lr nan", "--lr"),
        ("pretrain.py", "--epochs 0", "--epochs"),
        ("pretrain.py", "--batch-size 0", "--batch-size"),
        ("pretrain.py", "--batch-size 1.5", "--batch-size"),
        ("pretrain.py", "--mask-ratio 0", "mask ratio"),
        ("pretrain.py", "--mask-ratio 1", "mask ratio"),
        ("pretrain.py", "--mask-cell 0", "--mask-cell"),
        ("pretrain.py", "--image-size 100", "not a multiple of the 32-pixel mask cell"),
        ("pretrain.py", "--arch deit_tiny --image-size 96 --patch-size 20", "patch"),
        ("pretrain.py", "--image-size 64 --mask-cell 8 --mask-stage 4", "mask cell is smaller than the stride"),
        ("pretrain.py", "--mask-stage 7 --image-size 64", "mask stage 7"),
        ("pretrain.py", "--token glue", "--token"),
        ("pretrain.py", "--fill red", "--fill"),
        ("pretrain.py", "--spectrum all", "--spectrum"),
        ("pretrain.py", "--crop-min 0", "--crop-min"),
        ("pretrain.py", "--drop-path 1", "--drop-path"),
        ("pretrain.py", "--amp fp8", "--amp"),
        ("pretrain.py", "--save-every often", "--save-every"),
        ("pretrain.py", "--workers -1", "--workers"),
        ("pretrain.py", "--max-bad 2", "--max-bad"),
        ("pretrain.py", "--warmup-epochs 9 --epochs 3 --image-size 64", "--warmup-epochs"),
        ("pretrain.py", "--wings 2", "--wings"),
        ("pretrain.py", "--epoch 3", "--epoch"),
        ("pretrain.py", "--seed -4", "--seed"),
        ("pretrain.py", "--batch-size 5000 --image-size 64", "one step takes 5000"),
        ("pretrain.py", f"--data {work}/nowhere", "no such folder"),
        ("pretrain.py", f"--data {work}/empty", "no images below"),
        ("pretrain.py", f"--data {work}/file", "no such folder"),
        ("pretrain.py", "--data cifar10 --data-root " + str(work), "add --download"),
        ("pretrain.py", f"--data {work}/half_bad --image-size 64 --batch-size 8", "cannot be read"),
        ("pretrain.py", f"--out {work}/file/run", "cannot be written"),
        ("pretrain.py", "--out /proc/run", "cannot be written"),
        ("pretrain.py", f"--out {good}", "already holds a run"),
        ("pretrain.py", f"--out {work}/corrupt --resume", "cannot be read"),
        ("pretrain.py", f"--out {work}/cut --resume", "cannot be read"),
        ("pretrain.py", f"--out {work}/evil --resume", "cannot be read"),
        ("pretrain.py", f"--out {good} --resume --arch deit_small", "of another model"),
        ("finetune.py", f"--out {good} --resume", "of another model"),
        ("finetune.py", w, "--data is missing"),
        ("finetune.py", f"--data {classes}", "give --weights FILE"),
        ("finetune.py", f"--data {classes} --init scratch", "--arch is missing"),
        ("finetune.py", f"--data {classes} --weights {work}/no.pt --arch resnet18", "no such file"),
        ("finetune.py", f"--data {classes} --weights {work}/text.pt --arch resnet18", "not a file of weights"),
        ("finetune.py", f"--data {classes} --weights {work}/cut.pt --arch deit_tiny", "not a file of weights"),
        ("finetune.py", f"--data {classes} --weights {work}/evil.pt --arch resnet18", "code to run"),
        ("finetune.py", f"--data {classes} --weights {work}/list.pt --arch resnet18", "holds no weights"),
        ("finetune.py", f"--data {classes} {w} --arch resnet18", "another architecture"),
        ("finetune.py", f"--data {classes} {w} --labels none", "--labels none"),
        ("finetune.py", f"--data {classes} {w} --labels 500/class", "--labels 500/class"),
        ("finetune.py", f"--data {classes} {w} --recipe best", "--recipe"),
        ("finetune.py", f"--data {work}/train_only {w}", "no val/"),
        ("finetune.py", f"--data {work}/odd {w}", "different classes"),
        ("finetune.py", f"--data {work}/hollow {w}", "holds no images"),
        ("finetune.py", f"--data {work}/one_class {w}", "a folder for each class"),
        ("finetune.py", f"--data {classes} {w} --eval-only", "no classification head"),
    ]
    return [
        (
            program,
            (flags if "--data" in flags or program == "finetune.py" else f"{p} {flags}")
            + ("" if "--out" in flags else f" {next(fresh)}"),
            words,
        )
        for program, flags, words in table
    ]


def answer(program: str, flags: str, words: str, work: Path, world: int = 1) -> tuple[str, str, int, bool]:
    code, said = finish(start(program, flags, world), 120)
    lines = [line for line in said.splitlines() if line.startswith(f"{program}: ")]
    fine = (
        len(lines) == 1
        and words in lines[0]
        and "Traceback" not in said.split("torch/distributed")[0]
        and "MUST NEVER" not in said
        and code == (1 if world > 1 or "half_bad" in flags else 2)
    )
    return (
        f"{program} {flags}".replace(str(work) + "/", "").split(" --out fresh")[0],
        (lines or said.splitlines() or ["nothing"])[-1].replace(str(work) + "/", ""),
        code,
        fine,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="20")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (0)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/faults"), metavar="DIR", help="where faults.md goes (runs/faults)"
    )
    args = parser.parse_args()
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        global PRE, TUNE
        paint(work / "images", 40), paint(work / "classes/a", 20), paint(work / "classes/b", 20)
        PRE, TUNE = PRE.format(images=work / "images"), TUNE.format(classes=work / "classes")
        done, loadable, missing = kills(work, random.Random(args.seed), args.kills)
        checks = [
            (
                f"{done} kills by SIGKILL: {loadable} times a loadable checkpoint, every final bit-identical",
                loadable == done and missing == 0,
            )
        ]
        checks += preemption(work)
        checks += [full_disk(work), memory(work)]
        inputs = bad_inputs(work, work / "images", work / "classes")
        rows = [answer(program, flags, words, work) for program, flags, words in inputs]
        rows.append(answer(*inputs[10][:2], inputs[10][2], work, world=2))
        rows[-1] = ("torchrun, 2 processes: " + rows[-1][0], *rows[-1][1:])
    answered = sum(fine for *_, fine in rows)
    text = "\n".join(
        [
            *(f"- {'ok' if fine else 'FAILED'}: {what}" for what, fine in checks),
            f"- {'ok' if answered == len(rows) else 'FAILED'}: {answered} of {len(rows)} bad inputs answered in a line",
            "",
            "| given | printed | exit code |",
            "|---|---|---|",
            *(
                f"| `{given}` | {printed} | {code}{'' if fine else ' **unexpected**'} |"
                for given, printed, code, fine in rows
            ),
            "",
            f"{(time.time() - began) / 60:.1f} minutes",
        ]
    )
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "faults.md").write_text(text + "\n")
    sys.exit(0 if answered == len(rows) and all(fine for _, fine in checks) else 1)


if __name__ == "__main__":
    main()
