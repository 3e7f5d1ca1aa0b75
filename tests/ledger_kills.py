"""Kills sites at chosen lines of their bookkeeping; test_ledger_kill.py runs this as a script.

For each kill it forks a site that answers a coordinator and sends itself SIGKILL before the k-th
line of code that it executes in the ledger's modules. A second process then goes on as a
coordinator would: it asks again, then for further rounds. What a site read and sent is noted,
durably, in a file beside it; nothing in the product takes part.
"""

import inspect
import json
import os
import random
import signal
import sys
import tempfile
import traceback
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WATCHED = (
    "client/app.py",
    "fedaccord/evidence.py",
    *(f"privacy/{name}.py" for name in ("ledger", "log", "store", "second", "chain", "keys")),
)
RUN, ROUNDS, SPARE = "a", 2, 2
ACCORD = f"""
name = "small"
purpose = "to be killed"
task = {{ name = "noted" }}
sites = [{{ name = "cleveland", subjects = 200 }}]
model = {{ name = "mlp", options = {{ hidden = 2 }} }}
rounds = {{ rounds = {ROUNDS}, spare_rounds = {SPARE} }}
training = {{ steps = 1, learning_rate = 0.5 }}
privacy = {{ noise_multiplier = 3.0, sampling_prob = 0.1, max_epsilon = 10.0 }}
fairness = {{ attributes = ["sex"] }}
"""


class Lines:
    """Counts the lines that this process executes in watched files; kills it before one of them."""

    def __init__(self, kill_at=0, root=ROOT):
        # A room is also reached through its link in fedaccord/.
        self.names = {}
        for name in WATCHED:
            for path in (root / name, root / "fedaccord" / name):
                self.names[str(path)] = name
        self.kill_at, self.count, self.seen = kill_at, 0, []

    def __enter__(self):
        sys.settrace(self.call)
        return self

    def __exit__(self, *fault):
        sys.settrace(None)

    def call(self, frame, event, arg):
        return self.line if frame.f_code.co_filename in self.names else None

    def line(self, frame, event, arg):
        if event == "line":
            self.count += 1
            self.seen.append((self.names[frame.f_code.co_filename], frame.f_lineno))
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.line


class Notes:
    """What a site did, noted so that a kill cannot undo it."""

    def __init__(self, path):
        self.path = path

    def add(self, what, number=0, **more):
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(handle, (json.dumps({"what": what, "round": number} | more) + "\n").encode())
        os.fsync(handle)
        os.close(handle)

    def of(self, what):
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [note for note in map(json.loads, lines) if note["what"] == what]


def noted_task():
    """The task heart; it notes each reading of the training records with the round it is for."""
    from fedaccord.simulations.heart import Heart

    class Noted(Heart):
        notes = None
        number = 0

        def site(self, name):
            data = super().site(name)
            Noted.notes.add("read", Noted.number)
            return data

    return Noted


class Coordinator:
    """Asks one site, step by step; goes on after the last step that was answered."""

    def __init__(self, folder):
        from fedaccord import accord as accords
        from fedaccord.client import app
        from fedaccord.models.build import build
        from fedaccord.simulations.engine import InProcessGrid
        from fedaccord.simulations.heart import Heart

        self.folder, self.notes = folder, Notes(folder / "notes")
        path = folder / "small.toml"
        path.write_text(ACCORD)
        self.accord = accords.load(str(path))
        config = {"accord": str(path), "sites": str(folder / "sites")}
        self.grid = InProcessGrid(app.app, 1, config)
        self.weights = build("mlp", Heart.spec, {"hidden": 2}, 0).state_dict()

    def ask(self, kind, number=0):
        """Send a request; return the reply's words and note the arrays that came."""
        from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

        (node,) = self.grid.get_node_ids()
        Noted.notes, Noted.number = self.notes, number if kind == "train" else -number
        config = {"run": RUN, "accord": self.accord.digest, "server-round": number, "heads": "[]"}
        content = RecordDict({"config": ConfigRecord(config)})
        if number:
            name = "arrays" if kind == "train" else "model"
            content[name] = ArrayRecord(torch_state_dict=self.weights)
        (reply,) = self.grid.send_and_receive([Message(content, node, kind)])
        assert reply.has_content(), reply.error.reason
        if "arrays" in reply.content.array_records:
            self.notes.add("sent", number, sha=fingerprint(reply.content.array_records["arrays"]))
        return dict(reply.content.config_records["config"])

    def go(self):
        """Run the accord's rounds to their end from wherever an earlier process was stopped."""
        done = {note["round"] for note in self.notes.of("finished")}
        for kind in ("query.join", "query.reserve"):
            said = self.ask(kind)
            assert "refused" not in said, said
        asked = [note["round"] for note in self.notes.of("asking")]
        number = max(asked, default=1)
        while len(done) < ROUNDS:
            self.notes.add("asking", number)
            said = self.ask("train", number)
            if "refused" in said:
                assert "already used its slot" in said["refused"], said
            else:
                self.ask("train", number)  # the reply was lost: asked again
                said = self.ask("evaluate", number)
                assert "refused" not in said, said
                done.add(number)
                self.notes.add("finished", number)
            number += 1
        assert "ledger" in self.ask("query.ledger")


