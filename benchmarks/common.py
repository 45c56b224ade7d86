"""What the benchmarks share: the command line, images and networks, one race, its table, its plot, the record."""
import argparse
import time
from importlib.metadata import version
from importlib.util import find_spec
from statistics import median

import torch
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from race import PRODUCT, WARM_UP, compare, matmul_limit, matrix_product, measure_memory, race, share_of_limit
from targets import SIGNS, find_asked
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from robustint.core import make_generator, make_record, pick_device, project_root, write_record
from robustint.data import evaluation_points, load_dataset
from robustint.models import fold, make_model
from robustint.plots import COLOURS, add_caption, new_figure, save_figure
from robustint.zoo import load_checkpoint, load_model

PEERS = {"torchattacks": "torchattacks", "foolbox": "foolbox", "art": "adversarial-robustness-toolbox", "captum": "captum", "scipy": "scipy"}
SMOKE = {"repetitions": 2, "side": 256, "memory": 0, "digits": True, "peers": []}  # what the smallest scale has in common
NOTES = {  # for the captions, by script
    "benchmarks/attacks": "The time to compile is not in it.", "benchmarks/training": "The time to compile is not in it; ig_norm is not compiled.",
    "benchmarks/scaling": "Nothing is compiled."}
SMOKE_NOTE = "smoke numbers show that the script runs; they measure nothing"


class Unfolded(nn.Module):
    "A wrapper that `fold` does not know: the network is used as it is."

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images)


# --- images and networks -------------------------------------------------------------------------------------------------

def _load(dataset, split, digits):
    "A data set; where it is missing or digits will do, the embedded digits in its shape."
    try:
        if not digits:
            return load_dataset(dataset, split)
    except FileNotFoundError:
        pass
    return load_dataset("digits", split, size={"mnist": 28, "cifar10": 32}[dataset])


def load_images(dataset, images, split="test", digits=False, **_):
    "The paper's test points, or the first training images; their labels; and what they are."
    data = _load(dataset, split, digits)
    data = evaluation_points(data, images) if split == "test" else data.subset(torch.arange(images))
    x = data.images.expand(-1, 3, -1, -1).contiguous() if dataset == "cifar10" else data.images
    return x, data.labels, data.name if data.name == dataset else f"embedded digits in the shape of {dataset}"


def load_network(dataset, **_):
    "A network with frozen weights, and what it is: MNIST's as committed, CIFAR-10's as released, or an untrained one."
    try:
        if dataset == "mnist":
            name = "mnist-small-int-eps0.3-s0"
            model, words = load_checkpoint(project_root() / f"data/networks/{name}.safetensors")[0], f"trained here: {name}"
        else:
            model, words = load_model("int", dataset, "wresnet"), f"released: {dataset} wresnet int"
    except FileNotFoundError:
        model, words = make_model(*{"mnist": ("small",), "cifar10": ("wresnet",)}[dataset], channels=1 if dataset == "mnist" else 3, generator=make_generator(0)), "untrained"
    return model.eval().requires_grad_(False), words


def count_flops(function, images):
    "Floating-point operations of a function per image, convolutions and products only; what is constant has been computed before."
    with torch.no_grad():
        function(images[:2])
        with FlopCounterMode(display=False) as counter:
            function(images[:2])
    return counter.get_total_flops() / 2


def forward_flops(model, images, maps=False):
    "Operations of the folded network for one image, forwards: its logits, or its maps as well."
    network = fold(model, frozen=True)
    return count_flops(network.logits_and_cams if maps else network, images)


# --- one race ------------------------------------------------------------------------------------------------------------

def find_missing(names):
    "Which of these peers are not installed."
    return [name for name in names if find_spec(name) is None]


