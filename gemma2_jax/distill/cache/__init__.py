"""The offline teacher: its distributions over the training rows, computed once and kept sparse.

encoding.py          from a teacher's logits to a few entries a token, on devices
records.py           those entries to bytes and back, on the host
integer_streams.py   the bytes: streams of integers close to their entropy
manifest.py          what a folder of them holds, and what it was made for
reader.py            a folder and data to batches with the teacher's targets

`training/teacher_cache.py` writes a folder; `distill/teacher_identity.py` identifies the teacher by its weights.
"""
