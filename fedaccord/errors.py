"""Errors that a user can act on: one line each, exit code 2, no traceback."""


class FedAccordError(Exception):
    """Base of every error that ends a command with one line and exit code 2.

    The message names the parameter, the value, the bound and the remedy.
    """


class AccordError(FedAccordError):
    """An accord that cannot be read or does not hold together."""


class TaskError(FedAccordError):
    """A task whose data is missing, altered or outside its declared bounds."""


class PolicyError(FedAccordError):
    """An accord or a moment that a site's policy rules out.

    Attributes:
        rule: the key of the policy that refuses; "policy.toml" where the file itself is at fault.
    """

    def __init__(self, rule: str, sentence: str) -> None:
        super().__init__(sentence)
        self.rule = rule


class BudgetError(FedAccordError):
    """A plan or a round that a site's ledger has no room for."""


class LedgerError(FedAccordError):
    """A ledger that is damaged, altered or belongs to another site."""


class EvidenceError(FedAccordError):
    """A run folder that is missing, incomplete or altered."""


class RunError(FedAccordError):
    """A run that cannot start or go on."""


class KitError(FedAccordError):
    """A kit, a certificate or a request for one that is missing, altered or not allowed."""
