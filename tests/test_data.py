"""Data sets: range, split, order, and what is said when one is missing or damaged."""
import hashlib

import numpy
import pytest
import torch
from PIL import Image

from robustint.checks import check_images, check_labels
from robustint.data import DATASETS, FILES, RELEASED, SUPER_CLASSES, Dataset, evaluation_indices, evaluation_points, load_dataset
from conftest import one_line

LAYOUT = {"digits": (1, 28, 10), "mnist": (1, 28, 10), "cifar10": (3, 32, 10), "restricted_imagenet": (3, 224, 9), "restricted_tiny_imagenet": (3, 64, 9),
          "celeba": (3, 128, 2)}


def check_layout(dataset, name):
    channels, side, classes = LAYOUT[name]
    check_images(dataset.images, channels=channels)
    check_labels(dataset.labels, len(dataset), classes)
    assert dataset.images.shape[1:] == (channels, side, side) and dataset.images.dtype == torch.float32 and dataset.images.is_contiguous()
    assert dataset.labels.dtype == torch.int64 and len(dataset.class_names) == classes and dataset.name == name


# ---- digits

@pytest.mark.parametrize("split, n", [("train", 1200), ("validation", 200), ("test", 397)])
def test_digits(split, n):
    digits = load_dataset("digits", split)
    check_layout(digits, "digits")
    assert len(digits) == n and digits.split == split
    assert digits.labels.bincount(minlength=10).min() > n / 20, "every digit occurs in every split"
    assert torch.equal(digits.images, load_dataset("digits", split).images), "the same on every call"


def test_the_splits_of_the_digits_share_no_scan():
    from sklearn.datasets import load_digits
    order = numpy.concatenate([load_dataset("digits", split).labels for split in ("train", "validation", "test")])
    assert (order == load_digits().target[numpy.random.RandomState(0).permutation(1797)]).all()


def test_digits_of_another_size():
    small, large = (load_dataset("digits", size=size).images for size in (8, 32))
    assert small.shape[2:] == (8, 8) and large.shape[2:] == (32, 32) and large.min() >= 0 and large.max() <= 1
    assert torch.equal((small * 16).round(), small * 16), "17 grey levels"


# ---- test points

def test_the_test_points_are_those_of_the_paper():
    index = evaluation_indices(10000)
    assert index.shape == (200,) and (index == numpy.random.RandomState(99).permutation(10000)[:200]).all()
    assert (evaluation_indices(10000, 10) == index[:10]).all()
    digits = load_dataset("digits")
    assert torch.equal(evaluation_points(digits, 50).images, digits.images[evaluation_indices(397, 50)])
    for n in (0, -1, 398):
        with pytest.raises(ValueError, match="n must be from 1 to the number of images, 397") as error:
            evaluation_points(digits, n)
        one_line(error)


def test_a_subset_keeps_image_and_label_together():
    digits = load_dataset("digits")
    for index in ([3, 1], torch.tensor([3, 1]), numpy.array([3, 1])):
        part = digits.subset(index)
        assert torch.equal(part.images[0], digits.images[3]) and part.labels.tolist() == digits.labels[[3, 1]].tolist()
    mask = digits.labels == 4
    assert digits.subset(mask).labels.unique().tolist() == [4] and len(digits.subset(slice(0, 5))) == 5


# ---- the door

@pytest.mark.parametrize("arguments, match", [
    (("MNIST",), "choose one of digits, mnist"), (("mnist", "val"), "choose one of train, validation, test"), (("restricted_imagenet", "validation"), "choose one of train, test"), (("",), "choose one of")])
def test_unknown_names(arguments, match):
    with pytest.raises(ValueError, match=match) as error:
        load_dataset(*arguments)
    one_line(error)


def test_mnist_has_one_size():
    with pytest.raises(ValueError, match="leave size out"):
        load_dataset("mnist", size=32)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_missing_data_names_the_file_the_root_and_the_command(tmp_path, name, split, monkeypatch):
    root = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError) as error:
        load_dataset(name, split, root)
    message = one_line(error)
    assert str(root) in message and f"run `robustint fetch {name}`" in message and any(file in message for file in FILES[name])
    monkeypatch.setenv("ROBUSTINT_DATA", str(root))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_dataset(name, split)


