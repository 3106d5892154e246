"""The language of scrubbing hypotheses: what each input of the induction heads is computed from.

A hypothesis says from which datum, x or another one x', each part of the inputs of the induction
heads is computed: the embedding and, for every layer-0 head, a pattern and the values it weighs.
Source: Lawrence Chan and others 2022, "Causal scrubbing: results on induction heads".
"""

from dataclasses import dataclass

X, OTHER = "x", "x'"


@dataclass(frozen=True)
class Rule:
    """How one layer-0 head is fed.

    `values` come from a datum, "x" or "x'"; so does the `pattern`, unless it names a kind of token:
    then each query takes it from a text whose token there is of the same kind. `from_x` lists the
    offsets back from the query at which the values come from x all the same. With `identity` the
    value at offset 0 enters with weight 1: an identity on x plus the head's error on the other datum.
    """

    pattern: str = OTHER
    values: str = OTHER
    from_x: tuple[int, ...] = ()
    identity: bool = False

    def __post_init__(self):
        if self.values not in (X, OTHER):
            raise ValueError(f"values must come from {X!r} or {OTHER!r}, not {self.values!r}")


@dataclass(frozen=True)
class Input:
    """One input of the induction heads: its embedding, rules for named groups of heads, and one for the rest."""

    embedding: str
    rest: Rule
    roles: tuple[tuple[str, Rule], ...] = ()


@dataclass(frozen=True)
class Hypothesis:
    """What the V, Q and K inputs of the induction heads are said to depend on."""

    name: str
    claim: str
    v: Input
    q: Input
    k: Input


WHOLE, SCRUBBED = Rule(X, X), Rule()
UNSCRUBBED, RESAMPLED = Input(X, WHOLE), Input(OTHER, SCRUBBED)
