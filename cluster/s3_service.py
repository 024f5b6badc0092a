"""An S3 service on this machine that can be cut off: moto's server, and before it a process that hands on bytes.

    client --HTTP--> proxy (this file as a program, killed with SIGKILL) --> moto.server (keeps its objects in memory)

Killing the proxy refuses connections and breaks transfers in mid-body, as a service that died does; starting it again
brings the service back with what it held. For tests and `s3_outage.py`; needs `pip install 'moto[server]'`.

    python cluster/s3_service.py --bucket raydistill

starts one to try things on, says which variables and settings it needs, and serves until Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

_START_S = 60.0


class S3Service:
    """moto's server behind a proxy, both processes of their own."""

    def __init__(self, log: Path, *, checks_credentials_after: int | None = None):
        """log: file for moto's output. checks_credentials_after: requests, after which only keys that IAM knows are
        served; None: any are."""
        self._ports = _free_ports(2)
        self.endpoint = f"http://127.0.0.1:{self._ports[0]}"
        self._proxy: subprocess.Popen[bytes] | None = None
        environment = os.environ | {"AWS_ACCESS_KEY_ID": "moto", "AWS_SECRET_ACCESS_KEY": "moto"}
        if checks_credentials_after is not None:
            environment["INITIAL_NO_AUTH_ACTION_COUNT"] = str(checks_credentials_after)
        with log.open("ab") as output:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._ports[1])],
                stdout=output, stderr=output, env=environment,
            )  # fmt: skip

    def __enter__(self) -> S3Service:
        _wait_for(self._ports[1], self._server)
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._server.kill()
        self._server.wait()

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs in its environment beside the endpoint; moto takes any credentials."""
        return {
            "AWS_ACCESS_KEY_ID": "raydistill",
            "AWS_SECRET_ACCESS_KEY": "not-to-be-printed",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Let clients reach it, if they don't."""
        if self._proxy is not None:
            return
        self._proxy = subprocess.Popen([sys.executable, __file__, "--hand-on", *map(str, self._ports)])
        _wait_for(self._ports[0], self._proxy)

    def kill(self) -> None:
        """SIGKILL to what clients are connected to."""
        if self._proxy is not None:
            self._proxy.kill()
            self._proxy.wait()
            self._proxy = None


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"nothing listens at 127.0.0.1:{port}: is moto[server] installed?")


async def _hand_on(port: int, target: int) -> None:
    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                sink.write(data)
                await sink.drain()
        except OSError:
            pass  # either end went away, and the other is told by the close
        finally:
            sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    async with server:
        await server.serve_forever()


def main() -> None:
    import fsspec

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bucket", default="raydistill", help="made empty (default: %(default)s)")
    bucket = parser.parse_args().bucket
    with (
        tempfile.TemporaryDirectory(prefix="rd-s3-") as folder,
        S3Service(Path(folder) / "moto.log") as service,
    ):
        os.environ.update(service.environment)
        fsspec.filesystem("s3", endpoint_url=service.endpoint).mkdir(bucket)
        for name, value in service.environment.items():
            print(f"export {name}={value}")
        print(
            f"# data.endpoint_url={service.endpoint} checkpoint.endpoint_url={service.endpoint} "
            f"checkpoint.uri=s3://{bucket}/runs\n# in memory, until Ctrl-C",
            flush=True,
        )
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--hand-on"]:
        asyncio.run(_hand_on(int(sys.argv[2]), int(sys.argv[3])))
    else:
        main()
