"""The classifiers of the InterpretGAN paper: their shapes, where they can be cut, how they are kept."""
from collections import OrderedDict

import pytest
import torch
from conftest import one_line
from torch import nn

from robustint.classifiers import CLASSIFIERS, SmallCNN, VGG16, WideResNet, layers, load_classifier, make_classifier, make_pooling, pad_images, split
from robustint.core import make_generator
from robustint.models import fold, make_model
from robustint.pgd import pgd
from robustint.zoo import load_checkpoint, read_header, save_checkpoint

SMALL = {"smallcnn": (1, {}), "vgg16": (3, {"width": 4}), "wrn": (3, {"depth": 10, "width": 1})}


def fresh(architecture, seed=0, **options):
    channels, narrow = SMALL[architecture]
    model = make_classifier(architecture, channels=channels, generator=make_generator(seed), **narrow, **options).eval()
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    nn.init.normal_(last.weight, generator=make_generator(seed + 1))  # SmallCNN's last layer starts at zero
    return model


def images_for(architecture, n=3):
    return torch.rand(n, SMALL[architecture][0], 32, 32, generator=make_generator(5))


def shapes(architecture, **options):
    "The shapes of a network's weights, without the memory: the published sizes are large."
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "to_empty", lambda self, *, device: self)
        return CLASSIFIERS[architecture](**options).state_dict()


def count(state):
    return sum(tensor.numel() for name, tensor in state.items() if "running" not in name and "tracked" not in name)


def test_sizes_as_published():
    assert count(shapes("smallcnn")) == 427_402
    assert count(shapes("wrn")) == 46_160_474  # WRN-34-10
    assert count(shapes("vgg16")) == 15_253_578  # with 512 units in FC1 and FC2
    assert count(shapes("vgg16", batch_norm=False, hidden=4096, classes=1000)) == 138_357_544 - (25_088 - 512) * 4096  # torchvision's less its 7x7 positions
    assert shapes("vgg16", size=128, classes=2)["blocks.FC1.1.weight"].shape == (4096, 8192)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_vgg16_has_the_convolutions_of_torchvision(batch_norm):
    import torchvision

    with torch.device("meta"):
        published = (torchvision.models.vgg16_bn if batch_norm else torchvision.models.vgg16)(weights=None).features.state_dict()
    ours = [tensor.shape for name, tensor in shapes("vgg16", batch_norm=batch_norm).items() if "Conv" in name]
    assert ours == [tensor.shape for tensor in published.values()]


def test_smallcnn_is_the_protocols():
    model, x = fresh("smallcnn"), images_for("smallcnn")
    c, f = [b[0] for b in model.blocks[:4]], model.blocks
    y = nn.functional.max_pool2d(c[1](c[0](x).relu()).relu(), 2)
    y = nn.functional.max_pool2d(c[3](c[2](y).relu()).relu(), 2).flatten(1)
    assert y.shape == (3, 1600)
    torch.testing.assert_close(model(x), f.FC3(f.FC2[0](f.FC1[1](y).relu()).relu()))
    assert not SmallCNN(generator=make_generator(0)).blocks.FC3.weight.any()
    model.train()
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.5]


@pytest.mark.parametrize("architecture", CLASSIFIERS)
@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_the_parts_are_the_network_at_every_layer(architecture, pooling):
    model, x = fresh(architecture, pooling=pooling), images_for(architecture)
    logits, names = model(x), layers(model)
    assert len(names) == {"smallcnn": 7, "vgg16": 8, "wrn": 5}[architecture]
    for name in names[:-1]:
        f_pre, f_post = split(model, name)
        assert torch.equal(f_post(f_pre(x)), logits), name
    f_pre, f_post = split(model, names[-1])
    torch.testing.assert_close(f_pre(x).sum(1), torch.ones(3))
    torch.testing.assert_close(f_post(f_pre(x)).softmax(1), logits.softmax(1))
    assert torch.equal(f_post(f_pre(x)).argmax(1), logits.argmax(1))


def test_a_cut_shares_the_weights_and_changes_nothing():
    model = fresh("smallcnn").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    f_pre, f_post = split(model, "FC1")
    assert f_pre.training and f_post.training and all(module.training for module in model.modules())
    assert all(a is b for a, b in zip(model.parameters(), [*f_pre.parameters(), *f_post.parameters()]))
    assert list(model.state_dict()) == list(before) and layers(model) == ["Conv1", "Conv2", "Conv3", "Conv4", "FC1", "FC2", "FC3"]
    assert f_pre.eval() and not model.blocks.FC1.training  # the same modules


