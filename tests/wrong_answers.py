"""Plausible wrong answers to the exercises, and a word of the sentence with which the check must refuse each.

{notebook: [(function, wrong source, word)]}. Each is run in its notebook, before the solution;
an exercise may have several.
"""

WRONG = {
    "01_prompt_construction": [
        ("three_copies", '''
def three_copies(model, length, batch, seed):
    losses = stats.token_losses(model, prompts.repeated_tokens(model, length, batch, seed, copies=3))
    return [losses[:, i * length : (i + 1) * length].mean().item() for i in range(3)]
''', "leave out its first token"),
        ("three_copies", '''
def three_copies(model, length, batch, seed):
    losses = stats.token_losses(model, prompts.repeated_tokens(model, length, batch, seed, copies=3))
    return [losses[:, a:b].mean().item() for a, b in ((0, length), (length + 1, 2 * length), (2 * length, 3 * length))]
''', "third copy"),
        ("swap_corruption", '''
def swap_corruption(tokens, k):
    swapped = tokens.clone()
    swapped[:, k], swapped[:, 1 + k] = tokens[:, 1 + k], tokens[:, k]
    return swapped
''', "position 1 + k"),
        ("interrupt", '''
def interrupt(tokens, length, fresh):
    broken = tokens.clone()
    broken[:, length + 1 :: 2] = fresh[:, ::2]
    return broken
''', "off by one"),
    ],
    "02_attention_visualization": [
        ("find_induction_heads", '''
def find_induction_heads(model, threshold, length, seed):
    tokens = prompts.repeated_tokens(model, length, 1, seed)
    patterns = model.run_with_cache(tokens)[1].stack_activation("pattern")[:, 0]
    stripe = patterns.diagonal(-length, -2, -1).mean(-1)
    found = sorted((s.item(), i, j) for i, row in enumerate(stripe) for j, s in enumerate(row) if s > threshold)
    return [stats.head_name(i, j) for _, i, j in found]
''', "strongest"),
        ("one_layer_scores", '''
def one_layer_scores(table, tokens):
    return table[tokens[None, :], tokens[:, None]]
''', "in that order"),
        ("robust_score", '''
def robust_score(pattern_for, lengths):
    return max(attention.induction_score(pattern_for(n), n).item() for n in lengths)
''', "one length only"),
        ("robust_score", '''
def robust_score(pattern_for, lengths):
    return attention.induction_score(pattern_for(lengths[0]), lengths[0]).item()
''', "one length only"),
    ],
    "03_head_ablation": [
        ("circuit_parameters", '''
def circuit_parameters(d_model, d_head):
    return 2 * 3 * d_model * d_head
''', "four matrices"),
        ("mean_of_others", '''
def mean_of_others(z):
    return z.mean(0, keepdim=True).expand_as(z)
''', "own z"),
        ("mean_of_others", '''
def mean_of_others(z):
    return z[1:].mean(0, keepdim=True).expand_as(z)
''', "prompt 1"),
        ("change_without", '''
def change_without(first, others):
    sets = [[first, other] for other in others]
    return -interventions.ablate_together(model, repeated, margin, sets, "mean").cpu()
''', "twice"),
        ("change_without", '''
def change_without(first, others):
    sets = [[first, other] for other in others] + [[other] for other in others]
    lost = -interventions.ablate_together(model, repeated, margin, sets, "mean").cpu()
    return lost[:, : len(others)] - lost[:, len(others) :]
''', "without the other"),
    ],
    "04_activation_patching": [
        ("my_recovery", '''
def my_recovery(patched, corrupted, clean):
    return (patched - clean) / (corrupted - clean)
''', "corrupted metric"),
        ("patched_margin", '''
def patched_margin(layer, head, position):
    return metrics.evaluate(model, corrupted_few, few_margin)
''', "differ"),
    ],
    "05_logit_lens": [
        ("my_lens", '''
def my_lens(model, resid):
    return (resid @ model.W_U + model.b_U).log_softmax(-1)
''', "final norm"),
        ("parts_with_head_scaled", '''
def parts_with_head_scaled(layer, head, factor):
    return lens.attribute(model, few, answers[:8], against=few[:, length])
''', "factor of zero"),
    ],
    "06_path_analysis": [
        ("outside", '''
def outside(kept):
    return [head for head in everyone if head[0] > 0 and head not in kept]
''', "whatever its layer"),
        ("estimate", '''
def estimate(z, new, slope):
    return ((z - new) * slope).sum((1, 3))
''', "new minus z"),
        ("estimate", '''
def estimate(z, new, slope):
    return (new - z).sum((1, 3))
''', "times the slope"),
        ("estimate", '''
def estimate(z, new, slope):
    return ((new - z) * slope).sum((1, 2))
''', "over positions and over d_head"),
        ("smaller", '''
def smaller():
    return circuit
''', "not smaller"),
    ],
    "07_causal_scrubbing": [
        ("silent_loss", '''
def silent_loss(tokens, answers, heads):
    def even(q, hook):
        q = q.clone()
        q[:, :, list(heads)] = 0
        return q
    logits = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_q", even)])[:, -1]
    return torch.nn.functional.cross_entropy(logits, answers, reduction="none")
''', "is z zero"),
        ("flattering", '''
def flattering():
    return Hypothesis("all", UNSCRUBBED, UNSCRUBBED, UNSCRUBBED)
''', "no hypothesis"),
        ("my_attempt", '''
def my_attempt():
    return roles, Hypothesis("attempt", UNSCRUBBED, UNSCRUBBED, Input(OTHER, WHOLE))
''', "claims less"),
    ],
    "08_circuit_weights": [
        ("small_eigenvalues", '''
def small_eigenvalues(A, B):
    return torch.linalg.eigvals(A @ B)
''', "r x r"),
        ("random_overlap", '''
def random_overlap(S, T, d, generator):
    return (S * T).norm() / S.norm() / T.norm()
''', "1/d"),
    ],
    "09_training_dynamics": [
        ("steepest", '''
def steepest(tokens, gain):
    slope = np.diff(gain[1:]) / np.diff(np.log(tokens[1:]))
    return 1 + int(slope.argmax())
''', "same place"),
        ("steepest", '''
def steepest(tokens, gain):
    at = int((np.diff(gain[1:]) / np.diff(tokens[1:])).argmax()) + 1
    return np.sqrt(tokens[at] * tokens[at + 1])
''', "log axis"),
        ("split_change", '''
def split_change(before, after, mask):
    change = after - before
    return change[mask].mean(), change[~mask].mean()
''', "must sum"),
        ("memorising_batch", '''
def memorising_batch(step, n, shortest=10, longest=20):
    generator = torch.Generator().manual_seed(step)
    length = int(torch.randint(shortest, longest + 1, (), generator=generator))
    r = torch.randperm(d_vocab - 1, generator=generator)[:length] + 1
    return F.pad(torch.cat([r, r]), (1, 0)).expand(n, 32, -1)
''', "same tokens"),
    ],
    "10_in_the_wild": [
        ("completes", '''
def completes(row, n):
    groups = [tuple(row[i - n + 1 : i + 1]) for i in range(n - 1, len(row))]
    return [False] * (n - 2) + [group in groups[: i + 1] for i, group in enumerate(groups)]
''', "itself"),
        ("shift_removed", '''
def shift_removed(neutral, told, neutral_without, told_without):
    return told_without - told
''', "neutral_without"),
    ],
}  # fmt: skip