def hold(title, make, case, *, pairs=None, gflop=None, checks=None, n=None):
    "Let the contestants of `make(case)` race beside a matrix product; compared are `pairs(names)`, else each with the first. `gflop` is by name."
    contestants, (product, product_gflop) = make(case), matrix_product(case["device"], case.get("side"))
    found, (ours, *others) = checks(contestants) if checks else {}, contestants
    seconds = race(contestants | {PRODUCT: product}, case["repetitions"], device=case["device"])
    return {"title": title, "n": n, "case": case, "seconds": seconds, "checks": found, "missing": find_missing(case.get("peers", [])),
            "ratios": [compare(seconds, *pair) for pair in (pairs(list(contestants)) if pairs else [(name, ours) for name in others])],
            "shares": {name: share_of_limit(seconds, name, amount, product_gflop) for name, amount in (gflop or {}).items()},
            "gflop": gflop or {}, "memory_mib": measure_memory(make, case, list(contestants)[:case["memory"]])}


# --- what comes out ------------------------------------------------------------------------------------------------------

def show_ratio(ratio):
    "A ratio with its ends, in words."
    return f"{ratio['median']:.3g} ({ratio['low']:.3g} to {ratio['high']:.3g})"


def print_race(entry):
    "The small table of one race."
    print(f"\n{entry['title']}" + (f"; not installed: {', '.join(entry['missing'])}" if entry["missing"] else ""))
    for ratio in entry["ratios"]:
        print(f"  {ratio['name']:<34} takes {show_ratio(ratio)} times as long as {ratio['against']}")
    for name, share in entry["shares"].items():
        print(f"  {name:<34} reaches {100 * share['median']:.0f}% of the speed of a matrix product")
    for name, check in entry["checks"].items():
        print(f"  {name:<34} {', '.join(f'{key} {value:.6g}' for key, value in check.items())}")
    if entry["case"]["device"] == "cuda":
        for name, seconds in entry["seconds"].items():
            print(f"  {name:<34} {1e3 * median(seconds):.4g} ms")
    for name, peak in entry["memory_mib"].items():
        print(f"  {name:<34} {peak:.0f} MiB above the start")


def label_plainly(axis):
    "Plain numbers on a logarithmic axis whose limits are final: 1, 2, 5, 10, ...; at even distances where it spans less than a decade."
    low, high = axis.get_view_interval()
    ticks = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if high < 10 * low else [k * 10. ** n for n in range(-4, 5) for k in (1, 2, 5)]
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def count_repetitions(entry):
    "How many repetitions a race has, by its contestant with the fewest."
    return min(map(len, entry["seconds"].values()))


def mark_asked(axes, title, ratio, place):
    "A triangle at the ratio that was asked, pointing to where it is met; nothing where none was."
    if find_asked(title, ratio["name"], ratio["against"]):
        sign, asked = find_asked(title, ratio["name"], ratio["against"])
        axes.plot(asked, place, sign[0], color=COLOURS[2], markersize=7)


