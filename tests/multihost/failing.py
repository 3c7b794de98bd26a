"""`gemma2` in a process whose second training step fails: `python failing.py refuse|SIGNAL …`."""

import os
import signal
import sys

from gemma2_jax.cli.main import main
from gemma2_jax.config import UserError
from gemma2_jax.training.trainer import Trainer

take_step = Trainer._take_step
how, *argv = sys.argv[1:]


def fail_in_the_second(self):
    if self._step == 1 and how == "refuse":
        raise UserError("this host's disk is gone.")
    if self._step == 1:
        os.kill(os.getpid(), signal.Signals[how])
    take_step(self)


Trainer._take_step = fail_in_the_second  # type: ignore[method-assign]
sys.exit(main(argv))
