"""Opening a storage: a journal, PostgreSQL, SQLite for one worker, and what is refused."""

import gc
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage, RDBStorage

from lightning_ydrop.errors import ConfigurationError
from lightning_ydrop.search import storage as module
from lightning_ydrop.search.storage import FlockedJournal, open_claims, open_storage, open_study, shown
from tests.search.server import Server


def refusal(storage: str | Path, workers: int = 1) -> str:
    with pytest.raises(ConfigurationError) as raised:
        open_storage(storage, workers)
    # What else a traceback would print may hold a password.
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__ or raised.value.__context__ is None
    return str(raised.value)


def test_a_path_is_a_journal_and_its_folders_are_created() -> None:
    study = open_study("here/and/study.journal", "one", direction="maximize", workers=4)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    assert Path("here/and/study.journal").exists()
    again = open_study(Path("here/and/study.journal"), "one", direction="maximize")
    assert again.trials == study.trials
    assert isinstance(open_storage("here/and/study.journal"), JournalStorage)


def test_a_database_of_postgresql_is_opened(server: Server) -> None:
    url = server.database()
    study = open_study(url, "one", workers=4)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    assert len(open_study(url, "one").trials) == 2
    assert isinstance(open_storage(url), RDBStorage)
    # The driver may be named too.
    assert len(open_study(url.replace("postgresql://", "postgresql+psycopg://"), "one").trials) == 2


def test_machines_may_create_the_tables_at_once(server: Server) -> None:
    url = server.database()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=open_study, args=(url, "one")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4


def test_sqlite_is_for_one_worker() -> None:
    study = open_study("sqlite:///study.db", "one")
    study.optimize(lambda trial: 1.0, n_trials=1)
    assert refusal("sqlite:///study.db", 2) == (
        "open_storage('sqlite:///study.db', workers=2) was called. SQLite takes one worker: it locks no rows, so two "
        "workers may be handed the same trial. Pass a path without sqlite:///, which makes a journal file, or the URL "
        "of PostgreSQL."
    )
    assert "is kept in a file" in refusal("sqlite://")
    assert "the file nowhere/study.db and its folder" in refusal("sqlite:///nowhere/study.db")


def test_a_number_of_workers_is_checked() -> None:
    assert refusal("study.journal", 0).startswith("open_storage('study.journal', ...)(workers=0) was given.")


@pytest.mark.parametrize(
    "url",
    [
        "mysql://me:secret@host/studies",
        "mongodb://me:secret@host/studies",
        "redis://me:secret@host",
        "://me:secret@host",
    ],
)
def test_other_databases_are_refused(url: str) -> None:
    said = refusal(url)
    assert "postgresql://USER:PASSWORD@HOST/DATABASE" in said
    assert "secret" not in said


def test_a_journal_needs_a_folder_to_write_to() -> None:
    Path("file").touch()
    said = refusal("file/study.journal")
    assert said.startswith(
        "open_storage('file/study.journal', workers=1) was called. A journal and its locks need a folder"
    )
    assert said.endswith("Name a file in another folder, or pass the URL of PostgreSQL.")
    assert "Is a directory" in refusal(Path())
    with pytest.raises(ConfigurationError, match=r"open_claims\('file/study.journal', 'one'\) was called"):
        open_claims("file/study.journal", "one")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only_is_no_place_for_a_journal() -> None:
    Path("closed").mkdir(mode=0o500)
    assert "Permission denied" in refusal("closed/study.journal")


def test_a_torn_last_line_is_cut_off() -> None:
    study = open_study("study.journal", "one")
    study.optimize(lambda trial: 1.0, n_trials=1)
    file = Path("study.journal").absolute()
    whole = file.stat().st_size
    with file.open("a") as opened:
        opened.write('{"op_code": 4, "wor')
    said = refusal("study.journal")
    assert "the last one of this file is torn" in said
    command = f"truncate --size={whole} {file}"
    assert said.endswith(command)
    assert os.system(command) == 0
    open_study("study.journal", "one").optimize(lambda trial: 1.0, n_trials=1)
    assert len(open_study("study.journal", "one").trials) == 2


