"""PEFT methods: one folder a method. ``registration`` makes PEFT know them; nothing here imports torch by itself."""
