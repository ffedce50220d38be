"""PEFT methods, one file or folder each in ``methods/``; ``register`` describes them. Importing this needs no torch."""