def test_what_is_no_journal_is_refused() -> None:
    Path("notes").write_text("to do\n")
    assert "starts with something else" in refusal("notes")
    Path("notes").write_text('{"to": "do"}\n')
    assert "Optuna can't read this one: KeyError: 'op_code'" in refusal("notes")
    Path("notes").write_text("{to do}\n{to do}\n")
    assert "Optuna can't read this one: JSONDecodeError" in refusal("notes")
    open_study("sqlite:///study.db", "one")
    assert f"one worker may use it as sqlite:///{Path('study.db').absolute()}" in refusal("study.db")


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = refusal(f"postgresql://me:secret@127.0.0.1:{port}/studies", workers=2)
    assert said.startswith(f"open_storage('postgresql://me:***@127.0.0.1:{port}/studies', workers=2) was called.")
    assert "The database has to answer before the first trial; it said: connection failed" in said
    assert f"Check host 127.0.0.1, port {port}, database studies, user me," in said
    assert "secret" not in said


@pytest.mark.filterwarnings("ignore:Exception ignored in.*BaseConnection")  # Optuna leaves one open
def test_a_wrong_password_is_not_printed(server: Server) -> None:
    url = server.database()
    server.execute("DROP ROLE IF EXISTS careful", "CREATE ROLE careful LOGIN PASSWORD 's3cr3t@home'")
    mine = url.replace("tester@", "careful:{}@")
    said = refusal(mine.format("guessed"))
    assert 'password authentication failed for user "careful"' in said
    assert "guessed" not in said
    said = refusal(mine.format("s3cr3t@home"))
    assert said.endswith("Write its special characters as urllib.parse.quote does: @ is %40.")
    assert "s3cr3t" not in said
    assert "home" not in said
    # The right one is not allowed to create tables.
    said = refusal(mine.format("s3cr3t%40home"))
    assert "permission denied for schema public" in said
    assert "s3cr3t" not in said
    said = refusal(f"{url}?user=careful&password=guessed")
    assert "password authentication failed" in said
    assert "guessed" not in said
    assert 'database "nowhere" does not exist' in refusal(url.replace("study_", "nowhere?application_name="))
    gc.collect()


@pytest.mark.parametrize(
    ("storage", "written"),
    [
        ("runs/study.journal", "runs/study.journal"),
        ("postgresql://host/a", "postgresql://host/a"),
        ("postgresql://me@host:5432/a", "postgresql://me@host:5432/a"),
        ("postgresql://me:pass@host:5432/a", "postgresql://me:***@host:5432/a"),
        ("postgresql://me:p@ss:w/o?r#d@host/a", "postgresql://me:***@host/a"),
        (
            "postgresql://host/a?user=me&password=pass&sslpassword=b",
            "postgresql://host/a?user=me&password=***&sslpassword=***",
        ),
    ],
)
def test_a_storage_is_shown_without_its_password(storage: str, written: str) -> None:
    assert shown(storage) == written


def test_a_driver_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'psycopg'", name="psycopg")

    monkeypatch.setattr(module, "DatabaseClaims", missing)
    assert refusal("postgresql://me:secret@host/studies") == (
        "open_storage('postgresql://me:***@host/studies', workers=1) was called. Its driver is not installed: psycopg. "
        'Run pip install "lightning-ydrop[search]", which brings psycopg, the driver of postgresql:// URLs.'
    )


def hold(journal: Path) -> None:
    FlockedJournal(journal).acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_while_it_writes_keeps_nobody_waiting() -> None:
    journal = Path("study.journal").absolute()
    study = open_study(journal, "one")
    process = multiprocessing.get_context("fork").Process(target=hold, args=(journal,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    began = time.monotonic()
    study.optimize(lambda trial: 1.0, n_trials=1)
    assert time.monotonic() - began < 10  # Optuna's own lock is taken over after 30 seconds


def test_a_study_of_a_journal_is_optunas_own() -> None:
    open_study("study.journal", "one").optimize(lambda trial: 1.0, n_trials=1)
    backend = optuna.storages.journal.JournalFileBackend("study.journal")
    assert len(optuna.load_study(study_name="one", storage=JournalStorage(backend)).trials) == 1
