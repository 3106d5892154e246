"""Claims of notebook 07 about induction-2l, on its committed summary and tables."""

from pathlib import Path

import pandas as pd
import pytest

FOLDER_07 = Path(__file__).resolve().parents[1] / "outputs/induction-2l/07_causal_scrubbing"


def table_07(name, index):
    return pd.read_csv(FOLDER_07 / f"{name}.csv").set_index(index)


def steps_07(name):
    return table_07(name, "step")


def test_07_the_toy_has_its_known_answers(summary):
    found = summary("07_causal_scrubbing")["toy_recovered"]
    known = {"only a and b": 0.8, "only c": 0.2, "only a and c": 0.2, "a, b by their product": 1, "nothing": 0}
    assert found == pytest.approx(known, abs=0.01)


def test_07_next_to_nothing_is_left_of_the_textbook_and_most_with_two_tokens(summary):
    r = summary("07_causal_scrubbing")
    shares = r["recovered_from_silence"]
    assert shares["0"]["high"] < 0.15 and shares["two tokens"]["low"] > 0.8
    assert r["recovered_on_the_posts_scale"]["0"]["mean"] > shares["0"]["mean"] + 0.2


def test_07_silence_lies_well_above_zero_on_the_posts_scale(summary):
    silence = summary("07_causal_scrubbing")["silence_on_the_posts_scale"]
    assert 0.2 < silence["low"] and silence["high"] < 0.6


def test_07_the_textbook_lies_not_clearly_above_silence(summary):
    r = summary("07_causal_scrubbing")
    textbook, silence = r["recovered_on_the_posts_scale"]["0"], r["silence_on_the_posts_scale"]
    assert abs(textbook["mean"] - silence["mean"]) < 0.05
    assert r["recovered_from_silence"]["0"]["low"] < 0 < r["recovered_from_silence"]["0"]["high"]


def test_07_most_tokens_that_gain_most_are_pieces_of_words(summary):
    first = summary("07_causal_scrubbing")["whitelist_first"]
    assert len(first) == 12 and sum(token.islower() and token.isalpha() for token in first) > 6


def test_07_the_keys_by_hand_matter(summary):
    assert summary("07_causal_scrubbing")["keys_by_hand_nats"]["low"] > 0.3
    assert summary("07_causal_scrubbing")["keys_by_hand_nats"]["mean"] > 1


def test_07_the_embedding_in_v_and_q_is_no_better_than_the_floor(summary):
    table = table_07("scrubbing_percent", "hypothesis")
    zero, floor = table.loc["0"], table.loc["floor"]
    assert abs(zero["v"] - floor["v"]) < 3
    assert abs(zero["q"] - floor["q"]) < 3


def test_07_the_gain_is_in_hypotheses_1_and_2_and_the_last_steps_are_small(summary):
    gains = steps_07("gains")
    shares = summary("07_causal_scrubbing")["recovered_from_silence"]
    assert gains.loc["floor → 0", "low"] > 0.2 and shares["floor"]["high"] < -0.2 < 0.1 > shares["0"]["high"]
    assert (gains.loc[["0 → 1", "1 → 2"], "low"] > 0.1).all()
    assert (gains.loc[["2 → 3", "3 → 4", "4 → 5"], "mean"].abs() < 0.12).all()


def test_07_the_first_factor_is_the_largest_and_two_tokens_work_only_together(summary):
    gains = steps_07("ladder_gains")
    assert gains["mean"].idxmax() == "0 → V and Q"
    assert gains.loc["second token in K → two tokens", "low"] > 0.1
    assert (gains.loc[["V and Q → one token", "one token → second token in K"], "low"] < 0.02).all()


def test_07_two_tokens_beat_one_and_the_gain_over_5_is_vs(summary):
    refined = steps_07("refinement")
    assert refined.loc["one token → two tokens", "low"] > 0.1
    assert refined.loc["5 → 5, our V", "low"] > 0
    for step in ("5, our V → two tokens", "5 → two tokens, post's V"):  # no difference is clear
        assert refined.loc[step, "low"] < 0 < refined.loc[step, "high"]


def test_07_two_tokens_keep_far_less_of_the_key(summary):
    kept = table_07("kept_share_of_distance", "hypothesis")
    five, two_tokens = kept.loc["5"], kept.loc["two tokens"]
    assert two_tokens["recovered"] > five["recovered"] and two_tokens["k"] < 0.5 * five["k"]


def test_07_false_stories_recover_on_the_posts_scale_and_not_from_silence(summary):
    false = summary("07_causal_scrubbing")["false_stories"]
    assert false["the post's scale"]["lost"]["low"] > 0 and false["the post's scale"]["wrong"]["mean"] > 0
    assert false["from silence"]["wrong"]["mean"] < 0 and false["from silence"]["lost"]["low"] < 0


def test_07_the_choices_of_the_whitelist_move_the_worth_and_not_the_order(summary):
    r = summary("07_causal_scrubbing")
    naive, two_tokens = (r["recovered_by_list"][f"hypothesis {name}"] for name in ("0", "two tokens"))
    assert len(r["worth_by_list_nats"]) == 5 and r["worth_by_list_nats"].keys() == naive.keys() == two_tokens.keys()
    for name in naive:
        assert naive[name]["high"] < 0.25 and two_tokens[name]["low"] > 0.5


def test_07_off_the_list_the_heads_are_worth_less_but_far_from_nothing(summary):
    worth = summary("07_causal_scrubbing")["worth_by_list_nats"]
    others = worth.pop("other tokens")
    assert others["mean"] < min(value["mean"] for value in worth.values()) and others["low"] > 0.5
