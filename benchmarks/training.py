"""One training step of Int, Adv and IG-Norm, and the same step by a straightforward port: the same weights, images and starts. And the steps that Table 1 counts in hours of a core."""
from functools import partial

import port
import torch
from common import SMOKE, cases, count_flops, forward_flops, hold, load_images, run

from robustint.core import make_generator
from robustint.models import fold, make_model
from robustint.objectives import make_method
from robustint.pgd import Linf
from robustint.training import find_perturbed

STEP = {"dataset": "mnist", "title": "One training step, MNIST Small", "split": "train", "images": 50, "inner_steps": 40, "step_size": 0.01, "eps": 0.3}
CORE = STEP | {"title": "A training step on one core, MNIST Small", "threads": 1, "methods": ["normal", "adv", "int2", "int"]}
SCALES = {
    "smoke": SMOKE | {"cases": {name: case | {"images": 4, "inner_steps": 2} for name, case in (("small", STEP), ("core", CORE))}},
    "short": {"repetitions": 15, "memory": None, "cases": {"small": STEP, "core": CORE | {"repetitions": 7, "memory": 0}}},
}
SCALES["paper"] = SCALES["short"]  # 50 images and 40 inner steps are the paper's
PAIRS = [("int, not compiled", "int, compiled"), *[(name, ours) for ours in ("int, compiled", "int, not compiled") for name in ("int port", "int port, image gradient", "ig_norm")],
         ("adv port", "adv, compiled"), ("adv port, image gradient", "adv, compiled"), ("int, compiled", "adv, compiled")]


def prepare(case):
    "Images, labels, the starts of the ascents, and a fresh network: the same at every call."
    x, y, _ = load_images(**case)
    x, y = x.to(case["device"]), y.to(case["device"])
    start = Linf(case["eps"]).random_start(x, make_generator(1, case["device"]))
    return x, y, start, make_model("small", channels=1, generator=make_generator(0)).to(case["device"])


def attack(model, method, x, y, start, case, compiled=False):
    "Our inner maximisation from given starts."
    return find_perturbed(model, x, y, method, eps=case["eps"], steps=case["inner_steps"], step_size=case["step_size"], start=lambda ball: start, compiled=compiled)


def take_step(model, optimiser, method, x, y, start, case, compiled):
    "Our step: what `robustint.training.train` does with a batch. Returns the loss."
    perturbed = attack(model, method, x, y, start, case, compiled)
    loss = method.loss(fold(model), x, perturbed, y).mean()
    loss.backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return loss.detach()


def prepare_ours(name, case, compiled=True):
    x, y, start, model = prepare(case)
    return partial(take_step, model, torch.optim.Adam(model.parameters(), lr=1e-4), make_method(name), x, y, start, case, compiled)


def prepare_port(name, case, all_weights):
    x, y, start, model = prepare(case)
    network = port.PlainSmall(model)
    return partial(port.take_step, network, torch.optim.Adam(network.parameters(), lr=1e-4), x, y, name, eps=case["eps"],
                   steps=case["inner_steps"], step_size=case["step_size"], start=start, all_weights=all_weights)


def make(case):
    "The contestants; each trains a network of its own. IG-Norm asks for compiling too and does not get it: `ascend` refuses a compiled step that finds another gradient."
    contestants = {"int, compiled": prepare_ours("int", case), "adv, compiled": prepare_ours("adv", case),
                   "ig_norm": prepare_ours("ig_norm", case), "int, not compiled": prepare_ours("int", case, False)}
    for name in ("int", "adv"):
        contestants[f"{name} port"] = prepare_port(name, case, True)
        contestants[f"{name} port, image gradient"] = prepare_port(name, case, False)
    return contestants


def make_core(case):
    "Our step as long trainings take it, and the port's, by methods."
    return {name: step for method in case["methods"] for name, step in ((method, prepare_ours(method, case)), (f"{method} port", prepare_port(method, case, True)))}


def compare_with_port(name, case, dtype=torch.float32):
    "The same step by both: the share of equal perturbed pixels (to 1e-4), and the difference of the losses, relative."
    x, y, start, model = prepare(case)
    x, start, model, method = x.to(dtype), start.to(dtype), model.to(dtype), make_method(name)
    network = port.PlainSmall(model).to(dtype)
    ours = attack(model, method, x, y, start, case)
    theirs = port.find_perturbed(network, x, y, name, eps=case["eps"], steps=case["inner_steps"], step_size=case["step_size"], start=start)
    loss, other = method.loss(fold(model), x, ours, y).mean().item(), port.LOSSES[name][1](network, x, ours, y).item()
    return {"equal_pixels": ((ours - theirs).abs() <= 1e-4).double().mean().item(), "loss_difference": abs(loss - other) / abs(other)}


def count_step(name, case):
    "GFLOP that a step needs: inner steps forwards and back, the clean side once, and the outer step (three times forwards)."
    x, _, _, model = prepare(case)
    sides = 2 if name == "int" else 1
    return len(x) * forward_flops(model, x, maps=name == "int") * (2 * case["inner_steps"] + sides - 1 + 3 * sides) / 1e9


def count_ig_norm(case):
    """The same of IG-Norm. An inner step takes five points through the network forwards, back, and through both again for the second derivative; through the stem two images forwards,
    the mean gradient back, and one tangent through both. The outer step passes the clean side, and needs the gradients of the weights in both of the later passes too."""
    x, _, _, model = prepare(case)
    whole, stem = forward_flops(model, x), count_flops(fold(model, frozen=True).stem, x)
    inner = 5 * 4 * (whole - stem) + 5 * stem
    return len(x) * (inner * (case["inner_steps"] + 1.5) + 3 * whole) / 1e9


def measure(settings):
    "One race of all contestants."
    races = []
    for case in cases(settings).values():
        methods, alone = case.get("methods", ["int", "adv"]), "methods" in case
        checks = lambda _: {f"{name} port": compare_with_port(name, case) for name in methods}
        gflop = {} if alone else {f"{name}, compiled": count_step(name, case) for name in methods} | {"ig_norm": count_ig_norm(case)}
        pairs = [(f"{name} port", name) for name in methods] if alone else PAIRS
        torch.set_num_threads(case["threads"])
        entry = hold(case["title"], make_core if alone else make, case, pairs=lambda _: pairs, gflop=gflop, checks=checks, n=case["images"])
        races.append(entry | {"network": "untrained", "images": load_images(**case)[2]})
    torch.set_num_threads(settings["threads"]) # as it was, for whoever comes next
    return {"races": races, "n": max(entry["n"] for entry in races)}


if __name__ == "__main__":
    run("training", SCALES, measure)
