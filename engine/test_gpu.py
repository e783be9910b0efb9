"""What a step asks of a GPU, checked on a CPU: no waiting, few kernels, one compiled graph.

    pytest engine/test_gpu.py        about 2 minutes on 1 CPU core

FakeTensorMode runs a step with tensors that have a device ("cuda"), a shape and no values. A device
mismatch raises there, and so does everything that needs a value: item(), a boolean index.
"""

import itertools
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import finetune
import pretrain
from engine.checkpointer import Checkpointer, Snapshot
from engine.command import Distributed
from engine.optim import Lamb, momentum_sgd
from engine.progress import RunningMeans, TimedBatches
from engine.testing import prepared

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning",
                                        "ignore:User provided device_type of 'cuda'")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def few_images(monkeypatch):
    """`shapes` with 32 images."""
    init = data.Shapes.__init__

    def small(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.count = 32
        self.labels = self.labels[:32]
    monkeypatch.setattr(data.Shapes, "__init__", small)


# ---- no step waits for the GPU ----

class Copies(TorchDispatchMode):
    """Notes every copy between host and device of what runs below it, as (from, to, shape).

    What runs on the host alone has real values. What touches the device is fake."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        device = kwargs.get("device")
        on_host = device is None or torch.device(device).type == "cpu"
        if on_host and not any(isinstance(x, FakeTensor) for x in tensors):
            with _disable_current_modes():
                return f(*args, **kwargs)
        result = f(*args, **kwargs)
        if f.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = tensors[-1]                             # copy_(to, from)
            if source.device.type != result.device.type:
                self.found.append((source.device.type, result.device.type, tuple(source.shape)))
        return result


class NoBackward:
    """A GradScaler for a trace: a backward pass needs a device."""

    def scale(self, loss):
        assert loss.device.type == "cuda" and loss.dim() == 0
        return SimpleNamespace(backward=lambda: None)

    def unscale_(self, optimizer):
        pass

    step = update = unscale_


@pytest.fixture
def on_fake_gpu(monkeypatch):
    """trace(program, flags) makes the forward half of a step there: what was copied to and fro."""
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    data.mean_and_std.cache_clear()

    def trace(program, flags: str) -> tuple[list, SimpleNamespace]:
        host, gpu = Distributed(), Distributed()
        host.use("cpu")
        gpu.use("cuda")
        flags += " --data shapes --image-size 64 --batch-size 4 --workers 0 --amp off --out unused"
        settings, state = prepared(program, flags, host)
        state.scaler = NoBackward()
        batches = iter(state.loader)
        with FakeTensorMode(allow_non_fake_inputs=True), Copies() as copies:
            state.model.to("cuda")
            if getattr(state, "ema", None):
                state.ema.module.to("cuda")
            data.mean_and_std(gpu.device)                    # copied once for the whole run
            copies.found.clear()
            record = program.train_step(0, batches, settings, gpu, state)
            means = RunningMeans(gpu)
            means.add(record)
        assert all(value.device.type == "cuda" for value in record.values())
        return copies.found, state
    yield trace
    data.mean_and_std.cache_clear()


IMAGES = ("cpu", "cuda", (4, 3, 64, 64))
LABELS = ("cpu", "cuda", (4,))


@pytest.mark.parametrize("arch", ["resnet18", "convnext_tiny", "deit_tiny", "swin_tiny"])
@pytest.mark.parametrize("recipe", ["imagenet", "small"])
def test_pretraining_copies_only_the_images_to_the_gpu(on_fake_gpu, arch, recipe):
    flags = f"--arch {arch} --recipe {recipe} --mask-size 16 --val 0 --drop-path 0.1 --window 4"
    flags += " --token-stage 1" if arch != "resnet18" else " --token-stage 3"
    copies, state = on_fake_gpu(pretrain, flags)
    assert copies == [IMAGES]


@pytest.mark.parametrize("more", ["--mixup 0.8", "--cutmix 1.0", ""])
def test_finetuning_copies_only_images_and_labels_to_the_gpu(on_fake_gpu, more):
    flags = f"--init scratch --arch resnet18 --erasing 0.5 --ema 0.99 --accum 2 {more}"
    copies, state = on_fake_gpu(finetune, flags)
    assert copies == [IMAGES, LABELS] * 2
    assert state.ema.module.head.weight.device.type == "cuda"


def test_the_trace_sees_a_wait_and_a_device_mismatch(on_fake_gpu, monkeypatch):
    """The three faults that it is for: a copied number, a value that is read, a tensor left."""
    flags = "--init scratch --arch resnet18"

    def copies_a_number(images, probability):
        images[0, 0, 0, 0] = 1.0                             # torch makes a tensor of it on the CPU
        return images

    def reads_a_value(images, probability):
        return images if float(images.sum()) else images

    def leaves_a_tensor(images, probability):
        return images + torch.ones(3, 1, 1)
    monkeypatch.setattr(finetune, "erase", copies_a_number)
    assert ("cpu", "cuda", ()) in on_fake_gpu(finetune, flags)[0]
    monkeypatch.setattr(finetune, "erase", reads_a_value)
    with pytest.raises(Exception, match="(?i)local_scalar_dense|data-dependent"):
        on_fake_gpu(finetune, flags)
    monkeypatch.setattr(finetune, "erase", leaves_a_tensor)
    with pytest.raises(Exception, match="device"):
        on_fake_gpu(finetune, flags)


def test_lamb_takes_its_step_without_a_copy():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with FakeTensorMode(allow_non_fake_inputs=True), Copies() as copies:
        net.to("cuda")
        lamb = Lamb(net.parameters(), lr=0.1)
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        copies.found.clear()
        lamb.step()
    assert copies.found == []


# ---- data that come too late ----

def test_the_log_gets_the_share_of_waiting_and_one_warning(capsys):
    """A loader that takes 30 ms for each batch, and steps of 10 ms, against a clock."""
    loader = SlowLoader(0.03)
    world = Distributed()
    world.use("cpu")
    batches = TimedBatches(loader, world)
    shares = []
    for line in range(4):
        start = time.perf_counter()
        for _ in range(5):
            assert next(batches) == "batch"
            time.sleep(0.01)
        elapsed = time.perf_counter() - start
        shares.append((batches.take(elapsed, steps=40), loader.seconds / elapsed))
        loader.seconds = 0.0
    assert all(share == pytest.approx(expected, abs=0.02) for share, expected in shares)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "% of the time the steps wait for data; raise --workers" in said[0]
    assert "now 3 per process" in said[0]


class SlowLoader:
    num_workers = 3

    def __init__(self, pause: float):
        self.pause = pause
        self.seconds = 0.0

    def __iter__(self):
        while True:
            start = time.perf_counter()
            time.sleep(self.pause)
            self.seconds += time.perf_counter() - start
            yield "batch"


def test_a_fast_loader_gets_no_warning(capsys):
    world = Distributed()
    world.use("cpu")
    batches = TimedBatches(SlowLoader(0.0), world)
    for line in range(3):
        next(batches)
        assert batches.take(elapsed=1.0, steps=100) < 0.1
    assert capsys.readouterr().err == ""


def test_workers_are_counted_by_the_cores_that_this_process_may_use(monkeypatch):
    world = SimpleNamespace(local_size=2, on_cuda=False)
    for cores, expected in ((1, 1), (8, 3), (200, 16)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        loader = data.make_loader([0], [[0]], None, world)
        assert loader.num_workers == expected


# ---- compile: the training step alone, for one size ----

class Graphs:
    """A backend of torch.compile that notes what each graph is compiled for."""

    def __init__(self, monkeypatch):
        self.inputs = []
        plain = nn.Module.compile
        monkeypatch.setattr(nn.Module, "compile",
                            lambda module, **how: plain(module, backend=self.compile, **how))
        torch._dynamo.reset()

    def compile(self, graph, inputs):
        self.inputs.append(inputs)
        return graph.forward

    def batches(self) -> set:
        """The batch sizes of the images. Fails if a size is symbolic."""
        sizes = set()
        for inputs in self.inputs:
            assert not any(isinstance(x, torch.SymInt) for x in inputs)
            sizes |= {x.shape[0] for x in inputs if tuple(x.shape[1:]) == (3, 64, 64)}
        return sizes


def test_pictures_and_evaluations_are_not_compiled(few_images, monkeypatch, tmp_path):
    graphs = Graphs(monkeypatch)
    both = "--data shapes --image-size 64 --batch-size 12 --workers 0 --amp off --compile"
    # of 32 images 8 are held out, and 6 are in the pictures
    flags = f"{both} --arch resnet18 --val 0.3 --sheets 2 --epochs 1 --out {tmp_path / 'run'}"
    pretrain.main(flags.split())
    assert graphs.batches() == {12}
    found = len(graphs.inputs)
    flags = f"{both} --init scratch --arch resnet18 --epochs 2 --eval-every 1"
    finetune.main([*flags.split(), "--out", str(tmp_path / "tuned")])
    assert graphs.batches() == {12} and len(graphs.inputs) > found


# ---- start and epochs ----

def test_a_checkpoint_is_written_when_it_is_due_and_at_the_end(few_images, monkeypatch, tmp_path):
    written = []
    save = Checkpointer.save
    monkeypatch.setattr(Checkpointer, "save",
                        lambda self: (written.append(self.done), save(self)))
    flags = "--data shapes --arch resnet18 --image-size 64 --batch-size 8 --workers 0 --amp off"
    flags = f"{flags} --val 0 --sheets 0 --epochs 2"                         # 8 steps
    for every, expected in (("10m", [8]), ("3", [3, 6, 8])):
        pretrain.main([*flags.split(), "--save-every", every, "--out", str(tmp_path / every)])
        assert written == expected
        written.clear()


def test_validation_workers_start_once(few_images, tmp_path):
    """Two passes over the validation images have the same worker processes."""
    world = Distributed()
    world.use("cpu")
    flags = "--data shapes --init scratch --arch resnet18 --image-size 64 --batch-size 8 --amp off"
    _, state = prepared(finetune, f"{flags} --workers 1 --out {tmp_path}", world)
    loader = state.val_loader
    passes, workers = [], []
    for _ in range(2):
        passes.append([(images.clone(), index) for images, index, _ in loader])
        workers.append([worker.pid for worker in loader._iterator._workers])
    assert workers[0] == workers[1]
    for (a, i), (b, j) in zip(*passes, strict=True):
        assert torch.equal(a, b) and torch.equal(i, j)


# ---- few kernels ----

class Count(TorchDispatchMode):
    """Counts the operations that compute: each is about one kernel on a GPU. Views are none."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f.overloadpacket.__name__
        if not f.is_view and not name.startswith(("empty", "new_empty", "detach")):
            self.names[name] += 1
        return f(*args, **(kwargs or {}))


def bare_step(batches):
    """A supervised step of torchvision's ResNet-50 with fused AdamW."""
    net = torchvision.models.resnet50().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)

    def step():
        images, index, _ = next(batches)
        logits = net(data.normalise(images).contiguous(memory_format=torch.channels_last))
        nn.functional.cross_entropy(logits, index).backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def test_a_step_of_pretraining_has_at_most_1_3_times_the_kernels_of_the_bare_backbone(tmp_path):
    world = Distributed()
    world.use("cpu")
    flags = "--data shapes --arch resnet50 --recipe imagenet --image-size 64 --batch-size 2 --val 0"
    flags = f"{flags} --workers 0 --amp off --log-every 1000 --out {tmp_path}"
    settings, state = prepared(pretrain, flags, world)
    saved = dict(model=state.model, optimizer=state.optimizer, broken=state.unreadable)
    checkpointer = Checkpointer(settings, world, state.plan, saved, None)
    images, index, broken = next(iter(state.loader))
    batches = itertools.repeat((images, index % 1000, broken))
    bare = bare_step(batches)
    bare()
    with Count() as alone:
        bare()
    with checkpointer:
        steps = checkpointer.steps()
        for _ in range(2):                                   # the first one logs a line
            with Count() as whole:
                step = next(steps)
                record = pretrain.train_step(step, batches, settings, world, state)
                checkpointer.after(step, record)
    assert 400 < alone.names.total() < 700
    assert whole.names.total() <= 1.3 * alone.names.total()


