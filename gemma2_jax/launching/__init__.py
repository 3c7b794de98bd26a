"""A training run as a job of an engine that others run: one file an engine, and what is pinned for all of them."""
