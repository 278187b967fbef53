"""A small set of everyday English, to see whether an adapter makes a model forget the language."""
