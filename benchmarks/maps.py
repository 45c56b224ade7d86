"""CAM and integrated gradients against Captum: the same network, the same points, the same rule."""
import torch
from common import SMOKE, cases, find_missing, hold, load_images, load_network, run
from torch import nn

from robustint.attributions import integrated_gradients, split_points
from robustint.interpreters import cam

CAM = {"dataset": "mnist", "title": "CAM of the true class, MNIST Small", "interpreter": "cam", "images": 200}
DEEP = CAM | {"dataset": "cifar10", "title": "CAM of the true class, CIFAR-10 WResnet"}
IG = {"dataset": "mnist", "title": "Integrated gradients, 100 points, MNIST Small", "interpreter": "ig", "images": 200, "steps": 100}
SCALES = {
    "smoke": SMOKE | {"cases": {"cam": CAM | {"images": 4}, "ig": IG | {"images": 4, "steps": 3}}},
    "short": {"repetitions": 21, "memory": None, "peers": ["captum"], "cases": {"cam": CAM, "cam_deep": DEEP, "ig": IG | {"repetitions": 7}}},
}
SCALES["paper"] = SCALES["short"]  # 200 test images and 100 points are the paper's


class Features(nn.Module):
    "The layers of a network before its pooling, as one layer that Captum can name."

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model.features(images)


class WithFeatures(nn.Module):
    "The same network with that layer."

    def __init__(self, model):
        super().__init__()
        self.features, self.head = Features(model), model.head

    def forward(self, images):
        return self.features(images).mean((2, 3)) @ self.head.T


def captum_cam(model, images, labels, case):
    from captum import attr
    network = WithFeatures(model)
    interpreter = attr.LayerGradCam(network, network.features)
    x = images.clone().requires_grad_()  # Captum asks for a graph down to the layer
    return lambda: interpreter.attribute(x, labels).squeeze(1).detach()


def captum_ig(model, images, labels, case):
    from captum import attr
    interpreter = attr.IntegratedGradients(model)
    together = len(split_points(case["steps"], images)[0]) * len(images)  # as many points at once as ours takes
    return lambda: interpreter.attribute(images, 0, labels, n_steps=case["steps"], method="riemann_right", internal_batch_size=together)


OURS = {"cam": lambda model, x, y, case: cam(model, x, y), "ig": lambda model, x, y, case: integrated_gradients(model, x, y, steps=case["steps"])}
CAPTUM = {"cam": captum_cam, "ig": captum_ig}


def make(case):
    "Ours, and Captum's where it is wanted and there."
    x, y, _ = load_images(**case)
    x, y, model = x.to(case["device"]), y.to(case["device"]), load_network(**case)[0].to(case["device"])
    contestants = {"robustint": lambda: OURS[case["interpreter"]](model, x, y, case)}
    if case["peers"] and not find_missing(case["peers"]):
        contestants["captum"] = CAPTUM[case["interpreter"]](model, x, y, case)
    return contestants


def check(contestants):
    "The largest difference from our maps, in the unit of a logit."
    ours = contestants["robustint"]()
    return {name: {"largest_difference": (contestant() - ours).abs().max().item()} for name, contestant in contestants.items()}


def measure(settings):
    "One race for each case."
    races = []
    for case in cases(settings).values():
        images, network = load_images(**case)[2], load_network(**case)[1]
        entry = hold(case["title"], make, case, checks=check, n=case["images"])
        races.append(entry | {"network": network, "images": images})
    return {"races": races, "n": max(entry["n"] for entry in races)}


if __name__ == "__main__":
    run("maps", SCALES, measure)
