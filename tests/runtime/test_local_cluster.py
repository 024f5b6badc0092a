"""Real heads on ports and in a home of their own: started, found, submitted to, stopped alone.

Nobody else's Ray is touched: each head here has its own temp folder, and only what was started here is ended.
"""

import asyncio
import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from raydistill.cli import main
from raydistill.errors import ConfigError, RayDistillError
from raydistill.runtime import local_cluster
from raydistill.runtime.submit import connect, stop_jobs, submit_and_follow

BIN = Path(sys.executable).parent
TOKEN = "a-token-of-a-test"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def own_home(token: str | None) -> Iterator[dict[str, str]]:
    """An environment in which no Ray and no token is known but `token`; a short path, for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="rd", dir="/tmp", ignore_cleanup_errors=True) as home:
        if token:
            (Path(home) / ".ray").mkdir()
            (Path(home) / ".ray" / "auth_token").write_text(token)
        dropped = (
            "XDG_CACHE_HOME",
            "RAY_ADDRESS",
            "RAY_API_SERVER_ADDRESS",
            "RAY_AUTH_MODE",
            "RAY_AUTH_TOKEN",
        )
        env = {name: value for name, value in os.environ.items() if name not in dropped}
        yield env | {
            "HOME": home,
            "RAY_TMPDIR": f"{home}/ray",
            "RAYDISTILL_DASHBOARD_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
        }


def use(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> None:
    for name in set(os.environ) - set(env):
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This process in a home of its own, where no head runs."""
    with own_home(token=None) as env:
        use(monkeypatch, env)
        yield Path(env["HOME"])


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[dict[str, str], local_cluster.Head]]:
    """A head without token, from two threads that ask for it at once."""
    with own_home(token=None) as env, pytest.MonkeyPatch.context() as patch:
        use(patch, env)
        with ThreadPoolExecutor(2) as threads:
            first, second = threads.map(lambda _: local_cluster.up(), range(2))
        assert first.pid == second.pid
        assert sorted([first.started_now, second.started_now]) == [False, True]
        patch.undo()
        yield env, first
        use(patch, env)
        local_cluster.down()


def runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def tree(head: local_cluster.Head) -> list[psutil.Process]:
    root = psutil.Process(head.pid)
    return [root, *root.children(recursive=True)]


class BreakingProxy:
    """Passes TCP on to a port; each of the first `cuts` log streams is broken off after `after_s` seconds."""

    def __init__(self, port: int, cuts: int, after_s: float) -> None:
        self._target, self._cuts, self._after_s = port, cuts, after_s
        self.broken = 0
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.read(65536)
        to_head = await asyncio.open_connection("127.0.0.1", self._target)
        to_head[1].write(request)
        both = asyncio.gather(self._pass(reader, to_head[1]), self._pass(to_head[0], writer))
        if b"/logs/tail" in request and self.broken < self._cuts:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(both, self._after_s)
            self.broken += 1
            writer.transport.abort()
        else:
            await both
        to_head[1].close()

    @staticmethod
    async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            writer.write_eof()


