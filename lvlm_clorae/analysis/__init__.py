"""Analysis of models and runs: cost, scaling, comparison tables, plots, evaluation and gate routing."""
