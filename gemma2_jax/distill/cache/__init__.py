"""The offline teacher: its distributions over the training rows, computed once and stored as sparse targets.

encoding.py          encodes a teacher's logits as a few entries per token, on the devices
records.py           packs the entries of a row into bytes and unpacks them, on the host
integer_streams.py   compresses streams of unsigned integers, for records.py
manifest.py          describes the content of a cache folder, and the data, teacher and settings that it was made for
reader.py            reads a cache alongside the data: batches with teacher targets

`training/teacher_cache.py` writes a cache; `formats/identity.py` identifies the teacher by its weights.
"""
