"""Checkpoints that are whole, and pickles that cannot run."""
import builtins
import io
import json
import os
import pickle
import pickletools
import random
import struct
import subprocess

import numpy
import pytest
import safetensors.torch
import torch
from torch import nn

import robustint
from robustint import core, zoo
from robustint.core import sha256, write_atomic, write_record
from robustint.data import RELEASED, evaluation_points
from robustint.models import ARCHITECTURES, fold, make_model
from robustint.zoo import (RestrictedUnpickler, load_checkpoint, load_model, load_released, load_tensors, read_header, read_released, released_name, save_checkpoint,
                           save_tensors)
from conftest import one_line

METHODS = ("normal", "adv", "trades", "ig_norm", "ig_norm_sum", "int_one_class", "int", "int_adv", "int2", "int2_adv")


def network(architecture="small", channels=1, classes=10, seed=0):
    return make_model(architecture, channels=channels, classes=classes, generator=torch.Generator().manual_seed(seed))


def same(one, other):
    return type(one) is type(other) and all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def keep(path, model, **changes):
    return save_checkpoint(path, model, **{**dict(dataset="digits", method="int", seed=3, parameters={"eps": "8/255", "epochs": 2}), **changes})


# ---- checkpoints

@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("channels, classes", [(1, 10), (3, 9)])
def test_a_checkpoint_comes_back_to_the_last_bit(tmp_path, architecture, channels, classes):
    model = network(architecture, channels, classes)
    before = torch.get_rng_state()
    again, header = load_checkpoint(keep(tmp_path / "a" / "net.safetensors", model))
    assert same(model, again) and not again.training and torch.equal(before, torch.get_rng_state())
    assert header == {"format": 1, "architecture": architecture, "channels": channels, "classes": classes, "dataset": "digits", "method": "int", "seed": 3,
                      "parameters": {"eps": "8/255", "epochs": 2}, "version": robustint.__version__}
    assert os.listdir(tmp_path / "a") == ["net.safetensors"]


def test_a_folded_network_is_kept_as_the_plain_one(tmp_path):
    model = network()
    assert same(load_checkpoint(keep(tmp_path / "net", fold(model)))[0], model)


def test_the_same_network_gives_the_same_file(tmp_path):
    paths = [keep(tmp_path / name, network()) for name in ("a", "b")]
    assert sha256(paths[0]) == sha256(paths[1]) != sha256(keep(tmp_path / "c", network(seed=1)))


def test_any_tool_reads_our_checkpoints(tmp_path):
    path = keep(tmp_path / "net.safetensors", network(), extra={"mask": torch.ones(3)})
    theirs = safetensors.torch.load_file(path)
    assert set(theirs) == {f"model.{name}" for name in network().state_dict()} | {"extra.mask"}


def test_a_training_state_comes_back_with_its_types(tmp_path):
    tensors = {"rng": torch.get_rng_state(), "step": torch.tensor(7), "half": torch.ones(2, dtype=torch.float16), "transposed": torch.arange(6.0).reshape(2, 3).T,
               "flag": torch.tensor([True, False]), "part": torch.arange(10)[2:5], "leaf": torch.ones(2, requires_grad=True)}
    again, header = load_tensors(save_tensors(tmp_path / "state", tensors, {"log": [{"loss": 0.1}], "infinite": float("inf")}))
    assert header["log"] == [{"loss": 0.1}] and all(again[name].dtype == tensors[name].dtype and torch.equal(again[name], tensors[name]) for name in tensors)
    shared = torch.ones(4)
    assert set(load_tensors(save_tensors(tmp_path / "shared", {"a": shared, "b": shared}, {}))[0]) == {"a", "b"}


def test_a_checkpoint_cut_anywhere_is_refused(tmp_path):
    content = keep(tmp_path / "net", network("pool")).read_bytes()
    chance = random.Random(0)
    for length in [0, 1, 7, 8, 9, 100, len(content) - 1] + [chance.randrange(len(content)) for _ in range(50)]:
        with pytest.raises(ValueError, match="cut.safetensors is cut short") as error:
            load_checkpoint(write_atomic(tmp_path / "cut.safetensors", content[:length]))
        one_line(error)


