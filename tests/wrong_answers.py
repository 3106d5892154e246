"""Plausible wrong answers to the exercises, and a word of the sentence with which the check must refuse each.

{notebook: [(function, wrong source, word)]}. Each is run in its notebook, before the solution.
"""

WRONG = {
    "01_prompt_construction": [
        ("three_copies", '''
def three_copies(model, length, batch, seed):
    losses = stats.token_losses(model, prompts.repeated_tokens(model, length, batch, seed, copies=3))
    return [losses[:, i * length : (i + 1) * length].mean().item() for i in range(3)]
''', "leave out its first token"),
        ("swap_corruption", '''
def swap_corruption(tokens):
    swapped = tokens.clone()
    swapped[:, 2] = tokens[:, 3]
    return swapped
''', "keeps the tokens"),
    ],
    "02_attention_visualization": [
        ("find_induction_heads", '''
def find_induction_heads(model, threshold, length=30, seed=0):
    tokens = prompts.repeated_tokens(model, length, 1, seed)
    stripe = attention.patterns_of(model, tokens).diagonal(-length, -2, -1).mean(-1)
    found = sorted((s.item(), i, j) for i, row in enumerate(stripe) for j, s in enumerate(row) if s > threshold)
    return [stats.head_name(i, j) for _, i, j in found]
''', "strongest"),
        ("perfect_pattern", '''
def perfect_pattern(length):
    n = 2 * length + 1
    keys = torch.where(torch.arange(n) > length, torch.arange(n) - length, 0)
    return torch.nn.functional.one_hot(keys, n).float()[None, None]
''', "one off"),
        ("one_layer_scores", '''
def one_layer_scores(table, tokens):
    return table[tokens[None, :], tokens[:, None]]
''', "in that order"),
        ("robust_score", '''
def robust_score(pattern_for, lengths):
    return max(attention.induction_score(pattern_for(n), n).item() for n in lengths)
''', "one length only"),
    ],
    "03_head_ablation": [
        ("circuit_parameters", '''
def circuit_parameters(d_model, d_head):
    return 2 * 3 * d_model * d_head
''', "four matrices"),
        ("verify_induction_behavior", '''
def verify_induction_behavior(layer, head, seed=100):
    tokens = prompts.repeated_tokens(model, length, 8, seed)
    score = attention.score_heads(model, tokens, lambda p: attention.offset_score(p, length))[:, layer, head].mean()
    return score.item(), 0.0
''', "offset"),
        ("noop_error", '''
def noop_error():
    return interventions.ablate_together(model, repeated, copying, [[strongest[0]]]).abs().max().item()
''', "change nothing"),
    ],
    "04_activation_patching": [
        ("my_recovery", '''
def my_recovery(patched, corrupted, clean):
    return (patched - clean) / (corrupted - clean)
''', "corrupted metric"),
        ("patched_margin", '''
def patched_margin(layer, head, position):
    with torch.inference_mode():
        logits = model(corrupted[few])[:, -2]
    return (logits.gather(1, right.answers[few, None]) - logits.gather(1, wrong.answers[few, None]))[:, 0]
''', "differ"),
        ("position_of_the_key", '''
def position_of_the_key(tokens, gap):
    return 1
''', "position 2"),
    ],
    "05_logit_lens": [
        ("my_lens", '''
def my_lens(model, resid):
    return (resid @ model.W_U + model.b_U).log_softmax(-1)
''', "final norm"),
        ("parts_with_head_scaled", '''
def parts_with_head_scaled(layer, head, factor):
    return lens.attribute(model, few, task.answers[:4])
''', "factor of zero"),
        ("stops_in_the_lead", '''
def stops_in_the_lead(rank):
    return (rank == 0).int().sum(0)
''', "lead"),
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
    "07_circuit_weights": [
        ("small_eigenvalues", '''
def small_eigenvalues(A, B):
    return torch.linalg.eigvals(A @ B)
''', "r x r"),
        ("random_overlap", '''
def random_overlap(S, T, d, generator):
    return (S * T).norm() / S.norm() / T.norm()
''', "1/d"),
        ("split", '''
def split(product, k):
    return circuits.directions_kept(product, slice(k)), circuits.directions_kept(product, slice(k - 1, None))
''', "overlap"),
        ("written", '''
def written(product, vectors):
    return vectors @ product.AB.T
''', "W_V before W_O"),
    ],
    "08_training_dynamics": [
        ("steepest", '''
def steepest(tokens, gain):
    slope = np.diff(gain[1:]) / np.diff(np.log(tokens[1:]))
    return 1 + int(slope.argmax())
''', "midpoint"),
        ("split_change", '''
def split_change(before, after, mask):
    change = after - before
    return change[mask].mean(), change[~mask].mean()
''', "must sum"),
        ("memorising_batch", '''
def memorising_batch(step, recipe, shortest=16, longest=32):
    length = int(torch.randint(shortest, longest + 1, (), generator=torch.Generator().manual_seed(step)))
    r = torch.randperm(recipe.d_vocab - 1, generator=torch.Generator().manual_seed(step))[:length] + 1
    return torch.cat([torch.zeros(1, dtype=torch.long), r, r]).expand(32, -1)
''', "same tokens"),
    ],
}  # fmt: skip
