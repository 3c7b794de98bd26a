"""Training runs as jobs of an existing engine (SLURM, TPU VMs, GKE): one file per engine, and shared pinning."""
