"""The reward's terms by name. Settings, training, curves and pipelines read the names here."""

from typing import NamedTuple


class Terms(NamedTuple):
    """What a completion earns, term by term, before any weight.

    To add a term, name it here with a default of 0, which the published reward keeps, compute it in
    `adfm.method.rewards.calibrated`, and give its weight a line in `params.yaml`, and here in `WEIGHTS` if the default
    run pays it. Its weight in `train.weights`, its metrics, curves and report follow.
    """

    format: float
    classification: float
    localization: float
    regions: float = 0.0

    @property
    def total(self) -> float:
        """The sum of the terms, each by its default weight."""
        return self.weighted(WEIGHTS)

    def weighted(self, weights: "Terms") -> float:
        """The sum of the terms, each by a weight."""
        return sum(weight * term for weight, term in zip(weights, self, strict=True))


# The default weights in `train.weights`; a further term has 0, and changes nothing until a run sets its weight.
WEIGHTS = Terms(format=1.0, classification=1.0, localization=1.0)
MEANS = tuple(f"rewards/{term}/mean" for term in Terms._fields)  # of each term over a step, as TRL logs it
