"""Weights that stay in files: mapped where they lie, and given back to the system while in use.

A mapped tensor is an ordinary CPU tensor whose memory is a file. The system reads a page of it
when the page is touched, and counts it as memory of the process from then on. A `WeightStore` knows
the mapped tensors of one program, puts new ones into files of their own, and gives pages back
(`madvise`) whenever too many of them are resident. That changes no value: nobody writes to weights
in place, so a page that was given back is read again from its file. ADR 0006 says why.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

Function = Callable[..., Any]
RESIDENT_LIMIT = 256 << 20  # bytes of mapped pages that may be resident between two calls of torch
SMALLEST = 1 << 20  # tensors below it are no burden and stay in memory
# What loaders make new weights of a checkpoint with: another dtype, experts joined to one tensor.
_CONVERSIONS = frozenset({Tensor.to, torch.stack, torch.cat})


class WeightStore:
    """The mapped weights of one program and its rewritten forms.

    Where the system has no `/proc` or no `madvise`, pages are left to the system.

    Args:
        folder: Where files for new weights are made. They have no name: the space is free again
            when the last tensor in it is gone, or the process ends, in whatever way.
        limit: Bytes of mapped pages that may stay resident.
        smallest: Bytes from which on a new weight is put into a file.
    """

    def __init__(
        self, folder: Path, *, limit: int = RESIDENT_LIMIT, smallest: int = SMALLEST
    ) -> None:
        self._folder, self._limit, self._smallest = folder, limit, smallest
        self._mapped: dict[int, StorageWeakRef] = {}  # by address
        self._floor = resident_file_bytes()

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """Take charge of those of `tensors` that lie in mapped files that nobody has written to."""
        clean = unwritten_file_ranges()
        for tensor in tensors:
            start, stop = _span(tensor)
            if any(low <= start and stop <= high for low, high in clean):
                self._add(tensor)

    def keep(self, tensor: Tensor) -> Tensor:
        """Return an equal tensor in a file, or `tensor` if it is small or not on the CPU.

        Nobody may write to the result. If no file can be made the tensor stays in memory: then the
        run needs more of it, and may still succeed.
        """
        kept = self._copy(tensor)
        if kept is not tensor:
            self._add(kept)
            self.trim()
            _trim_heap()  # of what it took to compute the weight before this one
        return kept

    def trim(self) -> None:
        """Give mapped pages back if more than the limit are resident."""
        if resident_file_bytes() - self._floor > self._limit:
            self.release()

    def release(self) -> None:
        """Give all mapped pages back."""
        for address, reference in list(self._mapped.items()):
            storage = UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self._mapped[address]
            else:
                _give_back(storage)
        _trim_heap()
        self._floor = resident_file_bytes()

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Trim after every call of torch in this thread while the block runs."""
        with _AfterCall(self._trim_after):
            yield

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Put what a loader converts into files, one tensor after the other.

        `adopt` the weights afterwards: only then is it known that they were not written to.
        """
        name = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers: convert a weight when it is its turn
        before = os.environ.get(name)
        os.environ[name] = "1"
        try:
            with _AfterCall(self._copy_conversion):
                yield
        finally:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before

    def _trim_after(self, _function: Function, _args: tuple[Any, ...], result: Any) -> Any:
        self.trim()
        return result

    def _copy_conversion(self, function: Function, args: tuple[Any, ...], result: Any) -> Any:
        if function not in _CONVERSIONS or result is args[0]:
            return result
        kept = self._copy(result)
        if kept is not result:
            self.adopt(args[0] if isinstance(args[0], list | tuple) else args[:1])
            self.trim()
        return kept

    def _copy(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cpu" or tensor.nbytes < max(1, self._smallest):
            return tensor
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder) as file:
                for piece in pieces(tensor):
                    file.write(piece)
                    self.trim()
                file.flush()
                place = f"/dev/fd/{file.fileno()}"
                storage = UntypedStorage.from_file(place, False, tensor.nbytes)
        except (OSError, RuntimeError):
            return tensor
        assert isinstance(storage, UntypedStorage)
        flat = torch.empty(0, dtype=tensor.dtype).set_(storage)
        return flat.view(tensor.shape)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._mapped[storage.data_ptr()] = StorageWeakRef(storage)


def watching(store: WeightStore | None) -> contextlib.AbstractContextManager[None]:
    """Return `store.watch()`, or a context that does nothing without a store."""
    return contextlib.nullcontext() if store is None else store.watch()


def pieces(tensor: Tensor, size: int = 32 << 20) -> Iterator[memoryview]:
    """Yield the bytes of a CPU tensor in C order, at most `size` of them at a time."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), size):
        yield flat[start : start + size].numpy().data


def resident_file_bytes() -> int:
    """Return how many bytes of mapped files are resident in this process; 0 where none can tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[2]) * mmap.PAGESIZE
    except OSError:
        return 0


def unwritten_file_ranges() -> list[tuple[int, int]]:
    """Return the address ranges that mirror a file, without pages that were written to."""
    try:
        text = Path("/proc/self/smaps").read_text("utf-8", "replace")
    except OSError:
        return []
    ranges: list[tuple[int, int]] = []
    for line in text.splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # low-high permissions offset device inode path
            low, _, high = words[0].partition("-")
            ranges += [(int(low, 16), int(high, 16))] if words[4] != "0" else [(0, 0)]
        elif words[0] == "Anonymous:" and words[1] != "0":
            ranges[-1] = (0, 0)
    return [found for found in ranges if found != (0, 0)]


def _span(tensor: Tensor) -> tuple[int, int]:
    if tensor.device.type != "cpu":
        return 0, 0
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _give_back(storage: UntypedStorage) -> None:
    """Drop the pages of a mapped storage, with the neighbours in its first and last page."""
    madvise, advice = ctypes.CDLL(None).madvise, mmap.MADV_DONTNEED
    start = storage.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = storage.data_ptr() + storage.nbytes() - start
    madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)


def _trim_heap() -> None:
    """Let the C library give freed memory back; glibc keeps blocks of up to 32 MiB otherwise."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


class _AfterCall(TorchFunctionMode):
    """Lets `action(function, args, result)` replace every result of torch in this thread."""

    def __init__(self, action: Callable[[Function, tuple[Any, ...], Any], Any]) -> None:
        super().__init__()
        self._action = action

    def __torch_function__(
        self,
        func: Function,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return self._action(func, args, func(*args, **(kwargs or {})))
