"""Scaling laws: the loss of finished runs as a function of parameters, tokens and the teacher's loss."""
