"""What notebook 10 says in words, held to the committed summaries."""


def test_10_the_damage_is_at_pairs_that_were_there_before(summary):
    harm = summary("10_in_the_wild")["harm_by_class_nats"]
    ours, control = harm["induction heads"], harm["random heads"]
    for name in ("second time", "later time"):
        assert ours[name]["low"] > 1 and ours[name]["low"] > 10 * control[name]["high"]
    assert ours["new"]["high"] < 0.1
    little = ours["first of a repeat"]
    assert little["high"] < 0.2 * ours["second time"]["low"] and little["mean"] < control["first of a repeat"]["mean"]
    assert ours["other continuation"]["high"] < 0  # better without the heads
    # Random heads matter where no pair repeats.
    for name in ("first of a repeat", "other continuation", "new"):
        assert control[name]["low"] > control["second time"]["high"]


def test_10_no_random_set_comes_near_at_any_distance(summary):
    results = summary("10_in_the_wild")
    assert results["harm_on_repeats_nats"]["low"] > 5 * results["largest_random_harm_on_repeats_nats"]
    assert results["smallest_harm_on_repeats_nats"] > results["largest_random_harm_on_repeats_nats"]
    far = results["harm_by_distance_nats"]["induction heads"]
    assert 1 < far["128 and more"]["low"]
    assert far["128 and more"]["high"] < min(far[middle]["low"] for middle in ("8 to 31", "32 to 127"))


def test_10_random_sets_differ_and_two_heads_of_one_layer_leave_few(summary):
    results = summary("10_in_the_wild")
    one, other = results["induction_heads"]
    assert one.split("H")[0] == other.split("H")[0]
    assert 10 <= results["n_different_random_sets"] < 40  # texts
    for model in ("smollm2-135m", "gemma3-270m"):
        assert summary("10_in_the_wild", model)["n_different_random_sets"] > 60


def test_10_most_of_the_gain_in_context_goes_with_the_heads_and_as_much_with_those_that_feed_them(summary):
    results = summary("10_in_the_wild")
    assert all(kind["low"] > 0 for kind in results["gain_in_context_nats"].values())
    lost = {
        name: results["share_of_gain_lost: " + name] for name in ("induction heads", "strongest others", "random heads")
    }
    assert lost["induction heads"]["low"] > 0.5 and lost["strongest others"]["low"] > 0.5
    assert lost["random heads"]["high"] < 0.1
    # The heads that feed the induction heads are among the strongest others.
    assert summary("08_circuit_weights")["wire"][0] in results["strongest_others"]


def test_10_a_name_is_about_as_hard_as_new_without_the_heads_and_its_first_token_harder(summary):
    names = summary("10_in_the_wild")["by_token_of_a_name_nats"]
    new, intact, ablated, control = (
        names[case]
        for case in (
            "first mention",
            "second, intact",
            "second, without induction heads",
            "second, without random heads",
        )
    )
    assert intact["token 1"]["high"] < new["token 1"]["low"] / 2 and intact["token 1"]["low"] > 1
    for place in ("token 2", "token 3", "token 4", "token 5"):
        assert intact[place]["high"] < 0.5
    assert ablated["token 1"]["low"] > new["token 1"]["high"]
    for place in new:
        assert ablated[place]["high"] > new[place]["mean"]
        assert place == "token 1" or ablated[place]["low"] < new[place]["high"]
        assert control[place]["mean"] < intact[place]["mean"] + 0.2


def test_10_the_default_model_knows_no_facts(summary):
    results = summary("10_in_the_wild")
    known = results["facts_known_share"]
    assert known["low"] < 0.5 < known["high"] and known["n"] >= 64
    assert "agreement_margin_logits" not in results


def test_10_it_is_repeats_and_not_what_is_common(summary):
    harm = summary("10_in_the_wild")["harm_by_rarity_nats"]["induction heads"]
    assert harm["rare pair, repeated"]["low"] > harm["common pair, repeated"]["high"] > 1
    assert harm["common pair, not repeated"]["high"] < 0.05 and harm["rare pair, not repeated"]["high"] < 0.1


