"""What a run costs and what it did: tables and plots."""
