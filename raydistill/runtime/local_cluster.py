"""A Ray head on this machine: found if one runs, started if none does, and stopped alone.

Ray resolves a submission address `MODULE://REST` by importing MODULE and asking it for the cluster, so with

    export RAY_API_SERVER_ADDRESS=raydistill.runtime.local_cluster://auto

`ray job submit -- python jobs/dmd2_coco.py` works on a machine where no Ray runs yet, and also where Ray's
auth token exists, which `ray job submit` by itself doesn't send ("Missing authentication token", Ray 2.59).
`REST` is `auto` for this machine, or `HOST:PORT` of a running head, which then only gets the token added.

A head started here listens on 127.0.0.1 alone, is written down in the state folder with its process id, and
outlives the command that started it. `down` ends that process and its descendants, and no other Ray.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydistill.errors import ConfigError, RayDistillError

if TYPE_CHECKING:
    import psutil
    from ray.dashboard.modules.dashboard_sdk import ClusterInfo

ADDRESS = f"{__name__}://auto"
DEFAULT_PORT = 8265
OBJECT_STORE_BYTES = 512 * 2**20
START_TIMEOUT_S = 180.0
# Ray's 3 s are too short for a job to write the snapshot that SIGTERM asks for.
JOB_STOP_WAIT_S = 60
_PROBE_TIMEOUT_S = 5.0
# Without this Ray replaces 127.0.0.1 by the machine's outer address: GCS and raylet then listen on all interfaces, and
# are looked for where a head that keeps to 127.0.0.1 doesn't listen.
_LOOPBACK = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
# The root ends its own within 3 s; with a job or one of Ray's own detached actors running, the raylet waits for it for
# 10 s and more, and nothing of a head is worth that.
_ROOT_STOP_TIMEOUT_S = 3.0
_STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Head:
    """A Ray head that answers on this machine."""

    address: str
    """URL of its dashboard and job server."""
    pid: int | None = None
    """Its root process if raydistill started it; None for somebody else's, which `down` leaves alone."""
    created: float = 0.0
    """Start time of that process, in seconds since the epoch: a process id alone may be reused."""
    working_dir: str | None = None
    """Where it was started, which is where jobs without a working dir of their own run."""
    log: str | None = None
    """Its output, if raydistill started it."""
    started_now: bool = False
    """True if this very call started it."""


def get_job_submission_client_cluster_info(
    address: str,
    create_cluster_if_needed: bool | None = False,
    cookies: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
    headers: dict[str, Any] | None = None,
    **_unused: Any,
) -> "ClusterInfo":
    """What Ray calls to resolve `raydistill.runtime.local_cluster://ADDRESS`; the name is Ray's.

    `ray job submit` passes `create_cluster_if_needed=True`, `ray job status|logs|list|stop` do not.
    Raises RayDistillError if there is no head and none may be, or none can be, started.
    """
    from ray.dashboard.modules.dashboard_sdk import ClusterInfo

    if address == "auto":
        head = up() if create_cluster_if_needed else status()
        if head is None:
            raise RayDistillError(f"no Ray head answers at {_url()}; `raydistill up` starts one")
        if head.working_dir not in (None, os.getcwd()):
            where = f"in {head.working_dir}, where jobs without --working-dir run"
            print(f"raydistill: the head was started {where}", file=sys.stderr)
        url = head.address
    else:
        url = f"http://{address}"
    return ClusterInfo(
        address=url, cookies=cookies, metadata=metadata, headers={**auth_headers(), **(headers or {})}
    )


def up() -> Head:
    """The head on this machine, started if none answers at 127.0.0.1:RAYDISTILL_DASHBOARD_PORT (8265).

    Raises RayDistillError if something else answers there, if the head there refuses the auth token, or if
    the new head dies or does not answer within START_TIMEOUT_S.
    """
    with _locked_state() as state_file:
        return _running_head(state_file) or _start(state_file)


def status() -> Head | None:
    """The head that answers on this machine, or None."""
    return _running_head(_state_file())


