"""What notebook 09 says in words, held to the committed summary."""


def live(summary, *names):
    results = summary("09_training_dynamics")
    return [results[f"live_{what}: {name}"] for what in ("induction_at_the_end", "second_copy_nats") for name in names]


def test_09_much_is_done_where_the_gain_is_said_to_begin(table):
    done = table("09_training_dynamics", "order_million_tokens").set_index("curve")["done at the bend"]
    (previous,) = done[done.index.str.contains("previous")]
    assert previous > 0.5 and done["in-context learning"] > 0.3 and done["copy gain"] < 0.2


def test_09_repeated_pairs_become_easier_and_nothing_else(summary):
    results = summary("09_training_dynamics")
    assert results["change_where_the_pair_repeats_nats"]["high"] < -1
    elsewhere = results["change_elsewhere_nats"]
    assert -0.15 < elsewhere["low"] and elsewhere["high"] < 0.15
    of_text = {name: after - before for name, (before, after) in results["one_text_before_and_after_nats"].items()}
    assert of_text["induction-2l: repeated pairs"] < -1 and of_text["induction-1l: repeated pairs"] > -0.2
    assert all(abs(of_text[f"induction-{n}l: others"]) < 0.25 for n in (1, 2))
    # Between the two checkpoints, that is; on the way it is up to half a nat.
    assert all(abs(of_text[f"induction-1l: {name}"]) < 0.35 for name in ("repeated pairs", "others"))


def test_09_the_heads_are_worth_half_of_a_small_gain_before_the_mark_and_all_of_it_at_the_end(summary):
    results = summary("09_training_dynamics")
    before, end = (
        {name: results[f"worth_{when}_nats: {name}"] for name in ("second copy", "held-out text")}
        for when in ("before_the_mark", "at_the_end")
    )
    assert before["second copy"]["high"] < 0.1 * end["second copy"]["low"]
    gains = results["copy_gain_before_and_at_the_end_nats"]
    (small, large), (control, control_at_the_end) = gains["induction-2l"], gains["induction-1l"]
    assert small < 0.15 * large and 0.4 < before["second copy"]["mean"] / small < 0.6
    assert abs(control - small / 2) < 0.1 and abs(control_at_the_end - control) < 0.15
    assert end["second copy"]["mean"] > 0.95 * large
    # On text they help somewhat earlier.
    share = {name: before[name]["mean"] / end[name]["mean"] for name in before}
    assert share["held-out text"] > 2 * share["second copy"] and before["held-out text"]["low"] > 0


def test_09_two_layers_learn_it_live_and_one_does_not(summary):
    two, one, loss_two, loss_one = live(summary, "two layers", "one layer")
    assert two["n"] >= 8 and two["low"] > 0.6 and one["high"] < 0.25
    assert loss_two["high"] < 0.5 and 2 < loss_one["low"] and loss_one["high"] < 3  # of ln(63) = 4.1


def test_09_attention_to_the_token_before_starts_first_ends_later_and_is_spread(summary, table):
    results, order = summary("09_training_dynamics"), table("09_training_dynamics", "live_order_steps")
    later_by = order["sum previous 10 %"] - order["induction 10 %"]
    assert len(order) >= 8 and (later_by < -20).sum() >= len(order) - 1 and (later_by.abs() > 20).all()
    # The shipped run shares the order of the tenths, and not that of the halves.
    shipped = table("09_training_dynamics", "order_million_tokens").set_index("curve")
    for mark in ("10 %", "50 %"):
        first = shipped.loc[shipped.index.str.contains("previous"), mark].item()
        assert first < shipped.loc[shipped.index.str.contains("induction"), mark].min()
    assert results["live_previous_sum_after_induction_steps"]["50 %"]["mean"] > -5
    assert results["live_best_previous_at_the_end"]["high"] < 0.5
    even = 4 * sum(1 / query for query in range(2, 34)) / 32  # four heads that attend evenly, on 33 tokens
    assert 0.4 < results["live_sum_previous_at_the_end"]["mean"] - even < 0.9


def test_09_without_a_choice_in_layer_0_it_gets_part_of_the_way(summary):
    two, uniform, loss_two, loss_uniform = live(summary, "two layers", "layer 0 held uniform")
    one, _, loss_one, _ = live(summary, "one layer", "one layer")
    assert one["high"] < uniform["low"] and uniform["high"] < 0.7 * two["low"]
    assert loss_two["high"] + 0.5 < loss_uniform["low"] and loss_uniform["high"] < loss_one["low"]


def test_09_a_score_that_position_earns_is_there_at_one_length_only(summary):
    scores = summary("09_training_dynamics")["live_fixed_length_score"]
    assert scores["16"] > 0.5 and max(score for length, score in scores.items() if length != "16") < 0.2


def test_09_the_change_lies_before_the_learning_rate_falls(summary):
    results = summary("09_training_dynamics")
    assert results["gain_at_half_million_tokens"] < results["learning_rate_falls_from_million_tokens"]
