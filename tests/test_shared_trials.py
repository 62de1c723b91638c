import math
import multiprocessing
import random
import time

import optuna
import pytest
from optuna.trial import TrialState
from sharing_trials import BUDGET, LR, bare_run, searched, shared, work_off

from nomadam.experiments import shared_trials
from nomadam.experiments.search_spaces import Search
from nomadam.experiments.shared_trials import (
    SharedTrials,
    Worker,
    current_attempts,
    forget_dead_workers,
)
from nomadam.experiments.trial_storage import open_storage, quiet, sqlite_url


@pytest.fixture(autouse=True)
def _quiet_optuna():
    with quiet():
        yield


@pytest.fixture
def alone(tmp_path):
    with Worker(tmp_path, "session") as worker:
        yield shared(tmp_path, worker)


def states(trials):
    return [trial.state for trial in trials.study.get_trials()]


class TestOneProcess:
    def test_every_slot_is_done_once(self, alone):
        claims = []
        while (claim := alone.claim()) is not None:
            assert claim.values == alone.search.values(claim.slot)
            assert alone.finish(claim, None if claim.slot == 3 else float(claim.slot))
            claims.append(claim)
        assert [claim.slot for claim in claims] == list(range(BUDGET))
        assert states(alone) == [TrialState.COMPLETE] * BUDGET
        values = [trial.value for trial in alone.study.get_trials()]
        assert values == [math.inf if slot == 3 else slot for slot in range(BUDGET)]
        assert alone.open_slots() == []
        assert alone.study.best_trial.value == 0

    def test_a_larger_budget_adds_slots(self, alone, tmp_path):
        while (claim := alone.claim()) is not None:
            alone.finish(claim, 1.0)
        more = shared(tmp_path, alone.worker, budget=BUDGET + 2)
        assert more.open_slots() == [BUDGET, BUDGET + 1]
        assert more.claim().slot == BUDGET
        # And a smaller one looks at its own slots only.
        assert shared(tmp_path, alone.worker, budget=2).claim() is None

    def test_what_is_given_back_is_taken_up_with_the_same_values(self, alone):
        first, second = alone.claim(), alone.claim()
        assert (first.slot, second.slot) == (0, 1)
        alone.give_back(first)
        again = alone.claim()
        assert (again.slot, again.attempt, again.values) == (0, 1, first.values)
        assert alone.open_slots() == list(range(BUDGET))
        # Whoever had it before can deliver nothing any more.
        assert not alone.finish(first, 0.0)
        assert alone.finish(again, 1.0) and not alone.finish(again, 2.0)
        assert alone.current()[0].value == 1.0

    def test_a_failing_trial_is_tried_three_times_by_the_session(self, alone, tmp_path):
        for attempt in range(3):
            claim = alone.claim()
            assert (claim.slot, claim.attempt) == (0, attempt)
            alone.give_back(claim, "out of memory")
        assert alone.claim().slot == 1
        assert 0 not in alone.open_slots()
        with Worker(tmp_path, "the next command") as worker:
            assert shared(tmp_path, worker).claim().slot == 0

    def test_what_can_not_succeed_is_tried_once(self, alone):
        alone.give_back(alone.claim(), "lr = -1: must be at least 0", last=True)
        assert alone.claim().slot == 1
        assert alone.errors(0)[0]["error"] == "lr = -1: must be at least 0"

    def test_trials_of_others_in_the_study_are_left_alone(self, alone):
        alone.study.add_trial(optuna.create_trial(state=TrialState.RUNNING))
        alone.study.add_trial(
            optuna.create_trial(value=-1.0, user_attrs={"slot": BUDGET, "attempt": 0})
        )
        assert alone.claim().slot == 0
        assert list(alone.current()) == [0]


