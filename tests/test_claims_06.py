"""Claims of notebook 06 about induction-2l, on its committed summary and tables."""

from pathlib import Path

import pandas as pd
import pytest

FOLDER_06 = Path(__file__).resolve().parents[1] / "outputs/induction-2l/06_path_analysis"


def picked_06():
    return pd.read_csv(FOLDER_06 / "picked.csv").set_index("heads_kept")


def test_06_five_heads_of_sixteen_are_the_circuit(summary):
    r = summary("06_path_analysis")
    n, of = r["circuit_size_of_all"]
    assert n < of / 2 and of == 16
    assert r["circuit_kept"]["low"] >= 0.85
    assert r["circuit_removed"]["high"] < 0.05  # complete: next to nothing is left


def test_06_no_random_circuit_of_that_size_comes_near(summary):
    r = summary("06_path_analysis")
    assert r["random_circuits_of_its_size"]["n"] >= 20
    assert r["best_random_circuit_of_its_size"] < 0.5 * r["circuit_kept"]["mean"]


def test_06_each_head_of_the_circuit_is_missed(summary):
    r = summary("06_path_analysis")
    assert set(r["share_lost_without_one"]) == set(r["circuit_heads"])
    assert min(drop["low"] for drop in r["share_lost_without_one"].values()) > 0


def test_06_the_next_head_brings_the_rest_and_some_others_do_harm(summary):
    size, picked = summary("06_path_analysis")["circuit_size_of_all"][0], picked_06()["exact sweep"]
    assert picked[size] < 0.97 < picked[size + 1] < 1.03 and picked.max() > 1.01


def test_06_in_gemma_one_head_is_not_missed_and_a_random_circuit_recovers_as_much(summary):
    r = summary("06_path_analysis", "gemma3-270m")
    assert len(r["share_lost_without_one"]) == 4
    assert sum(drop["low"] < 0 < drop["high"] < 0.1 for drop in r["share_lost_without_one"].values()) == 1
    assert r["best_random_circuit_of_its_size"] > r["circuit_kept"]["mean"] - 0.02


def test_06_the_strongest_edge_is_from_the_previous_token_head_into_a_key(summary):
    r = summary("06_path_analysis")
    sender, receiver = r["strongest_key_edge"].split(" to ")
    assert sender == r["previous_token_head"] and receiver in r["receivers"]
    edges = pd.read_csv(FOLDER_06 / "edges.csv")
    assert edges.loc[0, ["sender", "receiver", "through"]].tolist() == [sender, receiver, "K"]


def test_06_other_heads_matter_through_queries_and_values(summary):
    r = summary("06_path_analysis")
    edges = pd.read_csv(FOLDER_06 / "edges.csv")
    clear = edges[(edges["low"] > 0) & (edges["sender"] != r["previous_token_head"])]
    assert {"Q", "V"} <= set(clear["through"])
    # Most of them look at tokens equal to the current one.
    same = set(summary("07_causal_scrubbing")["heads"]["same"])
    through = clear[clear["through"].isin(["Q", "V"]) & (clear["effect_nats"] > 0.05 * edges["effect_nats"].max())]
    assert through["sender"].isin(same).mean() > 0.5
    # And two strong edges are in no story.
    strong = edges[edges["effect_nats"] > 0.4 * edges["effect_nats"].max()]
    assert ((strong["sender"] != r["previous_token_head"]) & (strong["through"] == "K")).any()
    assert ((strong["sender"] == r["previous_token_head"]) & (strong["through"] == "Q")).any()


def test_06_the_query_edge_by_hand_is_not_nothing_and_agrees(summary):
    r = summary("06_path_analysis")
    assert r["query_edge_by_hand_nats"]["low"] > 0
    assert r["largest_difference_from_by_hand"] < 1e-4


