"""What notebook 10 says in words, held to the committed summaries."""

REAL = ("smollm2-135m", "gemma3-270m")


def test_10_the_damage_is_at_pairs_that_were_there_before(summary):
    harm = summary("10_in_the_wild")["harm_by_class_nats"]
    ours, control = harm["induction heads"], harm["random heads"]
    for name in ("second time", "later time"):
        assert ours[name]["low"] > 1 and ours[name]["low"] > 10 * control[name]["high"]
    assert ours["new"]["high"] < 0.1 and ours["first of a repeat"]["high"] < 0.3
    assert ours["other continuation"]["high"] < 0  # better without the heads
    # Random heads do the opposite: they matter where nothing repeats.
    for name in ("first of a repeat", "other continuation", "new"):
        assert control[name]["low"] > control["second time"]["high"]


def test_10_no_random_draw_comes_near_at_any_distance(summary):
    results = summary("10_in_the_wild")
    assert results["harm_on_repeats_nats"]["low"] > 10 * results["largest_random_harm_on_repeats_nats"]
    assert all(found["low"] > 1 for found in results["harm_by_distance_nats"]["induction heads"].values())


def test_10_most_of_the_gain_in_context_goes_with_the_heads_and_as_much_with_those_that_feed_them(summary):
    results = summary("10_in_the_wild")
    assert all(kind["low"] > 0 for kind in results["gain_in_context_nats"].values())
    lost = {
        name: results["share_of_gain_lost: " + name] for name in ("induction heads", "strongest others", "random heads")
    }
    assert lost["induction heads"]["low"] > 0.5 and lost["strongest others"]["low"] > 0.5
    assert lost["random heads"]["high"] < 0.1


def test_10_a_name_is_as_hard_as_new_without_the_heads(summary):
    results = summary("10_in_the_wild")
    cases = ("first mention", "second mention", "second, without induction heads", "second, without random heads")
    first, later = (
        {case: results[f"{place}_of_a_name_nats: {case}"] for case in cases}
        for place in ("first_token", "later_tokens")
    )
    assert later["second mention"]["high"] < 0.5 < first["second mention"]["low"]
    assert first["second mention"]["high"] < first["first mention"]["low"]
    without = later["second, without induction heads"]
    assert abs(without["mean"] - later["first mention"]["mean"]) < 0.5
    assert abs(later["second, without random heads"]["mean"] - later["second mention"]["mean"]) < 0.2


def test_10_the_default_model_knows_no_facts(summary):
    results = summary("10_in_the_wild")
    assert results["neutral_margin_logits"]["low"] < 0 < results["neutral_margin_logits"]["high"]
    assert "agreement_margin_logits" not in results


def test_10_it_is_repeats_and_not_what_is_common(summary):
    harm = summary("10_in_the_wild")["harm_by_rarity_nats"]["induction heads"]
    assert harm["rare pair, repeated"]["low"] > harm["common pair, repeated"]["high"] > 1
    assert harm["common pair, not repeated"]["high"] < 0.05 and harm["rare pair, not repeated"]["high"] < 0.1