@pytest.mark.parametrize("content", [b"hello, this is text", bytes(100), struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 4) + b"null", struct.pack("<Q", 2) + b"{}",
                                     struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 20) + b'{"__metadata__":null}', pickle.dumps({"a": 1}), b"PK\x03\x04" + bytes(50)])
def test_files_that_are_no_checkpoint(tmp_path, content):
    with pytest.raises(ValueError, match="other is cut short|other has no robustint header") as error:
        load_checkpoint(write_atomic(tmp_path / "other", content))
    one_line(error)


def test_foreign_safetensors_are_told_apart(tmp_path):
    for metadata in (None, {"format": "pt"}, {"robustint": "no json"}):
        with pytest.raises(ValueError, match="has no robustint header") as error:
            read_header(write_atomic(tmp_path / "other", safetensors.torch.save({"w": torch.ones(2)}, metadata=metadata)))
        one_line(error)


@pytest.mark.parametrize("change, match", [({"classes": 9}, "other weights than its header says"), ({"channels": 3}, "other weights"), ({"architecture": "pool"}, "other weights"),
                                           ({"architecture": "vgg"}, "no network of ours"), ({"classes": -1}, "no network of ours"), ({"channels": "1"}, "no network of ours")])
def test_headers_that_tell_something_else(tmp_path, change, match):
    tensors, header = load_tensors(keep(tmp_path / "net", network()))
    with pytest.raises(ValueError, match=match) as error:
        load_checkpoint(save_tensors(tmp_path / "other", tensors, {**header, **change}))
    one_line(error)


def test_headers_that_are_no_dictionary(tmp_path):
    for header in ([], 3, "small", None):
        with pytest.raises(ValueError, match="no network of ours|no robustint header") as error:
            load_checkpoint(save_tensors(tmp_path / "other", {"a": torch.ones(1)}, header))
        one_line(error)


def test_missing_files_are_named(tmp_path):
    for load in (load_checkpoint, load_tensors, read_header, load_released):
        with pytest.raises(FileNotFoundError, match="none_pool.pkl") as error:
            load(tmp_path / "none_pool.pkl")
        one_line(error)


def test_networks_we_could_not_build_again(tmp_path):
    for model in (nn.Linear(2, 2), nn.Sequential(network())):
        with pytest.raises(ValueError, match="holds one of small, pool, wresnet") as error:
            keep(tmp_path / "net", model)
        one_line(error)
    assert not os.listdir(tmp_path)


def test_a_full_disk_leaves_the_old_checkpoint(small_disk, monkeypatch):
    path = save_tensors(small_disk / "net.safetensors", {"a": torch.ones(10)}, {"epoch": 1})
    with pytest.raises(OSError, match="no space left writing .*net.safetensors: free some space") as error:
        keep(path, network())
    one_line(error)
    assert read_header(path) == {"epoch": 1} and os.listdir(small_disk) == ["net.safetensors"]


def _save_states(path):
    for step in range(10**9): save_tensors(path, {"a": torch.full((50_000,), float(step))}, {"step": step})


@pytest.mark.parametrize("times", [10, pytest.param(200, marks=pytest.mark.full)])
def test_a_state_is_whole_after_a_kill(kill_after, tmp_path, times):
    chance, path = random.Random(times), save_tensors(tmp_path / "state", {"a": torch.zeros(1)}, {"step": 0})
    for _ in range(times):
        kill_after(chance.uniform(0.01, 0.1), _save_states, path)
        tensors, header = load_tensors(path)
        assert (tensors["a"] == header["step"]).all()
    save_tensors(path, {}, {})
    assert os.listdir(tmp_path) == ["state"]


# ---- released networks: the format

