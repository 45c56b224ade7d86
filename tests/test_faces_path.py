"""Figure 4's chain on made-up faces: training at 128x128 in colour, a diagnosis whose pictures stay on the machine, the report that reads them."""
import base64
import json

import numpy
import pytest
import torch
from house import ROOT
from PIL import Image
from test_data import lay_out_faces
from test_notebooks import execute_here

from robustint.core import make_generator
from robustint.data import load_dataset
from robustint.reproduce import plan

PARTS, LAYER = "0" * 8 + "1" * 4 + "2" * 6, "Conv Block2"
SMALL = {"run_atta": dict(width=2, hidden=4, padding=0, epochs=1, learning_rate=[[0, 0.01]], batch_size=4, precision="float32"),
         "run_interpretgan": dict(layers=[LAYER], compression=64, widths=[2] * 6, epochs=[0.5] * 6, first_scale=4, batch_size=4, every=6),  # a step at each of the six scales
         "run_diagnosis": dict(steps=2, examples=2)}


def paint(folder):
    "Colours by chance in place of the grey pictures: patches that survive the JPEG and the crop, different in each channel."
    chance = make_generator(0)
    for path in sorted((folder / "celeba/img_align_celeba").glob("*.jpg")):
        patches = (255 * torch.rand(14, 11, 3, generator=chance)).byte().numpy()
        Image.fromarray(patches).resize((89, 109), Image.NEAREST).save(path, quality=95)


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    "A folder with the records, networks, local files and figures of the chain, planned as the shortened scale plans it, and run smaller."
    folder = tmp_path_factory.mktemp("faces")
    lay_out_faces(folder / "data", PARTS, (89, 109))
    paint(folder / "data")
    jobs = plan("interpretgan_fig4", scale="short", weights=["trained"], datasets=["celeba"])[0]
    for job in jobs:
        execute_here(ROOT / f"nbs/experiments/{job.notebook}.ipynb", folder, **job.parameters | SMALL[job.notebook], data=str(folder / "data"))
    execute_here(ROOT / "nbs/experiments/interpretgan_fig4.ipynb", folder, scale="short")
    diagnosis, = (job.name for job in jobs if job.notebook == "run_diagnosis")
    return folder, diagnosis, [job.name for job in jobs]


def leaves(value):
    "Every list of numbers and every single value of a record."
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def test_everything_runs_in_colour_at_128(faces):
    folder, diagnosis, names = faces
    assert {path.stem for path in (folder / "records").glob("*.json")} == set(names)
    trained = json.loads((folder / f"records/{diagnosis.removesuffix('-diagnosis')}.json").read_text())
    assert [entry["side"] for entry in trained["metrics"]["log"]] == [128] and trained["metrics"]["steps"] == 6
    metrics = json.loads((folder / f"records/{diagnosis}.json").read_text())["metrics"]
    assert metrics["image_shape"] == [3, 128, 128] and [row["layer"] for row in metrics["layers"]] == [LAYER] and len(metrics["class_names"]) == 2


def test_the_pictures_lie_under_local_and_are_those_of_the_test_images(faces):
    folder, diagnosis, _ = faces
    assert [path.relative_to(folder) for path in folder.rglob("*.npz")] == [(folder / f"runs/local/{diagnosis}.npz").relative_to(folder)]
    with numpy.load(folder / f"runs/local/{diagnosis}.npz") as arrays:
        found = dict(arrays)
    assert set(found) == {f"{kind} {name}" for kind in ("natural", "adversarial") for name in ("image", LAYER)}
    assert all(array.shape == (2, 3, 128, 128) and array.dtype == numpy.uint8 for array in found.values())
    test_images = load_dataset("celeba", "test", folder / "data").images[:2]
    assert numpy.array_equal(found["natural image"], (test_images * 255).round().byte().numpy())
    moved = numpy.abs(found["adversarial image"].astype(int) - found["natural image"])
    assert 0 < moved.max() <= 2, "the attack's eps is 2/255"


def test_no_pixel_is_in_a_record(faces):
    folder, diagnosis, names = faces
    with numpy.load(folder / f"runs/local/{diagnosis}.npz") as arrays:
        codes = [base64.b64encode(array[0].tobytes()).decode()[:64] for array in arrays.values()]
    for name in names:
        text = (folder / f"records/{name}.json").read_text()
        assert not any(code in text for code in codes)
        for leaf in leaves(json.loads(text)):
            assert not isinstance(leaf, str) or len(leaf) < 200, f"{name}: a long text: {leaf[:60]}"
            assert not isinstance(leaf, list) or len(leaf) <= max(16, len(PARTS)), f"{name}: {len(leaf)} numbers"
    assert json.loads((folder / f"records/{diagnosis}.json").read_text())["metrics"]["examples"] == {}


def test_the_grid_of_faces_is_drawn_under_local_and_the_figure_beside_the_others(faces):
    folder, _, _ = faces
    assert {path.name for path in (folder / "figures").iterdir()} == {f"interpretgan_fig4.{kind}" for kind in ("csv", "md", "png", "pdf")}
    grid, = folder.rglob("interpretgan_fig4_pictures.png")
    assert grid.parent == folder / "runs/local"
    with Image.open(grid) as image:
        pixels = numpy.asarray(image.convert("RGB")).astype(int)
    assert numpy.ptp(pixels, axis=2).max() > 100, "faces are in colour"
    assert "Nothing is missing." in (folder / "figures/interpretgan_fig4.md").read_text()


def test_without_the_local_pictures_the_report_says_so(faces, tmp_path):
    folder, diagnosis, _ = faces
    (tmp_path / "records").symlink_to(folder / "records")
    execute_here(ROOT / "nbs/experiments/interpretgan_fig4.ipynb", tmp_path, scale="short")
    assert not list(tmp_path.rglob("interpretgan_fig4_pictures.*"))
    assert f"those of {diagnosis} are not on this machine" in (tmp_path / "figures/interpretgan_fig4.md").read_text()
