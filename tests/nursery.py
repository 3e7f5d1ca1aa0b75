"""Forks the processes of a deployment for tests; deployment.py runs this script and talks to it.

It has imported whatever a deployment uses, and has run one accord in itself, so that a process of
its own costs milliseconds; it has made no channel, no server and no thread, which a fork would not
take along. It reads one JSON line a request on its standard input and answers with one.
When that ends it kills whatever it started. Of each process standard output and errors go to a
log file, and the moment when it began its work and when it ended go to a file beside it.
"""

import ctypes
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import torch
from coordinator_kills import plant

from fedaccord import cli
from fedaccord.client import app as site_app
from fedaccord.client import link
from fedaccord.kit import CoordinatorKit, SiteKit
from fedaccord.privacy.ledger import Ledger
from fedaccord.server import coordinator, link_service, watch
from fedaccord.simulations import engine

PR_SET_PDEATHSIG = 1


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def dying(own, number, when):
    """A function that kills the process in a round, before or after its work."""

    def planted(*args, **more):
        rounds = [value for value in args if type(value) is int]
        mine = number in rounds or any(getattr(arg, "round", None) == number for arg in args)
        if mine and when == "before":
            die()
        found = own(*args, **more)
        if mine:
            die()
        return found

    return planted


def dies_in_training(number):
    """Have a site train a round half of its way."""
    from fedaccord.client import client_level, train

    own = (client_level.train_plain, train.train_private)
    now = [0]

    def noted(*args, **more):
        now[0] = args[2]
        return intend(*args, **more)

    def half(which):
        def planted(*args, **more):
            found = own[which](*args, **more)
            return die() if now[0] == number else found

        return planted

    intend, Ledger.intend = Ledger.intend, noted
    client_level.train_plain, train.train_private = half(0), half(1)


def dies_in_push(number):
    """Have a site push the first piece of a round's reply and no more."""
    own, asked = link._pieces, link.Attendant._answer

    def noted(self, session, sealed):
        now[0] = json.loads(sealed.text)["round"] if '"train"' in sealed.text else 0
        return asked(self, session, sealed)

    def cut(*args):
        for piece in own(*args):
            yield piece
            if now[0] == number:
                time.sleep(0.05)  # it is on its way
                die()

    now = [0]
    link._pieces, link.Attendant._answer = cut, noted


def plant_site(point, number):
    if point == "before INTENT":
        Ledger.intend = dying(Ledger.intend, number, "before")
    elif point == "after INTENT":
        Ledger.intend = dying(Ledger.intend, number, "after")
    elif point == "in training":
        dies_in_training(number)
    elif point == "before RELEASE":
        Ledger.release = dying(Ledger.release, number, "before")
    elif point == "after RELEASE":
        Ledger.release = dying(Ledger.release, number, "after")
    else:
        dies_in_push(number)


def slow_site(number, seconds):
    """Have a site take its time for a round's training."""
    own = site_app.train_and_record

    def planted(site, model, run, which, *args, **more):
        if which == number:
            time.sleep(seconds)
        return own(site, model, run, which, *args, **more)

    site_app.train_and_record = planted


def note_readings(path):
    """Note each round whose training records a site is about to read, so that no kill undoes it."""
    own, intend, now = site_app._read, Ledger.intend, [0]

    def intended(self, run, number, *args, **more):
        now[0] = number
        return intend(self, run, number, *args, **more)

    def noted(site, which):
        if which == "train":
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(handle, f"{now[0]}\n".encode())
            os.close(handle)
        return own(site, which)

    Ledger.intend, site_app._read = intended, noted


def send_twice(every):
    """Have a site send each n-th reply a second time, newly sealed."""
    own, count = link.Attendant._send, [0]

    def planted(self, session):
        own(self, session)
        count[0] += 1
        if count[0] % every == 0:
            own(self, session)
            tell("sent twice")

    link.Attendant._send = planted


def shift_clock(seconds):
    own, own_ns = time.time, time.time_ns
    time.time = lambda: own() + seconds
    time.time_ns = lambda: own_ns() + int(seconds * 1e9)


def keepalive(seconds):
    """Find a dead connection within so many seconds."""
    for module in (link_service, link.dial.__globals__):
        options = module["OPTIONS"] if isinstance(module, dict) else module.OPTIONS
        for place, (name, _) in enumerate(options):
            if name in ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms"):
                options[place] = (name, int(seconds * 500))
            if name.endswith("min_ping_interval_without_data_ms"):
                options[place] = (name, 100)


def prepare(order):
    """Do to this process what a test asked for."""
    for name, value in order.get("change", {}).items():
        if name == "impatient":  # it dials again sooner than a hospital would
            link.FIRST, link.LONGEST, link.REFUSED = 0.05, value, value
        elif name == "keepalive":
            keepalive(value)
        elif name == "beat":
            link_service.BEAT = watch.BEAT = value
            watch.Watch.__init__.__defaults__ = (4 * value,)
        elif name == "clock":
            shift_clock(value)
        elif name == "file size":
            import resource

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (value, value))
        elif name == "twice":
            send_twice(value)
        elif name == "notes":
            note_readings(value)
        elif name == "slow":
            slow_site(*value)
        elif name == "dies in step":
            plant(value[0], value[1], value[2])
        elif name == "dies":
            plant_site(*value)
        else:
            raise KeyError(name)


def tell(words):
    print(words, flush=True)


def run_site(order):
    attendant = link.Attendant(SiteKit.read(Path(order["kit"])), site_app.app, tell)
    signal.signal(signal.SIGTERM, lambda *_: attendant.stop())
    attendant.run()


def run_coordinator(order):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        tell(coordinator.up(CoordinatorKit.read(Path(order["kit"])), tell))
    except OSError as fault:  # which the command says in one line
        tell(f"{fault.filename or 'a file'}: {fault.strerror}")
        sys.exit(2)


def run_engine(order):
    engine.simulate(order["accord"], Path(order["run"]), Path(order["sites"]), order["nodes"])


def run_command(order):
    sys.argv = ["fedaccord", *order["words"]]
    cli.main()


WORK = {
    "site": run_site,
    "coordinator": run_coordinator,
    "engine": run_engine,
    "command": run_command,
}


def child(order):
    """Become a process of the deployment."""
    if sys.platform == "linux":  # it ends with this script, however that ends
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    code = 1
    random.seed(os.urandom(8))  # the parent's state would give all of them the same pauses
    try:
        prepare(order)
        WORK[order["what"]](order)
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve():
    """Answer requests: fork, and how a process ended."""
    ended = {}
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "fork":
            pid = os.fork()
            if not pid:
                child(order)
            answer = {"pid": pid}
        else:
            pid = order["pid"]
            if pid not in ended:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    ended[pid] = os.waitstatus_to_exitcode(status)
            answer = {"code": ended.get(pid)}
        print(json.dumps(answer), file=out, flush=True)


def warm(accord):
    """Run an accord here, so that no child has to import or compile anything."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        engine.simulate(accord, Path(folder) / "run", Path(folder) / "sites", 3)
    threads = {thread.name for thread in threading.enumerate()} - {"tqdm_monitor"}  # of no use
    assert threads == {"MainThread"}, "a fork would lose threads"


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warm(sys.argv[1])
    print(json.dumps({"ready": True}), file=out, flush=True)
    serve()