def fingerprint(arrays):
    from fedaccord.evidence import sha256

    return sha256(b"".join(name.encode() + arrays[name].data for name in sorted(arrays)))


def check(folder, kills):
    """List what is wrong with a site's ledger after so many kills."""
    from fedaccord.evidence import sha256
    from fedaccord.privacy.chain import Chain
    from fedaccord.privacy.second import SecondPlace
    from fedaccord.privacy.store import Store
    from fedaccord.strategies.encoding import records_of

    site, notes, wrong = folder / "sites" / "cleveland", Notes(folder / "notes"), []
    if not site.exists():
        return wrong if not notes.of("read") else ["read without a ledger"]
    with closing(Store(site / "ledger.sqlite")) as store:
        found = Chain("ledger")
        found.extend(store.rows(), every=True)
    head = SecondPlace(folder / "sites" / "heads" / "cleveland.json").read()
    behind = len(found) - (head.seq if head else 0)
    if behind not in (0, 1) or (head and not found.holds(head)):
        wrong.append(f"the second place is {behind} behind")
    rounds = {
        kind: [e["round"] for e in found.entries if e["kind"] == kind]
        for kind in ("INTENT", "RELEASE")
    }
    releases = {e["round"]: e["sha256"] for e in found.entries if e["kind"] == "RELEASE"}
    stored = {int(p.stem[-5:]): p for p in (site / "releases").glob("*.safetensors")}
    read = {n["round"] for n in notes.of("read") if n["round"] > 0}
    sent = {(n["round"], n["sha"]) for n in notes.of("sent")}
    if uncounted := (read | {*stored} | {number for number, _ in sent}) - {*rounds["INTENT"]}:
        wrong.append(f"rounds {uncounted} are under-counted")
    for kind, numbers in rounds.items():
        if len(numbers) != len(set(numbers)):
            wrong.append(f"{kind} twice: {numbers}")
    if len(sent) != len({number for number, _ in sent}):
        wrong.append("two releases with different bytes for one round")
    for number, sha in sent:
        payload = stored[number].read_bytes()
        same = fingerprint(records_of(payload)["arrays"]) == sha
        if not same or releases.get(number) != sha256(payload):
            wrong.append(f"round {number} was sent and is not what the ledger has")
    lost = len(rounds["INTENT"]) - len(rounds["RELEASE"])
    if lost > kills:
        wrong.append(f"{lost} spare slots lost in {kills} kills")
    if any(kind in (e["kind"] for e in found.entries) for kind in ("REFUSAL", "LOST", "ACCEPT")):
        wrong.append("a refusal without reason")
    return wrong


def fork(work):
    """Do some work in a process of its own; return its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def site_with_kills(folder, kills, mutant=""):
    """Play the accord with kills at these lines, one after the other; list what went wrong."""
    folder.mkdir(parents=True)
    wrong = []
    for number, at in enumerate([*kills, 0], start=1):

        def play(at=at):
            coordinator = Coordinator(folder)
            if mutant == "reads first":
                read_before_intent()
            with Lines(at):
                coordinator.go()

        def judge(number=number):
            found = check(folder, number)
            (folder / f"found-{number}").write_text(json.dumps(found))

        status = fork(play)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if killed != bool(at) and (not at or os.WEXITSTATUS(status)):
            wrong.append(f"process {number} ended with status {status}")
        if fork(judge) == 0:
            wrong += json.loads((folder / f"found-{number}").read_text())
        else:
            wrong.append("the ledger cannot be read")
    return wrong


def read_before_intent():
    """A planted fault: records are read before the INTENT is written."""
    from fedaccord.client import app

    right = app.train_and_record

    def early(site, *rest, **more):
        counting = sys.gettrace()
        sys.settrace(None)  # the moments stay those of the right order
        site.task.site(site.name)
        sys.settrace(counting)
        return right(site, *rest, **more)

    app.train_and_record = early


def rotation(folder, at):
    """Rotate a ledger's key twice with a kill on the way; list what went wrong."""
    from fedaccord.privacy.chain import Chain
    from fedaccord.privacy.ledger import Ledger

    place = folder / "ward" / "ledger.sqlite", "ward", folder / "heads" / "ward.json"

    def play():
        with Lines(at), closing(Ledger(*place)) as ledger:
            ledger.counts("a", 1)
            ledger.rotate()
            ledger.counts("a", 1)
            ledger.rotate()

    def judge():
        with closing(Ledger(*place)) as ledger:
            ledger.counts("a", 1)
            ledger.rotate()
            ledger.counts("a", 1)
            found = Chain("ledger")
            found.extend(ledger._log._store.rows(), every=True)
            assert found.entries[-1]["kind"] == "COUNTS"
            assert 3 <= len(found) <= 8
        assert not (folder / "ward" / "ledger.key.next").exists()

    killed = os.WIFSIGNALED(fork(play))
    wrong = [] if killed else ["it was not killed"]
    return wrong if fork(judge) == 0 else [*wrong, "the ledger cannot be used"]


