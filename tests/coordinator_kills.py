"""Runs an accord and dies in a step of a round, as by a power cut; test_resume.py runs this script.

Usage: coordinator_kills.py ACCORD, and for each death FOLDER STEP ROUND before|after|inside.
Every run is a fork of this process, so that all of them import torch once. It exits with 1 if one
of them was not killed.
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


def killed(accord, folder, step, number, when):
    """Run in a fork until it kills itself; whether it did."""
    child = os.fork()
    if not child:
        plant(step, int(number), when)
        engine.simulate(accord, Path(folder) / "run", Path(folder) / "sites", 4)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


if __name__ == "__main__":
    accord, *words = sys.argv[1:]
    deaths = [words[i : i + 4] for i in range(0, len(words), 4)]
    done = [killed(accord, *death) for death in deaths]
    sys.exit(not all(done))
