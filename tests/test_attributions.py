"""Captum's baselines: their settings at the door. The interpreters themselves are in test_interpreters.py."""
import pytest
import torch
from conftest import one_line
from torch import nn

from robustint.attributions import baseline_maps
from robustint.core import make_generator


@pytest.fixture(scope="module")
def case():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)).eval()
    return model, torch.rand(2, 1, 8, 8, generator=make_generator(0))


BAD = [(dict(window=0), "window must be a whole number from 1 to the side of the images, 8"), (dict(window=9), "window"), (dict(window=2.5), "window"), (dict(stride=0), "stride"),
       (dict(window=2, stride=3), "from 1 to the window, 2: else pixels are left out"), (dict(steps=0), "steps must be a whole number, 1 or more"), (dict(batch_size=0), "batch_size")]


@pytest.mark.parametrize("change, message", BAD)
def test_baselines_refuse_what_captum_meets_deep_inside(case, change, message):
    with pytest.raises(ValueError) as error:
        baseline_maps(*case, 0, **change)
    assert message in one_line(error)


@pytest.mark.parametrize("window, stride", [(8, 8), (3, 3), (3, 2), (1, 1)])
def test_every_window_that_covers_the_image_is_taken(case, window, stride):
    maps = baseline_maps(*case, 0, window=window, stride=stride, steps=2)
    assert all(part.shape == (2, 8, 8) and torch.isfinite(part).all() for part in maps.values())
