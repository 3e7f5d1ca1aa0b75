"""The accord in readable rows: every key with its value, its unit and what it means."""

from __future__ import annotations

from typing import Any

from fedaccord.accord import Accord
from fedaccord.reports.reading import ACCORD

Row = dict[str, Any]

# key -> (unit, meaning); a table of free options is listed option by option under its key.
MEANINGS = {
    "name": ("", "name of the accord"),
    "purpose": ("", "what the model is for"),
    "seed": ("", "sets initial weights, invitations and the proxy set; never noise or sampling"),
    "tuning": ("", "how the settings were found, and what of that the privacy figures cover"),
    "task.name": ("", "where the records come from"),
    "task.options": ("", "options of the task"),
    "task.kind": ("", "what the sites' own records are"),
    "task.dataset": ("", "what policies and ledgers call the sites' own records"),
    "task.file": ("", "a site's records, in its own folder of the data set"),
    "task.delimiter": ("", "between the cells of a CSV file"),
    "task.site_column": ("", "the column that says whose a record is"),
    "task.subject": ("", "the column that says who; not set: each row is a subject of its own"),
    "task.label.column": ("", "what is predicted"),
    "task.label.classes": ("", "names of its values"),
    "task.label.values": ("", "as files have them, where they differ"),
    "task.label.bands": ("", "bounds of the classes; a bound belongs to the class above it"),
    "task.attributes.column": ("", "a sensitive attribute"),
    "task.attributes.values": ("", "its values as files have them"),
    "task.attributes.bands": ("", "bounds of its groups; a bound belongs to the group above it"),
    "task.attributes.groups": ("", "names of its groups, where they differ"),
    "task.attributes.missing": ("", "name of the group of those whose cell is empty"),
    "task.split": ("", "the column that says train or test"),
    "task.test_share": ("", "of the subjects, held out by the SHA-256 of each"),
    "task.missing_values": ("", "words that stand for a value that is not there"),
    "task.source": ("", "where the records come from"),
    "task.licence": ("", "of the records"),
    "task.public_file": ("", "public records from which the proxy set is drawn"),
    "task.public_sha256": ("", "of those records"),
    "task.inputs.kind": ("", "an input of the model"),
    "task.inputs.min": ("", "its lowest value: becomes -1"),
    "task.inputs.max": ("", "its highest value: becomes 1"),
    "task.inputs.log": ("", "whether it is scaled as a logarithm"),
    "task.inputs.values": ("", "its declared values, an input each"),
    "task.inputs.missing": ("", "whether it may be missing, which is an input of its own"),
    "task.outside": ("", "what a number out of its bounds does: refuse its record, or clip"),
    "task.path": ("", "the column of paths of images"),
    "task.size": ("pixels", "height and width that images are brought to"),
    "task.channels": ("", "1: grey, 3: red, green, blue"),
    "task.fit": ("", "whether images are stretched to the size or their middle is cut out"),
    "task.text": ("", "the column of texts"),
    "task.length": ("tokens", "after which a text is cut"),
    "task.tokenizer": ("", "what cuts texts into tokens"),
    "task.sha256": ("", "of its tokenizer.json"),
    "task.vocabulary": ("tokens", "that words are hashed to"),
    "sites.subjects": ("subjects", "training subjects that the site declares"),
    "sites.records": ("records", "training records that the site declares"),
    "model.name": ("", "the global model"),
    "model.options": ("", "options of the global model"),
    "model.pretrained": ("", "weights that the global model starts from"),
    "model.sha256": ("", "of those weights"),
    "model.frozen": ("", "layers that are neither trained nor sent"),
    "model.local": ("", "layers that are trained and stay at their site"),
    "rounds.rounds": ("rounds", "rounds that count"),
    "rounds.spare_rounds": ("rounds", "reserved besides, for rounds that fail"),
    "rounds.sites_per_round": ("sites", "drawn for a round; not set: all with a round left"),
    "rounds.min_sites": ("sites", "fewer accepted updates, and the round does not count"),
    "rounds.timeout": ("seconds", "that a round waits for its sites"),
    "rounds.max_misses": ("rounds", "in a row that a site may be silent before it is not asked"),
    "rounds.target_accuracy": ("", "mean accuracy of the model at which the run ends"),
    "training.steps": ("steps", "of the optimiser in a round, at each site"),
    "training.optimizer": ("", "of a site, anew in every round"),
    "training.learning_rate": ("", "of the optimiser"),
    "training.momentum": ("", "of stochastic gradient descent, within a round"),
    "training.views": ("views", "of each record, averaged before the clip"),
    "training.augmentation": ("", "what makes views differ"),
    "training.personal": ("", "pull of each site's own model to the global one; 0: there is none"),
    "strategy.averaging": ("", "share of the average over rounds that stays"),
    "strategy.name": ("", "how updates become a model"),
    "strategy.options": ("", "options of the strategy"),
    "strategy.max_update_norm": ("L2 norm", "longer updates are dropped"),
    "strategy.encoding": ("", "how an update's numbers travel, after the noise"),
    "privacy.enabled": ("", "whether noise protects training subjects or sites"),
    "privacy.target_epsilon": ("epsilon", "asked for over all reserved rounds; sets the noise"),
    "privacy.noise_multiplier": ("", "noise stddev of the sum / its L2 sensitivity, if given"),
    "privacy.delta": ("probability", "of (epsilon, delta)"),
    "privacy.max_epsilon": ("epsilon", "cap of a new simulated site over all its runs"),
    "privacy.sampling_prob": ("probability", "that a subject takes part in a step (Poisson)"),
    "privacy.engine": ("", "how the gradient of each subject is computed and cut"),
    "privacy.page_rows": ("rows", "that pass through the model at once, at most"),
    "privacy.kernels": ("", "how the engine chooses among equal ways"),
    "privacy.precision": ("", "arithmetic of the passes; its rounding is in the noise"),
    "privacy.max_grad_norm": ("L2 norm", "bound of one subject's gradient"),
    "privacy.unit": ("", "what is protected: a training subject at its site, or a whole site"),
    "privacy.clipping_norm": ("L2 norm", "bound of a site's update, with a site as the unit"),
    "privacy.target_quantile": ("", "share of updates that adaptive clipping leaves whole"),
    "privacy.clipping_learning_rate": ("", "of adaptive clipping"),
    "privacy.count_noise": ("updates", "noise stddev of the count of unclipped ones, if given"),
    "privacy.neighboring_relation": ("", "what a difference of one unit means"),
    "fairness.attributes": ("", "sensitive attributes that are audited"),
    "fairness.min_group": ("subjects", "a group with fewer is not assessable"),
    "fairness.confidence": ("probability", "of every interval, simultaneous over groups"),
    "fairness.max_parity_difference": ("", "rule on the demographic parity difference"),
    "fairness.stop_on_breach": ("", "whether breaking the rule ends the run"),
    "distillation.enabled": ("", "whether a compact student is taught"),
    "distillation.model": ("", "the student, which is what is deployed"),
    "distillation.options": ("", "options of the student"),
    "distillation.every": ("rounds", "between lessons"),
    "distillation.steps": ("steps", "of the optimiser in a lesson"),
    "distillation.batch_size": ("rows", "of the public proxy set in a step"),
    "distillation.learning_rate": ("", "of Adam"),
    "distillation.proxy_rows": ("rows", "drawn from the task's declared bounds"),
}


