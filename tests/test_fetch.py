"""Downloads against a local server: cut short, corrupted, refused, killed, and on a full disk."""
import gzip
import hashlib
import io
import os
import tarfile
import time
from pathlib import Path

import pytest

from robustint import data as module
from robustint.core import data_root, sha256
from robustint.data import ARCHIVES, FILES, fetch, load_dataset
from robustint.download import download
from conftest import one_line

CONTENT = bytes(range(256)) * 2000 # 512,000 bytes
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def digest(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def address(server):
    server.files["file"] = CONTENT
    return f"{server.address}/file"


# ---- one file

def test_a_whole_file(server, address, tmp_path):
    path = download(address, tmp_path / "deep" / "file", DIGEST)
    assert path.read_bytes() == CONTENT and os.listdir(path.parent) == ["file"] and server.asked == [("file", 0)]


def test_a_cut_is_mended_on_the_spot(server, address, tmp_path):
    server.cut = 200_000
    assert download(address, tmp_path / "file", DIGEST).read_bytes() == CONTENT
    assert server.asked == [("file", 0), ("file", 200_000), ("file", 400_000)] and os.listdir(tmp_path) == ["file"]


def test_a_connection_that_breaks(server, address, tmp_path):
    server.cut, server.reset, server.stall = 200_000, True, 0.2
    assert download(address, tmp_path / "file", DIGEST).read_bytes() == CONTENT


def test_cut_for_good_it_goes_on_the_next_time(server, address, tmp_path):
    server.end = 300_000
    with pytest.raises(ConnectionError, match="cut short after 300000 bytes: run the same command again, it goes on where it stopped") as error:
        download(address, tmp_path / "file", DIGEST)
    one_line(error)
    assert os.listdir(tmp_path) == ["file.part"] and (tmp_path / "file.part").stat().st_size == 300_000
    assert len(server.asked) == 6, "it gives up after five answers that bring nothing"
    server.end = None
    assert download(address, tmp_path / "file", DIGEST).read_bytes() == CONTENT
    assert server.asked[-1] == ("file", 300_000)


def test_a_server_that_cuts_and_cannot_resume(server, address, tmp_path):
    server.cut, server.ranges = 200_000, False
    with pytest.raises(ConnectionError, match="cut short after 200000 bytes"):
        download(address, tmp_path / "file", DIGEST)
    assert len(server.asked) == 6


def test_a_server_that_cannot_resume(server, address, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    server.ranges = False
    assert download(address, tmp_path / "file", DIGEST).read_bytes() == CONTENT


def test_a_part_that_was_already_whole(server, address, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    assert download(address, tmp_path / "file", DIGEST).read_bytes() == CONTENT


@pytest.mark.parametrize("part", [b"something else", CONTENT + b"x", bytes(len(CONTENT))], ids=["other", "longer", "zeros"])
def test_a_part_of_something_else_costs_one_more_try(server, address, tmp_path, part):
    (tmp_path / "file.part").write_bytes(part)
    assert download(address, tmp_path / "file", DIGEST).read_bytes() == CONTENT
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("wrong", [CONTENT[:-1] + b"x", CONTENT[:-1], CONTENT + b"x", b"", b"<html>not found</html>"], ids=["byte", "short", "long", "empty", "page"])
def test_a_corrupted_file_is_refused_and_removed(server, address, tmp_path, wrong):
    (tmp_path / "file").write_text("what stood there")
    server.files["file"] = wrong
    with pytest.raises(ValueError, match="is corrupted .* refused and removed") as error:
        download(address, tmp_path / "file", DIGEST)
    one_line(error)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "what stood there"


def test_corrupted_and_cut_comes_to_an_end(server, address, tmp_path):
    server.files["file"], server.cut = CONTENT[::-1], 200_000
    with pytest.raises(ValueError, match="is corrupted"):
        download(address, tmp_path / "file", DIGEST)
    assert len(server.asked) <= 10 and not os.listdir(tmp_path)


@pytest.mark.parametrize("status", [403, 404, 500, 503])
def test_a_server_that_refuses(server, address, tmp_path, status):
    server.status = status
    with pytest.raises(ConnectionError, match=f"answers {status} .*source= or ROBUSTINT_SOURCE") as error:
        download(address, tmp_path / "file", DIGEST)
    one_line(error)
    assert not os.listdir(tmp_path) and len(server.asked) == 1


def test_nobody_there(server, address, tmp_path):
    server.close()
    (tmp_path / "file.part").write_bytes(CONTENT[:10])
    with pytest.raises(ConnectionError, match="cannot be reached .*: check the network") as error:
        download(address, tmp_path / "file", DIGEST)
    one_line(error)
    assert (tmp_path / "file.part").read_bytes() == CONTENT[:10], "what had come is kept"


@pytest.mark.parametrize("address", ["localhost:1/file", "no address", "mirror/file", "gopher://example.org/x", "http://"])
def test_no_address(tmp_path, address):
    with pytest.raises((ValueError, ConnectionError), match="address|reached") as error:
        download(address, tmp_path / "file", DIGEST)
    one_line(error)


def test_a_folder_can_be_the_source(tmp_path):
    (tmp_path / "there").write_bytes(CONTENT)
    (tmp_path / "file.part").write_bytes(CONTENT[:10])
    assert download((tmp_path / "there").as_uri(), tmp_path / "file", DIGEST).read_bytes() == CONTENT


def test_killed_in_the_middle_it_goes_on(server, address, tmp_path, kill_after):
    server.cut, server.stall = 300_000, 30.0
    assert kill_after(1.0, download, address, tmp_path / "file", DIGEST), "it was still waiting for the rest"
    assert not (tmp_path / "file").exists() and (tmp_path / "file.part").stat().st_size > 0
    server.cut, server.stall = None, 0.0
    assert download(address, tmp_path / "file", DIGEST).read_bytes() == CONTENT
    assert server.asked[-1][1] > 0


def test_a_full_disk(server, address, small_disk):
    with pytest.raises(OSError, match="no space left writing .*file: free some space") as error:
        download(address, small_disk / "file", DIGEST)
    one_line(error)
    assert not (small_disk / "file").exists()
    server.files["file"] = b"small"
    assert download(address, small_disk / "file", digest(b"small")).read_bytes() == b"small"


def test_progress_can_be_switched_off(address, tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUSTINT_PROGRESS", str(tmp_path / "progress"))
    download(address, tmp_path / "quiet", DIGEST, progress=False)
    assert not (tmp_path / "progress").exists()
    download(address, tmp_path / "told", DIGEST)
    assert (tmp_path / "progress").exists()


# ---- MNIST and CIFAR-10, made up

@pytest.fixture
def mnist(server, monkeypatch):
    """A small MNIST on the server, and the hashes that go with it."""
    content = {file: f"the content of {file}".encode() * 50 for file in FILES["mnist"]}
    archives = {f"{file}.gz": gzip.compress(text, mtime=0) for file, text in content.items()}
    monkeypatch.setitem(FILES, "mnist", {file: digest(text) for file, text in content.items()})
    for file, archive in archives.items(): monkeypatch.setitem(ARCHIVES, file, digest(archive))
    server.files.update({Path(file).name: archive for file, archive in archives.items()})
    return content


@pytest.fixture
def cifar10(server, monkeypatch):
    """A small CIFAR-10 on the server, and the hashes that go with it."""
    content, packed = {file: f"the content of {file}".encode() * 50 for file in FILES["cifar10"]}, io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for file, text in content.items():
            entry = tarfile.TarInfo(file)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
    monkeypatch.setitem(FILES, "cifar10", {file: digest(text) for file, text in content.items()})
    monkeypatch.setitem(ARCHIVES, "cifar-10-python.tar.gz", digest(packed.getvalue()))
    server.files["cifar-10-python.tar.gz"] = packed.getvalue()
    return content


def holds(root, content):
    """Whether a folder holds these files and no other."""
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert found == content
    return True


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_fetch_unpacks_and_leaves_nothing_else(name, request, server, tmp_path):
    content = request.getfixturevalue(name)
    paths = fetch(name, tmp_path, source=server.address)
    assert paths == [tmp_path / file for file in FILES[name]] and holds(tmp_path, content)
    asked = len(server.asked)
    fetch(name, tmp_path, source=server.address)
    assert len(server.asked) == asked, "what is there and right is not asked for again"


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_fetch_mends_what_is_damaged(name, request, server, tmp_path):
    content = request.getfixturevalue(name)
    fetch(name, tmp_path, source=server.address + "/")
    damaged, missing = list(content)[:2]
    (tmp_path / damaged).write_bytes(content[damaged][:-1])
    (tmp_path / missing).unlink()
    server.asked.clear()
    fetch(name, tmp_path, source=server.address)
    assert holds(tmp_path, content) and len(server.asked) == (2 if name == "mnist" else 1)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_fetch_refuses_a_corrupted_archive(name, request, server, tmp_path):
    content = request.getfixturevalue(name)
    good = dict(server.files)
    server.files = {file: archive[:-9] + bytes(9) for file, archive in good.items()}
    with pytest.raises(ValueError, match="is corrupted") as error:
        fetch(name, tmp_path, source=server.address)
    one_line(error)
    assert holds(tmp_path, {})
    server.files = good
    fetch(name, tmp_path, source=server.address)
    assert holds(tmp_path, content)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_fetch_goes_on_where_it_was_cut(name, request, server, tmp_path):
    content = request.getfixturevalue(name)
    server.end = 50
    with pytest.raises(ConnectionError, match="goes on where it stopped"):
        fetch(name, tmp_path, source=server.address)
    server.end = None
    server.asked.clear()
    fetch(name, tmp_path, source=server.address)
    assert holds(tmp_path, content) and server.asked[0][1] == 50


def test_an_archive_that_holds_the_wrong_thing(mnist, server, tmp_path, monkeypatch):
    file = "MNIST/raw/t10k-labels-idx1-ubyte"
    wrong = gzip.compress(b"other labels", mtime=0)
    server.files[Path(file).name + ".gz"] = wrong
    monkeypatch.setitem(ARCHIVES, f"{file}.gz", digest(wrong))
    with pytest.raises(ValueError, match="does not hold the right t10k-labels-idx1-ubyte") as error:
        fetch("mnist", tmp_path, source=server.address)
    one_line(error)
    assert not (tmp_path / file).exists() and not list(tmp_path.glob(".unpacking*"))


def test_the_source_may_come_from_the_environment(mnist, server, tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUSTINT_SOURCE", server.address)
    monkeypatch.setenv("ROBUSTINT_DATA", str(tmp_path))
    fetch("mnist")
    assert holds(tmp_path, mnist)


def test_without_a_source_torchvisions_mirrors_are_tried_in_turn(mnist, server, tmp_path, monkeypatch):
    from torchvision.datasets import MNIST
    monkeypatch.delenv("ROBUSTINT_SOURCE", raising=False)
    monkeypatch.setattr(MNIST, "mirrors", [f"{server.address}/missing/", f"{server.address}/"])
    answer = server.answer

    def refuse_the_first(handler):
        return handler.send_error(404) if "missing" in handler.path else answer(handler)

    monkeypatch.setattr(server, "answer", refuse_the_first)
    fetch("mnist", tmp_path)
    assert holds(tmp_path, mnist)


def test_without_a_source_cifar10_comes_from_torchvisions_address(cifar10, server, tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10
    monkeypatch.delenv("ROBUSTINT_SOURCE", raising=False)
    monkeypatch.setattr(CIFAR10, "url", f"{server.address}/cifar-10-python.tar.gz")
    fetch("cifar10", tmp_path)
    assert holds(tmp_path, cifar10)


def test_a_full_disk_while_unpacking(server, small_disk, monkeypatch):
    file, text = "MNIST/raw/t10k-labels-idx1-ubyte", bytes(1_000_000) # packs to a thousand bytes
    archive = gzip.compress(text, mtime=0)
    monkeypatch.setitem(FILES, "mnist", {file: digest(text)})
    monkeypatch.setitem(ARCHIVES, f"{file}.gz", digest(archive))
    server.files[Path(file).name + ".gz"] = archive
    with pytest.raises(OSError, match="no space left") as error:
        fetch("mnist", small_disk, source=server.address)
    one_line(error)
    assert not (small_disk / file).exists() and not list(small_disk.glob(".unpacking*"))


def test_names_that_cannot_be_fetched(tmp_path):
    for name in ("digits", "imagenet", ""):
        with pytest.raises(ValueError, match="choose one of mnist, cifar10, released") as error:
            fetch(name, tmp_path)
        one_line(error)


def test_what_is_known_of_the_archives_is_torchvisions():
    from torchvision.datasets import CIFAR10, MNIST
    names = {Path(file).name for file in ARCHIVES}
    assert {file for file, _ in MNIST.resources} | {CIFAR10.filename} == names
    assert {Path(file).name for file in FILES["cifar10"]} == {file for file, _ in CIFAR10.train_list + CIFAR10.test_list} | {CIFAR10.meta["filename"]}


# ---- the released networks

@pytest.fixture
def networks(server, monkeypatch):
    """Three made-up networks on the server, and the hashes that go with them."""
    content = {f"reference_networks/{name}.pkl": name.encode() * 100 for name in ("one", "two", "three")}
    monkeypatch.setitem(FILES, "released", {file: digest(text) for file, text in content.items()})
    server.files.update({Path(file).name: text for file, text in content.items()})
    return content


def test_one_bad_network_does_not_spoil_the_others(networks, server, tmp_path):
    server.files["two.pkl"] = b"two?" * 75
    with pytest.raises(ValueError, match="two.pkl is corrupted") as error:
        fetch("released", tmp_path, source=server.address)
    one_line(error)
    assert not (tmp_path / "reference_networks/two.pkl").exists()
    server.files["two.pkl"] = networks["reference_networks/two.pkl"]
    server.asked.clear()
    fetch("released", tmp_path, source=server.address)
    assert holds(tmp_path, networks) and ("one.pkl", 0) not in server.asked


def test_released_networks_come_from_the_authors_by_default(networks, server, tmp_path, monkeypatch):
    monkeypatch.delenv("ROBUSTINT_SOURCE", raising=False)
    assert module.AUTHORS.startswith("https://raw.githubusercontent.com/AkhilanB/Proper-Interpretability/9b3e616/")
    monkeypatch.setattr(module, "AUTHORS", server.address)
    fetch("released", tmp_path)
    assert holds(tmp_path, networks)


@pytest.mark.full
def test_the_released_networks_through_a_server(released, server, tmp_path):
    from robustint.zoo import load_model
    server.files = {path.name: path.read_bytes() for path in released.glob("*.pkl")}
    server.cut = 700_000 # WResnet's files come in three pieces
    assert len(fetch("released", tmp_path, source=server.address)) == 32
    assert load_model("int", "cifar10", "wresnet", root=tmp_path).head.shape == (10, 64)


@pytest.mark.full
def test_fetch_knows_the_real_files(data):
    data("mnist"), data("cifar10")
    for name in ("mnist", "cifar10"): assert all(path.is_file() for path in fetch(name, source="http://127.0.0.1:9/"))
