"""tileloss: the losses of sentence-transformers, computed tile by tile."""

__version__ = "0.1.0"
