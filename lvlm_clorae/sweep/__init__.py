"""Many runs from one file: its points, how they stand, their scores in one table. Imports no torch (docs/sweeps.md)."""
