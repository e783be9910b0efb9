"""Fixtures of all tests."""

import pytest
import torch
import torchvision.models as tv

import data
import model


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def few_images(monkeypatch):
    """`shapes` with 32 images, an epoch of four steps; and a DeiT-T of three blocks, to be fast."""
    monkeypatch.setitem(model.VITS, "deit_tiny", (192, 3, 3, 384))
    init = data.Shapes.__init__

    def small(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.count, self.labels = 32, self.labels[:32]

    monkeypatch.setattr(data.Shapes, "__init__", small)


@pytest.fixture
def backbone(tmp_path):
    """A torchvision state dict saved by hand."""
    torch.save(tv.resnet18().state_dict(), tmp_path / "resnet18.pth")
    return tmp_path / "resnet18.pth"