def test_statistics_are_kept_and_put_back_by_a_few_kernels_however_many_they_are():
    counts = []
    for layers in (1, 30):
        tensors = [torch.randn(3), torch.randn(2, 2), torch.randn(())] * layers
        tensors = [t.clone() for t in tensors]
        before = [t.clone() for t in tensors]
        with Count() as count:
            snapshot = Snapshot(tensors)
            snapshot.take()
            for t in tensors:
                t.add_(1)
            snapshot.restore(torch.tensor(False))
        assert all(torch.equal(t, old + 1) for t, old in zip(tensors, before))
        snapshot.restore(torch.tensor(True))
        assert all(torch.equal(t, old) for t, old in zip(tensors, before))
        counts.append(count.names.total() - len(tensors))    # without the additions
    assert counts[0] == counts[1] <= 6
    Snapshot([]).take()
    Snapshot([]).restore(torch.tensor(True))


def test_lamb_has_as_many_kernels_for_many_weights_as_for_few():
    counts = []
    for layers in (2, 20):
        weights = [nn.Parameter(torch.randn(3, 3)) for _ in range(layers)]
        lamb = Lamb(weights, lr=0.1)
        for _ in range(2):                                   # the first one makes the moments
            for weight in weights:
                weight.grad = torch.randn(3, 3)
            with Count() as count:
                lamb.step()
        counts.append(count.names.total())
    assert counts[0] == counts[1] < 30


