"""The round: eight named steps, from the invitation to the decision to go on."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, RecordDict

from fedaccord.accord import Accord
from fedaccord.fairness.federation import audit_sites
from fedaccord.models.build import agreed
from fedaccord.privacy.plan import Plan, plan_for
from fedaccord.runs import RunFolder
from fedaccord.server import averages, checkpoint, decide, distillation, gates, records
from fedaccord.server.admission import DrawnGrid, Place, words
from fedaccord.server.checkpoint import Checkpoint
from fedaccord.server.distillation import Lesson
from fedaccord.server.door import JOIN, RESERVE, Door
from fedaccord.server.gates import Verdict
from fedaccord.server.heads import Heads
from fedaccord.server.mail import Mail
from fedaccord.strategies.driver import Driver
from fedaccord.strategies.updates import (
    Update,
    Weights,
    arrays_of,
    config_of,
    moved,
    to_arrays,
)
from fedaccord.tasks import Task

LOOK = 1.0  # seconds between two looks for sites, while too few are there


@dataclass
class Coordinator:
    """The coordinator's state between rounds, and one method for each step of a round."""

    accord: Accord
    task: Task
    mail: Mail
    driver: Driver
    folder: RunFolder
    places: list[Place]
    plans: dict[str, Plan | None]
    heads: Heads
    door: Door
    model: Weights
    student: torch.nn.Module | None
    teacher: torch.nn.Module | None = None  # a model of the global architecture, made when needed
    averaged: Weights | None = None  # over rounds, where the accord wants it
    number: int = 0
    finished: int = 0
    missing: int = 0  # rounds in a row in which too few sites were there
    begun: int = 0  # the round that an earlier process may have begun; nobody knows with whom
    # Of the round under way:
    verdicts: list[Verdict] = field(default_factory=list)
    late: list[dict[str, str]] = field(default_factory=list)
    wants: str = ""  # what the strategy asked of the sites besides updates
    lesson: Lesson | None = None
    failed: str = ""
    mechanism: dict[str, Any] | None = None  # what the round's noised mean says of itself

    @property
    def client_level(self) -> bool:
        """Whether updates arrive without noise, so that only their noised mean may be used."""
        return self.accord.privacy.enabled and self.accord.privacy.unit == "client"

    def run(self) -> str:
        """Run rounds until one decides to stop; return why it did."""
        while True:
            began = self.mail.clock.now()
            self.number += 1
            drawn = self.invite()
            replies = self.train(drawn)
            updates = self.gate(drawn, replies)
            accepted = self.aggregate(updates)
            lesson = self.distil() if accepted else None
            audit = self.audit(drawn) if accepted else None
            self.record(drawn, accepted, lesson, audit, self.mail.clock.now() - began)
            if stop := self.decide(audit):
                return stop

    def invite(self) -> list[Place]:
        """Step 1: draw the round's sites, from the seed, among those here with a slot left.

        Nobody is asked, and no slot is used, where too few are here for the round to count.
        """
        fewest, timeout = self.accord.rounds.min_sites, self.accord.rounds.timeout
        self.late = []
        end = self.mail.clock.now() + timeout
        while True:
            self._welcome()
            self.door.knock()
            here = [p for p in self.places if p.slots > 0 and not self.door.away(p)]
            able = sum(place.slots > 0 for place in self.places)
            if len(here) >= fewest or able < fewest or self.mail.clock.now() >= end:
                break
            self.mail.clock.sleep(LOOK)
        self.missing = 0 if len(here) >= fewest else self.missing + 1
        if self.missing:
            return []
        wanted = self.accord.rounds.sites_per_round or len(here)
        rng = random.Random(f"{self.accord.seed}/invite/{self.number}")
        drawn = rng.sample(here, min(wanted, len(here)))
        return sorted(drawn, key=lambda place: place.site)

    def _welcome(self) -> None:
        """Take in what came late: sites that are back or new, and replies of earlier rounds."""
        names = {place.node: place.site for place in self.places}
        for node, about, reply in self.mail.late():
            if about not in (JOIN, RESERVE):
                self.late.append({"site": names.get(node, f"node {node}"), "answers": about})
                continue
            place = self.door.hear(node, about, words(reply))
            if place is not None and place.site in self.plans:
                record = records.back(place.site, self.number)
                self.folder.append(record)
            elif place is not None:
                self.plans[place.site] = plan_for(self.accord, place.site)
                self.folder.append(records.plan(place, self.plans[place.site]))

    def train(self, drawn: list[Place]) -> Iterator[Message]:
        """Step 2: let the strategy address the drawn sites; give back replies as they arrive."""
        for place in self.places:  # a slot is gone once it is asked for, answer or not
            if place in drawn or self.number == self.begun:
                place.slots = max(0, place.slots - 1)
        if not drawn:
            return iter(())
        messages = self.driver.ask(
            self.number,
            self.model,
            ConfigRecord(self._about() | self.heads.words(self.number)),
            DrawnGrid(self.mail.grid, {place.node: place.site for place in drawn}),
        )
        asked = config_of(messages[0].content) if messages else {}
        self.wants = str(asked.get("wants", ""))
        timeout = self.accord.rounds.timeout
        return self.mail.exchange(messages, timeout, f"round {self.number}")

    def gate(self, drawn: list[Place], replies: Iterable[Message]) -> Iterator[Update]:
        """Step 3: drop what is malformed or not from who was asked; keep on record why."""
        sites = {place.node: place.site for place in drawn}
        bound = None if self.client_level else self.accord.strategy.max_update_norm
        weights, self.verdicts, self.lesson = self.weights(), [], self._lesson(len(drawn))
        encoding = self.accord.strategy.encoding
        found = gates.gate(
            replies, sites, self.folder.id, self.number, self.model, bound, encoding, self.wants
        )
        for verdict, reply in found:
            fault = "" if verdict.reason else self.heads.hear(verdict.site, words(reply))
            if fault:  # the site shows a ledger that went back
                verdict = Verdict(verdict.site, fault)
            self.verdicts.append(verdict.without_change())
            if verdict.change is None:
                continue
            if self.lesson is not None and not self.client_level:
                self.lesson.hear(moved(self.model, verdict.change))
            yield Update(verdict.site, verdict.change, weights[verdict.site], dict(verdict.metrics))

    def aggregate(self, updates: Iterable[Update]) -> list[str]:
        """Step 4: give the accepted updates, with the roster's weights, to the strategy.

        Returns the sites whose updates are in the new model; none where the round failed, and
        then the model stays what it was.
        """
        self.mechanism = None
        outcome = self.driver.combine(
            self.number,
            self.model,
            updates,
            bound=self.accord.strategy.max_update_norm,
            heaviest=max(self.weights().values()),
            quorum=self.accord.rounds.min_sites,
        )
        self.failed = outcome.fault
        if outcome.model is None:
            return []
        self.model = outcome.model
        self.mechanism = dict(outcome.said) if self.client_level and outcome.said else None
        self.finished += 1
        if self.accord.strategy.averaging:
            self.averaged = averages.follow(
                self.averaged, self.model, self.accord.strategy.averaging, self.finished
            )
        return list(outcome.sites)

    @property
    def shown(self) -> Weights:
        """The model that is audited and deployed: the round's, or the average over rounds."""
        return self.model if self.averaged is None else self.averaged

    def weights(self) -> dict[str, int]:
        """Each site's weight in the mean: its declared size, or 1 under client-level privacy."""
        return {site: 1 if self.client_level else n for site, n in self.accord.roster.items()}

    def _lesson(self, models: int) -> Lesson | None:
        """Prepare for the round's lesson, if one is due once the round has counted."""
        settings = self.accord.distillation
        if self.student is None or (self.finished + 1) % settings.every:
            return None
        proxy = torch.from_numpy(self.task.public(settings.proxy_rows, self.accord.seed))
        if self.teacher is None:
            self.teacher = agreed(self.accord.model, self.task.spec, self.accord.seed)
        return Lesson(self.teacher, proxy, max(1, models))

    def distil(self) -> dict[str, float] | None:
        """Step 5: teach the student what the site models agree on, on public inputs.

        Under client-level privacy the noised mean is the only teacher.
        """
        if self.lesson is None or self.student is None:
            return None
        if self.client_level:
            self.lesson.hear(self.model)
        if not self.lesson.heard:
            return None
        before, after = distillation.distil(
            self.student,
            self.lesson.proxy,
            self.lesson.targets(),
            self.accord.distillation,
            self.accord.seed + self.number,
        )
        return {"divergence_before": before, "divergence_after": after}

    def audit(self, drawn: list[Place]) -> dict[str, Any]:
        """Step 6: have every site count both models' predictions by group, and work out figures.

        Who was silent in this round, or is away, is not waited for once more.
        """
        content = RecordDict({"config": ConfigRecord(self._about())})
        content["model"] = to_arrays(self.shown)
        if self.student is not None:
            content["student"] = to_arrays(checkpoint.weights_of(self.student))
        silent = {place.site for place in drawn} - {verdict.site for verdict in self.verdicts}
        missing = {p.site: "no answer" for p in self.places if p.site in silent}
        missing |= {p.site: "away" for p in self.places if self.door.away(p)}
        nodes = [place.node for place in self.places if place.site not in missing]
        replies = self.mail.ask(nodes, "evaluate", content, self.accord.rounds.timeout)
        rules, classes = self.accord.fairness, len(self.task.spec.classes)
        groups = {name: self.task.spec.attributes[name] for name in rules.attributes}
        shapes = {name: (len(names), classes, classes) for name, names in groups.items()}
        tables: dict[str, dict[str, Any]] = {section: {} for section in arrays_of(content)}
        for place in self.places:
            if place.node not in replies:
                missing.setdefault(place.site, "no answer")
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
        accepted: list[str],
        lesson: dict[str, float] | None,
        audit: dict[str, Any] | None,
        seconds: float,
    ) -> None:
        """Step 7: checkpoint atomically, then append the round to the evidence."""
        answered = {verdict.site for verdict in self.verdicts}
        for place in drawn:
            place.misses = 0 if place.site in answered else place.misses + 1
        student = {} if self.student is None else checkpoint.weights_of(self.student)
        invited = [place.site for place in drawn]
        record: dict[str, Any] = {
            "id": f"round-{self.number}",
            "kind": "round",
            "round": self.number,
            "invited": invited,
            "replies": records.replies(self.verdicts, invited),
            "strangers": records.strangers(self.verdicts, invited),
            "late": self.late,
            "away": [place.site for place in self.places if self.door.away(place)],
            "failed": self.failed,
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
        record = self.mail.notes(self.number) | record  # a carrier replaces nothing
        if self.client_level:
            record["mechanism"] = self.mechanism
        state = Checkpoint(
            self.number,
            model=self.model,
            averaged=self.averaged or {},
            student=student,
            strategy=self.driver.state(),
            heads=self.heads.to_json(),
            record=record,
        )
        checkpoint.save(self.folder.path, state)
        self.folder.append(record)

    def decide(self, audit: dict[str, Any] | None) -> str:
        """Step 8: go on (""), or stop and say why; either is on record."""
        able = sum(place.slots > 0 for place in self.places)
        reason = (
            decide.breach(self.accord, audit)
            or decide.reached(self.accord, audit)
            or decide.ended(self.accord, self.finished, able, self.missing)
        )
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
