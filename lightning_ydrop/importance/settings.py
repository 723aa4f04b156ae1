"""The settings of the engine, checked where they are made."""

from dataclasses import dataclass

from lightning_ydrop.checks import check_count, check_flag, check_fraction, check_rate
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.functional.rates import Buckets, rate_around
from lightning_ydrop.importance.measures import Conductance, Measure, check_measure, is_conductance
from lightning_ydrop.importance.path import PathSettings, set_plain

# Of layers of p=0.5.
PAPER_INITIAL_DROP_PROB = 0.35


@dataclass(frozen=True)
class EngineSettings:
    """How Y-Drop drives a model.

    Args:
        path: How importance is measured.
        elasticity: `alpha` of the running mean (Eq. 6), in [0, 1].
        buckets: The two rates and the fraction of strong units (Eq. 5 and 8); None for `Buckets.around` each layer's p.
        initial_drop_prob: `p_0`, where the running mean starts, in [0, 1); None for the paper's, around p likewise.
        measure: What makes a unit important.
        seed: Seed of the samples drawn and of the rates.
        every_n_batches: Phase 1 runs in every nth step, at least 1.
        compile_phase1: Whether phase 1 is compiled.

    Raises:
        ConfigurationError: If a setting is out of range.

    """

    path: PathSettings
    elasticity: float = 1e-2
    buckets: Buckets | None = None
    initial_drop_prob: float | None = None
    measure: Measure = Conductance()  # noqa: RUF009, which keeps no state
    seed: int = 0
    every_n_batches: int = 1
    compile_phase1: bool = False

    def __post_init__(self) -> None:
        owner = self.path.owner
        check_fraction(owner, "elasticity", self.elasticity, example=1e-2)
        if self.buckets is not None and not isinstance(self.buckets, Buckets):
            raise ConfigurationError(
                f"{owner}(buckets={describe(self.buckets)}) was given.",
                "`buckets` is an instance of lightning_ydrop.Buckets, or None for rates that follow each layer's p.",
                "Pass, for example, buckets=Buckets(strong_fraction=0.3).",
            )
        if self.initial_drop_prob is not None:
            initial = check_rate(owner, "initial_drop_prob", self.initial_drop_prob)
            set_plain(self, "initial_drop_prob", float(initial))
        check_measure(owner, self.measure)
        check_count(owner, "seed", self.seed, minimum=0, example=0)
        check_count(owner, "every_n_batches", self.every_n_batches, minimum=1, example=5)
        if check_flag(owner, "compile_phase1", self.compile_phase1) and not is_conductance(self.measure):
            raise ConfigurationError(
                f"{owner}(compile_phase1=True, measure={self.measure!r}) was given.",
                "Of the measures Conductance is compiled, also inside Inverted and Shuffled.",
                "Pass measure=Conductance(), or leave out compile_phase1.",
            )
        set_plain(self, "elasticity", float(self.elasticity))
        for name in ("seed", "every_n_batches"):
            set_plain(self, name, int(getattr(self, name)))

    def buckets_of(self, p: float) -> Buckets:
        """Give the rates of a layer whose vanilla rate is `p`."""
        return Buckets.around(p) if self.buckets is None else self.buckets

    def initial_drop_prob_of(self, p: float) -> float:
        """Give where the running mean of a layer starts whose vanilla rate is `p`."""
        if self.initial_drop_prob is not None:
            return self.initial_drop_prob
        return PAPER_INITIAL_DROP_PROB if self.buckets is not None else rate_around(PAPER_INITIAL_DROP_PROB, p)

    @property
    def elasticity_of_an_update(self) -> float:
        """One update stands for `every_n_batches` updates, so that elasticity means the same for any number."""
        n = self.every_n_batches
        return self.elasticity if n == 1 else 1 - (1 - self.elasticity) ** n
