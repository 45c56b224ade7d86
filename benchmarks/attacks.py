"""PGD against torchattacks, foolbox and ART: the same network, the same images, the same attack, in turns.

The peers get the network as anybody would write it, of plain `nn.Conv2d` where there is such a twin (MNIST Small). On our own module and on
its folded form torchattacks runs once more, so that one can see what is the network's part and what the loop's.
"""
from functools import partial

import torch
from common import SMOKE, Unfolded, cases, find_missing, forward_flops, hold, load_images, load_network, run
from port import PlainSmall
from targets import OURS

from robustint.models import fold
from robustint.pgd import pgd

MNIST = {"dataset": "mnist", "title": "PGD, MNIST Small", "images": 200, "steps": 200, "step_size": 0.01, "eps": 0.3}
CIFAR = {"dataset": "cifar10", "title": "PGD, CIFAR-10 WResnet", "images": 40, "steps": 10, "step_size": 0.01, "eps": 8 / 255}
PEERS = ["torchattacks", "foolbox", "art"]
SCALES = {
    "smoke": SMOKE | {"memory": 1, "cases": {"mnist": MNIST | {"images": 4, "steps": 4}}},
    "short": {"repetitions": 7, "memory": None, "peers": PEERS, "cases": {"mnist": MNIST, "cifar10": CIFAR}},
    "paper": {"repetitions": 7, "memory": None, "peers": PEERS, "cases": {"mnist": MNIST, "cifar10": CIFAR | {"images": 200, "steps": 200}}},
}


def prepare_torchattacks(model, images, labels, case):
    from torchattacks import PGD
    attack = PGD(model, eps=case["eps"], alpha=case["step_size"], steps=case["steps"], random_start=False)
    return lambda: attack(images, labels)


def prepare_foolbox(model, images, labels, case):
    from foolbox import PyTorchModel
    from foolbox.attacks import LinfPGD
    wrapped = PyTorchModel(model, bounds=(0, 1), device=images.device)
    attack = LinfPGD(abs_stepsize=case["step_size"], steps=case["steps"], random_start=False)
    return lambda: attack(wrapped, images, labels, epsilons=case["eps"])[1]


def prepare_art(model, images, labels, case):
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier
    wrapped = PyTorchClassifier(model, torch.nn.CrossEntropyLoss(), tuple(images.shape[1:]), 10, clip_values=(0, 1), device_type="gpu" if images.is_cuda else "cpu")
    attack = ProjectedGradientDescentPyTorch(wrapped, eps=case["eps"], eps_step=case["step_size"], max_iter=case["steps"], batch_size=len(images), verbose=False)
    x, y = images.cpu().numpy(), labels.cpu().numpy()
    return lambda: torch.from_numpy(attack.generate(x, y)).to(images.device)


PREPARE = {"torchattacks": prepare_torchattacks, "foolbox": prepare_foolbox, "art": prepare_art}


def make(case):
    "The contestants: ours, compiled, not compiled (the default), and not even folded; the peers; and one peer on our module and on its folded form."
    x, y, _ = load_images(**case)
    x, y, model = x.to(case["device"]), y.to(case["device"]), load_network(**case)[0].to(case["device"])
    ours = partial(pgd, images=x, labels=y, eps=case["eps"], steps=case["steps"], step_size=case["step_size"])
    contestants = {OURS[0]: partial(ours, model, compiled=True), OURS[1]: partial(ours, model), "robustint, unfolded": partial(ours, Unfolded(model))}
    usual = PlainSmall(model).requires_grad_(False).eval() if case["dataset"] == "mnist" else model
    for name in case["peers"]:
        if not find_missing([name]):
            contestants[name] = PREPARE[name](usual, x, y, case)
    if "torchattacks" in contestants:
        contestants["torchattacks on the folded network"] = prepare_torchattacks(fold(model, frozen=True), x, y, case)
        if usual is not model:
            contestants["torchattacks on our module"] = prepare_torchattacks(model, x, y, case)
    return contestants


def list_pairs(names):
    "Ours by default beside ours compiled, and everybody else beside each of the two."
    return [(OURS[1], OURS[0])] + [(name, ours) for ours in OURS for name in names if name not in OURS]


def check(contestants, case):
    "Robust accuracy under each attack, and the share of its adversarial pixels that are ours to 1e-4."
    _, y, _ = load_images(**case)
    model = load_network(**case)[0]
    found = {name: attack().detach().cpu() for name, attack in contestants.items()}
    with torch.no_grad():
        return {name: {"robust_accuracy": (model(x).argmax(1) == y).float().mean().item(),
                       "equal_pixels": ((x - found[OURS[0]]).abs() <= 1e-4).float().mean().item()} for name, x in found.items()}


def measure(settings):
    "One race for each case. A step climbs once: forwards and back to the pixels, each of the same arithmetic."
    races = []
    for case in cases(settings).values():
        (x, _, images), (model, network) = load_images(**case), load_network(**case)
        flop = 2 * forward_flops(model, x)
        gflop = {OURS[0]: flop * len(x) * case["steps"] / 1e9}
        entry = hold(case["title"], make, case, pairs=list_pairs, gflop=gflop, checks=partial(check, case=case), n=len(x))
        races.append(entry | {"network": network, "images": images, "flop_image_step": flop})
    return {"races": races, "n": max(entry["n"] for entry in races)}


if __name__ == "__main__":
    run("attacks", SCALES, measure)