class TestTwoAtOnce:
    def test_of_two_who_take_one_slot_at_once_the_first_has_it(self, alone, tmp_path, monkeypatch):
        """The other one looks before the first has written, and writes before the first looks."""
        with Worker(tmp_path, "session") as worker:
            other = shared(tmp_path, worker)
            won = []
            write = type(alone.study).add_trial

            def late(study, trial):
                if not won and study is alone.study:
                    won.append(other.claim())
                write(study, trial)

            monkeypatch.setattr(type(alone.study), "add_trial", late)
            mine = alone.claim()
        assert (won[0].slot, mine.slot) == (0, 1)
        # The attempt that came too late is ended, so that nobody waits for it.
        assert states(alone).count(TrialState.RUNNING) == 2

    def test_current_attempts_are_the_last_ones_and_the_first_of_equals(self):
        def trial(number, slot, attempt, state=TrialState.RUNNING):
            made = optuna.create_trial(state=state, user_attrs={"slot": slot, "attempt": attempt})
            made.number = number
            return made

        trials = [
            trial(4, 0, 1),
            trial(0, 0, 0, TrialState.FAIL),
            trial(1, 0, 0),
            trial(5, 0, 1),
            trial(3, 1, 0),
            trial(2, 1, 0),
            trial(6, 9, 0),
        ]
        found = {slot: each.number for slot, each in current_attempts(trials, 5).items()}
        assert found == {0: 4, 1: 2}


class TestDeadProcesses:
    def test_a_dead_process_of_this_machine_is_seen_at_once(self, alone, tmp_path):
        worker = Worker(tmp_path, "session")
        other = shared(tmp_path, worker)
        claim = other.claim()
        assert alone.claim().slot == 1
        worker._file.close()  # what the system does at its death
        taken = alone.claim()
        assert (taken.slot, taken.attempt, taken.values) == (0, 1, claim.values)
        # It was not dead after all: its result does not count, and the other one's does.
        assert not other.finish(claim, 0.0)
        assert alone.finish(taken, 1.0)

    def test_a_result_that_comes_before_the_taking_over_counts(self, alone, tmp_path, monkeypatch):
        worker = Worker(tmp_path, "session")
        other = shared(tmp_path, worker)
        claim = other.claim()
        seen = alone._is_dead

        def dead(about):
            assert other.finish(claim, 0.5)
            return True

        monkeypatch.setattr(alone, "_is_dead", dead)
        assert alone.claim().slot == 1
        monkeypatch.setattr(alone, "_is_dead", seen)
        assert alone.current()[0].value == 0.5 and alone.current()[0].user_attrs["attempt"] == 0

    def test_on_another_machine_it_is_dead_when_its_beat_stops(self, tmp_path, monkeypatch):
        here, there = tmp_path / "here", tmp_path / "there"
        here.mkdir()
        clock = [0.0]
        with Worker(here, "one") as mine, Worker(there, "two") as theirs:
            alone = shared(here, mine, grace_seconds=60.0)
            other = SharedTrials(
                search=alone.search,
                budget=BUDGET,
                study=alone.study,
                worker=theirs,
                suggest=alone.suggest,
            )
            claim = other.claim()
            monkeypatch.setattr(shared_trials.time, "monotonic", lambda: clock[0])
            assert alone.claim().slot == 1
            for now in (50.0, 100.0, 150.0):
                clock[0] = now
                alone.study.set_user_attr(f"beat {theirs.name}", now)
                assert alone.claim().attempt == 0
            clock[0] = 205.0
            assert alone.claim().attempt == 0
            clock[0] = 211.0
            taken = alone.claim()
            assert (taken.slot, taken.attempt) == (0, 1)
            assert not other.finish(claim, 0.0)

    def test_whoever_comes_later_sees_the_dead_too_until_they_are_forgotten(self, tmp_path):
        dead, living = Worker(tmp_path, "a"), Worker(tmp_path, "b")
        dead._file.close()
        with Worker(tmp_path, "c") as later:
            assert later.sees(living.host, living.name) is True
            assert later.sees(dead.host, dead.name) is False
            assert later.sees("another machine", living.name) is None
            forget_dead_workers(tmp_path)
            assert later.sees(living.host, living.name) is True
            assert later.sees(dead.host, dead.name) is None
        living.__exit__()
        assert not list(tmp_path.glob(".worker-*.lock"))


