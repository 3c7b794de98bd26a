"""Text to batches: sources, tokenizer, shards, packing, pipeline."""
