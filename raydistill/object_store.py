"""Object stores behind URLs: how one is opened, what its errors mean, and which are worth another attempt.

    s3://bucket/prefix    any service that speaks S3, at an address of its own by `endpoint_url`; others by fsspec

Credentials come from where AWS's own tools look (environment, ~/.aws, the machine's role), never from a URL or a
setting, and are in no message. Shards (`data`) and snapshots (`checkpoint`) are both reached through here.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from raydistill.errors import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")
_LONGEST_PAUSE_S = 10.0

_CREDENTIALS = {
    "AccessDenied", "AllAccessDisabled", "ExpiredToken", "InvalidAccessKeyId", "InvalidSecurity", "InvalidToken",
    "SignatureDoesNotMatch", "TokenRefreshRequired", "403", "AuthFailure",
}  # fmt: skip
_REGION = {
    "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "InvalidLocationConstraint",
    "PermanentRedirect", "301",
}  # fmt: skip
_REFUSED = {"InvalidBucketName", "InvalidArgument", "InvalidRequest", "MethodNotAllowed", "NotImplemented"}
_WHERE_CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile of ~/.aws"


def is_remote(url: str) -> bool:
    return "://" in url


def require_no_credentials(url: str, setting: str) -> None:
    """Raise ConfigError, without repeating it, for a URL that holds a name or a password."""
    if "@" in urlsplit(url).netloc:
        raise ConfigError(
            f"{setting} has credentials in its URL, which would be written down with the settings; put them in the "
            "environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or ~/.aws/credentials, and give the URL without "
            "them"
        )


def require_endpoint(url: str | None, setting: str) -> None:
    """Raise ConfigError unless `url`, where given, is http(s)://HOST[:PORT] without credentials."""
    if url is None:
        return
    require_no_credentials(url, setting)
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        plain = urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))
        raise ConfigError(f"{setting}={plain!r} must be http(s)://HOST[:PORT], without a query")


def open_store(
    url: str, *, setting: str, endpoint_url: str | None = None, timeout_s: float = 60.0
) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the URL's path in it.

    setting: that the URL comes from. endpoint_url: of an S3 service other than AWS. timeout_s: the longest that one
    request waits for an answer. Nothing is asked yet.

    Raises ConfigError for an unknown scheme, and for credentials in a URL.
    """
    require_no_credentials(url, setting)
    import fsspec

    options: dict[str, Any] = {}
    if urlsplit(url).scheme in ("s3", "s3a"):
        config = {
            "connect_timeout": min(10.0, timeout_s),
            "read_timeout": min(60.0, timeout_s),
            # callers' own retries see every failure, so botocore's would only multiply the waiting
            "retries": {"max_attempts": 0},
        }
        options = {"endpoint_url": endpoint_url, "config_kwargs": config, "use_listings_cache": False}
    try:
        fs, path = fsspec.core.url_to_fs(url.rstrip("/"), **options)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{setting}={url!r}: {_first_line(error)}") from error
    return fs, path


@dataclass(frozen=True)
class Fault:
    """What a store's error means."""

    reason: str
    """One line without secrets."""
    passing: bool
    """Whether another attempt may succeed though nobody changes anything."""


def fault_of(error: BaseException) -> Fault | None:
    """What an error of a store's file system means; None if it is none."""
    kind, code = type(error).__name__, _code(error)
    if kind in ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"):
        return Fault(f"no credentials are there; set {_WHERE_CREDENTIALS}", False)
    if kind == "ProfileNotFound":
        return Fault(f"{_first_line(error)} (AWS_PROFILE)", False)
    if kind in ("EndpointResolutionError", "InvalidProxiesConfigError"):
        return Fault(f"{kind}: {_first_line(error)}", False)
    if kind in ("NoRegionError", "InvalidRegionError"):
        return Fault(f"{_first_line(error)} (AWS_DEFAULT_REGION)", False)
    if code == "NoSuchBucket":
        return Fault("there is no such bucket", False)
    if code in _REGION:
        expected = _response(error).get("Error", {}).get("Region")
        where = f"it is in {expected}" if expected else "the bucket is in another one"
        return Fault(f"the region is wrong ({where}); set AWS_DEFAULT_REGION ({code})", False)
    if code in _CREDENTIALS or isinstance(error, PermissionError):
        told = f" ({code})" if code else ""
        return Fault(f"these credentials are refused{told}; they come from {_WHERE_CREDENTIALS}", False)
    if isinstance(error, FileNotFoundError):
        return Fault("it is not there", False)
    if code in _REFUSED:
        return Fault(f"{code}: {_first_line(error)}", False)
    if isinstance(error, (OSError, asyncio.TimeoutError)) or _is_of_http(error):
        return Fault(f"{kind}: {_first_line(error)}", True)
    return None


class StoreError(Exception):
    """A store did not do what it was asked; `fault` says why, `attempts` how often it was asked."""

    def __init__(self, fault: Fault, attempts: int):
        super().__init__(fault.reason)
        self.fault = fault
        self.attempts = attempts


def with_retries(
    call: Callable[[], T],
    *,
    what: str,
    first_pause_s: float = 0.5,
    attempts: int | None = None,
    timeout_s: float = math.inf,
) -> T:
    """`call()`, again after growing pauses while its fault is a passing one.

    attempts: at most so many; None: as many as timeout_s allows, after which none begins. Raises StoreError.
    """
    pause, started, attempt = first_pause_s, time.monotonic(), 0
    while True:
        attempt += 1
        try:
            return call()
        except Exception as error:
            fault = fault_of(error)
            if fault is None:
                raise
            if not fault.passing or attempt == attempts or time.monotonic() - started > timeout_s:
                raise StoreError(fault, attempt) from error
            log.warning("%s: %s; next attempt in %.1f s", what, fault.reason, pause)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _response(error: BaseException) -> dict[str, Any]:
    """botocore's parsed answer, which s3fs hands on as the cause of its own error."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            return response
    return {}


def _code(error: BaseException) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))


def _is_of_http(error: BaseException) -> bool:
    # by name: importing botocore takes half a second, and who has one of its errors has imported it
    doors = ("botocore.", "aiobotocore.", "aiohttp.", "http.client")
    return any(base.__module__.startswith(doors) for base in type(error).__mro__)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
