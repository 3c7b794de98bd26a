"""Several runs as one piece of work: a study with its report, a sweep with its table."""
