"""nanoGPT checkpoints: one is trained here in nanoGPT's own format, saved, loaded and scored."""

import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers import attention, models, nanogpt, prompts
from helpers.catalog import ModelUnavailable, resolve
from tools import run

LETTERS = "\n abcdefghijklmnopqrstuvwxyz"


class Norm(nn.Module):
    def __init__(self, width, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    def __init__(self, width, heads, bias):
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x):
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(z.transpose(1, 2).reshape(x.shape))


class Mlp(nn.Module):
    def __init__(self, width, bias):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width, bias=bias), nn.Linear(4 * width, width, bias=bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, width, heads, bias):
        super().__init__()
        self.ln_1, self.attn = Norm(width, bias), Attention(width, heads, bias)
        self.ln_2, self.mlp = Norm(width, bias), Mlp(width, bias)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Gpt(nn.Module):
    """The function and the parameter names of nanoGPT's model, written from its description."""

    def __init__(self, vocab_size, block_size=64, n_layer=2, n_head=4, n_embd=64, bias=False):
        super().__init__()
        self.sizes = dict(
            vocab_size=vocab_size, block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=bias
        )
        parts = dict(wte=nn.Embedding(vocab_size, n_embd), wpe=nn.Embedding(block_size, n_embd))
        parts["h"] = nn.ModuleList(Block(n_embd, n_head, bias) for _ in range(n_layer))
        self.transformer = nn.ModuleDict(parts | dict(ln_f=Norm(n_embd, bias)))
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=1 / math.sqrt(n_embd))

    def forward(self, tokens):
        t = self.transformer
        x = t["wte"](tokens) + t["wpe"](torch.arange(tokens.shape[1]))
        for block in t["h"]:
            x = block(x)
        return self.lm_head(t["ln_f"](x))


def save(model: Gpt, path: Path, prefix: str = "", dataset: str = "letters", **extra) -> Path:
    """Write what nanoGPT's train.py writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = dict(
        model={prefix + key: value for key, value in model.state_dict().items()} | extra,
        optimizer=torch.optim.AdamW(model.parameters()).state_dict(),
        model_args=model.sizes | dict(dropout=0.0),
        iter_num=10,
        best_val_loss=torch.tensor(1.5),
        config=dict(dataset=dataset, learning_rate=1e-3, compile=bool(prefix)),
    )
    torch.save(checkpoint, path)
    return path


def text_with_repeats(n_lines: int, seed: int) -> str:
    """Lines of random letters said twice, so that copying is what there is to learn."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(n_lines):
        length = int(torch.randint(8, 24, (), generator=generator))
        word = "".join(LETTERS[2 + i] for i in torch.randperm(26, generator=generator)[:length])
        lines.append(f"\n{word}{word}")
    return " ".join(lines)


