"""The vigil: what a site holds every request to, and what it remembers so that none comes twice."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Message

from fedaccord.accord import Accord
from fedaccord.envelope import (
    COORDINATOR,
    REPLY,
    REQUEST,
    Envelope,
    Refused,
    keys_led_to,
    opened,
    refuse_stale,
    refuse_unexpected,
)
from fedaccord.evidence import canonical_json, digest, write_atomic
from fedaccord.journal import event
from fedaccord.strategies.updates import config_of

log = logging.getLogger("fedaccord.link")
ROUNDS, RUNS = 64, 64  # whose models are remembered; runs with a training that are


@dataclass(frozen=True)
class _Run:
    """What a site remembers of one run.

    Attributes:
        round: the last that it was asked to train in.
        models: digest of the model that it was given, by round.
        split: why it trains no more in this run, or "".
    """

    round: int = 0
    models: dict[str, str] = field(default_factory=dict)
    split: str = ""

    def __post_init__(self) -> None:
        if (type(self.round), type(self.models), type(self.split)) != (int, dict, str):
            raise TypeError


class Vigil:
    """What a site knows of the coordinator's earlier requests, kept on its disk.

    | a request | is |
    |---|---|
    | seen before, or older than one that was answered | refused |
    | of a run, site, accord or round other than its words say | refused |
    | that asks to train for a round before the last one | refused |
    | whose shown replies are for another model than this site was given in that round | refused, |
    | | and so is all training in this run from then on |
    | that shows more replies than there are sites, two of one, or of several rounds | refused |
    | that does not show the replies of all sites | logged: who is absent |
    | of a run that was left for another meanwhile | held to all that was remembered of that run |
    """

    def __init__(self, path: Path, accord: Accord, site: str) -> None:
        """Read what was remembered; a file that cannot be read stops the site, it is not guessed.

        Raises:
            Refused: "state".
        """
        self._path, self._accord, self._site = path, accord, site
        self._handovers: Mapping[str, Sequence[Mapping[str, Any]]] = {}
        self._sent = 0
        self._run = ""
        self.state: dict[str, Any] = {"nonce": 0, "runs": {}}
        if path.exists():
            try:
                said = json.loads(path.read_bytes())
                runs = {str(name): _Run(**known) for name, known in said["runs"].items()}
                self.state = {"nonce": int(said["nonce"]), "runs": runs}
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise Refused(
                    "state",
                    f"{path}: cannot be read. Restore it, or delete it if you have asked "
                    "the coordinator that no old request is about.",
                ) from None

    def begin(self, run: str, handovers: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Take part in a run; what is remembered of others stays."""
        self._handovers, self._run = handovers, run

    @property
    def mine(self) -> _Run:
        """What is remembered of the run that this site takes part in."""
        return self.state["runs"].get(self._run, _Run())

    def next_nonce(self) -> int:
        """Return a number larger than all that this site has used, also before a restart."""
        self._sent = max(self._sent + 1, time.time_ns())
        return self._sent

    def check(self, request: Envelope) -> None:
        """Hold a request's envelope to what this site knows, and remember that it came.

        Raises:
            Refused: it is not one to be answered.
        """
        wanted = {
            "direction": REQUEST,
            "sender": COORDINATOR,
            "recipient": self._site,
            "run": self._run,
            "accord": self._accord.digest,
        }
        refuse_unexpected(request, wanted)
        refuse_stale(request, int(self.state["nonce"]), time.time())
        if request.kind == "train" and request.round < self.mine.round:
            raise Refused(
                "round", f"Round {request.round} is asked for after round {self.mine.round}."
            )
        self.state["nonce"] = request.nonce
        self._keep()

    def hold(
        self, request: Envelope, message: Message, model: str, shown: Sequence[tuple[str, str]]
    ) -> None:
        """Hold a request's content to its envelope, and the model to what other sites signed.

        Args:
            request: the envelope.
            message: what came.
            model: digest of the global model in it.
            shown: replies of the round before, as sites signed them: text and signature.

        Raises:
            Refused: they differ.
        """
        config = config_of(message.content) if message.has_content() else {}
        said = {
            "kind": message.metadata.message_type,
            "run": config.get("run"),
            "round": config.get("server-round", 0),
            "accord": config.get("accord"),
            "model": model,
            "shown": digest([{"text": text, "signature": mark} for text, mark in shown])
            if request.kind == "train"
            else digest([]),
        }
        refuse_unexpected(request, said)
        if request.kind != "train":
            return
        split = self.mine.split or self._split(request, shown)
        models = self.mine.models | ({} if split else {str(request.round): request.model})
        number = self.mine.round if split else request.round
        runs = {name: one for name, one in self.state["runs"].items() if name != self._run}
        runs[self._run] = _Run(number, dict(list(models.items())[-ROUNDS:]), split)
        self.state["runs"] = dict(list(runs.items())[-RUNS:])
        self._keep()
        if split:
            raise Refused("model", split)

    def _split(self, request: Envelope, shown: Sequence[tuple[str, str]]) -> str:
        """Compare the model that others were given with this site's, in the round shown.

        Returns:
            What was found, or "".
        """
        if len(shown) > len(self._accord.roster):
            raise Refused("shown", "More replies are shown than there are sites.")
        seen: dict[str, Envelope] = {}
        for text, signature in shown:
            reply = self._shown(request, text, signature)
            if reply.sender in seen or any(one.round != reply.round for one in seen.values()):
                raise Refused("shown", "Two replies of one site are shown, or of several rounds.")
            seen[reply.sender] = reply
        absent = sorted(set(self._accord.roster) - set(seen))
        if absent and (seen or self.mine.models):
            event(log, "link.not-shown", round=request.round, sites=absent)
        first = next(iter(seen.values()), None)
        if first is None:
            return ""
        mine = self.mine.models.get(str(first.round), first.model)
        for reply in seen.values():
            if reply.model != mine:
                return (
                    f"Site {reply.sender} signed that it was given model {reply.model[:12]} in "
                    f"round {reply.round} of run {request.run}; this site or another was given "
                    f"{mine[:12]}. The coordinator shows different models to different sites; this "
                    "site trains no more in this run."
                )
        return ""

    def _shown(self, request: Envelope, text: str, signature: str) -> Envelope:
        """Read another site's signed reply, which must be by a key that the accord leads to."""
        for site, pin in self._accord.pins.items():
            for key in keys_led_to(pin, site, self._handovers.get(site, [])):
                try:
                    reply = opened(text, signature, key)
                except Refused:
                    continue
                wanted = {"sender": site, "direction": REPLY, "kind": "train"}
                refuse_unexpected(reply, wanted | {"run": request.run, "accord": request.accord})
                if reply.round >= request.round:
                    raise Refused("shown", "A shown reply is of a later round.")
                return reply
        raise Refused("shown", "A shown reply is signed by no site of the accord.")

    def _keep(self) -> None:
        runs = {name: asdict(one) for name, one in self.state["runs"].items()}
        write_atomic(self._path, canonical_json(self.state | {"runs": runs}) + "\n")
