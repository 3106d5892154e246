"""Find, test and explain induction heads in transformer language models."""

__version__ = "0.1.0"
