"""Claims of notebook 07 about induction-2l, on its committed summary and tables."""

from pathlib import Path

import pandas as pd
import pytest

FOLDER_07 = Path(__file__).resolve().parents[1] / "outputs/induction-2l/07_causal_scrubbing"


def steps_07(name):
    return pd.read_csv(FOLDER_07 / f"{name}.csv").set_index("step")


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
    assert 0.2 < summary("07_causal_scrubbing")["silence_on_the_posts_scale"] < 0.6


def test_07_the_keys_by_hand_matter(summary):
    assert summary("07_causal_scrubbing")["keys_by_hand_nats"]["low"] > 0.3


def test_07_the_embedding_in_v_and_q_is_no_better_than_the_floor(summary):
    table = pd.read_csv(FOLDER_07 / "scrubbing_percent.csv")
    zero, floor = table.iloc[0], table.iloc[-1]
    assert abs(zero["v"] - floor["v"]) < 3
    assert abs(zero["q"] - floor["q"]) < 3


def test_07_the_gain_is_in_hypotheses_1_and_2_and_the_last_steps_are_small(summary):
    gains = steps_07("gains")
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
    same = refined.loc["5 → two tokens, post's V"]
    assert same["low"] < 0 < same["high"]


def test_07_two_tokens_keep_far_less_of_the_key(summary):
    kept = pd.read_csv(FOLDER_07 / "kept_share_of_distance.csv")
    five, two_tokens = kept.iloc[5], kept.iloc[7]  # hypotheses 0 to 5, one token, two tokens
    assert two_tokens["recovered"] > five["recovered"] and two_tokens["k"] < 0.5 * five["k"]


def test_07_false_stories_recover_on_the_posts_scale_and_not_from_silence(summary):
    false = summary("07_causal_scrubbing")["false_stories"]
    assert false["the post's scale"]["lost"]["low"] > 0 and false["the post's scale"]["wrong"]["mean"] > 0
    assert false["from silence"]["wrong"]["mean"] < 0 and false["from silence"]["lost"]["low"] < 0
