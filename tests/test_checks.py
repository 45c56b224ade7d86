"""Bad input is refused at the door, in one line that names the remedy."""
import numpy
import pytest
import torch

from robustint.checks import check_eps, check_images, check_labels, check_logits, parse_fraction, raises
from conftest import one_line

GOOD = torch.linspace(0, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)


@pytest.mark.parametrize("images, match", [
    (GOOD * 255, "got max 255: divide by 255"), (GOOD * 2 - 1, "got min -1"), (GOOD / 0, "NaN"), (GOOD * float("inf"), "NaN"),
    (GOOD[:0], "empty"), (GOOD[:, :0], "empty"), (GOOD[0], r"\(N,C,H,W\)"), (GOOD[None], r"\(N,C,H,W\)"), ((GOOD * 255).byte(), "floating"),
    (GOOD.long(), "floating"), (GOOD[:, :1], "1 channels where the model takes 3"), (GOOD.permute(0, 2, 3, 1), "permute"), (GOOD * 1e6, "scale"),
    (torch.where(GOOD == GOOD.max(), torch.nan, GOOD), "NaN")])
def test_images(images, match):
    with pytest.raises(ValueError, match=match) as error:
        check_images(images, channels=3)
    one_line(error)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_images_of_any_floating_type(kind):
    assert check_images(GOOD.to(kind), channels=3) is None
    check_images(GOOD.to(kind).clone().requires_grad_())


def test_images_that_are_no_tensor():
    for images in (GOOD.numpy(), [[1.0]], None):
        with pytest.raises(TypeError, match="torch tensor") as error:
            check_images(images)
        one_line(error)


@pytest.mark.parametrize("labels, match", [
    (torch.tensor([0, 10]), "below 10"), (torch.tensor([-1, 0]), "0 or more"), (torch.tensor([0.0, 1.0]), "whole numbers"), (torch.tensor([True, False]), "whole numbers"),
    (torch.tensor([0]), "as many"), (torch.zeros(2, 1, dtype=torch.long), "argmax"), (torch.tensor(3), r"shape \(N,\)"), (torch.tensor([0j, 1j]), "whole numbers")])
def test_labels(labels, match):
    with pytest.raises(ValueError, match=match) as error:
        check_labels(labels, 2, 10)
    one_line(error)


def test_labels_that_are_no_tensor_or_empty():
    with pytest.raises(TypeError, match="torch tensor"):
        check_labels(numpy.array([0, 1]), 2)
    with pytest.raises(ValueError, match="empty"):
        check_labels(torch.zeros(0, dtype=torch.long), 0)
    check_labels(torch.tensor([0, 9]), 2, 10)
    for kind in (torch.uint8, torch.int32): # losses refuse them, or read them otherwise
        with pytest.raises(ValueError, match=r"write labels\.long\(\)"): check_labels(torch.tensor([0, 9]).to(kind), 2, 10)


@pytest.mark.parametrize("eps, match", [
    (8, "write '8/255' or 0.0314"), ("8", "write '8/255' or 0.0314"), (-0.1, "cannot be negative"), ("-1/255", "cannot be negative"), (float("nan"), "number"),
    (float("inf"), "number"), ("", "number"), ("8/255/2", "number"), ("8/0", "number"), (None, "number"), (True, "number"), ([0.1], "number"), (torch.zeros(2), "number"), (2000, "8/255")])
def test_eps(eps, match):
    with pytest.raises(ValueError, match=match) as error:
        check_eps(eps)
    one_line(error)


@pytest.mark.parametrize("eps, value", [("8/255", 8 / 255), (" 8 / 255 ", 8 / 255), ("0.3", 0.3), (0.3, 0.3), (0, 0.0), (1, 1.0), ("1e-3", 1e-3), (numpy.float64(0.3), 0.3), (torch.tensor(0.5), 0.5)])
def test_eps_as_people_write_it(eps, value):
    assert check_eps(eps) == value and parse_fraction(eps) == value and type(check_eps(eps)) is float


def test_eps_names_the_argument():
    with pytest.raises(ValueError, match="^step_size"):
        check_eps("8", "step_size")


@pytest.mark.parametrize("logits, match", [
    (torch.rand(4, 10).softmax(1), "remove the softmax"), (torch.eye(10)[:4], "remove the softmax"), (torch.full((4, 10), torch.nan), "NaN"),
    (torch.zeros(3, 10), r"shape \(4, classes\)"), (torch.zeros(4), r"shape \(4, classes\)"), (torch.zeros(4, 10, 1, 1), r"shape \(4, classes\)"), (torch.zeros(4, 10).long(), "floating")])
def test_logits(logits, match):
    with pytest.raises(ValueError, match=match) as error:
        check_logits(logits, 4)
    one_line(error)


def test_logits_that_pass():
    generator = torch.Generator().manual_seed(0)
    for logits in (torch.randn(4, 10, generator=generator), torch.zeros(4, 10), torch.full((4, 10), 0.1), torch.rand(4, 10, generator=generator), torch.rand(4, 10, generator=generator).log_softmax(1)):
        check_logits(logits, 4)
    with pytest.raises(TypeError, match="tensor of logits"):
        check_logits((torch.zeros(4, 10),), 4)


def test_raises_fails_when_nothing_does(capsys):
    with raises(ValueError, "wrong"): raise ValueError("something wrong")
    assert capsys.readouterr().out == "ValueError: something wrong\n"
    for body in (lambda: None, lambda: (_ for _ in ()).throw(ValueError("another"))):
        with pytest.raises(AssertionError):
            with raises(ValueError, "wrong"): body()
