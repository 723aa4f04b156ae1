"""Studies that stop anywhere and go on equal the uninterrupted one, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from lightning_ydrop.search.sampler import SAMPLERS
from tests.sameness import assert_same
from tests.search.spaces import SMALL
from tests.search.studies import finished, journal, small_sampler, study_of, wave_of


class Stopped(BaseException):
    """The process is gone."""


def work(study: Any, total: int, stop: tuple[str, int] | None) -> None:
    """What a single worker does: queue again what died, then one trial after another. `stop` is where it dies, and in
    which trial of its life.
    """
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        if "draw" in trial.user_attrs:
            study.enqueue_trial(trial.params, {"draw": trial.user_attrs["draw"], "retry_of": trial.number})

    def reach(point: str) -> None:
        if stop == (point, count):
            raise Stopped

    count = 0
    while len(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))) < total:
        trial = study.ask()
        reach("ask")
        trial.set_user_attr("draw", study.sampler.drawn(trial.number))
        reach("draw")
        choices = []
        for number, token in enumerate(SMALL.tokens):
            choices.append(token.values.index(trial.suggest_categorical(token.name, token.values)))
            if number == 2:
                reach("suggest")
        reach("train")
        trial.report(-1.0, 0)
        if choices[0] == 2:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, wave_of(choices))
        reach("tell")
        count += 1


STOPS = [("ask", 1), ("draw", 0), ("suggest", 2), ("train", 3), ("tell", 1), ("ask", 0), ("suggest", 0), ("draw", 2)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_worker_that_stops_anywhere_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole = study_of(small_sampler(name), journal(tmp_path / "whole"))
    work(whole, 24, None)
    for stop in STOPS:
        with pytest.raises(Stopped):
            work(study_of(small_sampler(name), journal(tmp_path / "parts")), 24, stop)
    parts = study_of(small_sampler(name), journal(tmp_path / "parts"))
    work(parts, 24, None)
    assert finished(parts) == finished(whole)
    assert len(parts.trials) > len(whole.trials) == 24
    assert len({str(row[0]) for row in finished(whole)}) > 6
    if name in ("table", "transformer"):
        for study in (parts, whole):
            study.ask()  # learns from the last trial
        assert_same(parts.sampler.policy.state(), whole.sampler.policy.state())
        assert {row[1] for row in finished(whole) if row[2] == TrialState.PRUNED} == {-1.0}
