"""Readings of notebook 04 about induction-2l; `summary("04_activation_patching")` gives its results."""

from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).resolve().parents[1] / "outputs/induction-2l/04_activation_patching"


def table_04(name):
    return pd.read_csv(FOLDER / f"{name}.csv")


def found_heads(summary):
    return summary("04_activation_patching")["heads_picked_by_patching"]


def test_04_the_surname_is_known_from_context_alone_and_patching_it_all_gives_the_clean_loss(summary):
    loss = summary("04_activation_patching")["one_prompt_loss_nats"]
    assert loss["corrupted"] > loss["clean"] + 2 and abs(loss["patched"] - loss["clean"]) < 1e-3


def test_04_the_task_has_a_gap(summary):
    margin = summary("04_activation_patching")["margin"]
    assert margin["clean"]["low"] > 0 > margin["corrupted"]["high"] and margin["gap"]["low"] > 10


def test_04_everything_sits_at_b_until_the_last_layer(summary):
    found = summary("04_activation_patching")
    assert abs(found["stream_at_b_before_the_first_layer"]["mean"] - 1) < 1e-3
    assert found["layer_that_brings_it_to_the_end"] == 1


def test_04_patching_picks_the_heads_that_the_score_picks(summary):
    found = summary("04_activation_patching")
    by_score = table_04("three_measures").nlargest(2, "induction_score")["head"]
    assert set(found["heads_picked_by_patching"]) == set(by_score)
    assert set(by_score) == set(summary("03_head_ablation")["induction_heads"])
    assert found["recovery_of_picked_heads_together"]["low"] > 0.9


def test_04_the_best_head_improves_every_trial(summary):
    found = summary("04_activation_patching")["top_head_patch"]
    assert found["smallest_improvement"] > 0 and found["n_trials"] >= 64
    interval = summary("04_activation_patching")["top_head_improvement"]
    assert interval["high"] - interval["low"] < found["standard_deviation"]


def test_04_each_corruption_is_brought_back_by_the_input_that_it_should_be(summary):
    found = summary("04_activation_patching")["recovery_by_input"]
    for row, right in {"A C .. A": "value", "C B .. A": "key", "A B .. C": "query"}.items():
        assert found[row][right]["low"] > 0.8 and found[row]["all three"]["low"] > 0.8
        assert all(found[row][other]["high"] < 0.15 for other in {"query", "key", "value"} - {right})


def test_04_one_head_writes_the_key_and_it_is_the_previous_token_head(summary):
    found = summary("04_activation_patching")
    assert found["previous_token_head"]["by patching"] == found["previous_token_head"]["by score"]
    assert found["previous_token_head_recovery"]["low"] > 0.8
    assert table_04("heads_at_b").recovery[1] < 0.05
    at_end = table_04("heads_at_the_last_position").set_index("head")
    assert abs(at_end.recovery[found["previous_token_head"]["by score"]]) < 0.01


def test_04_a_key_or_a_value_is_needed_and_not_enough(summary):
    found = summary("04_activation_patching")["enough_and_needed"]
    for part in ("key", "value"):
        assert found["denoising"][part]["high"] < 0.2 and found["noising"][part]["low"] > 0.8
    assert found["denoising"]["key and value"]["low"] > 0.9


def test_04_controls(summary):
    found = summary("04_activation_patching")
    controls = found["controls"]
    assert found["clean_into_clean_largest_difference_from_zero"] < 1e-3
    assert abs(controls["every head and MLP"]["mean"] - 1) < 1e-3
    assert controls["picked heads"]["low"] > controls["random sets of as many"]["high"]
    other, random = controls["picked heads, from another prompt"]["mean"], controls["random sets of as many"]["mean"]
    assert 0.4 < other < 0.6 and 0.05 < random < 0.15
    assert controls["picked heads"]["low"] > controls["best head alone"]["high"]


def test_04_two_heads_lead_by_attention_and_patching_and_no_overlap_is_shown_to_be_more_than_chance(summary):
    overlap = table_04("overlap_of_the_lists").set_index("lists")
    p = overlap.p
    assert p.min() > 0.05 / len(p) and (overlap.by_chance == 1).all()
    assert p["induction_score and copying_lost_nats"] > 0.05 and p["copying_lost_nats and patching"] > 0.05
    listed = table_04("three_measures")
    weaker = listed.set_index("head").copying_lost_nats[found_heads(summary)].idxmin()
    assert weaker not in set(listed.nlargest(4, "copying_lost_nats")["head"])
    top = listed.nlargest(1, "copying_lost_nats")["head"].item()
    assert top == summary("04_activation_patching")["previous_token_head"]["by score"]
