"""Rejected requests are logged once per client and reason, and the log stays small."""

from vla.serving.refusals import MOST, PERIOD_S, Refusals


def lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_broken_client_adds_few_lines_per_period(caplog):
    now = [0.0]
    refusals = Refusals(now=lambda: now[0])
    for _ in range(50 * 600):  # ten minutes at 50 Hz
        now[0] += 0.02
        refusals.log("10.0.0.7", "POST /act", "state: expected 7 entries")
    assert len(lines(caplog)) <= 2 * 600 / PERIOD_S + 1
    assert lines(caplog)[0] == "rejected: POST /act from 10.0.0.7: state: expected 7 entries"
    assert lines(caplog)[1].endswith("more rejected requests in the last 60 s")
    told = sum("expected 7" in line for line in lines(caplog))
    refusals.flush()
    counted = sum(int(line.split()[0]) for line in lines(caplog) if "more rejected requests" in line)
    assert told + counted == 50 * 600


def test_other_clients_and_reasons_are_logged_at_once(caplog):
    refusals = Refusals(now=lambda: 0.0)
    for who, why in (("a", "x"), ("a", "y"), ("b", "x"), ("a", "x")):
        refusals.log(who, "POST /act", why)
    assert len(lines(caplog)) == 3
    for number in range(1000):  # a different reason each time
        refusals.log("a", "POST /act", f"unknown unnorm_key {number}")
    assert len(lines(caplog)) == MOST


def test_a_client_cannot_inject_log_lines(caplog):
    Refusals().log("a", "POST /act", "unknown unnorm_key 'x\n12:00 all is well\x1b[2J" + "y" * 10_000)
    (line,) = lines(caplog)
    assert "\n" not in line and "\x1b" not in line and len(line) < 500
