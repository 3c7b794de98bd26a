"""Several runs carried out together: a study with its report, a sweep with its table."""
