"""What notebook 01 says of induction-2l (and once of the language models), held to the committed summaries.

`summary("01_prompt_construction", model="induction-2l")` gives the results of one notebook.
"""

from pathlib import Path

from tokenizers import Tokenizer

NAME = "01_prompt_construction"
WEIGHTS = Path(__file__).resolve().parents[1] / "helpers/weights/induction-2l"


def clear(estimate):
    """The interval of an estimate lies above zero."""
    return estimate["low"] > 0


def test_01_even_tom_is_two_tokens_and_its_first_another_one_after_a_space():
    pieces = Tokenizer.from_file(str(WEIGHTS / "tokenizer.json"))
    bare, spaced = (pieces.encode(text, add_special_tokens=False).ids for text in ("Tom", " Tom"))
    assert len(bare) == len(spaced) == 2 and bare[0] != spaced[0]


def test_01_only_the_repeated_half_is_predicted(summary):
    found = summary(NAME)
    assert found["second_copy_loss_nats"]["high"] < 0.1 * found["first_copy_loss_nats"]["low"]
    assert found["fresh_half_loss_nats"]["low"] > 0.9 * found["first_copy_loss_nats"]["mean"]
    assert found["reordered_half_loss_nats"]["low"] > found["fresh_half_loss_nats"]["high"]
    assert clear(found["gain_from_order_nats"])


def test_01_the_gap_is_there_at_k_1_and_larger_from_k_2_on(summary):
    gaps = summary(NAME)["logit_difference_gap_by_k"]
    assert clear(gaps["1"])
    assert all(gaps[k]["low"] > gaps["1"]["high"] for k in gaps if k != "1")


def test_01_the_letters_task_works(summary):
    found = summary(NAME)
    assert clear(found["letters_gap_nats"]) and found["letters_answer_loss_nats"]["high"] < 3


def test_01_three_tokens_of_a_name_are_copied_and_the_later_ones_best(summary):
    found = summary(NAME)
    assert found["name_later_tokens_nats"]["high"] < found["name_first_token_nats"]["low"]
    assert found["name_later_tokens_another_name_nats"]["low"] > 10 * found["name_later_tokens_nats"]["high"]


def test_01_every_prompt_set_has_a_gap_and_almost_none_in_the_one_layer_control(summary):
    found = summary(NAME)
    for task, gap in found["gaps_nats"].items():
        assert clear(gap), task
        assert found["gaps_one_layer_nats"][task]["mean"] < 0.1 * gap["mean"], task
        assert found["gaps_one_layer_nats"][task]["high"] < gap["low"], task


def test_01_any_first_token_will_do_and_none_is_a_little_worse(summary):
    by_start = dict(summary(NAME)["second_copy_loss_by_first_token_nats"])
    nothing = by_start.pop("nothing")
    assert all(estimate["high"] < nothing["low"] for estimate in by_start.values())
    assert nothing["high"] < 1
    assert by_start["an ordinary token"]["mean"] <= min(estimate["mean"] for estimate in by_start.values())


def test_01_natural_text_gains_from_context(summary):
    assert summary(NAME)["in_context_score_nats"]["high"] < 0


def test_01_ambiguous_copies_are_predicted_worse_and_gain_less_from_order(summary):
    found = summary(NAME)
    assert found["control_ambiguous_second_copy_nats"]["low"] > found["second_copy_loss_nats"]["high"]
    assert found["control_ambiguous_gain_from_order_nats"]["high"] < found["gain_from_order_nats"]["low"]
    assert clear(found["control_ambiguous_gain_from_order_nats"])
