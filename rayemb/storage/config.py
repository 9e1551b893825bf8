"""How object stores are reached: a config section that becomes the environment of every process of a run."""

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping

import pyarrow.fs as pafs
from pydantic import Field, SecretStr, model_validator

from rayemb.config import Config
from rayemb.storage.errors import StorageError

RETRIES, CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S = 8, 10.0, 60.0
# The AWS names where there are any: boto3, Lance and the AWS SDK then agree with us.
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_ANONYMOUS, _ATTEMPTS = "AWS_SKIP_SIGNATURE", "AWS_MAX_ATTEMPTS"
_CONNECT, _REQUEST = "RAYEMB_S3_CONNECT_TIMEOUT_S", "RAYEMB_S3_REQUEST_TIMEOUT_S"


class StorageConfig(Config):
    """S3 and stores that speak its protocol. What is not set here comes from the environment (`AWS_*`)."""

    endpoint: str | None = Field(
        None, pattern=r"^https?://", description="URL of a store other than AWS, for example http://minio:9000"
    )
    region: str | None = Field(None, description="region of the buckets")
    # Left out of every dump: a manifest or a report that holds the config must not hold the key to the store.
    access_key: str | None = Field(None, exclude=True, description="access key id")
    secret_key: SecretStr | None = Field(None, exclude=True, repr=False, description="secret access key")
    session_token: SecretStr | None = Field(
        None, exclude=True, repr=False, description="token of temporary credentials"
    )
    anonymous: bool = Field(False, description="send no credentials: public buckets")
    retries: int = Field(RETRIES, ge=1, le=50, description="attempts in all at one request, with growing pauses")
    connect_timeout_s: float = Field(CONNECT_TIMEOUT_S, gt=0, description="longest wait for a connection, in seconds")
    request_timeout_s: float = Field(
        REQUEST_TIMEOUT_S, gt=0, description="longest silence of the store in one attempt, in seconds"
    )

    @model_validator(mode="after")
    def _whole(self) -> "StorageConfig":
        if (self.access_key is None) != (self.secret_key is None):
            raise ValueError("access_key and secret_key are set together")
        if self.anonymous and self.access_key:
            raise ValueError("anonymous access has no access_key")
        return self

    def environment(self) -> dict[str, str]:
        """The variables that say the same to every process; empty where the section says nothing."""
        chosen = self.model_fields_set
        values = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": _shown(self.secret_key),
            "AWS_SESSION_TOKEN": _shown(self.session_token),
            _ANONYMOUS: "true" if self.anonymous else None,
            _ATTEMPTS: str(self.retries) if "retries" in chosen else None,
            _CONNECT: str(self.connect_timeout_s) if "connect_timeout_s" in chosen else None,
            _REQUEST: str(self.request_timeout_s) if "request_timeout_s" in chosen else None,
        }
        if self.endpoint:
            values["AWS_ENDPOINT_URL_S3"] = self.endpoint  # one that is set outside would win over the general name
        if self.access_key and self.session_token is None:
            values["AWS_SESSION_TOKEN"] = ""  # a token from outside belongs to other keys
        return {name: value for name, value in values.items() if value is not None}


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """This process with `values` in its environment; afterwards as before."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _shown(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret else None


def attempts() -> int:
    """How often one request is tried."""
    return int(_number(_ATTEMPTS, RETRIES))


def endpoint() -> str | None:
    """The store's URL; None for AWS itself."""
    return next((value for name in _ENDPOINTS if (value := os.environ.get(name))), None)


def s3_filesystem() -> pafs.S3FileSystem:
    """The filesystem that the environment describes; the same one, with its connections, while that does not change."""
    about = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith(("AWS_", "RAYEMB_S3"))))
    return _s3_filesystem(about)


@functools.lru_cache(maxsize=8)
def _s3_filesystem(about: tuple[tuple[str, str], ...]) -> pafs.S3FileSystem:
    anonymous = os.environ.get(_ANONYMOUS, "").lower() in ("1", "true")
    return pafs.S3FileSystem(
        # Passed in: pyarrow does not read the endpoint from the environment by itself.
        endpoint_override=endpoint(),
        **({"anonymous": True} if anonymous else {}),
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=attempts()),
        connect_timeout=_number(_CONNECT, CONNECT_TIMEOUT_S),
        request_timeout=_number(_REQUEST, REQUEST_TIMEOUT_S),
    )


def lance_s3_options() -> dict[str, str]:
    """The same for Lance, which reads endpoint, region and keys from the environment by itself."""
    request = _number(_REQUEST, REQUEST_TIMEOUT_S)
    options = {
        "client_max_retries": str(attempts() - 1),
        "client_retry_timeout": f"{max(1, round(request * attempts()))}",
        "connect_timeout": f"{_number(_CONNECT, CONNECT_TIMEOUT_S)}s",
        "timeout": f"{request}s",
        # Lance tries a download that failed again as a whole, on top of the retries of its client.
        "download_retry_count": "0",
    }
    # It refuses plain HTTP otherwise.
    return {**options, "allow_http": "true"} if (endpoint() or "").startswith("http://") else options


def _number(name: str, default: float) -> float:
    text = os.environ.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise StorageError(f"{text!r} is not a number above 0", where=name, fix="mend or unset the variable")
    return value
