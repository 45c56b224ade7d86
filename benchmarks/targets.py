"""What was asked of the ratios, and how far a result may differ from another implementation's."""
PGD, DEEP, STEP, TAU = "PGD, MNIST Small", "PGD, CIFAR-10 WResnet", "One training step, MNIST Small", "Kendall's tau of 200 pairs of maps"
OURS = ("robustint, compiled", "robustint, not compiled")  # the second is what `pgd` does by default
TARGETS = [  # the beginning of a race's title, the pair, and what is asked of the ratio of their times
    *[(title, peer, ours, ">=", asked) for title, asked in ((PGD, 15), (DEEP, 1.4)) for ours in OURS for peer in ("torchattacks", "foolbox")],
    *[(STEP, name, ours, ">=", 4) for ours in ("int, compiled", "int, not compiled") for name in ("int port", "int port, image gradient")],
    (STEP, "int, compiled", "adv, compiled", "<=", 2), (STEP, "ig_norm", "int, compiled", "<=", 3),
    (f"{TAU}, 49 ", "scipy", "robustint", ">=", 10), (f"{TAU}, 3,136 ", "scipy", "robustint", ">=", 0.9)]
LIMITS = {"CAM": 1e-5, "Integrated": 1e-5, "Kendall": 1e-12}  # of the largest difference from another implementation
SIGNS = {">=": ("at least", lambda a, b: a >= b), "<=": ("at most", lambda a, b: a <= b)}


def find_asked(title, name, against):
    "The sign and the number asked of this pair in the race with this title; None if nothing was."
    return next(((sign, asked) for race, *pair, sign, asked in TARGETS if title.startswith(race) and pair == [name, against]), None)
