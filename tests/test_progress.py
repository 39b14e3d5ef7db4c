"""Progress on a terminal, and where there is none."""

import logging
import re
import time

import pytest
from running import run_on_terminal

from hf_ibdistill import progress
from hf_ibdistill.progress import Progress, describe_seconds


WORK = """
import time
from hf_ibdistill.progress import Progress

print("before")
for is_shown in (True, False):
    with Progress("record {a}", 20, images_per_unit=3, is_shown=is_shown) as bar:
        bar.skip(4)
        for number in range(16):
            time.sleep(0.1)
            bar.update(note="loss 0.5")
    print("after")
"""


def test_a_bar_on_a_terminal_is_gone_at_the_end_and_may_be_hidden():
    written, lines = run_on_terminal(["-c", WORK], columns=80)
    assert lines == ["before", "after", "after", ""]
    assert all(len(line) <= 80 for line in re.split(r"[\r\n]", written))
    with_bar, hidden = written.split("after")[:2]
    assert hidden.strip() == ""
    shown = re.findall(
        r"record \{a\} (█.*?) +([\d]+)/20 images, ([\d.]+) images/s, (\d\d:\d\d) left, loss 0.5", with_bar
    )
    assert shown
    for _, count, rate, left in shown:
        # At most ten updates a second, each of three images. The units before do not count.
        assert 10 < int(count) <= 20 and 5 < float(rate) <= 30 and left in ("00:00", "00:01")


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_a_line_a_minute_without_a_terminal(clock, caplog, capsys):
    caplog.set_level(logging.INFO, progress.logger.name)
    with Progress("record", 10_000) as stage:
        for _ in range(100):
            clock[0] += 2
            stage.update(100)
        stage.finish()
    assert caplog.messages == [
        "record: 3,000/10,000 images, 50 images/s, 02:20 left",
        "record: 6,000/10,000 images, 50 images/s, 01:20 left",
        "record: 9,000/10,000 images, 50 images/s, 00:20 left",
        "record: 10,000 images, 3:20 min, 50 images/s",
    ]
    assert capsys.readouterr() == ("", "")


def test_an_unknown_total_and_a_stage_without_units(clock, caplog):
    caplog.set_level(logging.INFO, progress.logger.name)
    stage = Progress("train", None, "steps", images_per_unit=64)
    stage.skip(5)
    clock[0] = 64
    stage.update(note="loss 1")
    stage.finish()
    Progress("record", 0).finish()
    hidden = Progress("record", 10, is_shown=False)
    clock[0] += 100
    hidden.update()
    hidden.finish()
    assert caplog.messages == [
        "train: 6 steps, 1.0 images/s, loss 1",
        "train: 6 steps, 1:04 min, 1.0 images/s, loss 1",
        "record: 0 images, 0.0 s",
    ]


def test_a_library_user_sees_nothing_by_default(clock, capsys):
    stage = Progress("record", 10)
    clock[0] = 100
    stage.update()
    stage.finish()
    assert capsys.readouterr() == ("", "")


def test_seconds():
    assert [describe_seconds(s) for s in (0.04, 59.9, 60, 125, 3725)] == [
        "0.0 s", "59.9 s", "1:00 min", "2:05 min", "1:02:05 h",
    ]  # fmt: skip