def train(model: Gpt, text: str, steps: int) -> float:
    """Next-character training on random stretches of the text; returns the last loss, in nats."""
    ids = torch.tensor([LETTERS.index(c) for c in text])
    generator, length = torch.Generator().manual_seed(0), model.sizes["block_size"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for _ in range(steps):
        starts = torch.randint(len(ids) - length - 1, (16, 1), generator=generator)
        batch = ids[starts + torch.arange(length + 1)]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_a_model_trained_in_nanogpts_format_is_scored(tmp_path):
    torch.manual_seed(0)
    model, text = Gpt(len(LETTERS)), text_with_repeats(2000, seed=0)
    train(model, text, steps=20)
    (tmp_path / "data/letters").mkdir(parents=True)
    (tmp_path / "data/letters/input.txt").write_text(text)
    path = save(model, tmp_path / "out-letters/ckpt.pt", prefix="_orig_mod.")

    bridge = models.load(str(path), device="cpu")
    tokens = prompts.repeated_tokens(bridge, length=20, batch=4, seed=0)
    assert tokens.shape == (4, 41) and prompts.bos_id(bridge) == LETTERS.index("\n")
    with torch.no_grad():
        expected = model.eval()(tokens).log_softmax(-1)
    assert (bridge(tokens).log_softmax(-1) - expected).abs().max() < 1e-4
    assert bridge.compatibility_mode and not bridge.training

    samples = attention.induction_samples(bridge, seeds=(0, 1), length=20, batch=4)
    assert samples.shape == (8, 2, 4) and ((0 <= samples) & (samples <= 1)).all()
    assert prompts.encode(bridge, "abc\n") == [LETTERS.index(c) for c in "abc\n"]
    assert prompts.token_strings(bridge, torch.tensor([0, 1, 2])) == ["\n", " ", "a"]
    assert models.load(str(path), device="cpu") is bridge


@pytest.mark.slow
def test_training_on_repeats_makes_induction_heads(tmp_path):
    torch.manual_seed(0)
    model, text = Gpt(len(LETTERS)), text_with_repeats(4000, seed=0)
    train(model, text, steps=1200)
    (tmp_path / "input.txt").write_text(text)
    bridge = models.load(str(save(model, tmp_path / "ckpt.pt")), device="cpu")
    samples = attention.induction_samples(bridge, length=20)
    assert samples.mean(0).max() > 0.4
    untrained = save(Gpt(len(LETTERS)), tmp_path / "untrained/ckpt.pt")
    (untrained.parent / "input.txt").write_text(text)
    assert attention.induction_samples(models.load(str(untrained), device="cpu"), length=20).mean(0).max() < 0.2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_logits_equal_nanogpts(bias, prefix, tmp_path):
    torch.manual_seed(1)
    model = Gpt(len(LETTERS), n_layer=3, bias=bias).eval()
    if bias:
        for weight in model.parameters():
            if weight.ndim == 1:
                nn.init.normal_(weight, 1.0, 0.3)
    mask = torch.ones(1, 1, 64, 64).tril()  # older versions save it
    path = save(model, tmp_path / "ckpt.pt", prefix, **{prefix + "transformer.h.0.attn.bias": mask})
    (tmp_path / "input.txt").write_text(LETTERS)
    found, tokenizer = nanogpt.read_nanogpt(path)
    tokens = torch.randint(0, len(LETTERS), (2, 64))
    with torch.no_grad():
        torch.testing.assert_close(found(tokens).logits, model(tokens), atol=1e-4, rtol=1e-4)
    assert len(tokenizer) == len(LETTERS)


def test_characters_come_from_the_text(tmp_path):
    (tmp_path / "input.txt").write_text("zyx" + LETTERS)
    assert "".join(nanogpt.find_characters(tmp_path / "ckpt.pt", "", len(LETTERS))) == LETTERS
    with pytest.raises(ValueError, match="28 different characters, the checkpoint 65"):
        nanogpt.find_characters(tmp_path / "ckpt.pt", "", 65)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was opened",))


def test_a_pickled_vocabulary_is_never_opened(tmp_path):
    path = save(Gpt(len(LETTERS)), tmp_path / "ckpt.pt")
    with pytest.raises(ModelUnavailable, match="input.txt"):
        models.load(str(path))
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelUnavailable, match="put the text it was trained on"):
        models.load(str(path))


def test_a_checkpoint_that_holds_code_is_refused(tmp_path):
    torch.save({"model": Bomb(), "model_args": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="more than tensors"):
        models.load(str(tmp_path / "ckpt.pt"))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no file"):
        models.load("out/ckpt.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="not a nanoGPT checkpoint"):
        models.load(str(tmp_path / "list.pt"))
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match="damaged"):
        models.load(str(tmp_path / "damaged.pt"))
    extra = save(Gpt(len(LETTERS)), tmp_path / "extra.pt", **{"transformer.h.0.rotary": torch.ones(2)})
    with pytest.raises(ValueError, match="h.0.rotary"):
        models.load(str(extra))
    model = Gpt(len(LETTERS))
    model.sizes["n_layer"] = 3
    with pytest.raises(ValueError, match="weights missing: transformer.h.2"):
        models.load(str(save(model, tmp_path / "short.pt")))
    short = save(Gpt(len(LETTERS)), tmp_path / "context.pt", **{"transformer.wpe.weight": torch.ones(9, 64)})
    with pytest.raises(ValueError, match="another shape: transformer.wpe.weight"):
        models.load(str(short))


def test_gpt2_tokens_without_network_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    path = save(Gpt(50304, block_size=8, n_layer=1, n_head=1, n_embd=4), tmp_path / "ckpt.pt")
    with pytest.raises(ModelUnavailable, match="GPT-2's.*cannot be reached"):
        models.load(str(path))


def test_a_path_stays_whole_when_the_series_runs_on_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "check_parameters", lambda path, parameters: {})
    (job,) = run.plan(["out/ckpt.pt"], [Path("01.ipynb")], tmp_path, {})
    assert job.model == str(tmp_path / "out/ckpt.pt")
    assert resolve("ckpt.pt").kind == resolve("out/ckpt.pt").kind == "nanogpt"
