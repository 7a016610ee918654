"A small part of faults.py, and more in the slow tests: no fault loses, doubles or damages a run."
import sys

import pytest
from faults import Harness, Tally

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="takes Linux's capabilities away and looks into its /proc")


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    return Harness(tmp_path_factory.mktemp("faults"), seed=1)


@pytest.fixture(autouse=True)
def no_harm(harness):
    harness.tally = Tally()
    yield
    assert not harness.tally.harm, "\n".join(harness.tally.damage)


def few(number, many):
    "A small number of faults, and among the slow tests a larger one."
    return pytest.mark.parametrize("number", [number, pytest.param(many, marks=pytest.mark.slow)])


@few(6, 30)
def test_killed_at_random_moments(harness, number):
    harness.kill_at_random(number)
    assert harness.tally.faults["killed at a random moment"] == number


@few(4, 10)
def test_killed_before_changes_of_files(harness, number):
    assert harness.file_events > 50
    harness.kill_at_file_events(number, at_once=2)
    assert harness.tally.faults["killed before a change of a file"] >= 1.5 * number


@pytest.mark.slow
def test_killed_with_half_a_file_written(harness):
    harness.kill_in_half_a_file()
    assert sum(number for kind, number in harness.tally.faults.items() if "half" in kind or "cache" in kind) == 11


@pytest.mark.slow
def test_full_disk(harness):
    harness.fill_the_disk(1)


def test_a_folder_that_may_only_be_read(harness):
    harness.take_permissions()


def test_signals(harness):
    harness.send_signals(2)


def test_two_processes_at_once(harness):
    "Which do the same, and which fill one cache."
    harness.run_two_at_once(1)


@few(1, 3)
def test_killed_while_the_teacher_is_trained(harness, number):
    "With half of it written, and among the slow tests at random moments, and beside another process that waits for it."
    harness.kill_teachers(number)