def test_probabilities_too_small_for_the_machine_keep_their_order():
    f_pre, f_post = split(nn.Sequential(OrderedDict(last=nn.Flatten())), "last")
    logits = torch.tensor([[0., 200., -500.]]).view(1, 1, 1, 3)
    assert torch.isfinite(f_post(f_pre(logits))).all() and f_post(f_pre(logits)).argmax() == 1


def test_poolings_differ_where_they_should():
    for architecture in CLASSIFIERS:
        kinds = {pooling: [type(module).__name__ for module in fresh(architecture, pooling=pooling).modules() if "Pool" in type(module).__name__] for pooling in ("max", "avg")}
        assert kinds["max"] == ["MaxPool2d"] * {"smallcnn": 2, "vgg16": 5, "wrn": 1}[architecture]
        assert [kind.replace("Avg", "Max") for kind in kinds["avg"]] == kinds["max"] and "MaxPool2d" not in kinds["avg"]


@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_weights_come_from_our_generator_alone(architecture):
    before = torch.get_rng_state()
    nets = [make_classifier(architecture, channels=SMALL[architecture][0], generator=make_generator(seed), **SMALL[architecture][1]) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    a, b, c = (next(net.parameters()) for net in nets)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert all(torch.isfinite(tensor).all() for tensor in nets[0].state_dict().values())
    assert all(torch.equal(x, y) for x, y in zip(nets[0].state_dict().values(), nets[1].state_dict().values()))


@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_a_checkpoint_gives_the_same_network_back(architecture, tmp_path):
    model = fresh(architecture, pooling="avg")
    path = save_checkpoint(tmp_path / "net.safetensors", model, dataset="digits", method="trades", seed=3, parameters={"eps": 0.3})
    again, header = load_classifier(path)
    assert type(again) is type(model) and again.recipe == model.recipe and not again.training
    assert torch.equal(again(images_for(architecture)), model(images_for(architecture)))
    assert header == read_header(path) and header["options"]["pooling"] == "avg" and header["seed"] == 3
    with pytest.raises(ValueError, match="load_classifier") as error:
        load_checkpoint(path)
    one_line(error)


def test_the_old_networks_are_made_and_read_as_well(tmp_path):
    model = make_classifier("small", channels=1, generator=make_generator(0))
    path = save_checkpoint(tmp_path / "net.safetensors", model, dataset="digits", method="int", seed=0, parameters={})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), load_classifier(path)[0].parameters()))
    assert "options" not in read_header(path)


def test_attacks_take_them_as_they_are():
    model, x, y = fresh("smallcnn").train(), images_for("smallcnn"), torch.tensor([0, 1, 2])
    assert fold(model) is model and model.image_channels == 1
    attacked = pgd(model, x, y, eps=0.1, steps=3, step_size=0.05)
    assert 0 < (attacked - x).abs().max() <= 0.1 + 1e-6 and all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_padding_keeps_the_image_in_the_middle():
    x = torch.rand(2, 3, 28, 26)
    padded = pad_images(x, 32, value=0.5)
    assert padded.shape == (2, 3, 32, 32) and torch.equal(padded[:, :, 2:-2, 3:-3], x) and (padded[:, :, :2] == 0.5).all()


BAD = [
    (lambda: pad_images(torch.rand(1, 1, 27, 28)), "padded evenly"), (lambda: pad_images(torch.rand(1, 1, 40, 40)), "larger size"),
    (lambda: make_pooling("median"), "'max' or 'avg'"), (lambda: SmallCNN(pooling=None), "'max' or 'avg'"),
    (lambda: VGG16(size=40), "multiple of 32"), (lambda: VGG16(width=0), "width"), (lambda: WideResNet(depth=12), "10, 16, 22"),
    (lambda: WideResNet(width=0), "width"), (lambda: make_classifier("vgg", channels=3), "choose one of smallcnn, vgg16, wrn, small"),
    (lambda: make_classifier("vgg16", channels=3, dropout=1.), "from 0 to below 1"),
    (lambda: make_classifier("wrn", channels=3, hidden=5), "pooling, size, depth, width"), (lambda: make_classifier("small", channels=1, pooling="max"), "leave it out"),
    (lambda: layers(make_model("pool", channels=1)), "chain of named layers"), (lambda: layers(nn.Sequential()), "chain of named layers"),
    (lambda: split(fresh("smallcnn"), "Conv5"), "choose one of Conv1"), (lambda: fresh("smallcnn")(torch.rand(1, 1, 28, 28)), "pad_images"),
]


@pytest.mark.parametrize("call, message", BAD, ids=[message for _, message in BAD])
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in one_line(error)
