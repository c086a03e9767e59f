"""A folder belongs to the run that writes there, as long as that lives."""

import errno
import fcntl
import socket

import tiny
from faults import flags, logged, one_sentence, run, wait_for

from support.lock import hold


def test_a_second_run_is_refused_with_pid_host_and_time_until_the_first_is_gone(
    world, here, capsys
):
    out = here / "o"
    argv = flags(world, 1, "--steps", 1000, "--save-every", 0, "--out", out)
    (first,) = tiny.start(here, *argv, slow=0.05)
    wait_for(lambda: logged(out) > 1)
    for more in ((), ("--resume",)):
        owner = f"pid {first.pid} on {socket.gethostname()} since 20"
        one_sentence(capsys, run(world, 1, "--out", out, *more), out, owner, "another --out")
    assert first.is_alive() and sorted(p.name for p in out.iterdir()) == ["lock", "log.jsonl"]
    steps = [int(line.split(",")[0].split()[1]) for line in open(out / "log.jsonl")]
    assert steps == sorted(set(steps))
    first.kill()
    first.join()
    assert run(world, 1, "--resume", "--steps", 2, "--out", out) == 0


def test_a_file_system_without_locks_is_said_and_used_all_the_same(tmp_path, capsys, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    hold(tmp_path / "o").close()
    assert "has no locks" in capsys.readouterr().out