def down() -> Head | None:
    """Stop the head that `up` started, with everything it started; None if there is none of ours.

    A head that somebody else started is never touched, on whatever port it answers.
    """
    with _locked_state() as state_file:
        head = _read_state(state_file)
        process = _process_of(head) if head else None
        if process is not None:
            _end_tree(process)
        state_file.unlink(missing_ok=True)
        return head if process is not None else None


def auth_headers() -> dict[str, str]:
    """The header that a Ray head with token authentication wants; empty where no token exists.

    The token is where Ray itself looks: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return {}
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    if not token:
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        token = path.read_text() if path.is_file() else ""
    return {"Authorization": f"Bearer {token.strip()}"} if token.strip() else {}


def token_refused(url: str) -> RayDistillError:
    """What to raise when the head at `url` answers 401 or 403."""
    held = "the token here is not its own" if auth_headers() else "there is no token here"
    return RayDistillError(f"the Ray head at {url} wants an auth token and {held}; set RAY_AUTH_TOKEN")


def _url() -> str:
    text = os.environ.get("RAYDISTILL_DASHBOARD_PORT", str(DEFAULT_PORT))
    if not text.isdecimal() or not 1024 <= int(text) <= 65535:
        raise ConfigError(f"RAYDISTILL_DASHBOARD_PORT is {text!r}; it must be a port from 1024 to 65535")
    return f"http://127.0.0.1:{text}"


def _state_file() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "raydistill" / f"head-{_url().rpartition(':')[2]}.json"


@contextlib.contextmanager
def _locked_state() -> Iterator[Path]:
    """The state file, for one process at a time: two submissions at once must not start two heads."""
    path = _state_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path


def _read_state(path: Path) -> Head | None:
    try:
        return Head(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise RayDistillError(
            f"{path} should say which Ray head raydistill started and is damaged; "
            "stop that head by hand and delete the file"
        ) from None


def _process_of(head: Head) -> "psutil.Process | None":
    import psutil

    if head.pid is None:
        return None
    try:
        process = psutil.Process(head.pid)
        same = abs(process.create_time() - head.created) < 1.0
    except psutil.NoSuchProcess:
        return None
    return process if same and process.status() != psutil.STATUS_ZOMBIE else None


def _running_head(state_file: Path) -> Head | None:
    url = _url()
    if not _ray_answers(f"{url}/api/version"):
        return None
    head = _read_state(state_file)
    return head if head and _process_of(head) else Head(address=url)


def _ray_answers(url: str) -> bool:
    """False if nobody listens at `url`; RayDistillError if what listens is no Ray that takes our token."""
    port = "RAYDISTILL_DASHBOARD_PORT"
    # A proxy that the environment names for the world must not be asked for this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(
            urllib.request.Request(url, headers=auth_headers()), timeout=_PROBE_TIMEOUT_S
        ) as answer:
            body = json.load(answer)
            if isinstance(body, dict) and "ray_version" in body:
                return True
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise token_refused(url) from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ConnectionRefusedError):
            return False
        raise RayDistillError(f"{url} does not answer ({error.reason}); set {port} to another port") from None
    except (ValueError, OSError):
        pass
    raise RayDistillError(f"something that is no Ray head answers at {url}; set {port} to another port")


def _start(state_file: Path) -> Head:
    import psutil

    url = _url()
    print(f"raydistill: no Ray head answers at {url}, starting one", file=sys.stderr, flush=True)
    gcs_port, agent_port, client_port = free_ports(3)
    log = state_file.with_suffix(".log")
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
    ]
    command += [
        "--include-dashboard=true",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={url.rpartition(':')[2]}",
    ]
    command += [
        "--node-ip-address=127.0.0.1",
        f"--port={gcs_port}",
        f"--dashboard-agent-listen-port={agent_port}",
    ]
    # Any free port for the workers: the default range would collide with a second head's.
    command += [f"--ray-client-server-port={client_port}", "--min-worker-port=0", "--max-worker-port=0"]
    command += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
    with log.open("wb") as output:
        # A session of its own: Ctrl-C in the terminal that submits must not end the head.
        child = subprocess.Popen(
            command,
            env=_head_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    process = psutil.Process(child.pid)
    head = Head(
        address=url, pid=child.pid, created=process.create_time(), working_dir=os.getcwd(), log=str(log)
    )
    state_file.write_text(json.dumps(dataclasses.asdict(head)))
    try:
        _await_head(child, head, f"http://127.0.0.1:{agent_port}/api/local_raylet_healthz")
    except BaseException:
        _end_tree(process)
        state_file.unlink(missing_ok=True)
        raise
    return dataclasses.replace(head, started_now=True)


def address_to_join() -> str:
    """Of the cluster that RAY_ADDRESS names, else of the head that was started last on this machine; may be empty."""
    address = os.environ.get("RAY_ADDRESS", "auto")
    if address != "auto":
        return address
    remembered = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    return remembered.read_text().strip() if remembered.is_file() else ""


def prepare_to_join(address: str = "") -> None:
    """Let this process join the cluster at host:port, or start one; ray reads this when it is imported.

    Whoever sends a token asks for one as well: with a token at hand a cluster without authentication could be joined,
    but could not answer, and would take this process for dead.
    """
    os.environ.setdefault(*_LOOPBACK)
    if auth_headers() and not _takes_anybody(address):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _takes_anybody(address: str) -> bool:
    """Whether the head there answers without a token; False also where none answers."""
    if not address or "://" in address:
        return False
    import grpc

    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=_PROBE_TIMEOUT_S)
        except grpc.RpcError:
            return False
    return True


def _head_environment() -> dict[str, str]:
    ours = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_JOB_HEADERS")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    # Jobs say `python`, and it must be the one that raydistill is installed for.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    env.update([_LOOPBACK])
    # Ray starts its workers at niceness 15; the evaluator could then not give way to the trainers
    env.setdefault("RAY_worker_niceness", "0")
    env.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    env.setdefault("RAY_JOB_STOP_WAIT_TIME_S", str(JOB_STOP_WAIT_S))
    return env


def _await_head(child: subprocess.Popen[bytes], head: Head, agent_url: str) -> None:
    """Until the job server and the agent that runs its jobs answer."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise RayDistillError(
                f"the Ray head ended at its start: {_last_line(head)} (all of it: {head.log})"
            )
        with contextlib.suppress(RayDistillError):
            if _ray_answers(f"{head.address}/api/version") and _agent_answers(agent_url):
                return
        time.sleep(0.2)
    raise RayDistillError(
        f"the Ray head did not answer within {START_TIMEOUT_S:.0f} s; its output: {head.log}"
    )


def _agent_answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, headers=auth_headers()), timeout=_PROBE_TIMEOUT_S):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def _last_line(head: Head) -> str:
    lines = Path(head.log or os.devnull).read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def free_ports(count: int) -> list[int]:
    """Different TCP ports of 127.0.0.1 that nobody listens on now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _end_tree(root: "psutil.Process") -> None:
    """SIGTERM to the root, which ends its own; then whatever of its descendants is left."""
    import psutil

    everything = [root, *root.children(recursive=True)] if root.is_running() else []
    for processes, end, timeout_s in (
        (everything[:1], psutil.Process.terminate, _ROOT_STOP_TIMEOUT_S),
        (everything, psutil.Process.terminate, _STOP_TIMEOUT_S),
        (everything, psutil.Process.kill, _STOP_TIMEOUT_S),
    ):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
        until = time.monotonic() + timeout_s
        while (
            everything := [process for process in everything if _runs(process)]
        ) and time.monotonic() < until:
            time.sleep(0.1)


def _runs(process: "psutil.Process") -> bool:
    """Whether it has not ended; in a container whose first process reaps nobody, ended ones stay as zombies."""
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