# ---- fused SGD ----

def test_a_skipped_first_step_leaves_fused_sgd_as_it_was():
    """Against the textbook in float64. Torch's own start leaves the momentum uninitialised."""
    start, gradients = torch.randn(5), torch.randn(3, 5)
    weight = nn.Parameter(start.clone())
    optimizer = momentum_sgd([dict(params=[weight], weight_decay=0.1)], lr=0.5, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for gradient in (torch.full((5,), math.inf), *gradients):
        weight.grad = gradient * scaler.get_scale()
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()
    expected, momentum = start.double(), 0.0
    for gradient in gradients.double():
        momentum = 0.9 * momentum + gradient + 0.1 * expected
        expected = expected - 0.5 * momentum
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


# ---- means of the log ----

class TwoProcesses:
    """The collectives that RunningMeans needs, of a process beside another one. Counts them."""
    device = torch.device("cpu")

    def __init__(self, others: list[float]):
        self.others = torch.tensor(others)[:, None]
        self.calls = 0

    def all_reduce_mean(self, values):
        self.calls += 1
        part = self.others[:len(values)]
        self.others = self.others[len(values):]
        return (values + part) / 2


def test_the_means_are_reduced_only_for_a_line_or_a_checkpoint_which_does_not_change_them():
    mine, others = torch.randn(2, 40).tolist()
    others[7] = math.nan                                     # left out: not finite there
    lines = []
    for checkpoints in ([], [3, 11, 12, 29]):
        world = TwoProcesses(others)
        means = RunningMeans(world)
        for step, loss in enumerate(mine):
            means.add({"loss": torch.tensor(loss), "spatial": torch.tensor(2.0)})
            if step in checkpoints:                          # saved, and resumed from
                means.reduce()
                state = {name: value.clone() for name, value in means.state_dict().items()}
                means = RunningMeans(world)
                means.load_state_dict(state)
        lines.append((means.sums.clone(), means.take()))
        assert world.calls == 1 + len(checkpoints)
    assert lines[0][1] == lines[1][1]
    kept = [(a + b) / 2 for step, (a, b) in enumerate(zip(mine, others)) if step != 7]
    assert lines[0][1]["loss"] == pytest.approx(sum(kept) / len(kept), abs=2e-6)
