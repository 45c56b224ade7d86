"""How the cost of PGD and of an Int training step grows: with batch, steps, classes, image size, and the number of networks."""
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch
from common import SMOKE, label_plainly, run
from race import compare, race, wait_for

from robustint.core import make_generator
from robustint.models import fold, make_model
from robustint.objectives import make_method
from robustint.pgd import pgd
from robustint.plots import draw_curves, new_figure
from robustint.training import find_perturbed

MIDDLE = {"images": 50, "steps": 10, "classes": 10, "side": 28}  # one of them is changed at a time
GRID = {"images": [10, 25, 50, 100, 200], "steps": [5, 10, 20, 40], "classes": [2, 10, 50, 100], "side": [28, 56, 112]}
SCALES = {
    "smoke": SMOKE | {"images": 4, "middle": MIDDLE | {"images": 4, "steps": 2}, "grid": {"images": [2, 4], "side": [28, 56]}, "networks": [1, 2]},
    "short": {"repetitions": 7, "middle": MIDDLE, "grid": GRID, "networks": [1, 2]},
}
SCALES["paper"] = {"repetitions": 7, "middle": MIDDLE | {"images": 200, "steps": 40}, "grid": GRID | {"images": [50, 100, 200, 400], "steps": [10, 20, 40, 80]}, "networks": [1, 2]}
WORDS = {"images": "images in the batch", "steps": "steps of the ascent", "classes": "classes", "side": "side of the image (pixels)", "networks": "networks at once (a process each)"}


def prepare_pgd(images, steps, classes, side, device="cpu"):
    "PGD on an untrained Small and random images of such a size."
    model = make_model("small", channels=1, classes=classes, generator=make_generator(0)).to(device)
    x = torch.rand(images, 1, side, side, generator=make_generator(1)).to(device)
    y = torch.arange(images, device=device) % classes
    return partial(pgd, model, x, y, eps=0.3, steps=steps, step_size=0.01)


def prepare_int(images, steps, classes, side, device="cpu"):
    "The gradient of one Int training step on the same."
    attack = prepare_pgd(images, steps, classes, side, device)
    model, x, y = attack.args
    method = make_method("int")

    def step():
        model.zero_grad()
        perturbed = find_perturbed(model, x, y, method, eps=0.3, steps=steps, step_size=0.01, generator=make_generator(2, device))
        method.loss(fold(model), x, perturbed, y).mean().backward()
    return step


PREPARE = {"PGD": prepare_pgd, "Int step": prepare_int}


def race_axis(axis, values, settings):
    "All sizes of one axis, for both, in one race; times relative to the smallest."
    contestants = {f"{what} {value}": prepare(**settings["middle"] | {axis: value}, device=settings["device"])
                   for what, prepare in PREPARE.items() for value in values}
    seconds = race(contestants, settings["repetitions"], device=settings["device"])
    ratios = {what: [compare(seconds, f"{what} {value}", f"{what} {values[0]}") for value in values] for what in PREPARE}
    return {"axis": axis, "values": values, "seconds": seconds, "ratios": ratios}


# --- several networks side by side, each in a process of its own ------------------------------------------------------------

WORK = {}  # of a worker


def _sit_down(middle, device):
    "Prepare a worker: one thread, one network."
    torch.set_num_threads(1)
    WORK["device"] = device
    for what, prepare in PREPARE.items():
        WORK[what] = prepare(**middle, device=device)
        WORK[what]()


def _work(what):
    "Let this worker do its work a few times, so that handing it over weighs little."
    for _ in range(5):
        WORK[what]()
    wait_for(WORK["device"])


def race_networks(settings):
    "One network and several in as many processes of one thread each; times relative to one."
    counts = settings["networks"]
    with ProcessPoolExecutor(max(counts), get_context("spawn"), _sit_down, (settings["middle"], settings["device"])) as pool:
        contestants = {f"{what} {k}": lambda what=what, k=k: list(pool.map(_work, [what] * k)) for what in PREPARE for k in counts}
        seconds = race(contestants, settings["repetitions"], warm_up=2)
    ratios = {what: [compare(seconds, f"{what} {k}", f"{what} {counts[0]}") for k in counts] for what in PREPARE}
    return {"axis": "networks", "values": counts, "seconds": seconds, "ratios": ratios}


# --- the whole ---------------------------------------------------------------------------------------------------------------

def measure(settings):
    "One race for each axis, and one for the number of networks; largest against smallest goes into the table."
    axes = [race_axis(axis, values, settings) for axis, values in settings["grid"].items()] + [race_networks(settings)]
    for entry in axes:
        for what, ratios in entry["ratios"].items():
            factor = entry["values"][-1] / entry["values"][0]
            print(f"{entry['axis']:<10} x{factor:<5g} {what:<9} takes {ratios[-1]['median']:.3g} times as long")
    return {"axes": axes, "n": max(settings["grid"].get("images", [settings["middle"]["images"]]))}


def describe_middle(axis, middle):
    "What stays as it is along an axis."
    words = {"images": "n = {} images", "steps": "{} steps", "classes": "{} classes", "side": "{0} x {0} pixels"}
    return ", ".join(words[name].format(middle[name]) for name in words if name != axis)


def draw(record):
    "A panel for each axis, logarithmic both ways; the dotted line is cost in proportion."
    entries, middle = record["metrics"]["axes"], record["parameters"]["middle"]
    rows = -(-len(entries) // 3)
    figure, axes = new_figure(rows, 3, size=(9.6, 3.1 * rows))
    for entry, ax in zip(entries, axes.flat):
        draw_axis(ax, entry)
        ax.set_title(describe_middle(entry["axis"], middle), fontsize=8)
    for ax in list(axes.flat)[len(entries):]:
        ax.set_axis_off()
    return figure


def draw_axis(ax, entry):
    "One panel."
    values = entry["values"]
    draw_curves(ax, {what: (values, *([r[end] for r in ratios] for end in ("median", "low", "high"))) for what, ratios in ((what, entry["ratios"][what]) for what in PREPARE)},
                xlabel=WORDS[entry["axis"]], ylabel=f"time / time at {values[0]}")
    power = 2 if entry["axis"] == "side" else 1
    ax.plot(values, [(value / values[0]) ** power for value in values], ":", color="#888888", label="in proportion" + (" to pixels" if power == 2 else ""))
    ax.set(xscale="log", yscale="log")
    label_plainly(ax.yaxis)
    ax.set_xticks(values, values)
    ax.set_xticks([], minor=True)
    ax.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    run("scaling", SCALES, measure, draw)