# ---- sections 5 and 6, on a model that knows words and facts ----


def test_10_heads_match_more_than_tokens(summary):
    results = summary("10_in_the_wild", "smollm2-135m")
    attended = {form: found["mean"] for form, found in results["attention_to_the_partner"].items()}
    assert attended["capital letter"] > 0.75 * attended["same word"]
    assert max(attended["plural"], attended["synonym"]) < 0.5 * attended["same word"]
    assert 1.5 * attended["not in the list"] < attended["French"] < 0.25 * attended["same word"]
    intact = results["inexact_repeats_margin_logits"]["intact"]
    lost = {form: v for form, v in results["inexact_repeats_lost_logits"].items() if form != "not in the list"}
    assert len(lost) == 5 and all(loss["low"] > 0 for loss in lost.values())
    near, far = ("same word", "capital letter"), ("plural", "synonym", "French")
    assert min(lost[form]["low"] for form in near) > max(lost[form]["high"] for form in far)
    assert all(lost[form]["mean"] > 1 and intact[form]["low"] > 1 for form in near)
    assert all(lost[form]["mean"] < 0.55 and intact[form]["mean"] < 1 for form in far)
    assert intact["synonym"]["low"] < 0 < intact["plural"]["low"]


def test_10_a_mention_does_it_all_and_the_induction_heads_none_of_it(summary):
    results = summary("10_in_the_wild", "smollm2-135m")
    assert results["shift_logits: told"]["n"] >= 64
    shift = {
        case: results["shift_logits: " + case] for case in ("wrong city mentioned", "true of another country", "told")
    }
    assert shift["wrong city mentioned"]["low"] > shift["told"]["mean"] > 2 * shift["true of another country"]["high"]
    removed = results["shift_removed_logits: told, without induction heads"]
    assert removed["low"] < 0 < removed["high"] < 0.1 * shift["told"]["mean"]
    assert results["shift_removed_logits: told, without random heads"]["low"] > removed["high"]
    margin = {side: results["agreement_margin_logits"][side]["nothing"] for side in ("intact", "without random heads")}
    assert margin["without random heads"]["high"] < margin["intact"]["low"]
    # With a country that does not exist the statement does no more than the mention.
    told, mentioned = (results["shift_logits: invented, " + case] for case in ("told", "wrong city mentioned"))
    assert 5 < told["low"] < mentioned["mean"] and told["mean"] < mentioned["mean"]


def test_10_in_the_other_model_the_induction_heads_take_part(summary):
    results = summary("10_in_the_wild", "gemma3-270m")
    cases = ("wrong city mentioned", "told", "invented, wrong city mentioned", "invented, told")
    shift = {case: results["shift_logits: " + case] for case in cases}
    part = {case: results[f"shift_removed_logits: {case}, without induction heads"] for case in shift}
    assert 0.5 * shift["told"]["high"] < shift["wrong city mentioned"]["low"]
    assert part["wrong city mentioned"]["high"] < 0.1 * shift["wrong city mentioned"]["low"]
    assert part["told"]["mean"] > shift["told"]["mean"] / 3
    for case in ("told", "invented, told"):
        control = results[f"shift_removed_logits: {case}, without random heads"]
        assert control["high"] < 0.5 * part[case]["low"]
    # More than the statement adds to the mention.
    added = shift["told"]["mean"] - shift["wrong city mentioned"]["mean"]
    left = {case: shift[case]["mean"] - part[case]["mean"] for case in shift}
    assert part["told"]["low"] > added and left["told"] < left["wrong city mentioned"]
    # A country that does not exist.
    told, mentioned = "invented, told", "invented, wrong city mentioned"
    assert 1.7 < shift[told]["mean"] / shift[mentioned]["mean"] < 2
    assert left[told] - left[mentioned] < 0.15 * (shift[told]["mean"] - shift[mentioned]["mean"])
