"""What notebook 02 says of induction-2l, held to the committed summary and tables.

`summary("02_attention_visualization", model="induction-2l")` gives the results of one notebook.
"""

from pathlib import Path

import pandas as pd

NAME = "02_attention_visualization"
FOLDER = Path(__file__).resolve().parents[1] / "outputs" / "induction-2l" / NAME


def table(name):
    return pd.read_csv(FOLDER / f"{name}.csv")


def test_02_two_heads_of_layer_1_stand_alone(summary):
    scores = table("induction_scores")
    assert scores.layer[:2].tolist() == [1, 1] and scores.low[1] > 0.9 and scores.high[2] < 0.1
    assert summary(NAME)["candidates_clearly_above_0_3"] == scores["head"][:2].tolist()


def test_02_one_head_of_layer_0_looks_one_back_and_others_do_in_part_in_layer_1(summary):
    scores = table("previous_token_scores")
    assert scores.layer[0] == 0 and scores.low[0] > 0.9
    partial = scores[1:][scores.previous_token_score[1:] > 0.3]
    assert len(partial) and set(partial.layer) == {1}


def test_02_the_candidates_rest_most_on_bos(summary):
    assert set(table("bos_scores")["head"][:2]) == set(table("induction_scores")["head"][:2])
    assert summary(NAME)["bos_score_of_top_induction_head"]["low"] > 0.3


def test_02_no_head_is_a_duplicate_token_head(summary):
    assert summary(NAME)["top_duplicate_token_score"]["high"] < 0.1


def test_02_the_detector_of_transformer_lens_agrees(summary):
    assert summary(NAME)["largest_difference_from_detect_head"] < 1e-5


def test_02_the_candidates_are_far_above_their_baseline_on_text(summary):
    found = summary(NAME)
    assert set(found["top_heads_on_text"][:2]) == set(table("induction_scores")["head"][:2])
    assert found["prefix_matching_of_top_head"]["low"] > 10 * found["prefix_matching_baseline_of_top_head"]["high"]
    assert found["prefix_matching_of_top_head"]["high"] < found["top_induction_score"]["low"]


def test_02_the_best_head_keeps_its_score_at_every_length(summary):
    scores = summary(NAME)["control_score_by_length"]
    assert len(scores) >= 3 and all(score["low"] > 0.9 for score in scores.values())


def test_02_the_stripe_goes_when_nothing_repeats(summary):
    assert summary(NAME)["control_top_head_without_repetition"]["high"] < 0.1


def test_02_one_layer_has_no_stripe_and_gains_nothing_from_order(summary):
    found = summary(NAME)
    assert found["control_one_layer_best_score"] < 0.1
    assert found["control_one_layer_gain_from_order_nats"]["high"] < 0.1 < found["gain_from_order_nats"]["low"]