def rows(accord: Accord) -> list[Row]:
    """List an accord's keys with their values, defaults written out.

    Returns:
        Rows {"key", "value", "unit", "meaning", "record"}; a list is joined by commas, and a key
        without a value has null.
    """
    return [
        {
            "key": key,
            "value": ", ".join(map(str, value)) if isinstance(value, list) else value,
            "unit": MEANINGS.get(plain, ("", ""))[0],
            "meaning": MEANINGS.get(plain, ("", ""))[1],
            "record": ACCORD,
        }
        for key, plain, value in _leaves(accord.model_dump(mode="json"))
    ]


def _leaves(tables: dict[str, Any], path: str = "") -> list[tuple[str, str, Any]]:
    """List (key as shown, key in MEANINGS, value) for every leaf; a site goes by its name."""
    out: list[tuple[str, str, Any]] = []
    for name, value in tables.items():
        key = f"{path}.{name}" if path else name
        if key == "sites":
            out += [
                (f"sites.{s['name']}.{key}", f"sites.{key}", s[key])
                for s in value
                for key in ("subjects", "records")
            ]
        elif path in ("task.inputs", "task.attributes"):  # a column each, of any name
            out += [(f"{key}.{k}", f"{path}.{k}", v) for k, v in value.items() if v is not None]
        elif name == "options":
            named = [(f"{key}.{option}", key, value[option]) for option in value]
            out += named or [(key, key, None)]
        elif isinstance(value, dict):
            out += _leaves(value, key)
        else:
            out.append((key, key, value))
    return out