def layers_of(model):
    """The arrays as the authors' code pickles them."""
    layers = [(c.weight.detach().permute(2, 3, 1, 0).numpy(), c.bias.detach().numpy()) for c in model.convolutions]
    return layers + [(model.head.detach().T[None, None].numpy(),)]


@pytest.mark.parametrize("architecture, name", [("small", "mnist_smallgap_int_100.pkl"), ("pool", "mnist_pool_int_100.pkl"), ("wresnet", "cifar_wresnet_int_200.pkl")])
@pytest.mark.parametrize("change", [lambda array: array, numpy.asfortranarray, lambda array: array.astype(">f4"), lambda array: array.astype("f8")], ids=["C", "F", "big endian", "double"])
def test_a_network_in_their_format(tmp_path, architecture, name, change):
    model = network(architecture, 3, 9)
    layers = [tuple(change(array) for array in layer) for layer in layers_of(model)]
    path = write_atomic(tmp_path / name, pickle.dumps(layers, protocol=3))
    before = torch.get_rng_state()
    again = load_released(path)
    assert same(model, again) and not again.training and torch.equal(before, torch.get_rng_state())
    other = write_atomic(tmp_path / "net.pkl", path.read_bytes())
    with pytest.raises(ValueError, match="tells no architecture"): load_released(other)
    assert same(model, load_released(other, architecture=architecture))


@pytest.mark.parametrize("blank", [(numpy.full((2, 2), numpy.nan, numpy.float32), numpy.float32("nan")), (numpy.array(numpy.nan), numpy.array(numpy.nan)), (float("nan"), float("nan"))])
def test_placeholders_of_pooling_layers_are_passed_over(tmp_path, blank):
    model = network("pool")
    first, second, head = layers_of(model)
    assert same(model, load_released(write_atomic(tmp_path / "mnist_pool_int_100.pkl", pickle.dumps([first, blank, second, blank, head], protocol=3))))


def test_a_pickle_of_python_2():
    array = numpy.arange(6, dtype="<f4").reshape(1, 1, 2, 3)
    text = array.tobytes().decode("latin1").encode("unicode_escape").decode().replace("'", "\\'")
    pickled = ("(lp0\n(cnumpy.core.multiarray\n_reconstruct\np1\n(cnumpy\nndarray\np2\n(I0\ntS'b'\ntRp3\n(I1\n(I1\nI1\nI2\nI3\ntcnumpy\ndtype\np4\n(S'f4'\nI0\nI1\ntRp5\n"
               "(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\n" + f"S'{text}'\n" + "tbtp6\na.").encode("latin1")
    with pytest.raises(ValueError, match="its layers have other shapes"): # one layer only, but read
        read_released(pickled, "two.pkl")
    recorded = RestrictedUnpickler(io.BytesIO(pickled), encoding="latin1").load()
    assert (zoo._to_array(recorded[0][0]) == array).all()


# ---- released networks: what is refused

