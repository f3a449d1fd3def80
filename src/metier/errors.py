"""Every exception that metier raises on purpose, in one tree, so that a caller can catch as widely as it likes.

```
MetierError
├── ConfigError            a run's or a component's configuration cannot be used (also a ValueError)
├── DataError              records cannot be read, encoded or trained on (also a ValueError)
├── ModelError             a model cannot be loaded
│   └── UnsupportedModelError   it loads, but has no expert layer that metier can work on
├── SelectionError         a selection names experts or layers that do not exist (also a ValueError)
├── DeltaError             what a run left behind cannot be used
│   ├── CorruptDeltaError       the files are truncated, altered or not a delta
│   ├── BaseMismatchError       the delta was trained on another base
│   └── VerificationError       a delta broke one of the promises that `metier verify` checks
├── RowStoreError          rows of an adapter cannot be kept, read or trained where they live
│   └── NotFiniteError     a step's gradients are not finite, so nothing was updated
├── ServingError           a server cannot start, or answer a request
│   ├── UnknownDeltaError       no delta of that name is served
│   ├── RequestError            a request asks for what cannot be done (also a ValueError)
│   ├── OverloadedError         too many requests wait already; try again later
│   └── EngineError             the engine has died or is closing
└── RunError               a run cannot start, go on or be resumed
```

Every message says where, what was got, what was expected and what to do next.
"""

from __future__ import annotations


class MetierError(Exception):
    """Root of all exceptions that metier raises on purpose."""


class ConfigError(MetierError, ValueError):
    """A configuration cannot be used: an unknown key, a wrong type, a value outside its range."""


class DataError(MetierError, ValueError):
    """Records cannot be read, encoded or trained on."""


class ModelError(MetierError):
    """A model cannot be loaded."""


class UnsupportedModelError(ModelError):
    """A model has no expert layer that follows transformers' experts contract."""


class SelectionError(MetierError, ValueError):
    """A selection names experts or layers that the model does not have, or nothing at all."""


class DeltaError(MetierError):
    """What a run left behind cannot be used."""


class CorruptDeltaError(DeltaError):
    """A delta's files are truncated, altered, mis-shaped or not a delta at all."""


class BaseMismatchError(DeltaError):
    """A delta was trained on another base than the one it is being put on."""


class VerificationError(DeltaError):
    """A delta broke one of the promises that `metier verify` checks."""


class RowStoreError(MetierError):
    """Rows of an adapter cannot be kept, read or trained: a full disk, a missing file, a gradient that is no number."""


class NotFiniteError(RowStoreError):
    """Gradients of a step are not finite; nothing was updated by it, and what was trained before is good."""


class ServingError(MetierError):
    """A server cannot start, or answer a request."""


class UnknownDeltaError(ServingError):
    """No delta of that name is served."""


class RequestError(ServingError, ValueError):
    """A request asks for what cannot be done: a prompt longer than the cache holds, an option that is not there."""


class OverloadedError(ServingError):
    """Too many requests wait already; try again later."""


class EngineError(ServingError):
    """The engine has died or is closing."""


class RunError(MetierError):
    """A run cannot start, go on or be resumed."""