def test_06_head_and_group_are_one_and_an_edge_exceeds_the_group_in_gemma_only(summary):
    sizes = {name: value["mean"] for name, value in summary("06_path_analysis")["key_edge_of_the_group_nats"].items()}
    head, same_edge, whole = sizes.values()
    assert abs(head - same_edge) < 1e-4 and same_edge <= whole and same_edge > whole / 2
    *_, same_edge, whole = summary("06_path_analysis", "gemma3-270m")["key_edge_of_the_group_nats"].values()
    assert same_edge["low"] > whole["high"]


def test_06_the_gradient_is_far_too_low_integrating_mends_sizes_and_recomputing_the_rank_correlation(summary):
    alone = pd.read_csv(FOLDER_06 / "mean_ablation.csv")["delta_loss_nats"]
    assert (alone.abs() < 0.1).mean() > 0.5  # most heads do next to nothing, and decide a rank correlation
    r = summary("06_path_analysis", "gemma3-270m")  # a deep model, where repairs can overshoot and spoil the order
    assert r["size_of_five_strongest"]["integrated"] > 1.5
    assert r["rank_correlation"]["both repairs"] < r["rank_correlation"]["gradient"] - 0.2
    methods = pd.read_csv(FOLDER_06 / "methods.csv").set_index("method")
    size, order = methods["size_of_five_strongest"], methods["rank_correlation"]
    assert size["gradient"] < 0.3 < size["integrated"] and order["integrated"] <= order["gradient"] + 0.02
    assert order["recomputed patterns"] > order["gradient"] and size["recomputed patterns"] < 0.3
    assert 0.6 < size["both repairs"] < 1.2 and order["both repairs"] > order["gradient"] > 0.6


def test_06_the_circuits_of_the_shortcuts_are_near_at_its_size_and_two_fall_behind_below(summary):
    picked = picked_06()
    size = summary("06_path_analysis")["circuit_size_of_all"][0]
    assert picked.loc[size].min() > picked.loc[size, "exact sweep"] - 0.1
    fewer = picked.loc[size - 1]
    assert fewer[["gradient", "recomputed patterns"]].max() < fewer["exact sweep"] - 0.15
    assert fewer[["integrated", "both repairs"]].min() > fewer["exact sweep"] - 0.05
    # So it is integrating that orders the heads that matter, down to three of them.
    assert picked.loc[size - 2, "integrated"] > picked.loc[size - 2, "exact sweep"] - 0.05
    assert picked.loc[size - 2, "recomputed patterns"] < picked.loc[size - 2, "exact sweep"] - 0.15


@pytest.mark.parametrize("model", ["smollm2-135m", "gemma3-270m"])
def test_06_in_deep_models_the_best_rank_correlation_picks_poor_circuits(summary, model):
    r = summary("06_path_analysis", model)
    order, size = r["rank_correlation"], r["circuit_size_of_all"][0]
    assert order["gradient"] == max(order.values())
    picked = pd.read_csv(FOLDER_06.parents[1] / model / "06_path_analysis/picked.csv", index_col=0)
    assert picked.loc[size, "gradient"] < 1 / 3
    assert picked.loc[size, "integrated"] > picked.loc[size, "exact sweep"] - 0.1
    if model == "smollm2-135m":
        better = picked.loc[[16, 32]]
        assert (better["integrated"] > better["exact sweep"] + 0.2).all()
    spent = r["seconds"]
    assert 2 * max(spent["gradient"], spent["integrated"]) < min(spent["exact sweep"], spent["both repairs"])


def test_06_the_head_missed_most_is_one_of_the_circuit(summary):
    r = summary("06_path_analysis")
    assert r["missed_head"] in r["circuit_heads"]
    assert r["missed_head_nats"]["gradient"]["high"] < 0.3 * r["missed_head_nats"]["exact"]["low"]


def test_06_into_the_bystander_no_edge_comes_near_the_drawn_ones(summary):
    r = summary("06_path_analysis")
    edges = pd.read_csv(FOLDER_06 / "edges.csv")
    assert r["largest_edge_into_it_nats"] < 0.05 * edges["effect_nats"].max()
    assert r["edges_above_zero_into_it"]["family-wise"] == 0
