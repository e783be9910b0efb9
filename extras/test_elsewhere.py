"""Facts about our weights in other people's code, and about the pictures of figure.py and
reconstruct.py.

    pytest extras/test_elsewhere.py        from the root; pip install timm for the tests of the ViT
"""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import MEAN, STD, eval_transform
from engine.testing import randomised
from extras import figure, reconstruct
from extras.testing import short_run
from loss import a2mim_loss
from masking import fill_hidden, random_mask, resize_mask
from model import A2MIM, Classifier, VITS, build_encoder

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


# ---- weights in other people's code ----

def code_below(page: str, heading: str) -> str:
    """The first block of Python below a heading of a page."""
    text = (ROOT / page).read_text().split(f"{heading}\n", 1)[1]
    return re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)


def timm_arguments() -> dict[str, dict]:
    """The table of docs/recipes.md: arch -> further arguments of timm.create_model."""
    section = (ROOT / "docs/recipes.md").read_text().split("### A ViT in timm\n")[1]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", section.split("###")[0], re.MULTILINE)
    table = {}
    for arch, text in rows:
        code = "" if text == "none" else text.strip("`")
        table[arch] = eval(f"dict({code})")
    return table


@pytest.mark.parametrize("arch, size, patch", [
    ("vit_base", 224, 16), ("vit_small", 64, 16), ("vit_large", 32, 16),
    ("deit_tiny", (64, 96), 16), ("deit_small", 32, 4)])
def test_timms_beit_takes_our_vit_and_gives_its_features(arch, size, patch):
    timm = pytest.importorskip("timm")
    assert set(timm_arguments()) == set(VITS)
    encoder = randomised(build_encoder(arch, size, patch_size=patch))
    shape = dict(img_size=size, patch_size=patch, use_abs_pos_emb=True, **timm_arguments()[arch])
    plain = timm.create_model("beit_base_patch16_224", num_classes=0, global_pool="", **shape)
    plain.load_state_dict(encoder.backbone.state_dict())     # strictly
    height, width = encoder.backbone.image_size
    images = torch.randn(2, 3, height, width)
    with torch.no_grad():
        difference = (plain.eval()(images) - encoder(images)).abs().max()
    assert difference < 1e-5

    if arch != "deit_tiny":
        return
    tuned = randomised(Classifier(arch, encoder, 7))
    plain = timm.create_model("beit_base_patch16_224", num_classes=7, global_pool="avg", **shape)
    plain.load_state_dict(tuned.torchvision_state_dict())
    with torch.no_grad():
        difference = (plain.eval()(images) - tuned(images)).abs().max()
    assert difference < 1e-5


def test_the_lines_of_the_readme_for_weights_elsewhere_run_as_they_are_written(tmp_path,
                                                                              monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/tuned").mkdir(parents=True)
    tuned = randomised(Classifier("resnet18", build_encoder("resnet18"), 10))
    torch.save(tuned.torchvision_state_dict(), "runs/tuned/best.pt")
    of_torchvision, of_timm = code_below("README.md", "## Use the weights elsewhere").split("\n\n")
    names = {}
    exec(of_torchvision, names)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(names["net"].eval()(images), tuned(images), atol=1e-5)

    pytest.importorskip("timm")
    vit = randomised(build_encoder("vit_base", 224))
    torch.save(vit.backbone.state_dict(), "backbone.pt")
    exec(of_timm, names)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(names["vit"].eval()(images), vit(images), atol=1e-5)


def test_the_lines_of_the_readme_for_any_list_of_modules_train_it():
    images = torch.randn(2, 3, 224, 224)
    stem, stage1, stage2 = nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 12, 2, 2), nn.Conv2d(12, 16, 2, 2)
    names = dict(A2MIM=A2MIM, random_mask=random_mask, resize_mask=resize_mask,
                 a2mim_loss=a2mim_loss, images=images, stem=stem, stage1=stage1, stage2=stage2)
    exec(code_below("README.md", "**Any list of modules** can be the encoder:"), names)
    assert names["mask"].sum((1, 2)).tolist() == [30, 30]
    assert names["net"].mask_token.token.shape == (12,)      # before stage2
    names["loss"].backward()
    assert all(p.grad.abs().max() > 0 for p in names["net"].parameters())


