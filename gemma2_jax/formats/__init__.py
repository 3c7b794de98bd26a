"""Checkpoints of other tools: read, written, converted and looked at."""