def lay_out(root, name, change=lambda content: content):
    """Write a small set with the right file names, and the hashes that go with it; `change` damages the files afterwards."""
    import pickle
    generator, files = numpy.random.RandomState(0), {}
    for file in FILES[name]:
        if name == "mnist":
            n = 6000 if "train" in file else 20
            files[file] = bytes(16) + generator.bytes(n * 784) if "images" in file else bytes(8) + bytes(generator.randint(0, 10, n).tolist())
        elif file.endswith("meta"): files[file] = pickle.dumps({"label_names": list("abcdefghij")}, protocol=2)
        else:
            n = 1200 if "data" in file else 20
            files[file] = pickle.dumps({"data": generator.randint(0, 256, (n, 3072), dtype=numpy.uint8), "labels": generator.randint(0, 10, n).tolist()}, protocol=3)
    for file, content in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(change(content))
    return {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_splits_of_a_made_up_set(tmp_path, monkeypatch, name):
    monkeypatch.setitem(FILES, name, lay_out(tmp_path, name))
    train, validation, test = (load_dataset(name, split, tmp_path) for split in ("train", "validation", "test"))
    for dataset in (train, validation, test): check_layout(dataset, name)
    assert (len(train), len(validation), len(test)) == (1000, 5000, 20)
    if name == "mnist": # validation is the first 5,000
        raw = (tmp_path / "MNIST/raw/train-images-idx3-ubyte").read_bytes()
        assert validation.images[0, 0, 0, 0].item() == numpy.float32(raw[16]) / numpy.float32(255)
        assert train.images[0, 0, 0, 0].item() == numpy.float32(raw[16 + 5000 * 784]) / numpy.float32(255)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"", lambda content: content + b"x", lambda content: content[:20] + bytes([content[20] ^ 1]) + content[21:]],
                         ids=["cut", "empty", "longer", "one bit"])
def test_damaged_data_names_the_file_the_root_and_the_command(tmp_path, monkeypatch, name, damage):
    monkeypatch.setitem(FILES, name, lay_out(tmp_path, name, damage))
    with pytest.raises(ValueError) as error:
        load_dataset(name, "test", tmp_path)
    message = one_line(error)
    assert "damaged" in message and str(tmp_path) in message and f"run `robustint fetch {name}`" in message and any(file in message for file in FILES[name])


def test_a_pickle_in_place_of_cifar10_is_not_run(tmp_path):
    import os
    import pickle

    class Hostile:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "was-here"),)

    file = tmp_path / "cifar-10-batches-py" / "test_batch"
    file.parent.mkdir()
    file.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match="damaged"):
        load_dataset("cifar10", "test", tmp_path)
    assert not (tmp_path / "was-here").exists()


# ---- image folders

def photograph(path, colour, size=(30, 20), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, quality=95)


def test_image_folders(tmp_path):
    root = tmp_path / "restricted_imagenet" / "val"
    for label, name in enumerate(SUPER_CLASSES):
        if name != "turtle": photograph(root / name / "b.png", (10 * label, 0, 255))
    photograph(root / "cat" / "a.jpg", 200, mode="L") # grey, and first by name
    (root / "cat" / "notes.txt").write_text("no image")
    images = load_dataset("restricted_imagenet", "test", tmp_path)
    check_layout(images, "restricted_imagenet")
    assert images.labels.tolist() == [0, 1, 1, 2, 4, 5, 6, 7, 8], "the authors' order, not the alphabet's"
    assert images.class_names == SUPER_CLASSES
    cat, frog = images.images[1], images.images[3]
    assert (cat - 200 / 255).abs().max() < 0.02 and torch.allclose(frog[:, 7, 9], torch.tensor([20 / 255, 0, 1]))
    assert load_dataset("restricted_imagenet", "test", tmp_path, size=32).images.shape[2:] == (32, 32)


def test_images_are_squashed_not_cropped(tmp_path):
    image = Image.new("RGB", (40, 20), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 4, 20)) # a stripe at the left edge of a wide image
    (tmp_path / "restricted_tiny_imagenet/val/dog").mkdir(parents=True)
    image.save(tmp_path / "restricted_tiny_imagenet/val/dog/a.png")
    squashed = load_dataset("restricted_tiny_imagenet", "test", tmp_path).images[0, 0]
    assert squashed[:, 0].min() == 1 and squashed[:, 20:].max() == 0


def test_folders_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="one folder per super-class") as error:
        load_dataset("restricted_imagenet", "test", tmp_path)
    assert str(tmp_path) in one_line(error)
    for content in (b"", b"no image at all", b"\xff\xd8\xff\xe0 cut"):
        path = tmp_path / "restricted_imagenet/val/dog/a.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a.jpg .* is damaged") as error:
            load_dataset("restricted_imagenet", "test", tmp_path)
        one_line(error)
    photograph(path, (0, 0, 0), (300, 300))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="damaged"):
        load_dataset("restricted_imagenet", "test", tmp_path)


