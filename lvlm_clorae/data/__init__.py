"""Datasets as shards: converters, the WebDataset writer and reader, the verifier and the stream."""