def draw_race(axes, entry):
    "The ratios of one race as points with their ends, on a logarithmic axis; triangles where something was asked."
    for place, ratio in enumerate(entry["ratios"]):
        ends = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
        axes.errorbar(ratio["median"], place, xerr=ends, fmt="o", color=COLOURS[1], capsize=3)
        axes.annotate(f"{ratio['median']:.3g}", (ratio["median"], place), xytext=(0, 6), textcoords="offset points", fontsize=8, ha="center")
        mark_asked(axes, entry["title"], ratio, place)
    labels = [f"{ratio['name']} / {ratio['against']}" for ratio in entry["ratios"]]
    axes.axvline(1, color="#888888", linewidth=0.8)
    axes.margins(x=0.15)
    axes.set(xscale="log", yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.4, -0.7), xlabel="time of the first / time of the second")
    label_plainly(axes.xaxis)
    axes.tick_params(labelsize=8)
    axes.set_title(f"{entry['title']}\nn = {entry['n']} {'pairs' if 'pairs' in entry['case'] else 'images'}, {count_repetitions(entry)} repetitions", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def draw_races(record):
    "A row of axes for each race."
    races = record["metrics"]["races"]
    sizes = [len(entry["ratios"]) + 1.5 for entry in races]
    figure, axes = new_figure(len(races), size=(7.2, 0.36 * sum(sizes) + 0.75 * len(races)), height_ratios=sizes)
    for entry, ax in zip(races, axes[:, 0]):
        draw_race(ax, entry)
    return figure


def describe_run(record):
    "Who measured what, and how often: the caption of a plot."
    metrics = record["metrics"]
    entries = metrics.get("races") or metrics["axes"]
    asked = any(find_asked(entry["title"], ratio["name"], ratio["against"]) for entry in metrics.get("races", []) for ratio in entry["ratios"])
    parts = [f"Points: median of the ratio within a repetition; bars or bands: lowest and highest. At least {min(map(count_repetitions, entries))} interleaved repetitions in one run, after a warm-up that is not counted.",
             f"Orange triangles: the ratio asked for, pointing right for {SIGNS['>='][0]}, left for {SIGNS['<='][0]}." if asked else "", NOTES.get(record["notebook"], ""),
             f"{record['machine']}, {record['created'][:10]}, torch {record['libraries']['torch']}.",
             f"Scale smoke: {SMOKE_NOTE}." if record["parameters"]["scale"] == "smoke" else ""]
    return " ".join(part for part in parts if part)


def draw_record(record, draw, figures):
    "The plot of a record with its caption, as a file of the record's name."
    save_figure(add_caption(draw(record), describe_run(record)), f"{figures}/{record['id'].replace('-', '_')}")


def read_arguments(scales, arguments=None):
    "The command line that all benchmarks share."
    parser = argparse.ArgumentParser(description="Measure speed against other implementations, in one run on this machine.")
    parser.add_argument("--scale", choices=list(scales), default="short")
    parser.add_argument("--threads", type=int, default=None, help="of the processor; as many as torch takes by itself, if not given")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--records", default=None, help="folder; data/records if not given, for smoke data/runs/smoke")
    parser.add_argument("--figures", default=None, help="folder; figures if not given, for smoke figures/smoke")
    return parser.parse_args(arguments)


def run(name, scales, measure, draw=draw_races, arguments=None):
    "One benchmark from the command line to its record, its table and its plot; returns the record."
    given = read_arguments(scales, arguments)
    smoke, root = given.scale == "smoke", project_root()
    device = pick_device(given.device)
    torch.set_num_threads(given.threads or torch.get_num_threads())
    settings = scales[given.scale] | {"scale": given.scale, "threads": torch.get_num_threads(), "warm_up": WARM_UP, "device": device.type}
    began = time.perf_counter()
    metrics = {"matmul_gflops": matmul_limit(settings["threads"], device, side=settings.get("side"))} | measure(settings)
    metrics["peers"] = {peer: version(package) for peer, package in PEERS.items() if find_spec(peer)}
    id = "-".join(["bench", name] + ([] if given.scale == "short" else [given.scale]) + ([] if device.type == "cpu" else [device.type]))
    record = make_record(id, notebook=f"benchmarks/{name}", parameters=settings, seed=0, n=metrics.pop("n"), device=device,
                         seconds=time.perf_counter() - began, metrics=metrics)
    write_record(record, given.records or root / ("data/runs/smoke" if smoke else "data/records"))
    figures = given.figures or root / ("figures/smoke" if smoke else "figures")
    draw_record(record, draw, figures)
    print(f"{record['machine']}; matrix product {metrics['matmul_gflops']['median']:.0f} GFLOP/s" + (f"; {SMOKE_NOTE}" if smoke else ""))
    for entry in metrics.get("races", []):
        print_race(entry)
    return record


def cases(settings):
    "The cases of a scale, each with what they share; by name."
    shared = {name: value for name, value in settings.items() if name != "cases"}
    return {name: shared | case for name, case in settings["cases"].items()}
