"""The command line: one file a verb. Nothing else imports this room, and only it knows Hydra and argparse."""
