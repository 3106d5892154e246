"""Models trained with nanoGPT: `ckpt.pt` becomes a GPT-2 of the transformers library, in memory.

The layout is that of https://github.com/karpathy/nanoGPT, `train.py` and `model.py`. Only tensors and plain values
of a checkpoint are read, and `meta.pkl` never: a pickle can run code.
"""

from pathlib import Path

import torch
from torch import Tensor

from helpers.catalog import ModelUnavailable, hub_folder
from helpers.hugging_face import refuse_pointer, whole

GPT2_VOCABULARY = 50257  # a checkpoint may have more rows: nanoGPT pads them to a multiple of 64
SIZES = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
LINEAR = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
NORMS = ("ln_1.weight", "ln_2.weight", "ln_f.weight")


def read_nanogpt(path: Path) -> tuple:
    """(`GPT2LMHeadModel`, tokenizer) of a nanoGPT checkpoint.

    Raises:
        ValueError: no such file, not a nanoGPT checkpoint, or names or shapes of its weights do not match.
        ModelUnavailable: its tokenizer cannot be had here.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    refuse_pointer(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails in as many ways as there are bytes
        raise ValueError(f"{path} holds more than tensors and plain values, or is damaged; it was not read") from error
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        raise ValueError(f"{path} is not a nanoGPT checkpoint: it has no 'model' and 'model_args'")
    sizes = checkpoint["model_args"]
    if lacking := [name for name in SIZES if not isinstance(sizes.get(name), int)]:
        raise ValueError(f"{path}: its model_args lack {', '.join(lacking)}; add what the model was trained with")
    state = {key.removeprefix("_orig_mod."): value.float() for key, value in checkpoint["model"].items()}
    model = _build(path, sizes, state)
    if sizes["vocab_size"] < GPT2_VOCABULARY:
        dataset = str(checkpoint.get("config", {}).get("dataset", ""))
        return model, character_tokenizer(find_characters(path, dataset, sizes["vocab_size"]))
    from transformers import AutoTokenizer

    folder = hub_folder(f"{path}: its tokens are GPT-2's", "openai-community/gpt2", ("tokenizer.json",))
    return model, AutoTokenizer.from_pretrained(folder)


def _build(path: Path, sizes: dict, state: dict[str, Tensor]):
    """A `GPT2LMHeadModel` with nanoGPT's weights; absent biases are zero."""
    from transformers import GPT2Config, GPT2LMHeadModel

    head, embedding = (state.get(key, torch.empty(0)) for key in ("lm_head.weight", "transformer.wte.weight"))
    config = GPT2Config(
        **{name: sizes[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")},
        n_positions=sizes["block_size"], activation_function="gelu", bos_token_id=None, eos_token_id=None,
        tie_word_embeddings=torch.equal(head, embedding),
    )  # fmt: skip
    # Linear layers of transformers' GPT-2 are stored the other way round.
    state = {key: value.T if key.endswith(LINEAR) else value for key, value in state.items()}
    for key in [key for key in state if key.endswith((*LINEAR, *NORMS))]:
        state.setdefault(key.removesuffix("weight") + "bias", torch.zeros(state[key].shape[-1]))
    return whole(GPT2LMHeadModel, path, None, config=config, state_dict=state)


def find_characters(path: Path, dataset: str, n: int) -> list[str]:
    """The n characters in the order of their ids, from the text trained on.

    It is looked for as `input.txt` beside the checkpoint, and in `data/<dataset>`, where nanoGPT puts it.

    Raises:
        ValueError: the text has another number of different characters.
        ModelUnavailable: there is no such file.
    """
    folders = [path.parent, *(up / "data" / dataset for up in path.resolve().parents[:3] if dataset)]
    texts = [folder / "input.txt" for folder in folders if (folder / "input.txt").is_file()]
    if not texts:
        raise ModelUnavailable(
            f"{path}: which character has which id is not known; put the text it was trained on, as input.txt, "
            f"beside {path.name}"
        )
    characters = sorted(set(texts[0].read_text(encoding="utf-8")))
    if len(characters) != n:
        raise ValueError(f"{texts[0]} has {len(characters)} different characters, the checkpoint {n}")
    return characters


def character_tokenizer(characters: list[str]):
    """One token a character; a character outside the list is left out. BOS is the newline, else the first."""
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(characters)}, []))
    tokenizer.decoder = decoders.Fuse()
    return shipped_tokenizer("\n" if "\n" in characters else characters[0], tokenizer_object=tokenizer)


def shipped_tokenizer(bos: str = "<|bos|>", **source):
    """A fast tokenizer whose only special token is `bos`, which it puts first."""
    from transformers import PreTrainedTokenizerFast

    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), bos)
    # Without these two, TransformerLens would look for the tokenizer again, on the hub.
    return PreTrainedTokenizerFast(**source, **special, add_bos_token=True, name_or_path="shipped")
