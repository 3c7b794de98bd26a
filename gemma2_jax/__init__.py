"""Gemma 2 in JAX: train it, distil it, look at it.

Dimensions have the same letters in every einsum, comment and shape, and in the keys of `layout`:

    B  batch          T  position (of queries)   S  position of keys   D  model width
    N  query heads    K  key/value heads         G  query heads to each key/value head (N = K * G)
    H  head width     F  feed-forward width      V  vocabulary
    L  layers         P  (local, global) pairs of layers
"""

__version__ = "0.1.0"
