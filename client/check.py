"""What a site checks before it joins: each check finds something, and says what to do about it.

No check sends or stores a record or a count. What they find is for the site's own console: the
counts of its records are shown there without noise.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from fedaccord import authority, keyfiles, keys
from fedaccord.accord import Accord
from fedaccord.client.enrol import handovers
from fedaccord.envelope import key_in_force
from fedaccord.errors import FedAccordError, TaskError
from fedaccord.kit import SiteKit
from fedaccord.tasks import Task

State = Literal["ok", "warn", "fail"]
SOON = timedelta(days=30)  # a certificate that ends sooner is warned of
TIMES_THE_MODEL = 10  # free space: releases, what is fetched, and their temporary files
LEAST_FREE = 100_000_000  # bytes: ledger and logs grow, also with a small model


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        name: of the check.
        state: "ok", "warn" (it works, and should not stay so) or "fail" (it will not work).
        found: one or more sentences.
        remedy: what to do, with a command in backticks; "" where nothing is to be done.
    """

    name: str
    state: State
    found: str
    remedy: str = ""


def check_data(accord: Accord, task: Task, kit: SiteKit) -> Finding:
    """Look whether the site's records are there and can be read, and count them.

    | records | state |
    |---|---|
    | missing, or not readable at all | fail |
    | some at fault, clearly fewer than declared, none to evaluate on | warn |

    What is wrong with single records is not said here, since it shows their values; `fedaccord task
    check` says it.
    """
    from fedaccord.own import OwnTask
    from fedaccord.own_check import sizes
    from fedaccord.tasks import refuse_missing

    own = isinstance(task, OwnTask)
    where = f" --data {data_of(kit)}" if own else ""
    look = f"`fedaccord task check {kit.accord_file} --site {kit.name}{where}`"
    try:
        refuse_missing(task, [kit.name])
    except TaskError as fault:
        fetch = f"`fedaccord data fetch {accord.task.name}`, then `fedaccord site check`"
        return Finding("data", "fail", str(fault), look if own else fetch)
    try:
        loaded = task.load(kit.name) if isinstance(task, OwnTask) else None
        data = loaded.data if loaded else task.site(kit.name)
    except Exception as fault:  # whatever a reader raises; its words may show a record's value
        said = f"The records cannot be read: {type(fault).__name__}."
        return Finding("data", "fail", said, f"{look} says why.")
    odd = [*(loaded.found if loaded else ()), *sizes(accord, kit.name, data)]
    subjects = len(set(data.train.subjects.tolist()))
    found = (
        f"{subjects} training subjects, {len(data.train)} records; {len(data.test)} records to "
        "evaluate on."
    )
    if odd:
        more = "1 thing is" if len(odd) == 1 else f"{len(odd)} things are"
        return Finding("data", "warn", f"{found} {more} wrong with them.", f"{look} names them.")
    return Finding("data", "ok", found)


def data_of(kit: SiteKit) -> Path:
    """Find the folder of the site's own data sets; a relative one is seen from the kit."""
    return kit.folder / kit.data if kit.data else kit.site / "data"


def check_policy(
    accord: Accord, kit: SiteKit, parameters: int | Callable[[], int], now: datetime
) -> Finding:
    """Say which rules of the site's policy would refuse the accord.

    | policy | state |
    |---|---|
    | missing, not valid, or one that refuses that the site joins | fail |
    | one that lets it join and does not train at this hour | warn |

    Args:
        accord: as it was granted.
        kit: the site's.
        parameters: how many weights the accord's model has, or what counts them.
        now: the time, with its time zone.
    """
    from fedaccord.client import policy

    approve = f"`fedaccord site approve {kit.accord_file} --site {kit.site}`"
    try:
        own = policy.SitePolicy.read(kit.site / policy.FILE)
    except FedAccordError as fault:
        return Finding("policy", "fail", str(fault), approve)
    try:
        broken = own.broken(accord, kit.name, kind="join", parameters=parameters, now=now)
        later = own.broken(accord, kit.name, kind="train", parameters=parameters, now=now)
    except FedAccordError as fault:  # a site that the accord does not have, a model it cannot build
        return Finding("policy", "fail", str(fault), f"`fedaccord check {kit.accord_file}`")
    if broken:
        said = " ".join(f"{rule}: {sentence}" for rule, sentence in broken.items())
        edit = f"Edit {kit.site / policy.FILE}, then `fedaccord site policy --site {kit.site}`"
        remedy = approve if "approved" in broken else edit
        return Finding("policy", "fail", f"It would refuse by {said}", remedy)
    if later:
        said = " ".join(later.values())
        return Finding(
            "policy",
            "warn",
            f"It approves, but {said}",
            f"`fedaccord site policy --site {kit.site}`",
        )
    return Finding("policy", "ok", f"It approves accord {accord.name} ({accord.digest[:12]}).")


