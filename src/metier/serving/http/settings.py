"""What the server lets its clients do; safe unless told otherwise."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from pathlib import Path

from metier.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpSettings:
    api_key: str | None = field(default=None, repr=False)
    """What clients must send as `Authorization: Bearer …`; None for no key."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that a request's Host header may have; empty for any. A server for this machine alone allows only its own
    names, else any page in a browser here could reach it by a name that it makes point here."""
    allows_loading: bool = False
    """Whether requests may load and unload deltas."""
    delta_dirs: tuple[Path, ...] = ()
    """Folders that deltas may be loaded from by a request."""
    max_body_bytes: int = 4 << 20
    max_body_seconds: float = 30.0
    """A body that takes longer to arrive is refused."""
    max_prompt_tokens: int | None = None
    """Of one prompt; None leaves it to the model's length."""
    max_concurrent: int = 256
    """Requests that are answered at once; further ones are told to come again."""
    max_n: int = 128
    """Answers of one request: its prompts times `n`."""
    grace_seconds: float = 30.0
    """How long running requests may go on once the server is told to stop."""

    def __post_init__(self) -> None:
        if self.api_key == "":
            raise ConfigError("api_key: got an empty text, expected a key, or None for no key.")
        for name in ("max_body_bytes", "max_body_seconds", "max_prompt_tokens", "max_concurrent", "max_n"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name}: got {value}, expected more than 0.")
        if self.grace_seconds < 0:
            raise ConfigError(f"grace_seconds: got {self.grace_seconds}, expected at least 0.")

    def accepts_key(self, authorization: str | None) -> bool:
        """Whether a request with this Authorization header may pass; takes as long whatever the header has."""
        if self.api_key is None:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        is_key = hmac.compare_digest(key.strip().encode(), self.api_key.encode())
        return is_key and scheme.lower() == "bearer"

    def accepts_host(self, host: str | None) -> bool:
        """Whether a request with this Host header may pass."""
        if not self.allowed_hosts:
            return True
        name = (host or "").lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        return name in self.allowed_hosts
