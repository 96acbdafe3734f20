"""`.metadata`, which torch opens as a pickle: looked through before, without running anything that is in it.

Flows in: the file, and the names of the checkpoint's files; out: nothing, or the reason not to open it. A pickle calls what it
names. And where `.metadata` has bytes instead of a tensor, torch opens these as a pickle too. So nothing passes but what saves
write: the classes below, for tensors that lie in files of the checkpoint.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar

from ..runtime.untrusted_files import read_regular

METADATA = ".metadata"
_EXTRA_STATE = "._extra_state/shard_"
"""In the keys of modules' states that earlier versions saved: bytes, which are never loaded."""
_DAMAGE = (pickle.UnpicklingError, AttributeError, EOFError, LookupError, MemoryError, OverflowError, TypeError, ValueError)
_DTYPE = re.compile(r"torch\.((float|bfloat|int|uint)[0-9]+|bool)")


class _StandIn:
    """In place of a class that a pickle names: keeps the state that it is given, and does nothing."""

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        elif type(self).__name__ != "metadata.TensorProperties":  # its own form; of others a pair would set attributes
            raise pickle.UnpicklingError(f"the state of {type(self).__name__} is no dict")


_NAMED: dict[str, Any] = {
    f"torch.distributed.checkpoint.{name}": type(name, (_StandIn,), {})
    for name in (
        "metadata.Metadata", "metadata.TensorStorageMetadata", "metadata.BytesStorageMetadata", "metadata.StorageMeta",
        "metadata.ChunkStorageMetadata", "metadata.TensorProperties", "metadata._MEM_FORMAT_ENCODING",
        "metadata.MetadataIndex", "filesystem._StorageInfo",
    )
}  # fmt: skip
_METADATA, _TENSOR, _BYTES, *_, _INDEX, _ = _NAMED.values()
_NAMED |= dict.fromkeys(("pathlib.PosixPath", "pathlib._local.PosixPath"), _StandIn)  # the second: Python 3.13


def _layout(name: Any) -> str:
    """In place of what looks a layout up by its name. Text of anything else could be made for ever."""
    if type(name) is not str:
        raise pickle.UnpicklingError("a layout has no name")
    return name


_NAMED |= {"torch.Size": tuple, "torch.serialization._get_layout": _layout}


_IN_PYTHON: Any = pickle._Unpickler  # the other allocates what a number in the file says
_UNUSED = (pickle.PUT, pickle.LONG_BINPUT, pickle.BYTEARRAY8, pickle.DICT, pickle.ADDITEMS, pickle.FROZENSET)


class _Reader(_IN_PYTHON):  # type: ignore[misc]
    dispatch: ClassVar = {code: load for code, load in _IN_PYTHON.dispatch.items() if code not in b"".join(_UNUSED)}

    def load_setitems(self) -> None:
        self._check_keys(self.stack[::2])
        _IN_PYTHON.load_setitems(self)

    def load_setitem(self) -> None:
        self._check_keys(self.stack[-2:-1])
        _IN_PYTHON.load_setitem(self)

    dispatch[pickle.SETITEMS[0]], dispatch[pickle.SETITEM[0]] = load_setitems, load_setitem

    def _check_keys(self, keys: list[Any]) -> None:
        """Pairs of pairs of the same pairs would be hashed for ever."""
        if any(type(key) not in (str, _INDEX) for key in keys):
            raise pickle.UnpicklingError("a key is no text and no index")

    def find_class(self, module: str, name: str) -> Any:
        named = f"{module}.{name}"
        if named not in _NAMED and not _DTYPE.fullmatch(named):
            raise pickle.UnpicklingError(f"it names {named}")
        return _NAMED.get(named, named)


def check_metadata(path: Path, files: Collection[str]) -> None:
    """`files`: the names in the checkpoint's manifest. Raises: ValueError for what no save writes; OSError."""
    try:
        found = _Reader(io.BytesIO(read_regular(path))).load()
        tensors, places = found.state_dict_metadata, found.storage_data
        wrong = [] if type(found) is _METADATA and type(tensors) is type(places) is dict else ["it is no Metadata of torch"]
        others = {key: entry for key, entry in tensors.items() if type(entry) is not _TENSOR}
        wrong += [f"{key} is no tensor" for key, of in others.items() if type(of) is not _BYTES or _EXTRA_STATE not in key]
        named = [place.relative_path for place in places.values()]
        wrong += [f"it looks for a tensor in {name}" for name in named if type(name) is not str or name not in files]
    except _DAMAGE as error:
        wrong = [str(error)]
    if wrong:
        raise ValueError(f"{path} is not what a save writes, and is not opened: {wrong[0]}")