def spoil(name):
    """Pickles in the shape of mischief, each with a word of the message it should get."""
    good = layers_of(network("pool"))
    text = lambda *lines: "\n".join(lines).encode() + b"\n"
    mischief = {
        "os.system": (pickle.dumps(Call(os.system, "touch was-here")), "posix.system"),
        "protocol 0": (text("cposix", "system", "(S'touch was-here'", "tR."), "posix.system"),
        "instance": (text("(S'touch was-here'", "iposix", "system", "."), "posix.system"),
        "object": (b"(cposix\nsystem\nS'touch was-here'\no.", "posix.system"),
        "eval": (pickle.dumps(Call(builtins.eval, "open('was-here', 'w')")), "builtins.eval"),
        "getattr": (pickle.dumps(Call(builtins.getattr, "", "join")), "builtins.getattr"),
        "subprocess": (pickle.dumps(Call(subprocess.Popen, "touch was-here")), "subprocess.Popen"),
        "numpy.load": (b"cnumpy\nload\n(S'was-here'\ntR.", "numpy.load"),
        "numpy.save": (b"cnumpy\nsave\n(S'was-here'\nI1\ntR.", "numpy.save"),
        "a method of an array": (b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.", "numpy.ndarray.tofile"),
        "a module of numpy": (b"\x80\x04\x8c\x05numpy\x8c\x09os.system\x93.", "numpy.os.system"),
        "through a subpackage": (b"cnumpy.core.multiarray\nfromfile\n(S'x'\ntR.", "fromfile"),
        "codecs": (b"c_codecs\nencode\n(S'a'\nS'latin1'\ntR.", "_codecs.encode"),
        "an extension code": (b"\x80\x02\x82\x01.", "cut short or damaged"),
        "a persistent name": (b"Pthing\n.", "persistent"),
        "in a good list": (pickle.dumps(good + [Call(os.system, "touch was-here")], protocol=3), "posix.system"),
        "in the state of an array": (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(cposix\nsystem\nI1\ntb.", "posix.system"),
        "an array of objects": (pickle.dumps([(numpy.array([Call(os.system, "touch was-here")], object),)], protocol=3), "posix.system"),
        "an array of plain objects": (pickle.dumps([(numpy.array([1, "a"], object), numpy.zeros(1)), good[-1]], protocol=3), "not of floats"),
        "whole numbers": (pickle.dumps([(numpy.arange(4), numpy.arange(2)), good[-1]], protocol=3), "not of floats"),
        "a structured array": (pickle.dumps([(numpy.zeros(2, [("a", "f4")]),) * 2, good[-1]], protocol=3), "not of floats|damaged"),
        "a memory bomb": (b"\x80\x02]r\xff\xff\xff\xff.", "other shapes|no list"),
        "a long bomb": (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.", "damaged|exceeds|truncated"),
        "bytes that do not fill": (pickle.dumps(good, protocol=3).replace(struct.pack("<I", 64 * 4), struct.pack("<I", 64 * 4), 1)[:-40], "damaged|truncated"),
        "nothing": (b"", "damaged|cut"), "stop": (b".", "damaged"), "text": (b"what is this", "damaged|invalid"), "a number": (pickle.dumps(3), "no list of layers"),
        "a dictionary": (pickle.dumps({"a": 1}), "no list of layers"), "an empty list": (pickle.dumps([]), "other shapes"), "numbers": (pickle.dumps([1, 2]), "no list of layers"),
        "only the head": (pickle.dumps(good[-1:], protocol=3), "other shapes"), "no head": (pickle.dumps(good[:-1], protocol=3), "other shapes"),
        "a flat head": (pickle.dumps(good[:-1] + [(numpy.zeros(4, "f4"),)], protocol=3), "other shapes"),
        "one convolution less": (pickle.dumps(good[1:], protocol=3), "holds 1 convolutions, not 2"),
        "a kernel of another size": (pickle.dumps([(numpy.zeros((3, 3, 1, 32), "f4"), good[0][1])] + good[1:], protocol=3), r"\(32, 1, 3, 3\) in place of \(32, 1, 5, 5\)"),
        "a bias too many": (pickle.dumps([(good[0][0], numpy.zeros(31, "f4"))] + good[1:], protocol=3), r"\(31,\) in place of \(32,\)"),
        "a NaN": (pickle.dumps([(numpy.where(good[0][0] == good[0][0].max(), numpy.nan, good[0][0]), good[0][1])] + good[1:], protocol=3), "NaN or infinity"),
    }
    return mischief if name is None else mischief[name]


class Call:
    """Pickles as a call of a function."""
    def __init__(self, function, *arguments): self.function, self.arguments = function, arguments
    def __reduce__(self): return self.function, self.arguments


@pytest.mark.parametrize("name", spoil(None))
def test_a_bad_pickle_runs_nothing_and_is_refused(tmp_path, monkeypatch, name):
    content, match = spoil(name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=match) as error:
        load_released(write_atomic(tmp_path / "mnist_pool_int_100.pkl", content))
    assert "mnist_pool_int_100.pkl" in one_line(error)
    assert os.listdir(tmp_path) == ["mnist_pool_int_100.pkl"]


def test_a_bad_pickle_leaves_no_mark_on_the_next_one(tmp_path):
    """One may set the state of a stand-in's class; the next network must not notice."""
    for poison in (b"cnumpy\nndarray\n}S'__setstate__'\nI1\nsb.", b"cnumpy\nndarray\n(N}S'__setstate__'\ncnumpy\ndtype\nstb.", b"cnumpy.core.multiarray\n_reconstruct\n(N}S'arguments'\nI1\nstb."):
        with pytest.raises(ValueError): read_released(poison, "poison.pkl")
    model = network("pool")
    assert same(model, load_released(write_atomic(tmp_path / "a_pool.pkl", pickle.dumps(layers_of(model), protocol=3))))


def test_a_network_cut_anywhere_is_refused(tmp_path):
    content, chance = pickle.dumps(layers_of(network("pool")), protocol=3), random.Random(0)
    for length in range(0, 400, 7): _refused(tmp_path, content[:length])
    for _ in range(30): _refused(tmp_path, content[:chance.randrange(len(content))])


def _refused(folder, content):
    with pytest.raises(ValueError, match="a_pool.pkl") as error:
        load_released(write_atomic(folder / "a_pool.pkl", content))
    one_line(error)


def _fuzz(times, seed, monkeypatch):
    """Change bytes of a good pickle, mostly those between the numbers: it loads, or is refused; it never does anything else."""
    content, chance = pickle.dumps(layers_of(network("pool")), protocol=3), random.Random(seed)
    places = [place for operation, _, place in pickletools.genops(content) for place in range(place, place + 12)]
    for module, name in ((os, "system"), (os, "popen"), (os, "execv"), (subprocess, "Popen"), (builtins, "eval")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("it ran something"))
    counts = {True: 0, False: 0}
    for _ in range(times):
        changed = bytearray(content)
        for _ in range(chance.choice((1, 1, 2, 5))):
            changed[chance.choice(places) % len(content)] = chance.choice((chance.randrange(256), *b"cRbo.(t0i\x93\x81\x92}sN"))
        try: zoo.build_released(bytes(changed), "a_pool.pkl")
        except ValueError as error:
            assert "\n" not in str(error)
            counts[False] += 1
        else: counts[True] += 1
    return counts


def test_changed_bytes(monkeypatch):
    counts = _fuzz(300, 0, monkeypatch)
    assert counts[False] > 100


@pytest.mark.full
def test_many_changed_bytes(monkeypatch):
    counts = _fuzz(15_000, 1, monkeypatch)
    assert counts[False] > 5_000


# ---- by name

def test_names_of_released_networks():
    names = [released_name(method, dataset, architecture) for dataset, architecture, methods in (
        ("mnist", "small", METHODS), ("cifar10", "small", METHODS), ("cifar10", "wresnet", [m for m in METHODS if not m.startswith("ig")]),
        ("restricted_imagenet", "wresnet", ("normal", "adv", "int", "int2"))) for method in methods]
    assert sorted(names) == sorted(RELEASED)
    for wrong in (("ig_norm", "cifar10", "wresnet"), ("magic", "mnist", "small"), ("int", "digits", "small"), ("int", "mnist", "pool")):
        with pytest.raises(ValueError, match="there is no released network .*: choose") as error:
            released_name(*wrong)
        one_line(error)


def test_a_released_network_is_verified(tmp_path):
    (tmp_path / "reference_networks").mkdir()
    with pytest.raises(FileNotFoundError, match="run `robustint fetch released`") as error:
        load_model("int", "mnist", root=tmp_path)
    assert str(tmp_path) in one_line(error)
    write_atomic(tmp_path / "reference_networks/mnist_smallgap_int_100.pkl", pickle.dumps(layers_of(network()), protocol=3))
    with pytest.raises(ValueError, match="damaged .*run `robustint fetch released`") as error: # well formed, but not theirs
        load_model("int", "mnist", root=tmp_path)
    one_line(error)


def trained(root, name, model):
    path = keep(root / "networks" / f"{name}.safetensors", model)
    write_record({"id": name, "metrics": {"network_sha256": sha256(path)}}, root / "records")
    return path


def test_a_trained_network_is_verified(tmp_path):
    models = {eps: network(seed=seed) for seed, eps in enumerate(("0.3", "8_255"))}
    path = trained(tmp_path, "mnist-small-int-eps0.3-s0", models["0.3"])
    trained(tmp_path, "mnist-small-int_adv-eps0.3-s0", network(seed=5))
    trained(tmp_path, "mnist-small-int-eps0.3-s1", network(seed=6))
    load = lambda **more: load_model("int", "mnist", weights="trained", root=tmp_path, **more)
    assert same(load(), models["0.3"])
    trained(tmp_path, "mnist-small-int-eps8_255-s0", models["8_255"])
    with pytest.raises(ValueError, match="several trainings fit .*say which with eps=") as error: load()
    one_line(error)
    assert same(load(eps="8/255"), models["8_255"]) and same(load(eps="0.3"), models["0.3"])
    keep(path, network(seed=9))
    with pytest.raises(ValueError, match="is not the network of the record") as error: load(eps="0.3")
    one_line(error)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint") as error: load(eps="0.3")
    one_line(error)
    with pytest.raises(FileNotFoundError, match="no record of a training mnist-small-int with seed 7") as error: load(seed=7)
    one_line(error)
    with pytest.raises(ValueError, match="'released' or 'trained'"): load_model("int", "mnist", weights="mine")


def test_trained_networks_live_in_the_project(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUSTINT_HOME", str(tmp_path))
    model = network()
    trained(tmp_path / "data", "digits-small-int-eps0.1-s0", model)
    assert same(load_model("int", "digits", weights="trained"), model)


# ---- the real ones

@pytest.mark.full
def test_all_released_networks_load(released):
    for name in RELEASED:
        model = load_released(released / name)
        channels, classes = (1, 10) if name.startswith("mnist") else (3, 9) if name.startswith("rest") else (3, 10)
        assert type(model) is ARCHITECTURES["wresnet" if "wresnet" in name else "small"]
        assert model.convolutions[0].in_channels == channels and len(model.head) == classes


@pytest.mark.full
def test_released_networks_need_three_names_only(released):
    names = set()
    for name in RELEASED:
        for operation, argument, _ in pickletools.genops((released / name).read_bytes()):
            if operation.name in ("GLOBAL", "STACK_GLOBAL"): names.add(argument)
    assert names == {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}


@pytest.mark.full
def test_ours_reads_what_pickle_reads(released):
    for name in ("mnist_smallgap_int_100.pkl", "cifar_wresnet_int_200.pkl"):
        content = (released / name).read_bytes()
        for ours, theirs in zip(read_released(content, name), pickle.loads(content, encoding="latin1"), strict=True):
            assert all(numpy.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.full
@pytest.mark.parametrize("dataset, architecture, known", [
    ("mnist", "small", {"normal": 1.0, "adv": 0.98, "int": 0.935, "int_adv": 0.95}), ("cifar10", "wresnet", {"normal": 0.765, "int": 0.735, "int2": 0.68, "int2_adv": 0.69})])
def test_clean_accuracy_of_released_networks(released, data, dataset, architecture, known):
    points = evaluation_points(data(dataset))
    for method, accuracy in known.items():
        model = load_model(method, dataset, architecture, root=released.parent)
        with torch.no_grad(): found = (model(points.images).argmax(1) == points.labels).float().mean().item()
        assert found == pytest.approx(accuracy, abs=1e-6), method
