"""Experiment trackers, one file each, which show the metrics of a run outside its folder."""