def test_the_lines_of_the_docs_for_your_own_training_code_run_as_they_are_written(tmp_path,
                                                                                 monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/imagenet-resnet50").mkdir(parents=True)
    encoder = randomised(build_encoder("resnet50"))
    torch.save(encoder.backbone.state_dict(), "runs/imagenet-resnet50/backbone.pt")
    exec(code_below("docs/transfer.md", "## Your own training code"), names := {})
    own = encoder.backbone.state_dict()
    for backbone in (names["segmenter"].backbone, names["detector"].backbone.body):
        found = backbone.state_dict()
        assert len(found) > 200 and all(torch.equal(found[name], own[name]) for name in found)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():                                    # DeepLab's has stride 8, ours 32
        features = names["detector"].backbone.body.eval()(images)["3"]
        assert torch.allclose(features, encoder(images), atol=1e-5)


# ---- figure.py ----

def test_feature_maps_are_coloured_by_one_principal_component_analysis_of_all_of_them():
    """Second route: the axes are the eigenvectors of the covariance of all features."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([5.0, 3.0, 1.5, 0.4, 0.2])[:, None, None]
    maps = [spread * torch.randn(5, 6, 8, generator=generator) for _ in range(3)]
    maps[2][:, 0, 0] = maps[0][:, 5, 7]                      # the same feature in two maps
    shown = figure.in_colour(maps, torch.rand(3, 48, 64, generator=generator))
    assert [tuple(picture.shape) for picture in shown] == [(3, 6, 8)] * 3
    assert torch.allclose(shown[2][:, 0, 0], shown[0][:, 5, 7], atol=1e-6)

    features = torch.cat([z.flatten(1) for z in maps], 1).numpy().astype(float)
    centred = features - features.mean(1, keepdims=True)
    _, vectors = np.linalg.eigh(centred @ centred.T)
    scores = vectors[:, ::-1].T @ centred                    # the largest first
    pixels = torch.cat([x.flatten(1) for x in shown], 1).numpy()
    inside = ((pixels > 0) & (pixels < 1)).all(0)            # where no colour is cut off
    # brightness, warm-cold and magenta-green are one component each
    for i, axis in enumerate(([1, 1, 1], [1, 0, -1], [0.5, -1, 0.5])):
        look = np.array(axis) @ pixels[:, inside]
        rows = [abs(np.corrcoef(look, row[inside])[0, 1]) for row in scores]
        assert np.argmax(rows) == i and rows[i] > 0.95, rows


def test_the_first_component_is_bright_where_the_image_is_bright():
    image = torch.zeros(3, 32, 32)
    image[:, :, 16:] = 1.0
    z = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.1
    for sign in (1, -1):
        z[0] = sign * torch.tensor([-3.0] * 4 + [3.0] * 4)   # by column
        shown, = figure.in_colour([z], image)
        assert shown[:, :, 4:].mean() > shown[:, :, :4].mean() + 0.3


def test_the_numbers_of_the_picture_are_those_counted_by_hand():
    whole = torch.tensor([[[0.0, 2.0], [0.0, 2.0]]])         # variance 1
    hidden = torch.tensor([[True, False], [False, False]])
    z = whole + torch.tensor([[[9.0, 0.5], [0.5, 0.5]]])
    assert figure.change(z, whole, ~hidden) == pytest.approx(0.5)
    assert figure.change(z, whole, hidden) == pytest.approx(9.0)
    mean = whole.mean((1, 2), keepdim=True).expand_as(whole)
    assert figure.change(mean, whole, hidden | True) == pytest.approx(1.0)

    z = torch.tensor([[[4.0, 1.0], [1.0, 1.0]]])             # all of the variance is hidden or not
    assert figure.share_of_mask(z, hidden) == pytest.approx(1.0)
    z = torch.tensor([[[2.0, 1.0], [2.0, 3.0]]])             # equal means
    assert figure.share_of_mask(z, hidden) == pytest.approx(0.0, abs=1e-6)
    z = torch.tensor([[[4.0, 0.0], [2.0, 1.0]]])             # 27 of 35, by hand
    assert figure.share_of_mask(z, hidden) == pytest.approx(27 / 35)


def test_the_rows_differ_in_the_fill_and_in_the_token_alone():
    """Hidden features become the token before the token stage; visible ones stay as they were."""
    model = A2MIM(randomised(build_encoder("resnet18")), 128, mask_size=32, token_stage=3)
    nn.init.zeros_(model.mask_token.gamma)
    nn.init.normal_(model.mask_token.token)
    model.eval()
    image = torch.randn(1, 3, 128, 128)
    mask = random_mask(1, model.grid)
    whole, black, mean, token = figure.stages_of(model, image, mask)
    assert [z.shape[-1] for z in whole] == [128, 32, 16, 8, 4]
    for k in (0, 1):                                         # before the token both are the same
        assert torch.equal(mean[k], token[k])
    hidden = resize_mask(mask, (16, 16))[0, 0]               # stage 3 takes what stage 2 gives
    assert torch.equal(token[2][:, ~hidden], mean[2][:, ~hidden])
    assert (token[2][:, hidden] == model.mask_token.token[:, None]).all()
    assert torch.equal(token[3], model.encoder.run_stage(3, token[2][None])[0])
    shut = resize_mask(mask, (128, 128))[0, 0]
    assert torch.equal(black[0][:, ~shut], whole[0][:, ~shut])
    assert figure.denormalise(black[0][None])[0][:, shut].max() < 1e-6
    assert torch.allclose(mean[0][:, shut], image[0].mean((1, 2))[:, None], atol=1e-5)


def test_a_place_that_is_the_token_is_orange_and_others_keep_their_colour():
    z = torch.randn(8, 4, 4)
    token = torch.full((8,), 3.0)
    z[:, 1, 2] = token
    shown = torch.rand(3, 4, 4)
    stamped = figure.stamp(shown, z, token)
    orange = torch.tensor([0xf2, 0x8c, 0x1e]) / 255
    assert torch.allclose(stamped[:, 1, 2], orange, atol=1e-6)
    others = torch.ones(4, 4, dtype=torch.bool)
    others[1, 2] = False
    assert torch.equal(stamped[:, others], shown[:, others])


def test_figure_why_takes_the_checkpoint_of_a_resnet_and_refuses_other_nets(tmp_path, monkeypatch,
                                                                           capsys):
    monkeypatch.chdir(tmp_path)
    for arch in ("resnet18", "mobilenet_v2"):
        short_run(Path(arch), f"--arch {arch} --mask-size 16 --token-stage 2")
    capsys.readouterr()
    call = ["--figure", "why"]
    figure.main([*call, "resnet18/checkpoint.pt"])           # a grid of 4 x 4 units of 32 px
    figure.main([*call, "--checkpoint", "resnet18/checkpoint.pt"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["why.png", "why-2.png"]
    assert Image.open("why.png").size == tuple(map(int, said[0].split()[1:4:2]))
    with pytest.raises(SystemExit) as exit:
        figure.main([*call, "mobilenet_v2/checkpoint.pt"])
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.count("\n") == 1
    assert "--figure why and --measure need" in said


# ---- reconstruct.py at the photograph's own size ----

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """Of a run of one or two steps: a ResNet-18 at 64 px, a grid of 4 x 4 mask units."""
    out = tmp_path_factory.mktemp("reconstruct") / "run"
    return short_run(out, "--arch resnet18 --mask-size 16 --token-stage 2")


def pixels(file: str) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


def photograph(file: str, width: int, height: int) -> torch.Tensor:
    """Saves a photograph of noise; returns its pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    return pixels(file)


def test_a_photograph_is_reconstructed_tile_by_tile_at_its_own_size(checkpoint, tmp_path,
                                                                    monkeypatch):
    """Visible pixels are the photograph's own, bit by bit. A tile is what the model makes of it."""
    monkeypatch.chdir(tmp_path)
    photo = photograph("photo.png", 150, 70)                 # 3 x 2 tiles of 64 px, not whole ones
    rows = ["#" + 9 * ".", *3 * [10 * "."], 9 * "." + "#"]   # units of 16 px, the last are cut off
    reconstruct.main([checkpoint, "photo.png", "--full-size", "tiled", "--mask", "/".join(rows)])
    seen, whole, pasted = (pixels(f"reconstructed-photo-{name}.png")
                           for name in ("seen", "reconstruction", "pasted"))
    assert seen.shape == whole.shape == pasted.shape == photo.shape
    hidden = torch.tensor([[c == "#" for c in row] for row in rows])
    hidden = hidden.repeat_interleave(16, 0).repeat_interleave(16, 1)[:70, :150]
    assert hidden.sum() == 16 * 16 + 6 * 6                   # 70 = 64 + 6, and 150 = 144 + 6
    assert torch.equal(pasted[:, ~hidden], photo[:, ~hidden])
    assert torch.equal(seen[:, ~hidden], photo[:, ~hidden])
    assert torch.equal(pasted[:, hidden], whole[:, hidden])

    model, _ = reconstruct.load_model(checkpoint)
    tile = figure.normalise(photo[None, :, :64, :64])        # the first
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 0, 0] = True
    with torch.no_grad():
        expected = figure.denormalise(model(tile, mask))[0]
    assert (whole[:, :64, :64] / 255 - expected).abs().max() < 0.6 / 255
    filled = figure.denormalise(fill_hidden(tile, mask))[0]
    assert (seen[:, :64, :64] / 255 - filled).abs().max() < 0.6 / 255


