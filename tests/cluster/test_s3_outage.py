"""The main job with shards and snapshots on S3 over HTTP, which goes away in mid-run.

That the machine may go, too: tests/runtime/test_uploads.py, and with a whole job `python cluster/s3_outage.py`.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "cluster"))
from s3_outage import Drill, is_right
from s3_service import S3Service

sys.path.pop(0)


def test_an_outage_changes_no_figure_and_loses_no_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with S3Service(tmp_path / "moto.log") as service:
        for name, value in service.environment.items():
            monkeypatch.setenv(name, value)
        drill = Drill(tmp_path, service, 12, ["placement.session=inline", "evaluator.every=12"])
        drill.undisturbed()
        outage = drill.outage(4.0)
    assert outage["uploads that failed"] + outage["reads that were tried again"] > 0, outage
    assert outage["figures"] > 12 * 10
    assert is_right(outage), outage
    for log in tmp_path.glob("*.log"):
        assert service.environment["AWS_SECRET_ACCESS_KEY"] not in log.read_text()
