"""The offline teacher: its distributions over the training rows, computed once and kept sparse.

encoding.py    from a teacher's logits to a few entries a token, on devices
packing.py     those entries to bytes and back, on the host
manifest.py    what a folder of them holds, and what it was made for
identity.py    the teacher's fingerprint: of its weights, wherever they lie
writer.py      teacher and data to a folder
reader.py      a folder and data to batches with the teacher's signal
"""
