"""Refusing an accord under which the noise alone would make a site's updates too long."""

from __future__ import annotations

import math

from fedaccord.accord import Accord, TrainingSection
from fedaccord.errors import AccordError
from fedaccord.privacy.plan import PrivacyPlan, plan_for


def noise_norm(plan: PrivacyPlan, training: TrainingSection, weights: int) -> float:
    """Return the root mean square L2 norm that noise alone gives a round's update.

    Gradient descent with momentum m moves a weight by the learning rate times sum_k m^k of each
    step's noise, k over the steps that follow.

    Args:
        plan: the site's.
        training: steps, learning rate, momentum of plain gradient descent.
        weights: that are trained.
    """
    share, steps = training.momentum, training.steps
    reach = [(1 - share**left) / (1 - share) for left in range(1, steps + 1)]
    stddev = plan.noise_stddev / plan.normaliser * training.learning_rate
    return stddev * math.sqrt(weights * sum(part**2 for part in reach))


def refuse_drowned(accord: Accord, weights: int) -> None:
    """Refuse a bound on updates that noise alone would pass at some site.

    Every update of such a site would be dropped, and its privacy be spent on nothing. Looked at
    before anybody reserves; plain gradient descent only, whose noise can be told beforehand.

    Args:
        accord: what was agreed.
        weights: that are trained.

    Raises:
        AccordError: such a site, the one with the longest updates.
    """
    bound = accord.strategy.max_update_norm
    if accord.training.optimizer != "sgd":
        return
    plans = {site: plan_for(accord, site) for site in accord.roster}
    norms = {
        site: noise_norm(plan, accord.training, weights)
        for site, plan in plans.items()
        if isinstance(plan, PrivacyPlan)
    }
    site = max(norms, key=lambda name: norms[name], default="")
    if site and norms[site] > bound:
        raise AccordError(
            f"strategy.max_update_norm = {bound:g} is below {norms[site]:.3g}, the norm that "
            f"noise alone gives an update of site {site}: all of them would be dropped, and "
            f"its epsilon be spent on nothing. Set it to {2 * norms[site]:.2g} or more, or plan "
            "less noise for that site."
        )
