"""The errors of tileloss: one family, told apart by what the caller has to mend.

Each also inherits the built-in type that plain PyTorch or sentence-transformers would have raised for the same
mistake, so that code which catches those keeps working.
"""


class InputError(ValueError):
    """An argument has a value that the function cannot use; the message says what was expected."""


class ShapeError(InputError, IndexError, RuntimeError):
    """Tensors whose shapes do not fit together."""


class ColumnsError(ShapeError, AssertionError):
    """A batch of fewer or more columns than the loss takes."""


class DtypeError(InputError, RuntimeError):
    """A tensor of a dtype that the function cannot use, or dtypes that do not fit together."""


class DeviceError(InputError, RuntimeError):
    """Tensors that live on different devices."""


class KindError(InputError, TypeError, AssertionError):
    """A model, a loss or a setting of a kind that the function cannot work with."""


class MissingError(InputError, AttributeError, AssertionError):
    """Something that the function cannot do without was not given."""


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""


class VersionError(RuntimeError):
    """Another library is installed in a version that was not tested; the message says which were."""


class FallbackWarning(UserWarning):
    """An automatic choice took a slower path than the device allows; said once, with its reason."""
