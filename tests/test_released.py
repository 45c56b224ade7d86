"""The authors' networks under our attacks, against the printed Table 1 (`make test-full`; needs MNIST and the released networks)."""
import pandas
import pytest

from robustint.core import project_root
from robustint.data import evaluation_points
from robustint.evaluation import robust_accuracy
from robustint.zoo import load_model

TITLES = {"normal": "Normal", "adv": "Adv", "trades": "TRADES", "ig_norm": "IG-Norm", "ig_norm_sum": "IG-Norm-Sum", "int_one_class": "Int-one-class",
          "int": "Int", "int_adv": "Int-Adv", "int2": "Int2", "int2_adv": "Int2-Adv"}
EXCHANGED = {"Int": "Int-Adv", "Int-Adv": "Int"}  # their clean accuracies stand exchanged in the printed table


@pytest.mark.full
@pytest.mark.parametrize("method", TITLES)
def test_mnist_small_agrees_with_table_1(method, data, released):
    table = pandas.read_csv(project_root() / "data/papers/icml2020_table1.csv", dtype={"epsilon": str}).set_index(["dataset", "method", "epsilon"])
    points, model = evaluation_points(data("mnist"), 200), load_model(method, "mnist", "small")
    for eps in ("0", "0.05", "0.1", "0.2", "0.3", "0.35", "0.4"):
        printed_under = EXCHANGED.get(TITLES[method], TITLES[method]) if eps == "0" else TITLES[method]
        printed = table.loc[("MNIST", printed_under, eps), "pgd200_accuracy"]
        ours = robust_accuracy(model, points.images, points.labels, eps=eps)
        assert ours == pytest.approx(printed, abs=0.0051), f"{method} at eps {eps}: {ours} against {printed}"
