"""The one-page version has the loss and gradients of the full one, and its backbone loads."""

import sys
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from extras import mini
from loss import a2mim_loss
from masking import resize_mask
from model import A2MIM, build_encoder

close = torch.testing.assert_close


def test_one_page_is_the_whole_method():
    """The loss and every gradient equal those of model.py and loss.py with the same options."""
    torch.manual_seed(0)
    page = mini.MiniA2MIM().train()
    full = A2MIM(build_encoder("resnet18"), image_size=64, mask_size=8, token_stage=3).train()
    names = {}                                               # of the page -> of the full version
    for name in page.state_dict():
        names[name] = f"encoder.{name}" if name.startswith("backbone.") else name
    names |= {"token": "mask_token.token", "gamma": "mask_token.gamma"}
    state = {names[name]: value for name, value in page.state_dict().items()}
    for name in ("mask_token.token", "mask_token.gamma"):
        state[name] = state[name].flatten()
    full.load_state_dict(state)

    images, mask = torch.randn(8, 3, 64, 64), mini.random_mask(8)
    hidden = resize_mask(mask[:, 0].bool(), (64, 64))
    short = mini.loss(page(images, mask), images, hidden.float())
    reconstruction = full(images, mask[:, 0])
    long, _ = a2mim_loss(reconstruction, images, hidden, visible_weight=0.0, spectrum="image")
    close(short, long, atol=1e-6, rtol=1e-6)
    short.backward()
    long.backward()
    gradients = {name: p.grad for name, p in full.named_parameters()}
    for name, parameter in page.named_parameters():
        gradient = gradients[names[name]]
        close(parameter.grad.flatten(), gradient.flatten(), atol=1e-6, rtol=1e-4)


def test_sixty_percent_of_the_units_are_hidden():
    assert mini.random_mask(100).sum((1, 2, 3)).unique().tolist() == [39]    # ceil(0.6 * 64)


def test_it_learns_on_a_folder_and_leaves_a_backbone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "a").mkdir(parents=True)
    for i in range(8):
        x, y = torch.meshgrid(torch.arange(80), torch.arange(80), indexing="ij")
        picture = torch.stack([x * i, y * 3, x + y]).remainder(256).byte().permute(1, 2, 0)
        Image.fromarray(picture.numpy()).save(tmp_path / "photos" / "a" / f"{i}.png")
    monkeypatch.setattr(mini, "STEPS", 12)
    monkeypatch.setattr(mini, "BATCH", 8)
    mini.main(mini.parse(["photos"]))
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[-1]) for line in lines if line.startswith("step")]
    assert losses[-1] < losses[0]
    state = torch.load(tmp_path / "backbone.pt", weights_only=True)
    found = torchvision.models.resnet18().load_state_dict(state, strict=False)
    assert found.missing_keys == ["fc.weight", "fc.bias"] and not found.unexpected_keys


def test_a_folder_without_images_gets_one_line(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SystemExit) as end:
            mini.parse([str(folder)])
        assert end.value.code == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.endswith(f"error: {folder}: has no images in subfolders, such as "
                             f"{folder}/a/1.jpg")
