"""Readings of notebook 05 (prose about induction-2l), asserted on the committed summary."""

from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).resolve().parents[1] / "outputs/induction-2l/05_logit_lens"


def test_05_the_last_stop_is_the_model(summary):
    assert summary("05_logit_lens")["last_stop_error_nats"] < 1e-3


def test_05_the_answer_appears_in_the_last_layer_on_every_prompt(summary):
    r = summary("05_logit_lens")
    assert r["answer_first_at_the_end"]["low"] > 0.99 and r["probability_at_the_end"]["low"] > 0.5
    assert r["largest_gain_at"] == "L1" == r["usual_first_win"] and r["largest_gain_nats"]["low"] > 5
    assert r["other_prompts_answer_at_the_end"]["high"] < 0.01
    first = pd.read_csv(FOLDER / "where_the_answer_wins.csv").set_index("stop")["first wins here (share)"]
    assert first["embedding"] + first["L0"] < 0.05


def test_05_layer_0_takes_something_away(summary):
    r = summary("05_logit_lens")
    assert r["largest_fall_at"] == "L0" and -3 < r["largest_fall_nats"]["mean"] and r["largest_fall_nats"]["high"] < 0


def test_05_leads_are_hardly_ever_lost(summary):
    assert summary("05_logit_lens")["first_then_lost"]["high"] < 0.05


def test_05_the_two_induction_heads_write_nearly_all_and_no_other_head_is_named(summary):
    r = summary("05_logit_lens")
    assert sorted(r["heads_writing_for"]) == sorted(r["induction_heads"]) and len(r["induction_heads"]) == 2
    assert r["heads_writing_against"] == []
    assert r["induction_heads_write"]["low"] > 0.9 * r["logit_difference"]["mean"]


def test_05_the_regression_lens_learns_bigrams_at_the_embedding_and_more_after_layer_0(summary):
    beyond = summary("05_logit_lens")["regression_lens_beyond_bigram_nats"]
    assert beyond["embedding"]["low"] < 0 and beyond["embedding"]["mean"] < 0.1
    assert beyond["L0"]["low"] > 0 and beyond["L1"]["low"] > beyond["L0"]["mean"]


def test_05_the_untied_embedding_does_not_read_itself(summary):
    r = summary("05_logit_lens")
    assert r["current_token_first_at_the_embedding"]["high"] < 0.1
    there = r["final_choice_by_stop"]
    assert there["embedding"]["high"] < 0.1 and 0.2 < there["L0"]["mean"] < 0.3


def test_05_a_late_fall_need_not_be_a_head_against_the_answer(summary):
    r = summary("05_logit_lens", "smollm2-135m")
    layer = r["largest_fall_at"].split()[0]
    assert r["largest_fall_nats"]["high"] < 0
    assert not [head for head in r["heads_writing_against"] if head.startswith(layer + "H")]


def test_05_the_previous_token_head_works_through_the_induction_heads(summary):
    r = summary("05_logit_lens")
    direct, lost = r["previous_token_head_writes"], r["lost_without_it"]
    assert max(abs(direct["low"]), abs(direct["high"])) < 0.2
    assert lost["low"] > 0.9 * r["logit_difference"]["mean"]
    assert r["induction_heads_lose_without_it"]["low"] > 0.9 * lost["mean"]
