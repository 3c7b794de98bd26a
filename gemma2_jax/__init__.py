"""Gemma 2 in JAX: train it, distil it, look at it."""
