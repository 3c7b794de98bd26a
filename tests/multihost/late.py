"""`gemma2` in processes of which the first is late to write what the others need: `python late.py teacher-cache …`."""

import sys
import time

from gemma2_jax.cli.main import main
from gemma2_jax.distill.cache.manifest import read_cache
from gemma2_jax.training import teacher_cache as writer


def late(function):
    """Process 0 alone calls it."""

    def function_later(*arguments, **named):
        time.sleep(2)
        return function(*arguments, **named)

    return function_later


def written_and_read(*arguments):
    """Writes a cache and reads it back, as a study does before the next run distils from it."""
    manifest = write_cache(*arguments)
    assert read_cache(arguments[0].distill.cache) == manifest
    return manifest


write_cache = writer.write_cache
writer.locked = late(writer.locked)
writer.write_cache_manifest = late(writer.write_cache_manifest)
writer.write_cache = written_and_read
sys.exit(main())