@pytest.mark.ray
def test_a_started_head_listens_on_this_machine_only(
    head: tuple[dict[str, str], local_cluster.Head],
) -> None:
    addresses = {
        connection.laddr.ip
        for process in tree(head[1])
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def teachers_command(env: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [BIN / "raydistill", "teachers", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.ray
def test_teachers_command_joins_the_head_that_runs_here(
    head: tuple[dict[str, str], local_cluster.Head],
) -> None:
    listed = teachers_command(head[0])
    assert (listed.returncode, listed.stdout) == (0, "no teacher service runs on this cluster\n"), (
        listed.stderr
    )
    refused = teachers_command(head[0], "--stop", "nosuch")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].endswith(
        "no teacher service 'nosuch' runs on this cluster; there are: none"
    )


@pytest.mark.ray
def test_ray_job_submit_finds_the_head_through_the_plug_in(
    head: tuple[dict[str, str], local_cluster.Head],
) -> None:
    env, _ = head
    code = "import sys, raydistill; print('runs in', sys.executable)"
    done = subprocess.run(
        [BIN / "ray", "job", "submit", "--", "python", "-c", code],
        env=env | {"RAY_API_SERVER_ADDRESS": local_cluster.ADDRESS},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"runs in {sys.executable}" in done.stdout


@pytest.mark.ray
def test_a_broken_log_stream_is_attached_again_and_the_exit_code_is_the_jobs(
    head: tuple[dict[str, str], local_cluster.Head], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    env, running = head
    use(monkeypatch, env)
    (tmp_path / "job.py").write_text(
        "import sys, time\nfor n in range(40):\n    print('line', n)\n    time.sleep(0.1)\nsys.exit(3)\n"
    )
    proxy = BreakingProxy(int(running.address.rpartition(":")[2]), cuts=2, after_s=1.2)
    output: list[str] = []
    result = submit_and_follow(["python", "job.py"], tmp_path, proxy.url, write=output.append)
    assert proxy.broken == 2
    assert [line for line in "".join(output).splitlines() if line.startswith("line")] == [
        f"line {n}" for n in range(40)
    ]
    assert (result.status, result.exit_code) == ("FAILED", 3)


JOB_WITH_A_SNAPSHOT = """
import signal, sys, time
def stop(*_):
    time.sleep(4)
    print("snapshot written")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("working")
time.sleep(300)
"""


def follow_until_it_works(
    env: dict[str, str], folder: Path, stdin: int = subprocess.DEVNULL
) -> "tuple[subprocess.Popen[str], str]":
    """A `raydistill submit` whose job has begun, and its output so far."""
    (folder / "job.py").write_text(JOB_WITH_A_SNAPSHOT)
    command = [sys.executable, "-m", "raydistill.cli", "submit", "--working-dir", str(folder), "--"]
    child = subprocess.Popen(
        [*command, "python", "job.py"],
        env=env | {"PYTHONUNBUFFERED": "1"},
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell that started this suite in the background had it ignore SIGINT, which children inherit
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert child.stdout is not None
    seen = ""
    while "working\n" not in seen and (line := child.stdout.readline()):
        seen += line
    return child, seen


@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_or_sigterm_stops_the_job_which_may_write_its_snapshot_first(
    head: tuple[dict[str, str], local_cluster.Head], tmp_path: Path, number: int
) -> None:
    child, seen = follow_until_it_works(head[0], tmp_path)
    child.send_signal(number)
    rest = child.communicate(timeout=60)[0]
    assert "snapshot written" in rest, seen + rest
    assert child.returncode == 130


@pytest.mark.ray
def test_a_person_who_answers_no_to_ctrl_c_leaves_the_job_running(
    head: tuple[dict[str, str], local_cluster.Head], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env, started = head
    person, terminal = os.openpty()
    try:
        child, seen = follow_until_it_works(env, tmp_path, terminal)
        child.send_signal(signal.SIGINT)
        os.write(person, b"n\n")
        rest = child.communicate(timeout=60)[0]
    finally:
        os.close(person)
        os.close(terminal)
    assert child.returncode == 130, seen + rest
    assert "goes on" in rest
    use(monkeypatch, env)
    client = connect(started.address)
    going_on = [job.submission_id for job in client.list_jobs() if not job.status.is_terminal()]
    assert [number for number in going_on if number and number in rest] == going_on != []
    stop_jobs(started.address)
    assert all(job.status.is_terminal() for job in client.list_jobs())


@pytest.mark.ray
def test_down_lets_running_jobs_write_their_snapshots(tmp_path: Path) -> None:
    with own_home(token=None) as env, pytest.MonkeyPatch.context() as patch:
        use(patch, env)
        started = local_cluster.up()
        try:
            child, seen = follow_until_it_works(env, tmp_path)
            with pytest.raises(SystemExit) as ended:
                main(["down"])
            rest = child.communicate(timeout=120)[0]
        finally:
            local_cluster.down()
        assert ended.value.code == 0
        assert "snapshot written" in rest, seen + rest
        assert started.pid is not None
        assert not psutil.pid_exists(started.pid) or not runs(psutil.Process(started.pid))


@pytest.mark.ray
def test_a_head_that_dies_under_a_job_is_reported_and_not_waited_for() -> None:
    """And where a token exists, a head that is started takes it and `ray job submit` sends it."""
    with own_home(TOKEN) as env, pytest.MonkeyPatch.context() as patch:
        use(patch, env)
        plain = subprocess.run(
            [BIN / "ray", "job", "submit", "--", "python", "-c", "print('with a token')"],
            env=env | {"RAY_API_SERVER_ADDRESS": local_cluster.ADDRESS},
            capture_output=True,
            text=True,
            check=False,
        )
        try:
            assert plain.returncode == 0, plain.stdout + plain.stderr
            assert "with a token" in plain.stdout
            assert TOKEN not in plain.stdout + plain.stderr
            listed = teachers_command(env)
            assert (listed.returncode, TOKEN in listed.stdout + listed.stderr) == (0, False), listed.stderr
            started = local_cluster.status()
            assert started is not None
            assert started.pid is not None
            processes = tree(started)

            stopped_at: list[float] = []

            def stop_when_it_runs(text: str) -> None:
                if "\nworking" in f"\n{text}":
                    local_cluster.down()
                    stopped_at.append(time.monotonic())

            with pytest.raises(RayDistillError, match="has not answered for 2 s"):
                submit_and_follow(
                    ["python", "-uc", "import time; print('working'); time.sleep(300)"],
                    write=stop_when_it_runs,
                    lost_after_s=2.0,
                )
            assert time.monotonic() - stopped_at[0] < 60
            assert not any(runs(process) for process in processes)
            assert local_cluster.status() is None
        finally:
            local_cluster.down()


@pytest.mark.ray
def test_a_head_started_by_hand_with_a_token_is_used_and_never_stopped(tmp_path: Path) -> None:
    with own_home(TOKEN) as env, pytest.MonkeyPatch.context() as patch:
        use(patch, env)
        command = [BIN / "ray", "start", "--head", "--block", "--port=0", "--disable-usage-stats"]
        command += [f"--dashboard-port={env['RAYDISTILL_DASHBOARD_PORT']}", "--dashboard-agent-listen-port=0"]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=100000000"]
        by_hand = subprocess.Popen(
            [*command, f"--ray-client-server-port={free_port()}"],
            env=env | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 60
            while local_cluster.status() is None:
                assert time.monotonic() < deadline
                time.sleep(0.3)
            found = local_cluster.up()
            assert (found.pid, found.started_now) == (None, False)
            output: list[str] = []
            result = submit_and_follow(
                ["echo", "hello from the job"], tmp_path, found.address, write=output.append
            )
            assert result.exit_code == 0
            assert "hello from the job" in "".join(output)
            assert local_cluster.down() is None
            assert local_cluster.status() == found
            patch.setenv("RAY_AUTH_TOKEN", "another")
            with pytest.raises(RayDistillError, match="the token here is not its own"):
                local_cluster.up()
            with pytest.raises(RayDistillError, match="the token here is not its own"):
                connect(found.address)
        finally:
            processes = [psutil.Process(by_hand.pid), *psutil.Process(by_hand.pid).children(recursive=True)]
            by_hand.terminate()
            psutil.wait_procs(processes, timeout=20)


def test_without_a_head_the_plug_in_starts_none_unless_asked(home: Path) -> None:
    with pytest.raises(RayDistillError, match="`raydistill up` starts one"):
        local_cluster.get_job_submission_client_cluster_info("auto")
    assert local_cluster.status() is None
    assert local_cluster.down() is None


def test_a_given_head_gets_the_token_added(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    info = local_cluster.get_job_submission_client_cluster_info("10.0.0.7:8265", headers={"X-Team": "a"})
    assert info.address == "http://10.0.0.7:8265"
    assert info.headers == {"Authorization": f"Bearer {TOKEN}", "X-Team": "a"}


def test_something_else_on_the_port_is_an_error_that_names_the_setting(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("RAYDISTILL_DASHBOARD_PORT", str(server.server_port))
        with pytest.raises(RayDistillError, match="set RAYDISTILL_DASHBOARD_PORT to another port"):
            local_cluster.up()
        server.shutdown()


@pytest.mark.parametrize("value", ["", "web", "80", "70000", "8265.0"])
def test_a_bad_port_names_the_setting_and_its_range(
    home: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("RAYDISTILL_DASHBOARD_PORT", value)
    with pytest.raises(ConfigError, match=f"RAYDISTILL_DASHBOARD_PORT is '{value}'.*1024 to 65535"):
        local_cluster.up()


def test_a_head_that_can_not_start_says_why_and_leaves_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "ray").write_text("a file where Ray wants its folder")
    with pytest.raises(RayDistillError, match=r"the Ray head ended at its start: .*(ray|dir).*head-\d+\.log"):
        local_cluster.up()
    assert local_cluster.down() is None
    assert not list((home / ".cache" / "raydistill").glob("*.json"))


def test_down_does_not_end_a_process_that_only_has_the_number_of_ours(home: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    state = home / ".cache" / "raydistill" / f"head-{os.environ['RAYDISTILL_DASHBOARD_PORT']}.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"address": "http://127.0.0.1:1", "pid": bystander.pid, "created": 1.0}))
    assert local_cluster.down() is None
    assert bystander.poll() is None
    assert not state.exists()
    bystander.communicate(b"\n")


def test_a_damaged_state_file_is_named(home: Path) -> None:
    state = home / ".cache" / "raydistill" / f"head-{os.environ['RAYDISTILL_DASHBOARD_PORT']}.json"
    state.parent.mkdir(parents=True)
    state.write_text("{")
    with pytest.raises(RayDistillError, match=r"head-\d+\.json should say which Ray head"):
        local_cluster.down()


def test_the_token_is_looked_for_where_ray_looks(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_cluster.auth_headers() == {}
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("in the home\n")
    assert local_cluster.auth_headers() == {"Authorization": "Bearer in the home"}
    (home / "elsewhere").write_text("in a file")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "elsewhere"))
    assert local_cluster.auth_headers() == {"Authorization": "Bearer in a file"}
    monkeypatch.setenv("RAY_AUTH_TOKEN", "in the environment")
    assert local_cluster.auth_headers() == {"Authorization": "Bearer in the environment"}
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert local_cluster.auth_headers() == {}


def test_a_working_dir_that_is_none_is_refused_before_anything_starts(home: Path) -> None:
    with pytest.raises(RayDistillError, match="nowhere is no folder"):
        submit_and_follow(["true"], home / "nowhere")
    assert local_cluster.status() is None


def test_an_unreachable_address_is_named(home: Path) -> None:
    with pytest.raises(RayDistillError, match=r"no Ray head to submit to at http://127\.0\.0\.1:\d+"):
        submit_and_follow(["true"], home, f"http://127.0.0.1:{free_port()}")
