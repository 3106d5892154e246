"""Every architecture through `tools check`: tiny models whose weights, gains and biases are all random."""

from functools import cache
from pathlib import Path

import pytest

from tools import architectures, check

PAGE = Path(__file__).resolve().parents[1] / "outputs/architectures.md"
REFUSED = {
    "bert": "sees later tokens", "t5": "AutoModelForCausalLM", "mamba": "no attention pattern",
    "rwkv": "no attention pattern", "jamba": "cannot wrap and run", "qwen3_next": "cannot wrap and run",
    "recurrent_gemma": "cannot wrap and run",
}  # fmt: skip
QUICK = ("gpt2", "llama", "gemma3_text", "bloom", "gpt_oss")
findings = cache(architectures.findings)
CHECKS = (
    "log-probabilities against transformers", "attention patterns", "sweep: mean ablation of heads",
    "sweep: patching the stream", "logit attribution", "weights by head",
)  # fmt: skip
# What may be left out because it is not there, or not exact; all else must be right.
LEFT_OUT = {
    "logit attribution": dict.fromkeys(("gemma2", "nanochat", "vaultgemma"), "caps its logits")
    # Every block norms the stream itself.
    | {"openai-gpt": "does not sum to its logits"},
    "weights by head": dict.fromkeys(("deepseek_v2", "deepseek_v3"), "not available on MLA")
    | dict.fromkeys(("olmo2", "olmo3", "exaone4", "openai-gpt"), "no norm before attention or none before")
    | dict.fromkeys(("olmoe", "minimax_m2"), "cannot be folded into matrices of 8"),
}


def kinds(names):
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in sorted(names)]


def test_there_are_enough():
    assert len(set(architectures.KINDS) - set(REFUSED)) >= 36 and set(REFUSED) <= set(architectures.KINDS)


@pytest.mark.parametrize("kind", kinds(set(architectures.KINDS) - set(REFUSED)))
def test_what_is_measured_on_an_architecture_is_right(kind):
    by_what = {finding.what: finding for finding in findings(kind)}
    assert not [finding for finding in findings(kind) if finding.good is False]
    for what in CHECKS:
        reason = LEFT_OUT.get(what, {}).get(kind)
        assert by_what[what].good if reason is None else reason in by_what[what].found, by_what[what]


@pytest.mark.parametrize("kind", kinds(REFUSED))
def test_what_has_no_attention_is_refused(kind):
    (refusal,) = findings(kind)
    assert REFUSED[kind] in refusal.found


def test_the_page_lists_every_kind():
    lines = [line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert sorted(set(lines) - {"model_type"}) == sorted(architectures.KINDS)
    assert "WRONG" not in PAGE.read_text()


def test_folding_is_only_what_is_exact():
    for kind, expected in (("gpt2", True), ("gpt_oss", False)):  # both have value biases, the second has sinks
        folded = {finding.what: finding.found for finding in findings(kind)}["folded, because exact"]
        assert ("value biases" in folded) == expected


def test_a_wrong_number_is_wrong_and_ends_with_code_1(monkeypatch, capsys):
    effects = check.ablate_heads
    monkeypatch.setattr(check, "ablate_heads", lambda *arguments: effects(*arguments) * 1.01)
    assert check.main(check.argparse.Namespace(model="induction-2l", notebooks=False, architectures=False)) == 1
    page = capsys.readouterr().out
    assert page.count("WRONG") == 1 and "Greatest absolute difference" in page and "right  within 1e-04 nats" in page


def test_a_failure_inside_a_models_own_code_is_no_refusal():
    def fails(error):
        raise error("shapes do not match")

    assert not [e for e in (RuntimeError, ValueError) if check.judge("sweep", lambda e=e: fails(e)).good is not False]
