"""Progress of commands on terminals of any width, and without a terminal. No test sleeps."""

import io

import pytest
from rich.console import Console

from fdd_kernels.common.progress import Activity

TERMS = ["loss 12.3456", "output_kd 4.5678", "trajectory 3.4567", "derivative 1.2345", "ce 10.1234"]


def terminal(width, term="xterm"):
    return Console(
        file=io.StringIO(),
        force_terminal=True,
        width=width,
        color_system=None,
        legacy_windows=False,
        _environ={"TERM": term},
    )


class Time:
    """A clock that advances by each wait; `during` holds one action for each wait."""

    def __init__(self, *during, every=10.0):
        self.now, self.during, self.every = 0.0, list(during), every

    def clock(self):
        return self.now

    def wait(self, seconds):
        assert seconds == self.every
        if not self.during:
            return True
        self.now += seconds
        self.during.pop(0)()
        return False


def shown(activity, width):
    """Render the activity for a terminal of this width."""
    console = terminal(width)
    console.print(activity._bar.get_renderable())
    return console.file.getvalue().rstrip("\n")


@pytest.mark.parametrize(("width", "terms"), [(60, 0), (80, 2), (100, 3), (160, 5)])
def test_terms_are_dropped_before_bar_steps_and_time(width, terms):
    console = terminal(width)
    with Activity(console, "distilling") as activity:
        activity.start_at(0, 20000)
        activity.update(12345, terms=TERMS)
        line = shown(activity, width)
    assert "\n" not in line
    assert len(line) <= width
    for part in ("distilling", "━" * 8, "12345/20000", ":"):
        assert part in line, line
    assert [term in line for term in TERMS] == [True] * terms + [False] * (5 - terms), line


def test_without_a_terminal_a_line_every_ten_seconds():
    console, time = Console(file=io.StringIO(), width=80), Time()
    activity = Activity(console, "distilling", wait=time.wait, clock=time.clock)
    time.during = [
        lambda: None,
        lambda: activity.update(30, terms=["loss 2.5", "output_kd 1.5"]),
        lambda: activity.update(50),
    ]
    activity.start_at(10, 100)
    with activity:
        activity._heartbeat._thread.join()
    assert console.file.getvalue().splitlines() == [
        "distilling: 10/100 0:00:10 so far",
        "distilling: 30/100 0:01:10 left  loss 2.5  output_kd 1.5",
        "distilling: 50/100 0:00:38 left  loss 2.5  output_kd 1.5",
    ]


def test_a_terminal_without_a_bar_gets_lines():
    """TERM=dumb, as in editors and agents: rich shows nothing there before a bar ends."""
    console, time = terminal(80, term="dumb"), Time(lambda: None, every=5.0)
    with Activity(
        console, "distilling", 100, every=5.0, wait=time.wait, clock=time.clock
    ) as activity:
        activity._heartbeat._thread.join()
    assert console.file.getvalue().splitlines() == ["distilling: 0/100 0:00:05 so far"]


def test_what_has_no_steps_tells_its_time():
    console, time = Console(file=io.StringIO(), width=80), Time(*[lambda: None] * 7)
    with Activity(console, "loading the teacher", wait=time.wait, clock=time.clock) as activity:
        activity._heartbeat._thread.join()
    assert console.file.getvalue().splitlines()[-1] == "loading the teacher: 0:01:10 so far"
    assert len(console.file.getvalue().splitlines()) == 7


def test_amounts_are_shown_as_they_are_counted():
    activity = Activity(
        Console(file=io.StringIO()),
        "reading text",
        3 * 2**20,
        count=lambda n: f"{n / 2**20:.1f} MiB",
    )
    activity.update(2**20)
    assert activity.line(10.0) == "reading text: 1.0 MiB/3.0 MiB 0:00:20 left"


def test_a_quiet_console_says_nothing():
    console = Console(file=io.StringIO(), quiet=True)
    with Activity(console, "loading", wait=lambda seconds: pytest.fail("waited")) as activity:
        activity.update(3)
    assert console.file.getvalue() == ""
