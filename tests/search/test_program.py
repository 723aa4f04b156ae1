"""The program of a search, from its command line to its files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning
import optuna
import pytest
import yaml
from optuna.trial import TrialState

from lightning_ydrop import ConvPattern, PatternCallback, apply_patterns
from lightning_ydrop.search.apart import train_apart
from lightning_ydrop.search.cli import SearchCLI
from lightning_ydrop.search.files import read_patterns
from lightning_ydrop.search.program import main
from lightning_ydrop.search.storage import open_study
from lightning_ydrop.search.studies import space_of
from lightning_ydrop.search.training import Training, _Rewards
from tests.search.recorded import recorded
from tests.search.trained import TwoBlocks

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {
    "seed_everything": 3,
    "search": {"metric": "val_loss", "mode": "min"},
    "model": {"class_path": "tests.search.trained.Tiny"},
    "data": {"class_path": "tests.search.trained.Squares"},
    "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 2},
}


def config_with(**changes: Any) -> str:
    """Write the configuration of a search with other arguments, named "model.lr" as `model__lr`."""
    content = json.loads(json.dumps(CONFIG))
    for name, value in changes.items():
        *sections, last = name.split("__")
        section = content
        for each in sections:
            section = section.setdefault(each, {})
        section[last] = value
    file = Path("search.yaml")
    file.write_text(yaml.safe_dump(content))
    return str(file)


def fit(*args: str, **changes: Any) -> optuna.Study:
    """Search, and open the study."""
    main(["fit", "--config", config_with(**changes), "--out", "out", *args])
    cli = SearchCLI(["--config", "search.yaml", "--out", "out", *args])
    return open_study(cli.storage, cli.study_name, direction="maximize")


def params_and_values(study: optuna.Study) -> list[tuple[dict[str, Any], float | None]]:
    return [(trial.params, trial.value) for trial in study.trials if trial.state == TrialState.COMPLETE]


@pytest.mark.parametrize("sampler", ["random", "tpe", "table", "transformer"])
def test_all_samplers_search_by_one_command(sampler: str, capsys: pytest.CaptureFixture[str]) -> None:
    study = fit("--trials", "2", "--sampler", sampler)
    assert study.study_name == f"{sampler}-3"
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2
    first, second = study.trials
    assert first.params.keys() == {
        f"{place}.{name}"
        for place in ("stage1.1", "stage2.1")
        for name in ("size", "stride", "repeat", "rotate", "shear_x", "shear_y", "share_c", "residual")
    }
    assert first.params != second.params
    assert first.value == -first.user_attrs["metrics"]["val_loss"]
    assert "entropy" in first.user_attrs["policy"] or sampler in ("random", "tpe")
    out = capsys.readouterr().out
    assert "2/2 trials, 0 running, best" in out
    assert study.user_attrs["progress"]["done"] == 2
    assert not list(Path("out").rglob("*.ckpt"))


def test_a_search_that_is_started_again_equals_an_uninterrupted_one() -> None:
    whole = fit("--trials", "4", "--study", "whole")
    fit("--trials", "1", "--study", "parts")
    fit("--trials", "3", "--study", "parts")
    parts = fit("--trials", "4", "--study", "parts")
    assert params_and_values(parts) == params_and_values(whole)


@pytest.mark.skipif(lightning.__version__ < "2.5.3", reason="there batches come in another order")
def test_a_trial_whose_worker_is_killed_goes_on_from_its_checkpoint_and_changes_nothing() -> None:
    whole = fit("--trials", "2", "--study", "whole", trainer__max_epochs=8)
    record = str(Path("steps").absolute())
    changes = {"trainer__max_epochs": 8, "model__init_args": {"record": record}}
    command = [sys.executable, "-m", "lightning_ydrop.search", "fit", "--config", config_with(**changes)]
    command += ["--out", "out", "--trials", "2", "--study", "killed"]
    # As many threads as here, which change how sums are rounded.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while "2 0" not in recorded(record):  # the dry run has an epoch alone
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(recorded(record))
    study = fit("--trials", "2", "--study", "killed", **changes)
    dry_run, first, *_ = recorded(record)[before:]
    assert dry_run == "0 0"
    epoch, batch = map(int, first.split())
    assert epoch >= 2  # the one in which it was killed, a moment after the line was seen
    assert batch == 0
    assert params_and_values(study) == params_and_values(whole)


def test_workers_share_a_study() -> None:
    study = fit("--trials", "3", "--workers", "2", "--sampler", "random")
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3
    assert len({trial.user_attrs["claimed"] for trial in study.trials}) <= 2


def test_a_training_that_diverges_has_a_low_finite_reward() -> None:
    cli = SearchCLI(["--config", config_with()])
    untrained = Training(cli).untrained()
    with pytest.raises(SystemExit, match="All of 2 trials diverged"):
        fit("--trials", "2", model__class_path="tests.search.trained.Diverging")
    study = open_study("out/studies.journal", "transformer-3", direction="maximize")
    assert all(trial.user_attrs["diverged"] for trial in study.trials)
    assert [trial.value for trial in study.trials] == [pytest.approx(untrained - abs(untrained))] * 2
    with pytest.raises(SystemExit, match="All of 2 trials diverged"):
        main(["export", "--storage", "out/studies.journal", "--study", "transformer-3", "--out", "out"])


def test_a_training_that_ends_before_its_first_validation_fails() -> None:
    with pytest.raises(SystemExit, match="ended without a validation that logs 'val_loss'"):
        fit("--trials", "1", trainer__check_val_every_n_epoch=2, trainer__max_steps=1)


def test_the_reward_is_what_validation_logs() -> None:
    study = fit("--trials", "1", "--sampler", "random", model__class_path="tests.search.trained.OneName")
    plain = fit("--trials", "1", "--sampler", "random", "--study", "plain")
    assert study.trials[0].value == plain.trials[0].value


def test_a_trainer_may_count_steps_alone() -> None:
    study = fit("--trials", "1", "--sampler", "random", trainer__max_epochs=None, trainer__max_steps=3)
    assert len(params_and_values(study)) == 1


def test_the_last_epoch_stops_nothing_and_an_interrupted_training_reports_again() -> None:
    training = Training(SearchCLI(["--config", config_with()]))
    reported: list[tuple[int, float]] = []

    def report(epoch: int, reward: float) -> bool:
        reported.append((epoch, reward))
        return epoch == 1

    outcome = training({}, 0, Path("folder"), report)
    assert outcome.stopped_at is None
    rewards = _Rewards(training.settings, report)
    rewards.load_state_dict({"by_epoch": dict(reported), "stopped_at": None})
    rewards.on_train_start(training.cli.trainer, training.cli.model)
    assert reported[2:] == reported[:2]


def test_ctrl_c_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_ydrop.search.program.start_workers", interrupted)
    with pytest.raises(SystemExit) as raised:
        main(["fit", "--config", config_with(), "--out", "out", "--trials", "1"])
    assert raised.value.code == 130
    assert "The same command goes on" in capsys.readouterr().err


def test_defaults_that_no_file_can_hold_are_left_to_their_class() -> None:
    averaging = {"class_path": "lightning.pytorch.callbacks.StochasticWeightAveraging", "init_args": {"swa_lrs": 0.1}}
    assert len(params_and_values(fit("--trials", "1", trainer__callbacks=[averaging]))) == 1


def test_what_stops_early_is_compared_with_others_at_its_epoch() -> None:
    study = fit("--trials", "6", "--sampler", "random", search__prune_after=1, trainer__max_epochs=3)
    stopped = [trial for trial in study.trials if "stopped_at" in trial.user_attrs]
    others = [trial for trial in study.trials if "stopped_at" not in trial.user_attrs]
    assert stopped
    assert len(others) >= 2
    assert all(len(trial.intermediate_values) < 3 for trial in stopped)
    for trial in stopped:
        earlier = [float(each.value or 0) for each in others if each.number < trial.number]
        assert float(trial.value or 0) <= sum(earlier) / len(earlier)


def test_progress_goes_to_a_logger() -> None:
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "logs"}}
    fit("--trials", "2", trainer__logger=logger)
    (metrics,) = Path("logs").rglob("metrics.csv")
    header, *rows = metrics.read_text().splitlines()
    assert {"search/done", "search/best", "search/entropy", "search/distinct_patterns"} <= set(header.split(","))
    assert rows


def test_the_configuration_round_trips(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", config_with(search__conv={"size": [0, 0.5], "residual": [False]}), "--print_config"])
    printed = capsys.readouterr().out
    Path("printed.yaml").write_text(printed)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "printed.yaml", "--print_config"])
    assert capsys.readouterr().out == printed
    assert SearchCLI(["--config", "printed.yaml"]).settings == SearchCLI(["--config", "search.yaml"]).settings
    assert SearchCLI(["--config", "printed.yaml"]).settings.conv.size == (0, 0.5)


def test_the_best_patterns_are_retrained_and_written(capsys: pytest.CaptureFixture[str]) -> None:
    study = fit("--trials", "3", "--sampler", "table")
    storage = ["--storage", "out/studies.journal", "--study", "table-3"]
    arguments = ["export", *storage, "--top", "2", "--seeds", "2", "--out", "out", "--patterns", "found.yaml"]
    capsys.readouterr()
    main(arguments)
    said = capsys.readouterr().out
    retrained = open_study("out/studies.journal", "table-3, retrained")
    assert len(retrained.trials) == 6  # two of the search and the controller's most likely, with two seeds each
    assert len({trial.value for trial in retrained.trials}) > 2
    assert not {trial.value for trial in retrained.trials} & {trial.value for trial in study.trials}
    patterns = read_patterns("found.yaml")
    assert list(patterns) == ["stage1.1", "stage2.1"]
    assert PatternCallback("found.yaml").patterns == patterns
    assert "standard error" in said
    main(arguments)  # what is done is not done again
    assert len(open_study("out/studies.journal", "table-3, retrained").trials) == 6


def test_studies_and_patterns_are_drawn() -> None:
    fit("--trials", "2", "--sampler", "random")
    main(["plot", "--storage", "out/studies.journal", "--study", "random-3", "--out", "pictures"])
    for name in ("rewards.png", "patterns.png"):
        assert (Path("pictures") / name).read_bytes().startswith(b"\x89PNG")


BAD = {
    "a metric that is never logged": (["--search.metric", "accuracy"], {}, "Tiny logs 'val_acc', 'val_loss'."),
    "a metric of training": (["--search.metric", "train_loss"], {}, "Tiny logs 'val_acc', 'val_loss'."),
    "an unknown place": (["--search.places", "[stage9.*]"], {}, "The places of Tiny are 'stage1.1', 'stage2.1'."),
    "a pattern larger than the map": (
        ["--search.conv.size", "[0, 0.5]"],
        {"model__class_path": "tests.search.trained.Shrinking"},
        "search.places=['stage1.1']",
    ),
    "a pattern that covers the map upright": (
        ["--search.conv.size", "[0, 0.95, 0.25]", "--search.conv.rotate", "[0, 45]"],
        {},
        "search.conv.size=[0, 0.25]",
    ),
    "a Trainer without an end": (["--trainer.max_epochs", "-1"], {}, "Pass --trainer.max_epochs, --trainer.max_steps"),
    "patterns of its own": (
        ["--trainer.callbacks+=lightning_ydrop.PatternCallback", "--trainer.callbacks.patterns={}"],
        {},
        "Leave the callback out",
    ),
    "no validation": (["--trainer.limit_val_batches", "0"], {}, "a Trainer that never validates"),
    "validation after the end": (["--trainer.check_val_every_n_epoch", "5"], {}, "a Trainer that never validates"),
    "places that training does not call": (
        [],
        {"model__class_path": "tests.search.trained.WithCopy"},
        "Name the other places: search.places=['stage1.1', 'stage2.1'].",
    ),
    "a loss to be large": (["--search.mode", "null"], {}, 'Pass mode="min" if it should be small'),
    "no place": ([], {"model__class_path": "tests.search.trained.Placeless"}, "It has no place for a pattern."),
    "a storage that is not there": (["--storage", "postgresql://u:secret@127.0.0.1:1/none"], {}, "127.0.0.1"),
    "SQLite for two": (["--storage", "sqlite:///x.db", "--workers", "2"], {}, "SQLite takes one worker"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_before_the_first_trial(case: str) -> None:
    args, changes, said = BAD[case]
    with pytest.raises(SystemExit) as raised:
        main(["fit", "--config", config_with(**changes), "--out", "out", "--trials", "1", *args])
    assert said in str(raised.value)
    assert "secret" not in str(raised.value)
    assert not Path("out/studies.journal").exists()


def test_a_study_of_another_model_is_refused() -> None:
    fit("--trials", "1")
    for changes, said in (
        ({"model__init_args": {"width": 8}}, "model.init_args.width=8"),
        ({"search__conv": {"size": [0, 0.5]}}, "of another model"),
    ):
        with pytest.raises(SystemExit, match=r"study") as raised:
            main(["fit", "--config", config_with(**changes), "--out", "out", "--trials", "2"])
        assert said in str(raised.value)


def test_what_is_no_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="There is no command 'find'"):
        main(["find"])
    assert "export" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["BuiltInSetup", "HalfBuilt"])
def test_a_network_that_is_built_when_a_fit_begins_is_searched_as_a_whole(model: str) -> None:
    study = fit("--trials", "1", "--sampler", "random", model__class_path=f"tests.search.trained.{model}")
    assert list(space_of(study).kinds) == ["stage1.1", "stage2.1"]
    assert len(params_and_values(study)) == 1


def test_home_may_be_abbreviated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    args = ("--out", "~/out", "--storage", "~/journals/study.journal", "--sampler", "random")
    main(["fit", "--config", config_with(), "--trials", "1", *args])
    main(["plot", "--storage", "~/journals/study.journal", "--study", "random-3"])
    assert Path("home/out/random-3.yaml").exists()
    assert Path("home/journals/study.journal").exists()
    assert not Path("~").exists()


@pytest.mark.slow
def test_a_training_in_a_program_of_its_own_stops_early_too() -> None:
    asked: list[tuple[int, float]] = []

    def report(epoch: int, reward: float) -> bool:
        asked.append((epoch, reward))
        return epoch == 1

    file = config_with(trainer__devices=2, trainer__strategy="ddp", trainer__max_epochs=4, search__prune_after=1)
    outcome = train_apart(Path(file), {}, 0, Path("folder").absolute(), report)
    assert outcome.stopped_at == 1
    assert [epoch for epoch, _ in asked] == [0, 1]
    assert outcome.reward == asked[1][1]


@pytest.mark.slow
def test_ranks_of_a_trial_are_told_what_the_first_one_asked() -> None:
    study = fit("--trials", "2", trainer__devices=2, trainer__strategy="ddp")
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2
    assert study.trials[0].params != study.trials[1].params


def test_patterns_change_what_is_trained() -> None:
    training = Training(SearchCLI(["--config", config_with()]))
    patterns = {"stage1.1": ConvPattern(size=0.5), "stage2.1": ConvPattern(size=0)}
    rewards = [training(each, 0, Path("folder")).reward for each in ({}, patterns, patterns)]
    assert rewards[0] != rewards[1]
    assert rewards[1] == rewards[2]


def test_a_search_of_some_places_masks_these_alone() -> None:
    """Of Tiny's one stage of two blocks, the first alone would be read as a whole network of one block."""
    study = fit("--trials", "1", "--search.places", "[stage*.1]", model__class_path="tests.search.trained.TwoBlocks")
    patterns = space_of(study).patterns([1] * len(space_of(study).tokens))
    report = apply_patterns(TwoBlocks(), patterns)
    assert list(report.applied) == ["stage1.1"]
    assert patterns["stage1.2"] == ConvPattern(size=0.0)


def test_trials_work_whatever_the_trainer_is_told_of_loggers_and_checkpoints() -> None:
    monitor = {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}
    study = fit("--trials", "1", trainer__enable_checkpointing=False, trainer__callbacks=[monitor])
    assert len(params_and_values(study)) == 1


def test_export_makes_the_folder_of_its_file() -> None:
    fit("--trials", "2", "--sampler", "random")
    main(["export", "--storage", "out/studies.journal", "--study", "random-3", "--out", "out", "--top", "1",
          "--seeds", "1", "--patterns", "some/where/patterns.yaml"])  # fmt: skip
    assert read_patterns("some/where/patterns.yaml")
