"""The round: eight named steps, from the invitation to the decision to go on."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedaccord.accord import Accord
from fedaccord.fairness.federation import audit_sites
from fedaccord.models.build import agreed
from fedaccord.privacy.plan import Plan
from fedaccord.runs import RunFolder
from fedaccord.server import admission, averages, checkpoint, distillation, gates
from fedaccord.server.admission import Place
from fedaccord.server.gates import Verdict, Weights
from fedaccord.server.heads import Heads
from fedaccord.tasks import Task


@dataclass
class Coordinator:
    """The coordinator's state between rounds, and one method for each step of a round."""

    accord: Accord
    task: Task
    grid: Grid
    strategy: Strategy
    folder: RunFolder
    places: list[Place]
    plans: dict[str, Plan | None]
    heads: Heads
    model: Weights
    student: torch.nn.Module | None
    teacher: torch.nn.Module | None = None  # a model of the global architecture, made when needed
    averaged: Weights | None = None  # over rounds, where the accord wants it
    number: int = 0
    finished: int = 0
    mechanism: dict[str, Any] | None = None  # what the round's noised mean says of itself

    @property
    def client_level(self) -> bool:
        """Whether updates arrive without noise, so that only their noised mean may be used."""
        return self.accord.privacy.enabled and self.accord.privacy.unit == "client"

    def run(self) -> str:
        """Run rounds until one decides to stop; return why it did."""
        while True:
            began = time.monotonic()
            self.number += 1
            drawn = self.invite()
            replies = self.train(drawn)
            verdicts = self.gate(drawn, replies)
            accepted = self.aggregate(verdicts)
            lesson = self.distil(self.teachers(verdicts)) if accepted else None
            audit = self.audit() if accepted else None
            self.record(drawn, verdicts, accepted, lesson, audit, time.monotonic() - began)
            if stop := self.decide(audit):
                return stop

    def invite(self) -> list[Place]:
        """Step 1: draw the round's sites, from the seed, among those with a slot left."""
        able = [place for place in self.places if place.slots > 0]
        wanted = self.accord.rounds.sites_per_round or len(able)
        rng = random.Random(f"{self.accord.seed}/invite/{self.number}")
        drawn = rng.sample(able, min(wanted, len(able)))
        return sorted(drawn, key=lambda place: place.site)

    def train(self, drawn: list[Place]) -> list[Message]:
        """Step 2: let the strategy address the drawn sites, and collect what they release."""
        for place in drawn:  # a slot is gone once it is asked for, answer or not
            place.slots -= 1
        view = admission.DrawnGrid(self.grid, [place.node for place in drawn])
        messages = self.strategy.configure_train(
            self.number,
            gates.to_arrays(self.model),
            ConfigRecord(self._about() | {"heads": self.heads.show(self.number)}),
            view,
        )
        return list(self.grid.send_and_receive(messages, timeout=self.accord.rounds.timeout))

    def gate(self, drawn: list[Place], replies: list[Message]) -> list[tuple[Verdict, Message]]:
        """Step 3: drop what is malformed or not from who was asked; record why."""
        sites = {place.node: place.site for place in drawn}
        bound = None if self.client_level else self.accord.strategy.max_update_norm
        found = gates.gate(replies, sites, self.folder.id, self.number, self.model, bound)
        return [(self._heard(verdict, reply), reply) for verdict, reply in found]

    def _heard(self, verdict: Verdict, reply: Message) -> Verdict:
        """Drop an update whose site shows a ledger that went back."""
        fault = "" if verdict.reason else self.heads.hear(verdict.site, admission.words(reply))
        return Verdict(verdict.site, fault) if fault else verdict

    def aggregate(self, verdicts: list[tuple[Verdict, Message]]) -> list[str]:
        """Step 4: give the accepted updates, with the roster's weights, to the strategy.

        Returns the sites whose updates are in the new model; none where the round failed, and
        then the model stays what it was.
        """
        weights, self.mechanism = self.weights(), None
        good = [(verdict, reply) for verdict, reply in verdicts if not verdict.reason]
        if len(good) < self.accord.rounds.min_sites:
            return []
        replies = [gates.weighted(v, reply, weights[v.site]) for v, reply in good]
        arrays, said = self.strategy.aggregate_train(self.number, replies)
        if arrays is None:
            return []
        self.model = {
            name: np.asarray(value, self.model[name].dtype)
            for name, value in gates.to_weights(arrays).items()
        }
        self.mechanism = dict(said) if self.client_level and said else None
        self.finished += 1
        if self.accord.strategy.averaging:
            self.averaged = averages.follow(
                self.averaged, self.model, self.accord.strategy.averaging, self.finished
            )
        return [verdict.site for verdict, _ in good]

    @property
    def shown(self) -> Weights:
        """The model that is audited and deployed: the round's, or the average over rounds."""
        return self.model if self.averaged is None else self.averaged

    def weights(self) -> dict[str, int]:
        """Each site's weight in the mean: its declared size, or 1 under client-level privacy."""
        return {site: 1 if self.client_level else n for site, n in self.accord.roster.items()}

    def teachers(self, verdicts: list[tuple[Verdict, Message]]) -> list[Weights]:
        """Choose who teaches: the site models; under client-level privacy the noised mean alone."""
        if self.client_level:
            return [self.model]
        return [v.weights for v, _ in verdicts if not v.reason and v.weights is not None]

    def distil(self, teachers: list[Weights]) -> dict[str, float] | None:
        """Step 5: teach the student what the teachers agree on, on public inputs."""
        settings = self.accord.distillation
        if self.student is None or self.finished % settings.every:
            return None
        seed = self.accord.seed
        proxy = torch.from_numpy(self.task.public(settings.proxy_rows, seed))
        if self.teacher is None:
            self.teacher = agreed(self.accord.model, self.task.spec, seed)
        targets = distillation.teach(self.teacher, teachers, proxy)
        before, after = distillation.distil(
            self.student, proxy, targets, settings, seed + self.number
        )
        return {"divergence_before": before, "divergence_after": after}

    def audit(self) -> dict[str, Any]:
        """Step 6: have every site count both models' predictions by group, and work out figures."""
        content = RecordDict({"config": ConfigRecord(self._about())})
        content["model"] = gates.to_arrays(self.shown)
        if self.student is not None:
            content["student"] = gates.to_arrays(checkpoint.weights_of(self.student))
        nodes = [place.node for place in self.places]
        timeout = self.accord.rounds.timeout
        replies = admission.ask(self.grid, nodes, "evaluate", content, timeout)
        rules, classes = self.accord.fairness, len(self.task.spec.classes)
        groups = {name: self.task.spec.attributes[name] for name in rules.attributes}
        shapes = {name: (len(names), classes, classes) for name, names in groups.items()}
        missing: dict[str, str] = {}
        tables: dict[str, dict[str, Any]] = {section: {} for section in content.array_records}
        for place in self.places:
            if place.node not in replies:
                missing[place.site] = "no answer"
                continue
            missing[place.site], counts = gates.read_counts(
                replies[place.node], place.site, self.folder.id, self.number, shapes, tables.keys()
            )
            for section in tables.keys() & counts.keys():
                tables[section][place.site] = counts[section]
        out: dict[str, Any] = {"not_counted": {s: why for s, why in missing.items() if why}}
        for section, table in tables.items():
            figures = audit_sites(table, groups, rules.min_group, rules.confidence)
            out[section] = {"counts": table, "figures": figures}
        return out

    def record(
        self,
        drawn: list[Place],
        verdicts: list[tuple[Verdict, Message]],
        accepted: list[str],
        lesson: dict[str, float] | None,
        audit: dict[str, Any] | None,
        seconds: float,
    ) -> None:
        """Step 7: checkpoint atomically, then append the round to the evidence."""
        student = None if self.student is None else checkpoint.weights_of(self.student)
        checkpoint.save(self.folder.path, self.number, self.shown, student)
        replies: dict[str, dict[str, Any]] = {}
        for verdict, _ in verdicts:
            said: dict[str, Any] = {"accepted": not verdict.reason, "reason": verdict.reason}
            said |= accepted_update(verdict)
            first = replies.setdefault(verdict.site, said)
            if first is not said:  # the first reply counts; that there were more is on record
                first["further"] = [*first.get("further", []), verdict.reason]
        for place in drawn:
            replies.setdefault(place.site, {"accepted": False, "reason": "no answer"})
        self.folder.append(
            {
                "id": f"round-{self.number}",
                "kind": "round",
                "round": self.number,
                "invited": [place.site for place in drawn],
                "replies": replies,
                "aggregated": accepted,
                "weights": {site: self.weights()[site] for site in accepted},
                "model": checkpoint.weights_digest(self.shown),
                "student": checkpoint.weights_digest(student) if student else None,
                "distillation": lesson,
                "audit": audit,
                "epsilon": self._epsilon(),
                "heads": self.heads.record(),
                "seconds": round(seconds, 3),
            }
            | ({"mechanism": self.mechanism} if self.client_level else {})
        )

    def decide(self, audit: dict[str, Any] | None) -> str:
        """Step 8: go on (""), or stop and say why; either is on record."""
        reason = self._breach(audit) or self._reached(audit) or self._end()
        self.folder.append(
            {
                "id": f"decision-{self.number}",
                "kind": "decision",
                "round": self.number,
                "stop": bool(reason),
                "reason": reason or "go on",
            }
        )
        return reason

    def _breach(self, audit: dict[str, Any] | None) -> str:
        """Say which fairness rule the accord stops for, or "" if none."""
        rule = self.accord.fairness
        if audit is None or rule.max_parity_difference is None or not rule.stop_on_breach:
            return ""
        for section, name in product(("model", "student"), rule.attributes):
            if section not in audit:
                continue
            figure = audit[section]["figures"]["attributes"][name]["all"]
            value = figure["demographic_parity_difference"]["value"]
            if value is not None and value > rule.max_parity_difference:
                return (
                    f"fairness rule: the demographic parity difference of the {section} by {name}, "
                    f"{value:.3f}, is above {rule.max_parity_difference:g}"
                )
        return ""

    def _reached(self, audit: dict[str, Any] | None) -> str:
        """Say that the model is as accurate as the accord asked, or "" if not."""
        target = self.accord.rounds.target_accuracy
        mean = None if audit is None else audit["model"]["figures"]["accuracy"]["mean"]
        if target is None or mean is None or mean < target:
            return ""
        return f"target reached: mean accuracy {mean:.3f} is at least {target:g}"

    def _end(self) -> str:
        """Say why there is no further round, or "" if there is one."""
        planned = self.accord.rounds.rounds
        if self.finished >= planned:
            return f"rounds done: {planned} of {planned}"
        able = sum(place.slots > 0 for place in self.places)
        if able < self.accord.rounds.min_sites:
            return (
                f"budget: {able} sites have a reserved round left, after {self.finished} of "
                f"{planned} rounds"
            )
        return ""

    def _epsilon(self) -> dict[str, Any]:
        """Each site's used rounds, what they have spent (see `odometer`), and what is reserved."""
        out: dict[str, Any] = {}
        for place in self.places:
            plan = self.plans[place.site]
            used = int(place.entry["rounds"]) - place.slots
            private = plan is not None
            out[place.site] = {
                "rounds_used": used,
                "odometer": plan.odometer(used) if plan else "infinite",
                "reserved": place.entry["epsilon"] if private else "infinite",
            }
        return out

    def _about(self) -> dict[str, Any]:
        return {
            "run": self.folder.id,
            "accord": self.accord.digest,
            "server-round": self.number,
        }


def accepted_update(verdict: Verdict) -> dict[str, Any]:
    """Describe an accepted update: its length, and the hash that its site's RELEASE has as well.

    Nothing where it has no norm: an update without noise leaves no mark on the record.
    """
    if verdict.weights is None or verdict.norm is None:
        return {}
    return {"update_norm": verdict.norm, "sha256": checkpoint.weights_digest(verdict.weights)}
