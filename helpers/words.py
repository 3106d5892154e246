"""Words that notebook 10 asks models about: capitals, synonyms and French, names that nobody has, lists of pairs."""

import json
import random
from pathlib import Path

_LISTS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
CAPITALS = [tuple(pair) for pair in _LISTS["capitals"]]  # (country, first word of its capital)
FACTS = [(*fact, *CAPITALS[i - 9]) for i, fact in enumerate(CAPITALS)]  # with another country and its capital
SYNONYMS = [tuple(row) for row in _LISTS["synonyms"]]  # (word, synonym, French)


def invented_names(n: int, seed: int) -> list[str]:
    """Names of two to five syllables, without repeats: n or a few less."""
    rng, syllables = random.Random(seed), [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    return list(dict.fromkeys("".join(rng.choices(syllables, k=rng.randint(2, 5))).title() for _ in range(n)))


def pair_lists() -> list[tuple[str, str, list[str]]]:
    """For each word of SYNONYMS a list of six pairs with it in the fourth.

    Gives the text up to its partner, the whole list, and all partners, its own first.
    """
    words, found = [row[0] for row in SYNONYMS], []
    partners = "lamp paper music silver winter bread number garden glass cotton letter butter summer engine".split()
    for i in range(len(words)):
        places = range(i - 3, i + 3)
        pairs = [f" {words[j % len(words)]} {partners[j % len(partners)]}" for j in places]
        listed = [partners[j % len(partners)] for j in (i, *(j for j in places if j != i))]
        found.append(("Pairs:" + ",".join(pairs[:4]), "Pairs:" + ",".join(pairs) + ", ", listed))
    return found
