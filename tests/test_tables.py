"""Tables: how near the rows of trained networks come to the paper's and to the released network's."""
import pandas
import pytest
from house import ROOT

from robustint.tables import COLUMNS, compare_rows, judge_rows


def cells(method, weights, paper, ours, eps=("0", "0.1", "0.3"), dataset="MNIST"):
    return [{"dataset": dataset, "model": "Small", "method": method, "weights": weights, "epsilon": e, "paper": p, "ours": o} for e, p, o in zip(eps, paper, ours)]


def table(*rows):
    return pandas.DataFrame([cell for row in rows for cell in row], columns=COLUMNS)


PAPER, RELEASED = (1., 0.8, 0.2), (0.9, 0.8, 0.3)


def test_a_row_is_compared_with_the_paper_and_with_the_released_network():
    row, = compare_rows(table(cells("Int", "released", PAPER, RELEASED), cells("Int", "trained", PAPER, (0.94, 0.83, 0.2)))).itertuples()
    assert (row.paper_cells, row.released_cells) == (3, 3)
    assert row.from_paper == pytest.approx((0.06 + 0.03 + 0.) / 3) and row.from_released == pytest.approx((0.04 + 0.03 + 0.1) / 3)


def test_only_cells_of_the_same_eps_dataset_and_method_are_compared():
    few = cells("Int", "released", PAPER[:1], RELEASED[:1])
    others = [cells("Adv", "released", PAPER, (0., 0., 0.)), cells("Int", "released", PAPER, (0., 0., 0.), dataset="CIFAR-10"), cells("Int", "released-sample", PAPER, (0., 0., 0.))]
    row, = compare_rows(table(few, *others, cells("Int", "trained", PAPER, (0.94, 0.83, 0.2)))).itertuples()
    assert row.released_cells == 1 and row.from_released == pytest.approx(0.04) and row.paper_cells == 3


def test_every_block_of_trained_networks_has_its_rows_and_released_ones_have_none():
    near = compare_rows(table(cells("Int", "released", PAPER, PAPER), cells("Int", "trained", PAPER, PAPER), cells("Adv", "trained", PAPER, PAPER), cells("Int", "trained-full", PAPER, PAPER)))
    assert near[["weights", "method"]].values.tolist() == [["trained", "Int"], ["trained", "Adv"], ["trained-full", "Int"]]
    assert compare_rows(table(cells("Int", "released", PAPER, PAPER))).empty and len(judge_rows(compare_rows(table()))) == 1


@pytest.mark.parametrize("off, away, verdict", [
    (0.05, 0.05, "yes"), (0.051, 0.06, "**NOT reached**"), (0.01, 0.06, "**NOT reached** for the released network's"), (0.06, 0.01, "**NOT reached** for the paper's")])
def test_a_row_that_misses_the_goal_says_so(off, away, verdict):
    near = pandas.DataFrame([("MNIST", "Small", "trained", "Int", 7, off, 7, away)], columns=["dataset", "model", "weights", "method", "paper_cells", "from_paper", "released_cells", "from_released"])
    assert judge_rows(near, 0.05)[1] == ["MNIST, Small, trained", "Int", f"{off:.3f} (7)", f"{away:.3f} (7)", verdict]


def test_the_committed_report_judges_what_its_table_holds():
    made, text = pandas.read_csv(ROOT / "figures/icml2020_table1.csv", dtype={"epsilon": str}), (ROOT / "figures/icml2020_table1.md").read_text(encoding="utf-8")
    for row in judge_rows(compare_rows(made))[1:]:
        line = next(line for line in text.splitlines() if line.startswith(f"| {row[0]} | {row[1]} |"))
        assert ("NOT reached" in line) == ("NOT reached" in row[-1]), line
