"""Readings of notebook 08 (prose about induction-2l), asserted on the committed summary."""


def test_08_the_matrices_are_the_models(summary):
    assert summary("08_circuit_weights")["largest_error_of_OV"] < 1e-4


def test_08_weights_name_the_induction_heads_that_attention_names(summary):
    r = summary("08_circuit_weights")
    assert r["wire_found"] and r["wire"][0].startswith("L0") and r["wire"][1] in r["heads"]["by_weights"]
    assert sorted(r["heads"]["by_weights"]) == sorted(r["heads"]["by_attention"]) and len(r["heads"]["by_weights"]) == 2


def test_08_the_match_is_through_block_0_and_gone_from_the_plain_embedding(summary):
    match = summary("08_circuit_weights")["match_of_the_wire_by_query"]
    assert match["token after block 0"] > 0.8 and match["plain embedding"] < 0.1


def test_08_the_induction_heads_copy_and_another_head_stands_between_them(summary, table):
    order = table("08_circuit_weights", "names").sort_values("copying", ascending=False)["head"].tolist()
    assert {order[0], order[2]} == {*summary("08_circuit_weights")["heads"]["by_attention"]} and order[1] == "L1H0"


def test_08_a_high_copying_score_without_top_1_copying(summary, table):
    names = table("08_circuit_weights", "names")
    assert ((names["copying"] > 0.9) & (names["top_1"] < 0.2)).any()
    apart = names.loc[names["by_weights"], "top_1"]
    assert summary("08_circuit_weights")["top_1_together"]["low"] > apart.max() + 0.1


def test_08_nulls_of_the_copying_score_lie_far_from_zero_on_either_side(table):
    names = table("08_circuit_weights", "names")
    assert (names["null_low"] > 0.2).any() and (names["null_high"] < -0.2).sum() == 1


def test_08_the_previous_token_head_stands_out_in_k_composition_for_the_induction_heads_only(table):
    names = table("08_circuit_weights", "names")
    later = names[names["head"].str.startswith("L1")]
    assert later.loc[later["by_weights"], "K_composition_z"].min() > 1.5
    assert later.loc[~later["by_weights"], "K_composition_z"].max() < 0.5


def test_08_suppressors_lower_by_a_small_part_of_what_induction_heads_raise(summary, table):
    names, r = table("08_circuit_weights", "names"), summary("08_circuit_weights")
    assert r["wire"][0] in r["heads"]["suppressor"]  # the previous-token head
    assert (
        names.loc[names["suppressor"], "own_logit"].abs().max()
        < 0.05 * names.loc[names["by_weights"], "own_logit"].min()
    )


def test_08_the_heads_are_a_twelfth_of_the_model_tokens_and_positions_more_than_half(table):
    entries = table("08_circuit_weights", "parameters").set_index("part")["entries"]
    assert 1 / 13 < entries["heads of the circuit"] / entries["whole model"] < 1 / 11
    assert entries[["tokens", "positions"]].sum() > entries["whole model"] / 2


def test_08_another_head_matches_without_looking_back(table):
    pairs = table("08_circuit_weights", "best_pairs")
    assert (pairs["earlier_looks_back"][:2] > 0.9).all()
    assert ((pairs["match"] > 0.5) & (pairs["earlier_looks_back"] < 0.2)).any()


def test_08_matching_needs_most_directions_copying_two_thirds_handing_on_half_positions_a_quarter(summary):
    r = summary("08_circuit_weights")
    assert r["directions needed by induction QK"]["low"] > 0.75 * 32
    assert 0.55 * 32 < r["directions needed by induction OV"]["mean"] < 0.8 * 32
    assert r["directions needed by previous-token OV"]["high"] < 0.5 * 32
    assert r["directions needed by previous-token QK"]["high"] <= 0.32 * 32


def test_08_any_part_at_its_mean_leaves_nearly_the_loss_of_the_first_copy(summary):
    losses = summary("01_prompt_construction")
    first, second = (losses[f"{which}_copy_loss_nats"]["mean"] for which in ("first", "second"))
    for beyond in summary("08_circuit_weights")["beyond_the_first_copy_nats"].values():
        assert -0.06 * (first - second) < beyond["low"] and beyond["high"] < 0  # a few per cent are left


def test_08_the_token_before_the_key_decides(summary):
    r = summary("08_circuit_weights")
    by_offset = r["change_by_offset_nats"]
    assert by_offset["-1"]["high"] < by_offset["-2"]["low"] < by_offset["-2"]["high"] < -1
    assert all(abs(by_offset[offset]["mean"]) < 0.3 for offset in ("-4", "-3", "1", "2", "3"))
    assert r["largest_change_in_one_layer_nats"] < 1e-4
