"""`python -m benchmarks.byzantine`: what hostile sites can do to each rule, on skewed data.

2 of 11 sites are hostile and know all honest updates of the round. The records are those of the
task digits, all offices together, divided anew by Dirichlet(0.3) of labels:
`fedaccord task plot digits --partition dirichlet:0.3 --sites 11` draws the first split. The last
two sites are the hostile ones. Rules are those of an accord ([strategy] name), and updates pass
through the coordinator's driver as float32. With --epsilon, sites train as FedAccord's do, under a
plan of that epsilon each. "Clean" is FedAvg over the nine honest sites alone. Accuracy is of
the last model on the task's public images.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import time
from typing import Any

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}

import numpy as np
import torch
from flwr.app import ConfigRecord
from flwr.clientapp import ClientApp
from rich.console import Console
from rich.table import Table

from benchmarks.byzantine_attacks import ATTACKS, BOUND, Attack
from benchmarks.byzantine_sites import (
    SITES,
    F,
    Federation,
    Floats,
    PlainSites,
    PrivateSites,
    federation,
    flipped,
    read,
    write,
)
from fedaccord.simulations.engine import InProcessGrid
from fedaccord.strategies.driver import Driver
from fedaccord.strategies.seam import Setting, make
from fedaccord.strategies.updates import Update, Weights, shaped

MIXED = {"num_malicious_nodes": F, "mixing": True}
PLAIN = {"num_malicious_nodes": F, "mixing": False}
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "fedavg": ("fedavg", {}),
    "fedmedian": ("fedmedian", PLAIN),
    "fedmedian, mixed": ("fedmedian", MIXED),
    "fedtrimmedavg": ("fedtrimmedavg", PLAIN),
    "fedtrimmedavg, mixed": ("fedtrimmedavg", MIXED),
    "krum": ("krum", PLAIN),
    "krum, mixed": ("krum", MIXED),
    "multikrum": ("multikrum", PLAIN),
    "multikrum, mixed": ("multikrum", MIXED),
    "bulyan": ("bulyan", {"num_malicious_nodes": F}),
    "centred-clipping": ("centred-clipping", PLAIN),
    "centred-clipping, mixed": ("centred-clipping", MIXED),
}
NONE, LABELS = "none", "label flip"
COLUMNS = (NONE, *ATTACKS, LABELS)


def accuracy(of: Federation, rule: str, attack: str, clean: bool = False) -> float:
    """Train once and return the last model's accuracy on the public images, in percent.

    Args:
        of: the federation.
        rule: a name of RULES.
        attack: a name of COLUMNS.
        clean: whether the hostile sites are left out.
    """
    honest = SITES - F
    names = of.names[:honest] if clean else of.names
    records = list(of.sites[: len(names)])
    if attack == LABELS:
        records[honest:] = map(flipped, records[honest:])
    sites = PlainSites(records, of.training) if of.epsilon is None else PrivateSites(records, of)
    driver, grid = driver_for(of, rule, names), InProcessGrid(ClientApp(), len(names), {})
    rng = np.random.default_rng([of.seed, 0xBAD])
    module = of.model()
    model = read(module)
    for number in range(1, of.rounds + 1):
        driver.ask(number, model, ConfigRecord(), grid)
        sent = sites.updates(model)
        if attack in ATTACKS:
            sent[honest:] = lies(ATTACKS[attack], sent[:honest], rng)
        model = combined(driver, number, model, sent, names, [len(site) for site in records])
    write(module, model)
    with torch.no_grad():
        said = module(torch.from_numpy(of.test[0])).argmax(1).numpy()
    return 100.0 * float((said == of.test[1]).mean())


def lies(attack: Attack, honest: Floats, rng: np.random.Generator) -> Floats:
    """Have the hostile sites speak; whatever the gates would drop is a fault of the benchmark."""
    sent = attack(honest, F, rng)
    if not (np.isfinite(sent).all() and (np.linalg.norm(sent, axis=1) <= BOUND).all()):
        raise SystemExit("benchmarks.byzantine: an attack that the gates would drop")
    return sent


def driver_for(of: Federation, rule: str, names: tuple[str, ...]) -> Driver:
    """Make the rule as an accord would name it."""
    setting = Setting(
        sites=names,
        cohort=len(names),
        quorum=len(names),
        steps=of.training.steps,
        learning_rate=of.training.learning_rate,
        momentum=of.training.momentum,
        optimizer=of.training.optimizer,
        private=of.epsilon is not None,
    )
    name, options = RULES[rule]
    return make(name, options, setting)


def combined(
    driver: Driver,
    number: int,
    model: Weights,
    sent: Floats,
    names: tuple[str, ...],
    sizes: list[int],
) -> Weights:
    """Pass a round's updates through the coordinator's driver, as float32, as they travel."""
    updates = [
        Update(name, shaped(row.astype(np.float32), model), size, {})
        for name, row, size in zip(names, sent, sizes, strict=True)
    ]
    out = driver.combine(
        number, model, updates, bound=BOUND, heaviest=max(sizes), quorum=len(names)
    )
    if out.model is None:
        raise SystemExit("benchmarks.byzantine: the rule made no model")
    return out.model


def report(made: list[Federation], rules: list[str], attacks: list[str]) -> Table:
    """Run every rule against every attack; mean over the federations."""
    clean = statistics.mean(accuracy(of, "fedavg", NONE, clean=True) for of in made)
    private = "" if made[0].epsilon is None else f", epsilon {made[0].epsilon:g} at each site"
    table = Table(title=f"{F} of {SITES} sites hostile{private}: accuracy, %", title_justify="left")
    table.add_column("rule")
    for heading in (*attacks, "worst", "below clean"):
        table.add_column(heading, justify="right")
    for rule in rules:
        row = [statistics.mean(accuracy(of, rule, attack) for of in made) for attack in attacks]
        worst = min(row)
        print(f"{rule}: worst {worst:.1f}", file=sys.stderr, flush=True)
        table.add_row(rule, *(f"{x:.1f}" for x in row), f"{worst:.1f}", f"{clean - worst:.1f}")
    table.caption = f"Clean, FedAvg over the {SITES - F} honest sites: {clean:.1f} %"
    return table


def quiet() -> None:
    """Silence Flower, and let torch use one core."""
    logging.disable(logging.INFO)
    torch.set_num_threads(1)


def main() -> None:
    """Run the asked part and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=120, help="of training (default 120)")
    parser.add_argument("--seeds", type=int, default=1, help="splits, from seed 0 (default 1)")
    parser.add_argument("--rule", choices=RULES, action="append", help="only this; repeatable")
    parser.add_argument("--attack", choices=COLUMNS, action="append", help="only this; repeatable")
    parser.add_argument("--epsilon", type=float, help="train under DP at each site")
    parser.add_argument("--steps", type=int, default=5, help="of a site in a round (default 5)")
    parser.add_argument("--rate", type=float, default=1.4, help="learning rate (default 1.4)")
    asked = parser.parse_args()
    quiet()
    began = time.monotonic()
    made = [
        federation(seed, asked.rounds, asked.steps, asked.rate, asked.epsilon)
        for seed in range(asked.seeds)
    ]
    table = report(made, asked.rule or list(RULES), asked.attack or list(COLUMNS))
    Console(width=170).print(table)
    print(f"{asked.rounds} rounds, {asked.seeds} splits, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
