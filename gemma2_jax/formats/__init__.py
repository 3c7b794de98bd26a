"""Reads, writes, converts and inspects checkpoints of other tools."""
