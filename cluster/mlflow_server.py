"""An MLflow server with PostgreSQL behind it, for many runs at a time on one machine.

    python cluster/mlflow_server.py --folder /srv/raydistill-mlflow

starts both, prints what runs are to be told, and goes on until Ctrl-C; the same command goes on with the same runs.
PostgreSQL comes from Debian's package (apt-get install postgresql), its driver with pip install 'raydistill[postgres]'.
Database, artifacts and logs lie in the folder. Both listen on 127.0.0.1 alone; the database asks for a password, which
is in the folder too, MLflow asks nobody who they are. PostgreSQL refuses to be root's: started by root it runs as the
package's user postgres, who must be able to enter the folder.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

HOST = "127.0.0.1"
_READY_S = 600.0  # on a machine that is busy; one that ended is noticed at once
_STOP_S = 30.0
_USER = "mlflow"


class MlflowServer:
    """PostgreSQL and MLflow's server in front of it, everything under one folder; a context manager."""

    def __init__(self, folder: Path, port: int = 0):
        """port: of MLflow; 0 takes a free one. Raises FileNotFoundError where PostgreSQL is not installed."""
        self.folder = folder.absolute()
        self._port = port or _free_port()
        self._database_port = _free_port()
        self._programs = programs()
        self._database: subprocess.Popen[bytes] | None = None
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> MlflowServer:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._start_database()
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def uri(self) -> str:
        """For tracking.uri."""
        return f"http://{HOST}:{self._port}"

    @property
    def database_uri(self) -> str:
        """Of PostgreSQL, with its password."""
        password = (self.folder / "password").read_text()
        return f"postgresql+psycopg://{_USER}:{password}@{HOST}:{self._database_port}/postgres"

    def start(self) -> None:
        """Start MLflow's server; the database must run. Returns when it answers."""
        # by the environment: a command line is seen by everybody on the machine
        environment = os.environ | {
            "MLFLOW_BACKEND_STORE_URI": self.database_uri,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(self._port)]
        command += ["--workers", "1", "--artifacts-destination", str(self.folder / "artifacts")]
        self._server = self._popen(command, "mlflow.log", env=environment)
        _wait_for(self._server, self._answers, self.folder / "mlflow.log")

    def stop(self) -> None:
        """End MLflow's server with all its processes, at once; the database stays."""
        if self._server is not None:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
            self._server = None

    def close(self) -> None:
        """End server and database."""
        self.stop()
        if self._database is not None:
            self._database.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
            try:
                self._database.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._database.kill()
                self._database.wait()
            self._database = None

    def _answers(self) -> None:
        urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()

    def _start_database(self) -> None:
        data = self.folder / "postgres"
        owner: dict[str, Any] = {}
        if os.geteuid() == 0:  # which PostgreSQL refuses to run as
            owner = {"user": "postgres", "group": "postgres", "extra_groups": []}
        if not (data / "PG_VERSION").exists():
            password = self.folder / "password"
            password.touch(mode=0o600)
            password.write_text(secrets.token_urlsafe(24))
            data.mkdir(mode=0o700, exist_ok=True)
            if owner:
                shutil.chown(data, "postgres", "postgres")
                shutil.chown(password, "postgres", "postgres")
            made = subprocess.run(
                [
                    str(self._programs / "initdb"), "-D", str(data), "-U", _USER, "-E", "UTF8", "--no-locale",
                    "--auth=scram-sha-256", f"--pwfile={password}",
                ],
                capture_output=True, text=True, cwd="/", **owner,
            )  # fmt: skip
            if made.returncode:
                raise RuntimeError(f"initdb failed in {data}: {made.stderr.strip()}")
        command = [
            str(self._programs / "postgres"), "-D", str(data), "-c", f"listen_addresses={HOST}",
            "-c", f"port={self._database_port}", "-c", "unix_socket_directories=",
        ]  # fmt: skip
        self._database = self._popen(command, "postgres.log", cwd="/", **owner)
        where = HOST, self._database_port
        _wait_for(
            self._database,
            lambda: socket.create_connection(where, timeout=5).close(),
            self.folder / "postgres.log",
        )

    def _popen(self, command: list[str], log: str, **more: Any) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as output:
            # a group of its own: Ctrl-C is ours to pass on, and a server has children
            return subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, **more
            )


def programs() -> Path:
    """Folder of PostgreSQL's programs. Raises FileNotFoundError where they are not installed."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    found = shutil.which("initdb")
    for folder in ([Path(found).resolve().parent] if found else []) + debian[::-1]:
        if (folder / "postgres").exists():
            return folder
    raise FileNotFoundError("PostgreSQL is not installed: apt-get install postgresql")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _wait_for(process: subprocess.Popen[bytes], ask: Callable[[], None], log: Path) -> None:
    until = time.monotonic() + _READY_S
    while True:
        try:
            return ask()
        except OSError as error:
            if process.poll() is not None or time.monotonic() > until:
                last = log.read_text(errors="replace").strip().splitlines()[-1:]
                raise RuntimeError(f"it does not answer ({error}); {log} ends with {last}") from None
            time.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="of database, artifacts, password and logs"
    )
    parser.add_argument("--port", type=int, default=5000, help="of MLflow (%(default)s)")
    arguments = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        with MlflowServer(arguments.folder, arguments.port) as server:
            print(f"python jobs/dmd2_coco.py tracking.uri={server.uri}")
            print("Ctrl-C ends it", flush=True)
            stop.wait()
    except (OSError, RuntimeError) as error:
        print(f"mlflow_server: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
