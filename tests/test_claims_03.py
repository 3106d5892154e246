"""Readings of notebook 03 about induction-2l; `summary` gives its results, `table_03` its tables."""

from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).resolve().parents[1] / "outputs/induction-2l/03_head_ablation"


def table_03(name):
    return pd.read_csv(FOLDER / f"{name}.csv")


def test_03_the_twins_cannot_be_copied(summary):
    loss = summary("03_head_ablation")["loss_nats"]
    assert loss["second copy"]["high"] < 1 < 6 < loss["not repeated"]["low"]


def test_03_the_strongest_stripe_matters_on_the_second_copy_and_not_on_the_twins(summary):
    by_hand = summary("03_head_ablation")["by_hand_nats"]
    assert by_hand["second copy"]["low"] > 1 and abs(by_hand["not repeated"]["mean"]) < 0.2


def test_03_the_sweep_equals_the_head_by_hand(summary):
    assert summary("03_head_ablation")["difference_from_by_hand_nats"] < 1e-4


def test_03_six_heads_lose_a_nat_or_more_and_others_that_pass_lose_hundredths(summary):
    table = table_03("copying_lost_by_head")
    large = table[table.copying_lost_nats >= 1]
    assert len(large) == 6 and large.matters.all()
    small = table[table.matters & (table.copying_lost_nats < 1)]
    assert len(small) and small.copying_lost_nats.max() < 0.1
    assert table.copying_lost_nats.iloc[6:].max() < 0.1


def test_03_nearly_all_damage_is_loss_of_copying(summary):
    both = table_03("copying_lost_by_head").merge(
        table_03("delta_loss_by_head")[["head", "delta_loss_nats"]], on="head"
    )
    assert (both.copying_lost_nats - both.delta_loss_nats).abs().max() < 0.2


def test_03_the_head_that_matters_most_is_in_layer_0_and_has_no_induction_stripe(summary):
    found, table = summary("03_head_ablation"), table_03("copying_lost_by_head")
    assert found["top_head"] == table["head"][0] and table.layer[0] == 0 and table.induction_score[0] < 0.05
    assert found["top_head"] == summary("02_attention_visualization")["top_previous_token_head"]


def test_03_both_induction_heads_are_in_layer_1_and_none_attends_in_vain(summary):
    found = summary("03_head_ablation")
    assert len(found["induction_heads"]) == 2 and all(head.startswith("L1") for head in found["induction_heads"])
    assert not found["attend_effect_not_shown"]


def kinds():
    return table_03("four_ablations_nats").pivot(index="ablation", columns="head", values="mean")


def test_03_zero_mean_and_resample_name_the_same_six_heads(summary):
    tops = [set(kinds().loc[how].nlargest(6).index) for how in ("zero", "mean", "resample")]
    assert tops[0] == tops[1] == tops[2]


def test_03_resampling_raises_the_loss_more_for_the_heads_of_layer_0_but_the_previous_token_head(summary):
    found = summary("03_head_ablation")
    table = table_03("copying_lost_by_head").iloc[:6]
    itself = [head for head in table["head"] if head.startswith("L0") and head != found["top_head"]]
    assert len(itself) == 3
    assert (kinds().loc["resample", itself] > 1.5 * kinds().loc["mean", itself]).all()


def test_03_frozen_patterns_spare_the_previous_token_head(summary):
    found = summary("03_head_ablation")
    assert found["most_spared_by_frozen_patterns"] == found["top_head"]
    assert abs(kinds().loc["pattern-preserving", found["top_head"]]) < 0.05 * kinds().loc["zero", found["top_head"]]


def test_03_zero_and_mean_agree_to_less_than_a_nat_and_part_to_both_sides(summary):
    assert 0 < summary("03_head_ablation")["zero_most_above_mean"]["nats"] < 1
    apart = kinds().loc["zero"] - kinds().loc["mean"]
    assert apart.abs().max() < 1 and apart.min() < 0 < apart.max()


def test_03_the_strongest_set_loses_nearly_all_and_random_sets_less_but_some_as_much(summary):
    found = summary("03_head_ablation")
    strong, random = (found["largest_set_lost"][who] for who in ("strongest", "random"))
    assert strong["low"] > random["high"] and random["low"] > 0
    assert sum(found["random_sets_that_lose_as_much"].values()) >= 1


def test_03_every_pair_with_the_previous_token_head_is_negative_and_the_induction_heads_show_no_backup(summary):
    found, table = summary("03_head_ablation"), table_03("interactions").set_index("pair")
    assert all(table.high[pair] < 0 for pair in table.index if found["top_head"] in pair)
    pair = table.loc[" and ".join(found["induction_heads"])]
    assert pair.low < 0 < pair.high


def test_03_the_letters_task_works_here_and_has_the_same_heads_at_the_top(summary):
    found = summary("03_head_ablation")
    assert found["letters_loss_nats"]["high"] < 3.26 - 1
    copying, letters = table_03("copying_lost_by_head")["head"], table_03("delta_loss_letters_nats")
    assert set(letters["head"][:5]) == set(copying[:5]) and list(letters["head"][:5]) != list(copying[:5])
    assert letters.set_index("head").high[copying[5]] < 0 and copying[5] not in set(letters["head"][:10])


def test_03_the_twins_lose_little_with_any_head():
    assert 0.1 < table_03("copying_lost_by_head")["twin_nats"].abs().max() < 0.165


def test_03_all_heads_have_an_effect_on_text_and_the_induction_heads_smaller_ones(summary):
    text = table_03("delta_loss_text_nats").sort_values("mean")
    assert (text.low > 0).all()
    assert {*summary("03_head_ablation")["induction_heads"]} <= {*text["head"][:4]}


def test_03_effects_on_natural_text_are_smaller(summary):
    assert (
        table_03("delta_loss_text_nats")["mean"].max()
        < 0.3 * summary("03_head_ablation")["top_copying_lost_nats"]["mean"]
    )


def test_03_no_head_of_the_one_layer_model_comes_near_the_weakest_induction_head(summary):
    found, table = summary("03_head_ablation"), table_03("copying_lost_by_head").set_index("head")
    weakest = table.loc[found["induction_heads"], "copying_lost_nats"].min()
    assert found["one_layer_largest_copying_lost_nats"] < 0.1 * weakest
