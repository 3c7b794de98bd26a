"""Files of records have the predicted sizes."""

from pathlib import Path

import numpy as np
import pytest

from gemma2_jax.data.shards import RecordWriter, record_file_size


@pytest.mark.parametrize(
    ("records", "size"), [(1, 100), (3, 40_000), (30, 4_100), (20_000, 64), (5_000, 1_300), (40, 130_000)]
)
def test_the_size_of_a_file_of_records(records: int, size: int, tmp_path: Path) -> None:
    """Records of about `size` bytes that cannot be compressed."""
    random = np.random.default_rng(0)
    sizes = random.integers(size // 2, size * 3 // 2, records)
    writer = RecordWriter(tmp_path / "records", ",uncompressed")
    for each in sizes:
        writer.write(random.bytes(int(each)))
    assert record_file_size(records, int(sizes.sum())) == pytest.approx(writer.finish().size, abs=64 * 1024)
