"""A straightforward PyTorch port of the ICML paper's training step: nothing folded, nothing kept from one inner step to the next."""
import torch
import torch.nn.functional as F
from torch import nn


class PlainSmall(nn.Module):
    "Small as anybody would write it, with the weights of one of ours; for images whose sides are multiples of 4."

    def __init__(self, small):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(c.in_channels, c.out_channels, c.kernel_size, c.stride, padding=p)
                                          for c, p in zip(small.convolutions, (1, 1, 3)))
        self.head = nn.Linear(small.head.shape[1], small.head.shape[0], bias=False)
        self.load_state_dict({("head.weight" if name == "head" else name): value for name, value in small.state_dict().items()})
        self.to(small.head.device)

    def features(self, images):
        "The last features A, (N, 100, h, w)."
        first, second, third = self.convolutions
        return third(second(first(images).relu()).relu())

    def forward(self, images):
        return self.head(self.features(images).mean((2, 3)))

    def logits_and_maps(self, images):
        "Logits, and the maps of all classes in the code's scale (no 1/u)."
        features = self.features(images)
        return self.head(features.mean((2, 3))), torch.einsum("ck,nkhw->nchw", self.head.weight, features)


def discrepancy(maps, other, logits, labels):
    "Eq. 7 in the code's scale: the true class, and the others by the softmax of f(x') without it; (N,)."
    distances = (maps - other).abs().sum((2, 3))
    true = F.one_hot(labels, logits.shape[1])
    shares = logits.softmax(1) * (1 - true)
    shares = shares / shares.sum(1, keepdim=True)
    return ((true + shares) * distances).sum(1)


def clean_loss(network, images, perturbed, labels):
    "CE(x): what Normal descends."
    return F.cross_entropy(network(images), labels)


def adv_loss(network, images, perturbed, labels):
    "CE(x'): what Adv climbs and what it descends."
    return F.cross_entropy(network(perturbed), labels)


def int_term(network, images, perturbed, labels, gamma=0.01):
    "gamma times eq. 7: what Int climbs (eq. 9)."
    maps = network.logits_and_maps(images)[1]
    logits, other = network.logits_and_maps(perturbed)
    return gamma * discrepancy(maps, other, logits, labels).mean()


def int_loss(network, images, perturbed, labels):
    "CE(x) and gamma times eq. 7: what Int descends."
    return clean_loss(network, images, perturbed, labels) + int_term(network, images, perturbed, labels)


LOSSES = {"normal": (None, clean_loss), "adv": (adv_loss, adv_loss), "int": (int_term, int_loss), "int2": (adv_loss, int_loss)}  # climbed, descended


def find_gradient(loss, network, perturbed, all_weights):
    "The gradient at the perturbed images: by loss.backward(), which fills those of the weights too, or of the images alone."
    if not all_weights:
        return torch.autograd.grad(loss, perturbed)[0]
    loss.backward()
    network.zero_grad()
    return perturbed.grad


def find_perturbed(network, images, labels, method, *, eps, steps, step_size, start, all_weights=True):
    "Projected sign ascent from given points; the images themselves where nothing is climbed."
    if LOSSES[method][0] is None:
        return images
    perturbed = start.clone()
    for _ in range(steps):
        perturbed = perturbed.detach().requires_grad_()
        gradient = find_gradient(LOSSES[method][0](network, images, perturbed, labels), network, perturbed, all_weights)
        perturbed = perturbed.detach() + step_size * gradient.sign()
        perturbed = (images + (perturbed - images).clamp(-eps, eps)).clamp(0, 1)
    return perturbed


def take_step(network, optimiser, images, labels, method, **attack):
    "One step of training; returns its loss."
    perturbed = find_perturbed(network, images, labels, method, **attack)
    loss = LOSSES[method][1](network, images, perturbed, labels)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.detach()