def dry(folder, play):
    """Count the lines of a scenario in a process of its own."""

    def count():
        with Lines() as lines:
            play()
        (folder / "lines").write_text(json.dumps(lines.seen))

    folder.mkdir(parents=True)
    assert fork(count) == 0
    return json.loads((folder / "lines").read_text())


def occurrences(seen):
    """For each line of code, the moments at which it is executed."""
    moments = {}
    for moment, line in enumerate(seen, start=1):
        moments.setdefault(tuple(line), []).append(moment)
    return moments


def while_the_intent_is_written(moments):
    """Six moments of the first round between its call of `intend` and its next line."""
    from fedaccord.client import app

    lines, first = inspect.getsourcelines(app.train_and_record)
    call = first + next(n for n, line in enumerate(lines) if ".intend(" in line)
    start, end = (moments["client/app.py", line][0] for line in (call, call + 1))
    return [[start + (end - start) * part // 7] for part in range(1, 7)]


def sweep(folder, share, mutant):
    """Kill a site at a share of its lines of code; at share 1, some twice in a row."""
    Coordinator(folder).accord  # noqa: B018  (imports are done once, before any fork)
    fork(lambda: None)
    warm()
    (folder / "dry").mkdir()
    seen = dry(folder / "count", lambda: Coordinator(folder / "dry").go())
    moments, wrong, kills = occurrences(seen), {}, 0
    chance = random.Random(0)
    places = sorted(moments)
    chosen = places if share == 1 else places[chance.randrange(share) :: share]
    plans = [[chance.choice(moments[place])] for place in chosen]
    if share == 1:
        twice = chosen[::3]
        plans += [[moments[p][0], chance.randrange(1, len(seen) // 2)] for p in twice]
    plans = while_the_intent_is_written(moments) if mutant else plans
    for number, at in enumerate(plans):
        kills += len(at)
        if found := site_with_kills(folder / str(number), at, mutant):
            wrong[f"{seen[at[0] - 1]} at {at}"] = found
    return {"places": len(places), "moments": len(seen), "kills": kills, "wrong": wrong}


def sweep_rotation(folder, share):
    """Kill a site that rotates its key at a share of its moments; at share 1, at all."""
    from fedaccord.privacy.ledger import Ledger

    def play():
        with closing(Ledger(folder / "ledger.sqlite", "ward", folder / "head.json")) as ledger:
            ledger.counts("a", 1)
            ledger.rotate()
            ledger.counts("a", 1)
            ledger.rotate()

    seen = dry(folder / "count", play)
    moments, wrong = occurrences(seen), {}
    every = sorted({moment for found in moments.values() for moment in (found[0], found[-1])})
    chosen = range(1, len(seen) + 1) if share == 1 else every[::4]
    for at in chosen:
        if found := rotation(folder / str(at), at):
            wrong[f"{seen[at - 1]} at {at}"] = found
    return {"places": len(moments), "moments": len(seen), "kills": len(chosen), "wrong": wrong}


def warm():
    """Do in this process what is done once in a process: examinations, digests."""
    with tempfile.TemporaryDirectory() as folder:
        Coordinator(Path(folder)).go()


if __name__ == "__main__":
    where, which, part, planted = Path(sys.argv[1]) / sys.argv[2], *sys.argv[2:]
    where.mkdir()
    if which == "rounds":
        import torch

        from fedaccord import registry

        torch.set_num_threads(1)
        Noted = noted_task()
        registry.TASKS["noted"] = "__main__:Noted"
        print(json.dumps(sweep(where, int(part), planted)))
    else:
        print(json.dumps(sweep_rotation(where, int(part))))
