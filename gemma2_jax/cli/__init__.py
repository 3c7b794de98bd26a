"""The command line: one file per verb. No other package imports this one, and only this one uses Hydra and argparse."""