# ---- CelebA

def lay_out_faces(root, parts, size=(178, 218), titles="Smiling Male Young"):
    """Grey pictures in CelebA's layout, one for each part ("0", "1" or "2"); every third is labelled Male, number i has the brightness 10 i."""
    home = root / "celeba"
    names = [f"{i + 1:06d}.jpg" for i in range(len(parts))]
    for i, name in enumerate(names): photograph(home / "img_align_celeba" / name, (10 * i,) * 3, size)
    (home / "list_eval_partition.txt").write_text("".join(f"{name} {part}\n" for name, part in zip(names, parts)))
    (home / "list_attr_celeba.txt").write_text(f"{len(parts)}\n{titles}\n" + "".join(f"{name} -1  {1 if i % 3 == 0 else -1}  1\n" for i, name in enumerate(names)))
    return home


def numbers(dataset):
    """Which pictures these are, told by their brightness."""
    return (dataset.images.mean((1, 2, 3)) * 25.5).round().int().tolist()


@pytest.mark.parametrize("size", [(178, 218), (89, 109)], ids=["original", "half size"])
def test_faces_in_the_published_partition(tmp_path, size):
    lay_out_faces(tmp_path, "0012201", size)
    found = {split: load_dataset("celeba", split, tmp_path) for split in ("train", "validation", "test")}
    assert {split: numbers(part) for split, part in found.items()} == {"train": [0, 1, 5], "validation": [2, 6], "test": [3, 4]}
    assert [part.labels.tolist() for part in found.values()] == [[1, 0, 0], [0, 1], [1, 0]] and found["test"].class_names == ("female", "male")
    for part in found.values(): check_layout(part, "celeba")
    assert load_dataset("celeba", "test", tmp_path, size=32).images.shape == (2, 3, 32, 32)


@pytest.mark.parametrize("size", [(178, 218), (89, 109)], ids=["original", "half size"])
def test_a_sample_of_training_images_is_cut_in_three(tmp_path, size):
    lay_out_faces(tmp_path, "0" * 25, size)
    found = [numbers(load_dataset("celeba", split, tmp_path)) for split in ("train", "validation", "test")]
    assert found == [list(range(18)), [18, 19], list(range(20, 25))], "the last fifth, and the last tenth of the rest"


