"""From text to batches: sources, tokenizer, shards, packing, pipeline."""