def check_ledger(accord: Accord, kit: SiteKit) -> Finding:
    """Check the ledger's chain and its head in the second place, and what the plan would use.

    Nothing is written, and a site that has no ledger yet gets none.

    | ledger | state |
    |---|---|
    | altered, cut, another site's, or older than its head | fail |
    | one run of the plan more would pass the cap, and this accord has no reservation | fail |
    | the same, and it has one, which a run goes on with | warn |
    """
    from fedaccord.client import policy
    from fedaccord.privacy import accounting
    from fedaccord.privacy.ledger import Ledger, of_accord, spent
    from fedaccord.privacy.plan import plan_for

    path = kit.site / "ledger.sqlite"
    try:
        own = policy.SitePolicy.read(kit.site / policy.FILE)
        entries = []
        if path.exists():
            ledger = Ledger(path, kit.name, kit.site / own.second_head)
            entries = ledger.entries()
            ledger.close()
        plan = plan_for(accord, kit.name)
    except FedAccordError as fault:
        return Finding("ledger", "fail", str(fault), f"`fedaccord ledger show {kit.site}`")
    event = plan.event() if plan else accounting.NON_PRIVATE
    about = (accord.task.name, own.disjoint)
    here = of_accord(entries, accord.digest)
    held = any(e["kind"] == "RESERVE" and e["accord"] == accord.digest for e in entries)
    said = [f"{len(entries)} entries, chained and signed." if entries else "There is none yet."]
    state: State = "ok"
    for cap, of, over in (
        (own.cap, entries, "over all accords"),
        (own.cap_for(accord), here, "over this accord"),
    ):
        if cap is None:
            continue
        then = spent(of, cap, event, *about)
        said.append(
            f"One run more: epsilon {accounting.show(then)} of {accounting.show(cap.epsilon)} at "
            f"delta {cap.delta:g} {over}."
        )
        if then > cap.epsilon:
            state = "warn" if held or state == "warn" else "fail"
    if state == "ok":
        return Finding("ledger", "ok", " ".join(said))
    if held:
        said.append("A run that was begun goes on with its reservation; a new one is refused.")
    return Finding("ledger", state, " ".join(said), f"`fedaccord ledger show {kit.site}`")


def check_keys(accord: Accord | None, kit: SiteKit) -> Finding:
    """Hold the site's keys to the accord's pin and to its certificate; others may not read them.

    The key in force is the pinned one, or the one that the site's handovers lead to from it.

    Args:
        accord: as it was granted; None where it was not yet, and then no pin is looked at.
        kit: the site's.
    """

    def fail(found: str, remedy: str) -> Finding:
        return Finding("keys", "fail", found, remedy)

    request = f"send {kit.folder / 'request.json'} to the coordinator"
    if not kit.identity_key.exists() and not (kit.site / "ledger.sqlite").exists():
        return fail("No key was made here yet.", f"`fedaccord site init {kit.folder}`; {request}.")
    try:
        own = keys.load(kit.identity_key)
        if not kit.tls_cert.exists():
            return fail(
                f"There is no certificate {kit.tls_cert} yet.",
                f"`fedaccord site init {kit.folder}`; {request}, and put the site.pem here that "
                "comes back.",
            )
        keyfiles.load(kit.tls_key)
        steps = handovers(kit)
    except FedAccordError as fault:
        private = f"`chmod 600 {kit.identity_key} {kit.new_tls_key}`"
        rotate = f"`fedaccord site rotate {kit.folder}`, then {request}; or restore the file."
        return fail(str(fault), private if "chmod" in str(fault) else rotate)
    if accord is None:
        return Finding("keys", "ok", f"{own.public[:16]}...; the TLS key fits its certificate.")
    pin = accord.pins.get(kit.name)
    if pin is None:
        return fail(
            f"{kit.accord_file} pins no key of this site.",
            "Put the accord.toml here that `fedaccord provision` wrote once all keys were there.",
        )
    if own.public != key_in_force(pin, kit.name, steps):
        return fail(
            f"The accord pins the key {pin[:16]}..., and {kit.identity_key} is {own.public[:16]}"
            "..., to which the pinned one did not hand over.",
            f"Restore the key; `fedaccord ledger show {kit.site}` shows whose the ledger is.",
        )
    how = "the one pinned" if own.public == pin else "the pinned one's successor"
    return Finding(
        "keys", "ok", f"{own.public[:16]}... is {how}; the TLS key fits its certificate."
    )


