"""Run an accord and kill this process in a step of a round, as a power cut would.

Usage: coordinator_kills.py ACCORD RUN SITES STEP ROUND before|after|inside
"""

import os
import signal
import sys
from pathlib import Path

from fedaccord.server.rounds import Coordinator
from fedaccord.simulations import engine


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def halfway(found):
    """Give back the first of what a step gives, then die."""
    for item in found:
        yield item
        die()


def plant(step, number, when):
    """Have a step of a round kill the process."""
    own = getattr(Coordinator, step)

    def planted(self, *args):
        if self.number != number:
            return own(self, *args)
        if when == "before":
            die()
        found = own(self, *args)
        if when == "inside":
            return halfway(found)
        if hasattr(found, "__next__"):  # a step that gives its results as they come
            list(found)
        die()

    setattr(Coordinator, step, planted)


if __name__ == "__main__":
    accord, run, sites, step, number, when = sys.argv[1:]
    plant(step, int(number), when)
    engine.simulate(accord, Path(run), Path(sites), 4)
