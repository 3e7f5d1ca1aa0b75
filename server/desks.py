"""The desks: what the coordinator holds of each site between two calls, and what it lets in."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from fedaccord.accord import Accord
from fedaccord.envelope import (
    AHEAD,
    COORDINATOR,
    REPLY,
    Refused,
    Signed,
    opened,
    refuse_stale,
    refuse_unexpected,
    seal,
)
from fedaccord.keys import SigningKey
from fedaccord.objects import Store, refuse_oversized
from fedaccord.server.desk import OFTEN, Desk, Letter, Over, Reply
from fedaccord.server.members import Members
from fedaccord.server.watch import Watch

PATIENCE = 1_000  # requests of the past whose replies are still let in, a site
MINUTE = 60.0  # seconds in which a site may join `OFTEN` times
INCIDENTS = 200  # kinds of incident in one round's record; more are counted together


class Desks:
    """One desk a site; every call may come from another thread."""

    def __init__(
        self,
        accord: Accord,
        run: str,
        members: Members,
        key: SigningKey,
        store: Store,
        most: int,
        watch: Watch,
    ) -> None:
        """Open the desks.

        Args:
            accord: with the sites' keys.
            run: the run's id.
            members: who may come in.
            key: the coordinator's.
            store: takes the replies' bytes.
            most: bytes that a reply may have.
            watch: is told what happens.
        """
        self.accord, self.run, self.members, self.key = accord, run, members, key
        self.store, self.most, self.watch = store, most, watch
        self.changed = threading.Condition()
        self.closed = ""
        self._fault: OSError | None = None
        self._desks = {site: Desk() for site in accord.roster}
        self._nonce = 0
        self._shown: dict[int, dict[str, Signed]] = {}  # train replies by round and site
        self._incidents: Counter[tuple[str, str]] = Counter()

    def sit(self, site: str, session: str, nonce: int) -> str:
        """Begin a site's session; an older one is over.

        Returns:
            The session that ended, or "".

        Raises:
            Refused: "nonce": the envelope of this join was seen before; "session": it joins again
                and again, as two processes with the same kit do.
        """
        with self.changed:
            desk, now = self._desks[site], time.monotonic()
            if nonce <= desk.nonce:
                raise Refused("nonce", "The envelope was seen before, or came out of order.")
            if len(desk.joins) == OFTEN and now - desk.joins[0] < MINUTE:
                raise Refused(
                    "session",
                    f"Site {site} joined {OFTEN} times in {MINUTE:.0f} s. If two processes run "
                    "with its kit, stop one.",
                )
            desk.joins.append(now)
            before, desk.session, desk.nonce = desk.session, session, nonce
            desk.delivered, desk.seen = set(), now
            self.changed.notify_all()
            return before

    def rise(self, site: str, session: str) -> bool:
        """End a session; tell whether it was the one that counts."""
        with self.changed:
            desk = self._desks[site]
            if desk.session != session:
                return False
            desk.session = ""
            self.changed.notify_all()
            return True

    def heard(self, site: str, session: str) -> None:
        """Note that a site is there.

        Raises:
            Over: another has begun since.
            Refused: "session": it is another site's.
        """
        with self.changed:
            desk = self._desks[site]
            others = {one.session for name, one in self._desks.items() if name != site}
            if session and session in others:
                raise Refused("session", "The session is of another site.")
            if not session or desk.session != session or self.closed:
                raise Over("session", "The session is over. Join again.")
            desk.seen = time.monotonic()

    def present(self) -> list[str]:
        """List the sites that have a session and were heard of lately, in order."""
        now = time.monotonic()
        with self.changed:
            return [
                site
                for site, desk in self._desks.items()
                if desk.session and now - desk.seen < self.watch.silence
            ]

    def standing(self) -> dict[str, dict[str, Any]]:
        """Say of each site whether it is there, and what is on its way to or from it."""
        here, now = self.present(), time.monotonic()
        with self.changed:
            return {
                site: {
                    "here": site in here,
                    "heard": round(now - desk.seen, 1) if desk.seen > 0 else None,
                    "asked": [
                        letter.request.kind
                        for letter in desk.letters.values()
                        if letter.parcel is not None
                    ],
                }
                for site, desk in self._desks.items()
            }

    def put(self, letter: Letter) -> None:
        """Lay down a request; it is delivered as soon as its site is there."""
        with self.changed:
            desk = self._desks[letter.site]
            desk.letters[letter.request.message] = letter
            while len(desk.letters) > PATIENCE:
                self._drop(desk, next(iter(desk.letters)))
            for other in self._desks.values():  # of sites that are away, too
                self._let_late_go(other)
            self.changed.notify_all()
        self.watch.request(letter.site, letter.request, letter.parcel.size if letter.parcel else 0)

    def _let_late_go(self, desk: Desk) -> None:
        """Forget the objects of requests whose time is up: a slot would be spent for nothing."""
        now = time.monotonic()
        for letter in desk.letters.values():
            if letter.end < now:
                letter.parcel = None

    def _drop(self, desk: Desk, mark: str) -> None:
        desk.letters.pop(mark, None)
        for replies in (desk.arriving, desk.arrived):
            reply = replies.pop(mark, None)
            if reply is not None:
                self.store.let_go(reply.sizes)

    def letter(self, site: str, mark: str) -> Letter:
        """Find a request that may still be fetched.

        Raises:
            Refused: "message": there is none, or it is too late for it.
        """
        with self.changed:
            letter = self._desks[site].letters.get(mark)
            if letter is None or letter.parcel is None:
                raise Refused("message", "There is no such request, or its time is up.")
            return letter

    def next_letter(
        self, site: str, session: str, active: Callable[[], bool]
    ) -> Iterator[Letter | None]:
        """Give back requests for a site, as they come; None at least once a second.

        Args:
            site: whose.
            session: it ends when this is over,
            active: or when this says so.
        """
        while active():
            with self.changed:
                desk = self._desks[site]
                if desk.session != session or self.closed:
                    return
                letter = self._undelivered(desk)
                if letter is None:
                    self.changed.wait(1.0)
                else:
                    desk.delivered.add(letter.request.message)
            yield letter

    def _undelivered(self, desk: Desk) -> Letter | None:
        self._let_late_go(desk)
        for mark, letter in desk.letters.items():
            if letter.parcel is not None and mark not in desk.delivered:
                return letter
        return None

    def next_nonce(self) -> int:
        """Return a number larger than all before it, also those of an earlier process."""
        with self.changed:
            self._nonce = max(self._nonce + 1, time.time_ns())
            return self._nonce

    def sealed(self, letter: Letter) -> Signed:
        """Seal a request for one delivery."""
        left = min(max(0.0, letter.end - time.monotonic()), AHEAD)
        fresh = replace(letter.request, nonce=self.next_nonce(), expires=time.time() + left)
        return seal(fresh, self.key)

    def expected(self, site: str, mark: str) -> dict[str, int]:
        """Return the sizes of the objects that a site may push for a reply that it offered.

        Raises:
            Refused: "message": it offered none.
        """
        with self.changed:
            reply = self._desks[site].arriving.get(mark)
            if reply is None:
                raise Refused("message", "The reply was not offered, or is here already.")
            return reply.sizes

    def offer(self, site: str, signed: Signed, objects: Iterable[tuple[str, int]]) -> Reply | None:
        """Take in a site's signed reply, before its objects.

        Args:
            site: whose session it came over.
            signed: the envelope.
            objects: id and size of each.

        Returns:
            The reply, whose objects are to be pushed; None if it is known already.

        Raises:
            Refused: it is not from this site, not for this run, round or request, not new.
        """
        envelope = opened(signed.text, signed.signature, self.members.key(site))
        with self.changed:
            desk = self._desks[site]
            wanted = {
                "run": self.run,
                "sender": site,
                "recipient": COORDINATOR,
                "direction": REPLY,
                "accord": self.accord.digest,
            }
            refuse_unexpected(envelope, wanted)
            refuse_stale(envelope, desk.nonce, time.time())
            desk.nonce = envelope.nonce
            if envelope.message in desk.answered:
                return None
            letter = desk.letters.get(envelope.message)
            if letter is None:
                raise Refused("message", "The reply answers nothing that was asked of this site.")
            asked = {name: getattr(letter.request, name) for name in ("round", "kind", "model")}
            refuse_unexpected(envelope, asked | {"shown": ""})
            sizes = refuse_oversized(objects, envelope.body, self.most)
            before = desk.arriving.get(envelope.message)
            reply = Reply(signed, envelope, sizes)
            self.store.hold(sizes)
            if before is not None:  # what arrived of it stays
                self.store.let_go(before.sizes)
            desk.arriving[envelope.message] = reply
            return reply

    def arrived(self, site: str, mark: str) -> bool:
        """Note that a reply's objects may all be there; tell whether they are."""
        with self.changed:
            desk = self._desks[site]
            reply = desk.arriving.get(mark)
            if reply is None:
                return mark in desk.answered
            if any(name not in self.store for name in reply.sizes):
                return False
            del desk.arriving[mark]
            desk.answered[mark] = None
            while len(desk.answered) > PATIENCE:
                desk.answered.pop(next(iter(desk.answered)))
        try:
            self.watch.reply(site, reply.envelope, sum(reply.sizes.values()))
        except OSError:  # a full disk: the site may offer it again
            with self.changed:
                desk.answered.pop(mark, None)
                desk.arriving[mark] = reply
            raise
        with self.changed:  # on record before anybody uses it
            if mark not in desk.letters:  # meanwhile it was one of too many
                self.store.let_go(reply.sizes)
                return True
            desk.letters[mark].parcel = None
            if reply.envelope.kind == "train":
                self._shown.setdefault(reply.envelope.round, {})[site] = reply.signed
            desk.arrived[mark] = reply
            self.changed.notify_all()
        return True

    def take(self, mark: str) -> tuple[Letter, Reply] | None:
        """Give back a request and its reply, if that has arrived, and forget both.

        Raises:
            OSError: of the disk, in whichever thread it was (see `fail`).
        """
        with self.changed:
            if self._fault is not None:
                raise self._fault
            for desk in self._desks.values():
                if mark in desk.arrived:
                    return desk.letters.pop(mark), desk.arrived.pop(mark)
        return None

    def fail(self, fault: OSError) -> None:
        """Have the run end at once, since what arrives can no longer be kept."""
        with self.changed:
            self._fault = fault
            self.changed.notify_all()

    def done(self, reply: Reply) -> None:
        """Let go of a reply's bytes."""
        with self.changed:
            self.store.let_go(reply.sizes)

    def shown(self, number: int) -> list[Signed]:
        """List what sites signed of their replies in the last round before one that had any."""
        with self.changed:
            before = max((n for n in self._shown if n < number), default=0)
            return [signed for _, signed in sorted(self._shown.get(before, {}).items())]

    def note(self, site: str, what: str, reason: str) -> None:
        """Keep an incident for the round's record."""
        self.watch.refused(site, reason, what)
        self._count(site, what)

    def _count(self, site: str, what: str) -> None:
        with self.changed:
            mark = (site, what if len(self._incidents) < INCIDENTS else "further incidents")
            self._incidents[mark] += 1

    def ended(self, site: str, why: str, counts: bool) -> None:
        """Note that a session ended; one that broke off is an incident of the round."""
        self.watch.left(site, why, len(self.present()))
        if counts and not self.closed:
            self._count(site, f"its session broke off: {why}")

    def notes(self, number: int) -> dict[str, Any]:
        """What a round's record says of the link: incidents, and what sites signed of their
        replies.
        """  # noqa: D205
        with self.changed:
            incidents, self._incidents = self._incidents, Counter()
            signed = self._shown.get(number, {})
            for old in [n for n in self._shown if n < number]:
                del self._shown[old]
        listed = [
            {"site": site, "what": what, "count": count}
            for (site, what), count in sorted(incidents.items())
        ]
        envelopes = {site: words.to_json() for site, words in sorted(signed.items())}
        return {"link": listed, "envelopes": envelopes}

    def take_up(self, envelopes: Mapping[int, Mapping[str, Mapping[str, str]]]) -> None:
        """Show what sites signed before this process began, from the run's records by round."""
        for number, found in envelopes.items():
            self._shown[number] = {
                site: Signed(str(said["text"]), str(said["signature"]))
                for site, said in found.items()
            }

    def close(self, why: str) -> None:
        """End every session."""
        with self.changed:
            self.closed = why
            self.changed.notify_all()
