"""The demo data: a small invented world, drawn and written by a seeded generator."""