@pytest.mark.parametrize("size", [(178, 218), (89, 109)], ids=["original", "half size"])
def test_a_face_is_the_central_square(tmp_path, size):
    home, (width, height) = lay_out_faces(tmp_path, "2", size), size
    top = (height - width) // 2
    face = Image.new("RGB", size, (255, 0, 0))  # red above and below, green inside, a blue stripe at the left edge
    face.paste((0, 255, 0), (0, top, width, top + width))
    face.paste((0, 0, 255), (0, top, width // 8, top + width))
    face.save(home / "img_align_celeba" / "000001.jpg", quality=100, subsampling=0)
    red, green, blue = load_dataset("celeba", "test", tmp_path).images[0]
    assert red[3:-3].max() < 0.05 and red.mean() < 0.02, "nothing from above and below"
    assert blue[5:-5, :14].min() > 0.9 and green[5:-5, 19:].min() > 0.9, "and all of the width"


def test_a_face_is_resized_as_by_pillow(tmp_path):
    home = lay_out_faces(tmp_path, "2", (178, 218))
    noise = Image.fromarray(numpy.random.RandomState(0).randint(0, 256, (218, 178, 3), dtype=numpy.uint8))
    noise.save(home / "img_align_celeba" / "000001.jpg", quality=95)
    with Image.open(home / "img_align_celeba" / "000001.jpg") as image:
        wanted = numpy.asarray(image.crop((0, 20, 178, 198)).resize((64, 64), Image.Resampling.BILINEAR))
    found = load_dataset("celeba", "test", tmp_path, size=64).images[0]
    assert numpy.array_equal((found * 255).round().byte().permute(1, 2, 0).numpy(), wanted)
    assert found.std() < 0.6 * (numpy.asarray(noise) / 255).std(), "antialiased: noise is averaged away"


def test_celeba_that_is_missing_or_cut_short_says_what_to_do(tmp_path):
    def attempt(error, match, split="test"):
        with pytest.raises(error, match=match) as caught:
            load_dataset("celeba", split, tmp_path)
        assert str(tmp_path) in one_line(caught)
    attempt(FileNotFoundError, "celeba/list_eval_partition.txt .* put img_align_celeba/, .* cannot be fetched")
    home = lay_out_faces(tmp_path, "0022")
    attempt(ValueError, "names no image for validation", "validation")
    (home / "img_align_celeba" / "000004.jpg").unlink()
    attempt(FileNotFoundError, "1 of 2 images for test are not in celeba/img_align_celeba .* the first 000004.jpg: copy them there")
    assert len(load_dataset("celeba", "train", tmp_path)) == 2, "the other splits are whole"
    (home / "img_align_celeba" / "000004.jpg").write_bytes(b"no image")
    attempt(ValueError, "000004.jpg .* is damaged")
    listed = (home / "list_attr_celeba.txt").read_text()
    (home / "list_attr_celeba.txt").write_text(listed[:-10])  # the last row lost its end
    attempt(ValueError, "no row for 1 of 2 images, the first 000004.jpg")
    (home / "list_attr_celeba.txt").write_text(listed.replace("Male", "Hat"))
    attempt(ValueError, "does not name the attribute Male")
    (home / "list_attr_celeba.txt").unlink()
    attempt(FileNotFoundError, "celeba/list_attr_celeba.txt")
    (home / "list_attr_celeba.txt").write_text(listed)
    (home / "list_eval_partition.txt").write_text("000001.jpg 0\n000002.jpg\n")
    attempt(ValueError, "the line '000002.jpg'", "train")


def test_photographs_that_were_not_aligned_are_refused(tmp_path):
    lay_out_faces(tmp_path, "2", (400, 300))
    with pytest.raises(ValueError, match="400x300 pixels where aligned faces have 178x218 .* img_align_celeba") as error:
        load_dataset("celeba", "test", tmp_path)
    one_line(error)


# ---- the real files

MNIST_TEST = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
MNIST_TRAIN = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def test_there_are_32_released_networks():
    assert len(RELEASED) == 32 and sum(name.startswith("mnist_smallgap") for name in RELEASED) == 10
    assert set(DATASETS) == set(LAYOUT)


@pytest.mark.full
def test_mnist(data):
    train, validation, test = (data("mnist", split) for split in ("train", "validation", "test"))
    for dataset in (train, validation, test): check_layout(dataset, "mnist")
    assert (len(train), len(validation), len(test)) == (55000, 5000, 10000)
    assert test.labels.bincount().tolist() == MNIST_TEST
    assert (train.labels.bincount() + validation.labels.bincount()).tolist() == MNIST_TRAIN


@pytest.mark.full
def test_mnist_is_torchvisions(data):
    from torchvision.datasets import MNIST
    from robustint.core import data_root
    test, train = data("mnist", "test"), data("mnist", "train")
    theirs = MNIST(data_root(), train=False)
    assert torch.equal((test.images[:, 0] * 255).round().byte(), theirs.data) and torch.equal(test.labels, theirs.targets)
    theirs = MNIST(data_root(), train=True)
    assert torch.equal((train.images[:, 0] * 255).round().byte(), theirs.data[5000:]) and torch.equal(train.labels, theirs.targets[5000:])


@pytest.mark.full
def test_cifar10_is_torchvisions(data):
    from torchvision.datasets import CIFAR10
    from robustint.core import data_root
    for split, train, cut in (("test", False, slice(None)), ("validation", True, slice(0, 5000)), ("train", True, slice(5000, None))):
        ours, theirs = data("cifar10", split), CIFAR10(data_root(), train=train)
        check_layout(ours, "cifar10")
        assert numpy.array_equal((ours.images * 255).round().byte().permute(0, 2, 3, 1).numpy(), theirs.data[cut])
        assert ours.labels.tolist() == theirs.targets[cut] and list(ours.class_names) == theirs.classes


@pytest.mark.full
@pytest.mark.parametrize("name, split", [("restricted_imagenet", "test"), ("restricted_tiny_imagenet", "train"), ("restricted_tiny_imagenet", "test")])
def test_restricted_imagenet(data, name, split):
    images = data(name, split)
    check_layout(images, name)
    assert (images.labels.diff() >= 0).all() and images.labels[0] == 0


@pytest.mark.full
def test_celeba_sample(data):
    train, validation, test = (data("celeba", split) for split in ("train", "validation", "test"))
    for dataset in (train, validation, test): check_layout(dataset, "celeba")
    if len(train) + len(validation) + len(test) != 2000: pytest.skip("not the sample of 2,000 images")
    assert (len(train), len(validation), len(test)) == (1440, 160, 400)
    assert (train.labels.sum() + validation.labels.sum()).item() == 677 and test.labels.sum() == 169
    likeness = torch.nn.functional.cosine_similarity(train.images.mean(0).flatten(), test.images.mean(0).flatten(), dim=0)
    assert likeness > 0.99, "aligned faces: the mean of many looks the same"
