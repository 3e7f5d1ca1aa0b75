"""The command provision: one kit a site and one for the coordinator, from an accord."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedaccord.errors import KitError

if TYPE_CHECKING:
    from fedaccord.accord import Accord
    from fedaccord.enrolment import Request
    from fedaccord.provision import Kits

app = typer.Typer()

FOR_TRYING_OUT = (
    "For trying out only: all keys were made in one place, so whoever has this folder can act as "
    "any site. Never use it with records of people."
)


@app.command()
def provision(
    accord: Annotated[str, typer.Argument(help="The accord: a TOML file, or a bundled one.")],
    out: Annotated[Path, typer.Option(help="The folder of all kits.")],
    address: Annotated[
        list[str] | None,
        typer.Option(help="Where sites reach the coordinator: fed.example.org:8443; repeatable."),
    ] = None,
    request: Annotated[
        list[Path] | None,
        typer.Option(help="A site's request.json; else those in OUT/requests; repeatable."),
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="A certificate holds.")] = 397,
    demo: Annotated[
        bool, typer.Option("--demo", help="Make the sites' keys here too: for trying out only.")
    ] = False,
) -> None:
    """Make the kits of an accord, or add to them: sites, certificates, the accord with all keys."""
    from fedaccord import accord as accords
    from fedaccord import membership, provision, tasks
    from fedaccord.kit import host_and_port

    file, agreed, now = accords.find(accord), accords.load(accord), datetime.now(UTC)
    tasks.check_fits(agreed, tasks.task_of(agreed, file.parent))
    try:
        for one in address or []:
            host_and_port(one)
    except ValueError as fault:
        raise KitError(f"--address {fault}") from None
    kits = provision.Kits(out)
    addresses = address or ([provision.DEMO_ADDRESS] if demo and not _there(kits) else [])
    for name in provision.lay(kits, agreed, addresses, days, now, demo):
        print(f"{name}: new kit in {out / name}")
    if not demo:
        _policies(kits, agreed)
    issued = []
    for asked in _requests(kits, request or [], agreed, demo):
        words, changed = membership.grant(kits, agreed, asked, days, now)
        issued += [asked.site] if changed else []
        if changed or request:
            print(words)
    lacking = provision.missing(kits, agreed)
    if lacking:
        print(_waits(out, lacking))
        return
    final, new = provision.finish(kits, agreed, file)
    if demo:
        _approve(kits, final)
    print(_granted(kits, final, new, issued, demo))


def _there(kits: Kits) -> bool:
    return (kits.coordinator / "coordinator.toml").exists()


def _policies(kits: Kits, agreed: Accord) -> None:
    """Give each site that has no policy yet one that takes part in nothing."""
    from fedaccord.client import policy, policy_file

    for name in agreed.roster:
        path = kits.site(name) / name / policy.FILE
        if not path.exists():
            policy_file.write_strict(path)


def _requests(kits: Kits, given: list[Path], agreed: Accord, demo: bool) -> list[Request]:
    """Read the requests that were given, else those beside the kits; a demo makes them."""
    from fedaccord import enrolment, membership

    if demo:
        from fedaccord.client import enrol
        from fedaccord.kit import SiteKit

        now = int(datetime.now(UTC).timestamp())
        return [enrol.init(SiteKit.read(kits.site(name)), now) for name in agreed.roster]
    return [enrolment.read(file) for file in given] or membership.waiting(kits)


def _approve(kits: Kits, final: Accord) -> None:
    """Let every site of a demo take part, under the accord's own figures where it has no policy."""
    from fedaccord.client import policy, policy_file

    for name in final.roster:
        path = kits.site(name) / name / policy.FILE
        if not path.exists():
            policy_file.write_simulated(path, final)
        policy_file.approve(path, final.digest, f"{final.name}, by provision --demo")


def _waits(out: Path, lacking: list[str]) -> str:
    """Say what comes next while keys are missing."""
    return (
        f"Waits for the requests of: {', '.join(lacking)}.\n"
        f"Send each site its folder ({out / lacking[0]}); its README.md says what to do. When its "
        f"request.json is here, compare its fingerprint over the telephone, and say again:\n"
        f"  fedaccord provision ACCORD --out {out} --request request.json"
    )


def _granted(kits: Kits, final: Accord, new: bool, issued: list[str], demo: bool) -> str:
    """Say which accord all must approve, and what comes next."""
    own = kits.coordinator
    lines = [f"accord {final.name} with all keys: {own / 'accord.toml'}, digest {final.digest}"]
    if demo:
        lines.append(FOR_TRYING_OUT)
        lines.append("Every site's policy approves this accord. Next, each in a terminal:")
        lines.append(f"  fedaccord coordinator up {own}")
        lines += [f"  fedaccord site join {kits.site(name)}" for name in final.roster]
    elif new:
        lines.append(
            "It is new: every site must approve it, those too that approved an earlier one. Send "
            "each its accord.toml and site.pem. Take the authority's folder off this machine:"
        )
        lines.append(f"  {kits.authority}")
        lines.append(f"Next: fedaccord coordinator up {own}")
    else:
        lines.append("It is the one that was sent; nothing about it has changed.")
        lines += [f"Send {name} its new {kits.site(name) / 'site.pem'}" for name in issued]
    return "\n".join(lines)
