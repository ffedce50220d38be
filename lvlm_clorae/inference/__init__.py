"""Use of trained weights: adapter directories, requests, extraction and records."""
