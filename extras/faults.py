"""The slow faults, for real: runs are killed, disks fill up, users mistype. In 15 to 25 minutes:

    python extras/faults.py
    python extras/faults.py --only same_folder damaged       some parts only

Prints the results and writes them to --out: how many kills lost no checkpoint, how many final
states are bit-identical to the uninterrupted run, and a table of bad input (given, printed, exit
code). The exit code is 1 if anything is not as it should be.
"""

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
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.command import Failed, Distributed, command_line
from engine.files import read_lines
from engine.flags import COUNT, Parser, defaults, number, path
from extras.output import check_folder, writing

PRE = ("--data {images} --arch deit_tiny --image-size 64 --mask-size 16 --batch-size 8 --epochs 6 "
       "--log-every 1 --sheets 0 --amp off --workers 2 --save-every 1 --val 0")
TUNE = ("--data {classes} --init scratch --arch resnet18 --image-size 32 --batch-size 8 --epochs 6 "
        "--log-every 1 --amp off --workers 2 --save-every 1 --ema 0.9 --mixup 0.5")
SMALL = ("--arch shufflenet_v2_x0_5 --image-size 64 --batch-size 8 --log-every 1 --amp off "
         "--workers 0 --save-every 1")
PRE_SMALL = f"--data {{images}} {SMALL} --sheets 0 --val 0"              # both: 5 steps an epoch
TUNE_SMALL = f"--data {{classes}} --init scratch {SMALL}"


def start(program: str, flags: str, world: int = 1, restarts: int = 0,
          **options) -> subprocess.Popen:
    """A run as a user starts it, in a process group of its own."""
    launch = [sys.executable]
    if world > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}",
                   f"--max-restarts={restarts}"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*launch, program, *flags.split()], cwd=ROOT, text=True,
                            start_new_session=True, env=environment, **{**streams, **options})


def finish(run: subprocess.Popen, limit: float = 300) -> tuple[int, str]:
    """(exit code, what it printed, without the progress bar). It is killed after `limit` s."""
    try:
        said, _ = run.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        kill(run)
        return -signal.SIGKILL, f"did not end in {limit:g} s"
    lines = [line.split("\r")[-1] for line in (said or "").split("\n")]
    lines = [line for line in lines if line and "step/s" not in line and "s/step" not in line]
    return run.returncode, "\n".join(lines)


def kill(run: subprocess.Popen) -> None:
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()


CLOCK = ("time", "images_per_s", "data_wait", "peak_memory_mb")           # differ from run to run