def check_certificate(kit: SiteKit, now: datetime) -> Finding:
    """Check the site's certificate: its name, who issued it, its dates.

    | certificate | state |
    |---|---|
    | missing, of another name, not by the kit's authority, run out, or not valid yet | fail |
    | it, or the authority's own, ends in under 30 days | warn |
    """
    rotate = f"`fedaccord site rotate {kit.folder}`, and send the coordinator its request.json"
    try:
        own = authority.read_certificate(kit.tls_cert.read_bytes(), str(kit.tls_cert))
        by = authority.read_certificate(kit.ca.read_bytes(), str(kit.ca))
    except OSError as fault:
        return Finding(
            "certificate",
            "fail",
            f"{fault.filename}: {fault.strerror}.",
            f"`fedaccord site init {kit.folder}`, send its request.json, and put the site.pem here "
            "that comes back.",
        )
    except FedAccordError as fault:
        return Finding("certificate", "fail", str(fault), rotate)
    if words := _not_good(own, by, kit.name, now):
        ahead = "not valid before" in words
        clock = "`timedatectl` shows this machine's clock; set it if it is wrong."
        return Finding("certificate", "fail", words, clock if ahead else rotate)
    last = min(own.not_valid_after_utc, by.not_valid_after_utc)
    found = f"{kit.name}, valid until {last:%Y-%m-%d} ({(last - now).days} days)."
    if last - now < SOON:
        return Finding("certificate", "warn", found, rotate)
    return Finding("certificate", "ok", found)


def _not_good(
    own: x509.Certificate, by: x509.Certificate, name: str, now: datetime
) -> str:  # fmt: skip
    """Say why a certificate would be refused, or ""."""
    if authority.name_of(own) != name:
        return f'The certificate is for "{authority.name_of(own)[:40]}", and this is site {name}.'
    try:
        own.verify_directly_issued_by(by)
    except (ValueError, TypeError, InvalidSignature):
        return "The certificate was not issued by the authority of this kit (ca.pem)."
    for whose, one in (("The certificate", own), ("The authority's certificate", by)):
        if now > one.not_valid_after_utc:
            return f"{whose} ran out on {one.not_valid_after_utc:%Y-%m-%d %H:%M} UTC."
        if now < one.not_valid_before_utc:
            return f"{whose} is not valid before {one.not_valid_before_utc:%Y-%m-%d %H:%M} UTC."
    return ""


def check_disk(folder: Path, model_bytes: int) -> Finding:
    """Look whether the site's folder can be written durably and has room.

    Args:
        folder: the site's own.
        model_bytes: size of the accord's model.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as fault:
        said = f"{folder} cannot be written: {fault.strerror}."
        return Finding("disk", "fail", said, f"`df -h {folder}` and `ls -ld {folder}` show why.")
    needed = max(LEAST_FREE, TIMES_THE_MODEL * model_bytes)
    found = f"{free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB are needed."
    if free < needed:
        return Finding("disk", "fail", found, f"`df -h {folder}`: make room, or move the kit.")
    return Finding("disk", "ok", found)


def check_device(name: str, precision: str) -> Finding:
    """Say where the site's records would pass through the model: a GPU, or the CPU.

    Args:
        name: of the site.
        precision: of the passes, as in the accord.
    """
    import torch

    from fedaccord import devices

    try:
        device = devices.device(name, precision)
        if device.type != "cuda":
            there = "none" if device.type == "cpu" else device.type
            cores = f"; the CPU is used ({os.cpu_count()} cores)" if device.type == "cpu" else ""
            return Finding("GPU", "ok", f"{there}{cores}.")
        free, total = torch.cuda.mem_get_info(device)
        torch.zeros(1, device=device)
    except (FedAccordError, RuntimeError) as fault:
        first = str(fault).splitlines()[0][:300]
        return Finding("GPU", "fail", first, f"`nvidia-smi`, or `export {devices.DEVICE}=cpu`")
    said = f"{torch.cuda.get_device_name(device)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB"
    return Finding("GPU", "ok", f"{said} free.")
