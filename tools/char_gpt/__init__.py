"""The demonstration: a character-level GPT trained across worker processes; run it with tools/demo."""