def test_full_size_by_resizing_pastes_into_the_photograph_and_overwrites_nothing(
        checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photo = photograph("photo.png", 300, 200)
    call = [checkpoint, "photo.png", "--full-size", "resized", "--mask", "#./.."]
    capsys.readouterr()
    reconstruct.main(call)
    first = {file.name: file.read_bytes() for file in Path().glob("reconstructed-*")}
    assert sorted(first) == [f"reconstructed-photo-{name}.png"
                             for name in ("pasted", "reconstruction", "seen")]
    pasted = pixels("reconstructed-photo-pasted.png")
    assert torch.equal(pasted[:, 100:], photo[:, 100:])
    assert torch.equal(pasted[:, :, 150:], photo[:, :, 150:])
    assert not torch.equal(pasted[:, :100, :150], photo[:, :100, :150])
    assert torch.equal(pasted[:, :100, :150],
                       pixels("reconstructed-photo-reconstruction.png")[:, :100, :150])

    Path("reconstructed-photo-2-seen.png").touch()                 # one of three names is enough
    reconstruct.main(call)
    assert Path("reconstructed-photo-3-pasted.png").exists()
    assert all(Path(name).read_bytes() == content for name, content in first.items())
    reconstruct.main([*call, "--out", "new/one.png"])
    assert Path("new/one-pasted.png").exists()
    assert "new/one-pasted.png: 300 x 200 px" in capsys.readouterr().out

    photograph("tiny.png", 3, 3)
    reconstruct.main([checkpoint, "tiny.png", "--full-size", "tiled"])
    assert Image.open("reconstructed-tiny-pasted.png").size == (3, 3)
    with pytest.raises(SystemExit) as exit:
        reconstruct.main([checkpoint, "tiny.png", "--full-size", "resized"])
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.count("\n") == 1 and "3 x 3 pixels is too small" in said


def test_the_table_over_a_folder_has_the_numbers_of_each_picture(tmp_path, capsys):
    """Here of one picture, by hand."""
    checkpoint = short_run(tmp_path / "run", "--arch resnet18 --mask-size 16 --token-stage 2")
    (tmp_path / "set").mkdir()
    picture = Image.effect_noise((128, 128), 80).convert("RGB")
    picture.save(tmp_path / "set" / "a.png")
    figure.main([checkpoint, "--measure", str(tmp_path / "set"), "--seed", "3"])
    printed = capsys.readouterr().out
    assert "means over 1 images" in printed

    model, run = figure.load_model(checkpoint, (128, 128), mask_size=32)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)            # uint8
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (MEAN, STD))
    image = (eval_transform((128, 128))(pixels) / 255 - mean) / std
    mask = random_mask(1, (4, 4), 0.6, generator=torch.Generator().manual_seed(3))
    whole, _, filled, _ = figure.stages_of(model, image[None], mask)
    visible = ~mask[0].repeat_interleave(8, 0).repeat_interleave(8, 1)       # at stride 4
    z, w = filled[1][:, visible], whole[1]
    spread = w.flatten(1).var(1, unbiased=False).sum()
    off_by = ((z - w[:, visible]).square().sum(0).mean() / spread).sqrt()
    line = next(line for line in printed.splitlines() if line.startswith("| visible parts off by: "
                                                                         "mean colour |"))
    assert float(line.split("|")[2]) == pytest.approx(off_by.item(), abs=0.006)
