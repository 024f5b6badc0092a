"""The evaluation queue: newest wins, first and last always, nothing asked twice, nothing lost with the process."""

from pathlib import Path

from raydistill.errors import EvaluatorError
from raydistill.roles.evaluator import Evaluation
from raydistill.runtime.session import TEACHER_STEP, EvaluationQueue, request_stop, stop_requested
from raydistill.tracking import RunInput


class SlowEvaluator:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.ready = False
        self.deadly: set[int] = set()
        self.references = "one"

    def start(self, step: int) -> None:
        self.asked.append(step)

    def collect(self, timeout_s: float) -> Evaluation | None:
        if not self.ready:
            return None
        self.ready = False
        step = self.asked[-1]
        if step in self.deadly:
            raise EvaluatorError("the actor died")
        protocol = {
            "hash": f"h{self.references}",
            "reference": "coco/val",
            "reference_sha256": self.references,
            "num_reference": 10,
            "weights": str(step),
        }
        return Evaluation({"eval/toyfid_10": float(abs(step - 30))}, protocol, b"png")


class Notes:
    """What was recorded, in order."""

    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []
        self.artifacts: list[str] = []
        self.references: list[str] = []

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.points.append((step, dict(values)))

    def tags(self, tags: dict[str, object]) -> None:
        pass

    def inputs(self, inputs: list[RunInput]) -> None:
        self.references += [each.sha256 for each in inputs]

    def artifact_bytes(self, data: bytes, name: str, artifact_path: str = "") -> None:
        self.artifacts.append(name)

    def sync(self) -> None:
        pass


def answer(queue: EvaluationQueue, evaluator: SlowEvaluator, now: int) -> None:
    evaluator.ready = True
    queue.poll(now)


def test_newest_snapshot_takes_the_waiting_ones_place_but_the_marked_ones_stay(tmp_path: Path) -> None:
    evaluator, notes = SlowEvaluator(), Notes()
    queue = EvaluationQueue(evaluator, notes, str(tmp_path))  # type: ignore[arg-type]
    queue.submit(0, must=True)
    queue.submit(10)
    queue.submit(20)
    queue.submit(30)
    assert evaluator.asked == [0]
    assert queue.pending_steps() == {0, 30}
    assert queue.figures(31) == {"eval/queue": 2.0, "eval/behind_updates": 31.0}
    answer(queue, evaluator, now=31)
    assert evaluator.asked == [0, 30]
    queue.submit(40, must=True)
    queue.submit(50)
    assert queue.pending_steps() == {30, 40, 50}
    for _ in range(3):
        answer(queue, evaluator, now=60)
    assert evaluator.asked == [0, 30, 40, 50]
    assert queue.figures(61) == {"eval/queue": 0.0, "eval/behind_updates": 11.0}
    assert queue.best_step("eval/toyfid_10") == 30
    # figures are posted at the snapshot's own step, with the lag and the number passed over
    step, values = notes.points[1]
    assert (step, values["eval/lag_updates"], values["eval/skipped"]) == (30, 30.0, 2.0)
    # the ledger goes with every figure, so that MLflow has the protocol while the run goes on
    assert notes.artifacts[:2] == ["grid_00000000.png", "evaluations.json"]


def test_ledger_outlives_the_process_and_only_unanswered_steps_are_asked_again(tmp_path: Path) -> None:
    evaluator, notes = SlowEvaluator(), Notes()
    queue = EvaluationQueue(evaluator, notes, str(tmp_path))  # type: ignore[arg-type]
    queue.submit(0, must=True)
    answer(queue, evaluator, now=1)
    queue.submit(10, must=True)
    # the process dies here
    again = SlowEvaluator()
    queue = EvaluationQueue(again, notes, str(tmp_path))  # type: ignore[arg-type]
    queue.submit(0, must=True)
    queue.submit(10, must=True)
    assert again.asked == [10]


def test_evaluation_that_kills_the_evaluator_costs_itself_only_and_is_asked_again_by_the_next_process(
    tmp_path: Path,
) -> None:
    evaluator, notes = SlowEvaluator(), Notes()
    evaluator.deadly = {10}
    queue = EvaluationQueue(evaluator, notes, str(tmp_path))  # type: ignore[arg-type]
    for step in (0, 10, 20):
        queue.submit(step, must=True)
    for _ in range(3):
        answer(queue, evaluator, now=21)
    assert evaluator.asked == [0, 10, 20]
    assert queue.pending_steps() == set()
    queue.drain(21)  # has nothing to wait for
    assert (21, {"eval/failed": 1.0}) in notes.points
    assert queue.ledger["10"] == {"state": "failed", "error": "the actor died"}

    again = SlowEvaluator()
    queue = EvaluationQueue(again, notes, str(tmp_path))  # type: ignore[arg-type]
    for step in (0, 10, 20):
        queue.submit(step, must=True)
    assert again.asked == [10]


def test_figures_of_other_references_are_no_curve_with_new_ones(tmp_path: Path) -> None:
    evaluator, notes = SlowEvaluator(), Notes()
    queue = EvaluationQueue(evaluator, notes, str(tmp_path))  # type: ignore[arg-type]
    for step in (TEACHER_STEP, 30):
        queue.submit(step, must=True)
        answer(queue, evaluator, now=31)
    # the teacher's sampler differs from the generator's, and that is no other protocol
    assert queue.best_step("eval/toyfid_10") == 30
    assert set(queue.ledger) == {"-1", "30"}
    evaluator.references = "two"
    queue.submit(40, must=True)
    answer(queue, evaluator, now=41)
    assert queue.best_step("eval/toyfid_10") == 40
    assert set(queue.ledger) == {"40"}
    assert notes.references == ["one", "two"]  # the run's inputs


def test_waiting_ends_with_the_answer_the_time_or_a_request_to_stop(tmp_path: Path) -> None:
    evaluator, notes = SlowEvaluator(), Notes()
    queue = EvaluationQueue(evaluator, notes, str(tmp_path))  # type: ignore[arg-type]
    queue.submit(0, must=True)
    queue.wait(0, timeout_s=0.01)
    assert queue.pending_steps() == {0}
    evaluator.ready = True
    queue.wait(0, timeout_s=1e9)
    assert queue.answered(0)
    queue.submit(10, must=True)
    request_stop(str(tmp_path))
    queue.wait(11, timeout_s=1e9)
    queue.drain(11)
    assert queue.pending_steps() == {10}


def test_stop_request_is_seen(tmp_path: Path) -> None:
    assert not stop_requested(str(tmp_path))
    request_stop(str(tmp_path))
    assert stop_requested(str(tmp_path))
