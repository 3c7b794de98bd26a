"""Reports of runs, sweeps and studies, and the state of runs in progress."""