def test_a_living_process_has_a_beat_that_changes(alone):
    seen = set()
    deadline = time.monotonic() + 60
    with alone.kept_alive(beat_seconds=0.01):
        while len(seen) < 3 and time.monotonic() < deadline:
            seen.add(alone.study.user_attrs.get(f"beat {alone.worker.name}"))
            time.sleep(0.01)
    last = alone.study.user_attrs[f"beat {alone.worker.name}"]
    assert len(seen) == 3
    time.sleep(0.05)
    assert alone.study.user_attrs[f"beat {alone.worker.name}"] == last


def start(folder, name):
    process = multiprocessing.get_context("spawn").Process(target=work_off, args=(folder, name))
    process.start()
    return process


def check_all_done_once(folder):
    with Worker(folder, "afterwards") as worker:
        trials = shared(folder, worker)
        assert trials.open_slots() == [] and trials.claim() is None
        complete = trials.study.get_trials(states=[TrialState.COMPLETE])
        assert sorted(trial.value for trial in complete) == list(range(BUDGET))
        assert all(trial.params == trials.search.values(int(trial.value)) for trial in complete)
    lines = (folder / "log").read_text().split("\n")[:-1]
    for slot in range(BUDGET):
        assert lines.count(f"counts {slot}") <= 1
        if f"counts {slot}" in lines:
            assert f"begun {slot}" not in lines[lines.index(f"counts {slot}") :]
    return lines


def test_two_processes_on_one_database_lose_nothing_and_do_nothing_twice(tmp_path):
    processes = [start(tmp_path, name) for name in ("a", "b")]
    for process in processes:
        process.join(600)
        assert process.exitcode == 0
    lines = check_all_done_once(tmp_path)
    # Nobody died, so that each was begun once, N in all and not N each.
    assert sorted(lines) == sorted(f"{word} {n}" for word in ("begun", "counts") for n in range(12))


def test_processes_killed_at_random_instants_lose_nothing(tmp_path):
    draw = random.Random(0)
    processes = [start(tmp_path, name) for name in ("a", "b")]
    for kill in range(2):
        deadline = time.monotonic() + 600
        # Not before something has begun, else the kill meets only the start of the interpreter.
        while (tmp_path / "log").exists() is False and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(draw.random() * 0.5)
        victim = processes[kill % 2]
        victim.kill()
        victim.join()
        processes[kill % 2] = start(tmp_path, f"after {kill}")
    for process in processes:
        process.join(600)
        assert process.exitcode == 0
    check_all_done_once(tmp_path)


class TestStorage:
    @pytest.mark.parametrize(
        ("url", "words"),
        [
            ("postgres//host", "is no database URL"),
            ("nosuch://host/name", "is no database URL"),
            ("sqlite://", "lost when the process ends"),
            ("sqlite:////no/such/folder/tuning.db", "can not be opened"),
        ],
    )
    def test_what_can_not_be_opened(self, url, words):
        with pytest.raises(ValueError, match=words):
            open_storage(url)

    def test_a_file_that_is_no_database(self, tmp_path, monkeypatch):
        monkeypatch.setattr("nomadam.experiments.trial_storage.OPENING_TRIES", 1)
        (tmp_path / "tuning.db").write_bytes(b"no database" * 1000)
        with pytest.raises(ValueError, match="can not be opened.*not a database"):
            open_storage(sqlite_url(tmp_path / "tuning.db"))

    def test_a_password_is_not_shown(self):
        with pytest.raises((ValueError, ImportError)) as caught:
            open_storage("postgresql://user:secret@127.0.0.1:1/name")
        assert "secret" not in str(caught.value)

    def test_another_search_is_refused_by_what_differs(self, alone, tmp_path):
        with pytest.raises(ValueError, match=r"another search.*\n.*run\.steps: 12 there, 3 here"):
            shared(tmp_path, alone.worker, search=searched(steps=3))
        wider = Search(label="sgd_sai", runs=(bare_run(),), bounds={LR: (1e-4, 1.0)})
        with pytest.raises(ValueError, match=r"space\.optimizer\.lr.*1\.0\] here"):
            shared(tmp_path, alone.worker, search=wider)
        # One that was changed under the hands of a process is noticed too.
        alone.study.set_user_attr("plan", wider.plan)
        with pytest.raises(ValueError, match="another search"):
            alone.claim()
