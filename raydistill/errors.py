"""The errors that this package raises on purpose.

None takes more than a message, so each survives pickling on its way through Ray.
"""


class RayDistillError(Exception):
    """Base of every error that raydistill raises on purpose."""


class ConfigError(RayDistillError, ValueError):
    """A setting has a value that can't work; the message names the setting."""


class DataError(RayDistillError, ValueError):
    """A data set, a shard or a sample is not what the run needs."""


class CheckpointError(RayDistillError, RuntimeError):
    """A snapshot can't be written or read."""


class PlacementError(RayDistillError, RuntimeError):
    """The roles don't fit on the devices that are there."""


class TrainingError(RayDistillError, RuntimeError):
    """Training can't go on, for instance after a non-finite loss."""


class EvaluatorError(RayDistillError, RuntimeError):
    """The evaluator died over a request; training goes on without that figure."""


class TrackingError(RayDistillError, RuntimeError):
    """Figures or artifacts can't be recorded."""