def log_of(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def weights_of(out: Path) -> dict:
    """The weights of checkpoint.pt, or of their moving average if there is one, and the step."""
    saved = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
    step = {"step": torch.tensor(saved["step"])}
    return {**saved.get("model", {}), **saved.get("ema", {}), **step}


def whole_run(work: Path, program: str, flags: str) -> Path:
    """The folder of a run that nothing disturbs. The run is made once."""
    out = work / f"whole-{program}"
    if not out.exists():
        code, said = finish(start(program, f"{flags} --out {out}"))
        assert code == 0, said
    return out


def one_line(said: str, program: str) -> bool:
    """Does exactly one printed line come from the program, and no line from a traceback?"""
    lines = [line for line in said.splitlines() if line.startswith(f"{program}: ")]
    return len(lines) == 1 and "Traceback" not in said


def usable(file: Path) -> bool:
    """Is it a file that torch loads, and are all its weights finite?"""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:                                        # a broken file raises various types
        return False
    weights = saved.get("model", saved)
    tensors = [tensor for tensor in weights.values() if isinstance(tensor, torch.Tensor)]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def same(a: Path, b: Path) -> bool:
    """Is every weight the same, bit by bit, and every line of the log?"""
    first, second = weights_of(a), weights_of(b)
    if set(first) != set(second) or log_of(a) != log_of(b):
        return False
    return all(torch.equal(value, second[name]) for name, value in first.items())


# ---- runs that are killed ----

def kills(work: Path, rng: random.Random, count: int) -> tuple[int, int, int]:
    """SIGKILL at random moments until the run has ended, and then another run.

    Returns (kills, loadable checkpoints after a kill, identical final states - runs)."""
    done, loadable, identical, runs = 0, 0, 0, 0
    while done < count:
        program, flags = (("pretrain.py", PRE), ("finetune.py", TUNE))[runs % 2]
        whole, cut = whole_run(work, program, flags), work / f"cut-{runs}"
        log = cut / "log.jsonl"
        while True:
            run = start(program, f"{flags} --out {cut} --resume")
            before = log.stat().st_mtime if log.exists() else 0.0
            # it is killed at a random moment after its first step
            while run.poll() is None and not (log.exists() and log.stat().st_mtime > before):
                time.sleep(0.05)
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
                    loadable += 1        # killed before the first checkpoint: none is lost
                except (RuntimeError, EOFError, OSError) as error:
                    print(f"  {cut}: not loadable: {error}")
        code, said = finish(run)
        runs += 1
        is_same = same(whole, cut)
        identical += code == 0 and is_same
        word = "identical" if is_same else "DIFFERENT"
        print(f"  {program}: {done} kills so far, final {word}", flush=True)
    return done, loadable, identical - runs


def preemption(work: Path) -> list[tuple[str, bool]]:
    """SIGTERM and SIGINT to a run and its workers, with one process and with two; and a rank that
    is killed under --max-restarts."""
    checks = []
    for world in (1, 2):
        whole = work / f"whole-{world}"
        code, said = finish(start("pretrain.py", f"{PRE} --out {whole}", world))
        assert code == 0, said
        for sent in (signal.SIGTERM, signal.SIGINT):
            cut = work / f"signal-{world}-{sent.name}"
            run = start("pretrain.py", f"{PRE} --out {cut}", world)
            while run.poll() is None and not (cut / "log.jsonl").exists():
                time.sleep(0.05)
            time.sleep(1.0)
            os.killpg(run.pid, sent)                         # as a terminal does, to all processes
            code, said = finish(run)
            finish(start("pretrain.py", f"{PRE} --out {cut} --resume", world))
            what = (f"{sent.name}, {world} process{'es' * (world > 1)}: exit {code}, says how to "
                    "resume, resumed run identical")
            fine = code == 128 + sent if world == 1 else code != 0         # torchrun's own code
            fine = fine and f"stopped by {sent.name} after step" in said and same(whole, cut)
            checks.append((what, fine))

    cut = work / "restart"
    run = start("pretrain.py", f"{PRE} --out {cut} --resume", 2, restarts=3)
    while run.poll() is None and not (cut / "checkpoint.pt").exists():
        time.sleep(0.05)
    os.kill(ranks_of(run, cut)[-1], signal.SIGKILL)
    code, said = finish(run)
    what = "a rank killed under torchrun --max-restarts=3 --resume: recovers by itself, identical"
    checks.append((what, code == 0 and same(work / "whole-2", cut)))
    return checks


def ranks_of(run: subprocess.Popen, out: Path) -> list[int]:
    """The processes that torchrun has started, without their workers."""
    call = ["pgrep", "-f", f"pretrain.py.*{out}"]
    found = subprocess.run(call, capture_output=True, text=True).stdout.split()
    ranks = []
    for process in map(int, found):
        if process != run.pid:
            parent = Path(f"/proc/{process}/stat").read_text().split()[3]
            if parent == str(run.pid):
                ranks.append(process)
    return ranks


# ---- a disk that fills up, memory that grows ----

def full_disk(work: Path) -> tuple[str, bool]:
    """A limit on the size of files, reached in a run: it says so, keeps the old checkpoint, and is
    not called done."""
    out = work / "full"
    flags = PRE.replace("--epochs 6", "--epochs 2")
    code, said = finish(start("pretrain.py", f"{flags} --out {out}"))
    before = (out / "checkpoint.pt").read_bytes()

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    flags = f"{flags} --epochs 3 --out {out} --resume"
    code, said = finish(start("pretrain.py", flags, preexec_fn=limit_files))
    what = f"no room for the last checkpoint: exit {code}, says so, the old one is kept"
    told = "checkpoint.pt not written" in said and "make room, then go on with" in said
    kept = (out / "checkpoint.pt").read_bytes() == before
    return what, code == 1 and told and kept


def memory(work: Path) -> tuple[str, bool]:
    """Resident memory of all processes of a run, after 200 steps and after 2,000."""
    out = work / "long"
    log = out / "log.jsonl"
    run = start("pretrain.py", f"{PRE} --out {out} --epochs 500 --image-size 32 --patch-size 16 "
                               "--save-every 500 --log-every 20")
    # without a reader the pipe would fill up, and the run would wait
    threading.Thread(target=run.stdout.read, daemon=True).start()
    at = {}                                                  # step -> MB
    while run.poll() is None and 2000 not in at:
        time.sleep(0.2)
        lines = read_lines(log)
        step = lines[-1]["step"] if lines else 0
        for mark in (200, 2000):
            if step >= mark and mark not in at:
                call = ["ps", "-o", "rss=", "-g", str(run.pid)]
                sizes = subprocess.run(call, capture_output=True, text=True).stdout.split()
                at[mark] = sum(map(int, sizes)) / 1024
    if run.poll() is None:
        os.killpg(run.pid, signal.SIGKILL)
    what = (f"resident memory with workers: {at.get(200, 0):.0f} MB after 200 steps, "
            f"{at.get(2000, 0):.0f} MB after 2,000")
    return what, 2000 in at and at[2000] <= 1.05 * at[200]


def full_terminal(work: Path) -> list[tuple[str, bool]]:
    """A run whose messages cannot be written: from the start, or after its disk has filled up."""
    whole, checks = work / "told", []
    code, said = finish(start("pretrain.py", f"{PRE_SMALL} --epochs 4 --out {whole}"))
    assert code == 0, said

    limit = 64 * 2**20                                       # no file of the run is as large
    log = work / "slurm.out"
    log.touch()
    os.truncate(log, limit - 2000)                           # room for 2,000 characters

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    cases = (
        ("stderr is /dev/full", "/dev/full", None),
        ("stderr's disk fills up", log, limit_files),
    )
    for what, file, before in cases:
        out = work / f"told-{Path(file).name}"
        flags = f"{PRE_SMALL} --epochs 4 --out {out}"
        with open(file, "ab") as stderr:
            code, _ = finish(start("pretrain.py", flags, stderr=stderr, preexec_fn=before))
        checks.append((f"{what}: exit {code}, final identical", code == 0 and same(whole, out)))
    return checks


# ---- a run is called done only if its files are there ----

def false_done(work: Path) -> list[tuple[str, bool]]:
    """Steps whose loss is not finite: all of them but the first, or the last one alone."""
    checks = []
    for program, flags in (("pretrain.py", PRE_SMALL), ("finetune.py", TUNE_SMALL)):
        out = work / f"diverged-{program}"
        code, said = finish(start(program, f"{flags} --epochs 1 --lr 1e308 --out {out}"))
        what = f"{program} --lr 1e308: exit {code}, says why in one line, is not called done"
        checks.append((what, code == 1 and "done:" not in said and one_line(said, program)))

    out = work / "diverged-late"
    code, said = finish(start("pretrain.py", f"{PRE_SMALL} --epochs 1 --out {out}"))
    assert code == 0, said
    flags = f"--out {out} --resume --epochs 1.4 --lr 1e308"  # 2 steps more
    code, said = finish(start("pretrain.py", flags))
    what = (f"the last step is not finite: exit {code}, says why in one line, is not called done, "
            "the files stay usable")
    told = "done:" not in said and one_line(said, "pretrain.py")
    kept = usable(out / "checkpoint.pt") and usable(out / "backbone.pt")
    checks.append((what, code == 1 and told and kept))
    return checks


def best_not_written(work: Path) -> list[tuple[str, bool]]:
    """Something stands where best.pt is to be written. When it is gone, --resume writes best.pt."""
    checks = []
    for name in ("best.pt.tmp", "best.pt"):
        out = work / f"blocked-{name}"
        (out / name / "inside").mkdir(parents=True)          # not empty: no rename can replace it
        flags = f"{TUNE_SMALL} --epochs 2 --out {out}"
        first, said = finish(start("finetune.py", flags))
        honest = usable(out / "best.pt") if first == 0 else one_line(said, "finetune.py")
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        second, said = finish(start("finetune.py", f"{flags} --resume"))
        what = (f"a folder stands at {name}: exit {first}, done only with best.pt; when it is gone "
                f"--resume: exit {second}, best.pt is there")
        checks.append((what, honest and second == 0 and usable(out / "best.pt")))
    return checks


# ---- one folder, two runs ----

def same_folder(work: Path) -> list[tuple[str, bool]]:
    """A second run is started in the folder of a first: during it, and at the same time."""
    alone, checks = work / "alone", []
    flags = f"{PRE_SMALL} --epochs 4"
    code, said = finish(start("pretrain.py", f"{flags} --out {alone}"))
    assert code == 0, said

    for more in ("", " --resume"):
        out = work / f"shared{more.strip()}"
        first = start("pretrain.py", f"{flags} --out {out}")
        while first.poll() is None and not (out / "log.jsonl").exists():
            time.sleep(0.05)
        os.killpg(first.pid, signal.SIGSTOP)                 # so that it does not end too early
        second, said = finish(start("pretrain.py", f"{flags} --out {out}{more}"), 120)
        os.killpg(first.pid, signal.SIGCONT)
        code, _ = finish(first)
        what = (f"a second start{more} in the folder of a run: exit {second} in one line, "
                f"the first: exit {code}, identical")
        fine = second == 2 and one_line(said, "pretrain.py") and code == 0 and same(alone, out)
        checks.append((what, fine))

    out = work / "together"
    runs = [start("pretrain.py", f"{flags} --out {out}") for _ in range(2)]
    codes, said = zip(*map(finish, runs))
    what = (f"two starts at once: exit {codes[0]} and {codes[1]}, one is refused in one line, "
            "the other identical")
    fine = sorted(codes) == [0, 2]
    fine = fine and one_line(said[codes.index(2)], "pretrain.py") and same(alone, out)
    checks.append((what, fine))
    return checks


# ---- checkpoints that are damaged, or no files ----

# python -c KILLER n program flags: the program kills itself before its n-th change of a checkpoint
KILLER = """
import os, runpy, signal, sys
left = int(sys.argv[1])
def count(event, what):
    global left
    changes = event in ("os.rename", "os.link", "os.remove", "shutil.copyfile")
    if changes and "checkpoint" in str(what):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def damaged(work: Path) -> list[tuple[str, bool]]:
    """The whole one of two checkpoints is never lost: one is damaged, or a folder, or a pipe."""
    good, checks = work / "two-saves", []
    code, said = finish(start("pretrain.py", f"{PRE_SMALL} --epochs 1 --out {good}"))
    assert code == 0, said

    kills, goes_on = 0, 0
    for moment in range(1, 7):                               # two saves, three changes each
        out = work / f"damaged-{moment}"
        shutil.copytree(good, out)
        (out / "checkpoint.pt").write_bytes(b"junk")
        flags = f"--out {out} --resume --epochs 2".split()
        call = [sys.executable, "-c", KILLER, str(moment), "pretrain.py", *flags]
        ended = subprocess.run(call, cwd=ROOT, capture_output=True, timeout=300)
        if ended.returncode != -signal.SIGKILL:
            break                                            # it has no such moment
        kills += 1
        code, said = finish(start("pretrain.py", " ".join(flags)))
        goes_on += code == 0 and "resuming from" in said and usable(out / "checkpoint.pt")
    what = (f"checkpoint.pt is damaged, SIGKILL before each of {kills} changes of a checkpoint: "
            f"{goes_on} go on")
    checks.append((what, kills > 0 and goes_on == kills))

    for kind, make in (("folder", os.mkdir), ("pipe", os.mkfifo)):
        out = work / f"a-{kind}"
        shutil.copytree(good, out)
        (out / "checkpoint.pt").unlink()
        make(out / "checkpoint.pt")
        before = (out / "checkpoint-previous.pt").read_bytes()
        code, said = finish(start("pretrain.py", f"--out {out} --resume --epochs 2"), 60)
        previous = out / "checkpoint-previous.pt"
        kept = previous.exists() and previous.read_bytes() == before
        word = "kept" if kept else "LOST"
        what = f"checkpoint.pt is a {kind}: exit {code} in one line, checkpoint-previous.pt {word}"
        checks.append((what, code == 2 and one_line(said, "pretrain.py") and kept))
    return checks


# ---- bad input ----

def save_noise(folder: Path, count: int, size: int = 48) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        noise = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")


class Evil:
    """An object whose pickle calls a function when it is read."""

    def __reduce__(self):
        return print, ("THIS MUST NEVER RUN",)


def bad_inputs(work: Path, images: Path, classes: Path) -> list[tuple[str, str, str]]:
    """(program, flags, words that the one line must have)."""
    (work / "empty").mkdir()
    (work / "file").write_text("")
    for folder, count in (
        ("train_only/train/a", 2), ("train_only/train/b", 2),
        ("odd/train/a", 2), ("odd/train/b", 2), ("odd/val/a", 2), ("odd/val/c", 2),
        ("hollow/a", 3),
        ("one_class/a", 3),
    ):
        save_noise(work / folder, count)
    (work / "hollow/b").mkdir()
    shutil.copytree(images, work / "half_bad")
    for i in range(20):
        (work / "half_bad" / f"bad{i}.jpg").write_text("no image")

    good = whole_run(work, "pretrain.py", PRE)
    for name in ("corrupt", "cut", "evil"):
        shutil.copytree(good, work / name)
    (work / "corrupt/checkpoint.pt").write_bytes(b"junk")
    (work / "corrupt/checkpoint-previous.pt").write_bytes(b"junk")
    (work / "cut/checkpoint.pt").write_bytes((good / "checkpoint.pt").read_bytes()[:9999])
    (work / "cut/checkpoint-previous.pt").unlink()
    torch.save(Evil(), work / "evil/checkpoint.pt")
    (work / "evil/checkpoint-previous.pt").unlink()

    torch.save(Evil(), work / "evil.pt")
    torch.save([1, 2], work / "list.pt")
    (work / "text.pt").write_text("hello")
    (work / "cut.pt").write_bytes((good / "backbone.pt").read_bytes()[:9999])
    c, w = f"--data {classes}", f"--weights {good}/backbone.pt"
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
        ("pretrain.py", "--mask-size 0", "--mask-size"),
        ("pretrain.py", "--image-size 100", "not a multiple of the 32-pixel mask unit"),
        ("pretrain.py", "--arch deit_tiny --image-size 96 --patch-size 20", "patch"),
        ("pretrain.py", "--image-size 64 --mask-size 8 --token-stage 4",
         "mask unit is smaller than the stride"),
        ("pretrain.py", "--token-stage 7 --image-size 64", "token stage 7"),
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
        ("pretrain.py", f"--data cifar10 --data-root {work}", "add --download"),
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
        ("finetune.py", c, "give --weights FILE"),
        ("finetune.py", f"{c} --init scratch", "--arch is missing"),
        ("finetune.py", f"{c} --weights {work}/no.pt --arch resnet18", "no such file"),
        ("finetune.py", f"{c} --weights {work}/text.pt --arch resnet18", "not a file of weights"),
        ("finetune.py", f"{c} --weights {work}/cut.pt --arch deit_tiny", "not a file of weights"),
        ("finetune.py", f"{c} --weights {work}/evil.pt --arch resnet18", "code to run"),
        ("finetune.py", f"{c} --weights {work}/list.pt --arch resnet18", "holds no weights"),
        ("finetune.py", f"{c} {w} --arch resnet18", "another architecture"),
        ("finetune.py", f"{c} {w} --labels none", "--labels none"),
        ("finetune.py", f"{c} {w} --labels 500/class", "--labels 500/class"),
        ("finetune.py", f"{c} {w} --recipe best", "--recipe"),
        ("finetune.py", f"--data {work}/train_only {w}", "no val/"),
        ("finetune.py", f"--data {work}/odd {w}", "different classes"),
        ("finetune.py", f"--data {work}/hollow {w}", "holds no images"),
        ("finetune.py", f"--data {work}/one_class {w}", "a folder for each class"),
        ("finetune.py", f"{c} {w} --eval-only", "no classification head"),
    ]
    inputs = []
    for program, flags, words in table:
        if program == "pretrain.py" and "--data" not in flags:
            flags = f"--data {images} {flags}"
        if "--out" not in flags:
            flags = f"{flags} --out {work}/fresh-{len(inputs)}"
        inputs.append((program, flags, words))
    return inputs


def answer(program: str, flags: str, words: str, work: Path,
           world: int = 1) -> tuple[str, str, int, bool]:
    """(given, printed, exit code, as it should be) of a bad input."""
    code, said = finish(start(program, flags, world), 120)
    lines = [line for line in said.splitlines() if line.startswith(f"{program}: ")]
    right_code = 1 if world > 1 or "half_bad" in flags else 2        # 1: torchrun's, a failed run's
    fine = (
        len(lines) == 1
        and words in lines[0]
        and "Traceback" not in said.split("torch/distributed")[0]
        and "MUST NEVER" not in said
        and code == right_code
    )
    given = f"{program} {flags}".replace(f"{work}/", "").split(" --out fresh")[0]
    last = (lines or said.splitlines() or ["nothing"])[-1]
    return given, last.replace(f"{work}/", ""), code, fine


# ---- the command ----

def killed(work: Path, args: SimpleNamespace) -> list[tuple[str, bool]]:
    done, loadable, missing = kills(work, random.Random(args.seed), args.kills)
    what = (f"{done} kills by SIGKILL: {loadable} times a loadable checkpoint, "
            "every final bit-identical")
    return [(what, loadable == done and missing == 0)]


def mistakes(work: Path) -> list[tuple[str, str, int, bool]]:
    """A row for each bad input: given, printed, exit code, as it should be."""
    inputs = bad_inputs(work, work / "images", work / "classes")
    rows = [answer(program, flags, words, work) for program, flags, words in inputs]
    given, *rest = answer(*inputs[10], work, world=2)
    return [*rows, (f"torchrun, 2 processes: {given}", *rest)]


PARTS = {                                # name -> checks, each (what happened, as it should be)
    "kills": killed,
    "preemption": lambda work, args: preemption(work),
    "full_disk": lambda work, args: [full_disk(work)],
    "full_terminal": lambda work, args: full_terminal(work),
    "false_done": lambda work, args: false_done(work),
    "best_not_written": lambda work, args: best_not_written(work),
    "same_folder": lambda work, args: same_folder(work),
    "damaged": lambda work, args: damaged(work),
    "memory": lambda work, args: [memory(work)],
}
MISTAKES = "mistakes"                                        # a part that gives a table


def faults(args: SimpleNamespace, world: Distributed) -> None:
    """Runs the parts, prints and writes what came out.

    Raises Failed if anything is not as it should be."""
    check_folder(Path(args.out))
    began, checks, rows = time.time(), [], []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        global PRE, TUNE, PRE_SMALL, TUNE_SMALL
        save_noise(work / "images", 40)
        save_noise(work / "classes/a", 20)
        save_noise(work / "classes/b", 20)
        places = dict(images=work / "images", classes=work / "classes")
        PRE, PRE_SMALL = PRE.format(**places), PRE_SMALL.format(**places)
        TUNE, TUNE_SMALL = TUNE.format(**places), TUNE_SMALL.format(**places)
        for name, part in PARTS.items():
            if name in args.only:
                try:
                    checks += part(work, args)
                except Exception as error:                   # the report still names the others
                    checks.append((f"{name} ended early: {error!r}", False))
                minutes = (time.time() - began) / 60
                print(f"{name}: {minutes:.1f} minutes since the start", flush=True)
        if MISTAKES in args.only:
            rows = mistakes(work)

    lines = [f"- {'ok' if fine else 'FAILED'}: {what}" for what, fine in checks]
    if rows:
        answered = sum(fine for *_, fine in rows)
        word = "ok" if answered == len(rows) else "FAILED"
        lines += [f"- {word}: {answered} of {len(rows)} bad inputs answered in a line", ""]
        lines += ["| given | printed | exit code |", "|---|---|---|"]
        for given, printed, code, fine in rows:
            lines.append(f"| `{given}` | {printed} | {code}{'' if fine else ' **unexpected**'} |")
    lines += ["", f"{(time.time() - began) / 60:.1f} minutes"]
    text = "\n".join(lines)
    print(text)
    file = Path(args.out) / "faults.md"
    with writing(file):
        file.write_text(text + "\n")
    wrong = sum(not fine for *_, fine in (*checks, *rows))
    if wrong:
        raise Failed(f"{wrong} of {len(checks) + len(rows)} are not as they should be, see above")


FLAGS = {
    "what is done": {
        "kills": (20, COUNT, "how many SIGKILLs at random moments"),
        "seed": (0, number(int, 0), "seed of the random moments"),
    },
    "where it goes": {
        "out": ("runs/faults", path("DIR"), "faults.md in this folder is replaced"),
    },
}


def parse(argv: list[str] | None) -> SimpleNamespace:
    """The flags. Raises ValueError for a mistake."""
    parser = Parser("faults.py", "%(prog)s [--only PART ...] [options]", __doc__, FLAGS, {})
    parts = [*PARTS, MISTAKES]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART",
                        help=f"some of {', '.join(parts)} (all)")
    return SimpleNamespace(**{**defaults(FLAGS), **vars(parser.parse_args(argv))})


def main(argv: list[str] | None = None) -> None:
    command_line("faults.py", parse, faults, argv)


if __name__ == "__main__":
    main()
