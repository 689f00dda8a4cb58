"""The checkpoints of `fit`, written by orbax, to which `TrainState` is a plain pytree; and the lock of their folder."""

import contextlib
import errno
import json
import os
import pathlib
import socket
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.numerics import brief
from jaxheads.numerics.brief import Shaped
from jaxheads.numerics.describing import find_changes
from jaxheads.numerics.warned import CheckpointWarning
from jaxheads.training.batches import is_key
from jaxheads.training.progress import Progress

# How much of another library's message an error repeats.
SHOWN = 120

# Errors of file systems that know no locks.
UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

# The list of a checkpoint's files, and up to which size they have checksums there.
FILES, SMALL = "files.json", 2**20


class Damaged(ValueError):
    """A checkpoint cannot be read: a file of it is missing, cut or changed."""


class Checkpoints:
    """A folder of checkpoints. With None as the folder, nothing is written and nothing is found.

    A checkpoint is written completely or not at all (orbax renames a finished folder). So a process may be killed at
    any moment. Two are kept: if the newer one is damaged, the older one is read.
    """

    def __init__(self, folder: pathlib.Path | None):
        self.folder, self.manager = folder, None
        if folder is not None:
            import orbax.checkpoint as ocp

            if folder.exists() and not folder.is_dir():
                raise ValueError(f"{folder} must be a folder of checkpoints. Given a file: remove it.")
            # Not in the background: the next step would overwrite the donated buffers.
            options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
            # With handlers, it can tell the shapes of a checkpoint before it restores any.
            handlers = {"state": ocp.StandardCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()}
            self.manager: Any = ocp.CheckpointManager(folder, options=options, item_handlers=handlers)

    def save(self, number: int, state: Any, progress: Progress) -> None:
        """Writes a state and the progress of training.

        Checkpoints of this number and of later ones go first: they are of a run that went another way, or damaged.
        Orbax would skip the new one, and keep them in its place.
        """
        if self.manager is None:
            return
        import orbax.checkpoint as ocp

        items = {"state": ocp.args.StandardSave(state), "progress": ocp.args.JsonSave(progress.to_json())}
        try:
            for other in self.manager.all_steps():
                if other >= number:
                    self.manager.delete(other)
            written = self.manager.save(number, args=ocp.args.Composite(**items), force=True)
            if written and self.folder is not None and jax.process_index() == 0:
                _list_files(self.folder / str(number))
        except (OSError, ValueError, RuntimeError) as error:
            fix = " The disk is full: make room, and call fit again." if "No space left" in str(error) else ""
            raise ValueError(
                f"The checkpoint {number} could not be written to {self.folder}: {_shorten(error)}. Older checkpoints "
                f"are as they were.{fix}"
            ) from error
        if not written:
            raise ValueError(f"Orbax has not written the checkpoint {number} to {self.folder}, and does not say why.")

    def restore(self, like: Any, run: Mapping[str, str], allow_changes: bool) -> tuple[Any, Progress] | None:
        """Returns the state and the progress of the newest checkpoint that is intact; None if there is none at all.

        Args:
            like: a state of the same structure.
            run: what identifies this run: texts about its head and its optimizer.
            allow_changes: whether a checkpoint of another run is taken.

        Raises:
            ValueError: a checkpoint of another run, or of other shapes; no checkpoint that is intact.
        """
        numbers = [] if self.manager is None else sorted(self.manager.all_steps(), reverse=True)
        for i, number in enumerate(numbers):
            try:
                return self.read(number, like, run, allow_changes)
            except Damaged as error:
                if i + 1 == len(numbers):
                    raise ValueError(
                        f"{error} No other in {self.folder} is intact. To begin anew, delete the directory or give "
                        "another one."
                    ) from error
                warnings.warn(
                    f"{error} Training goes on from the checkpoint before it, {numbers[i + 1]}.",
                    CheckpointWarning,
                    stacklevel=4,
                )
        return None

    def read(self, number: int, like: Any, run: Mapping[str, str], allow_changes: bool) -> tuple[Any, Progress]:
        """Returns the state and the progress of one checkpoint, or raises `Damaged` or another `ValueError`."""
        import orbax.checkpoint as ocp

        if self.manager is None or number not in self.manager.all_steps():
            raise Damaged(f"The checkpoint {number} of {self.folder} is missing.")
        with self._reading(number):
            if self.folder is not None:
                _check_files(self.folder / str(number))
            items = ocp.args.Composite(progress=ocp.args.JsonRestore())
            progress = Progress.from_json(self.manager.restore(number, args=items).progress)
        if not allow_changes:
            _check_run(progress.run, run, self.folder)
        with self._reading(number):
            kept = _list_shapes(self.manager.item_metadata(number)["state"].tree)
        _check_shapes(kept, _list_shapes(like), self.folder)
        with self._reading(number):
            shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
            items = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
            state = self.manager.restore(number, args=items).state
        _check_types(state, like, self.folder)
        return state, progress

    @contextlib.contextmanager
    def _reading(self, number: int) -> Iterator[None]:
        """Turns what a damaged file causes, which may be any exception at all, into `Damaged`."""
        try:
            yield
        except (MemoryError, PermissionError):
            raise  # the files may be as they should
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise
            if "tree structures do not match" in str(error):
                raise ValueError(
                    f"The checkpoint in {self.folder} is of another state: {_shorten(error)}. Build the same network, "
                    "head and optimizer, or give another directory."
                ) from error
            raise Damaged(f"The checkpoint {number} of {self.folder} is damaged: {_shorten(error)}.") from error


def _list_files(folder: pathlib.Path) -> None:
    """Writes a list of the files of a checkpoint beside them, with their sizes, and checksums of the small ones.

    Large ones hold arrays, of which orbax keeps checksums. The small ones say what the arrays are, and have none.
    """
    half = folder / f"{FILES}.tmp"
    half.write_text(json.dumps(_describe_files(folder)), encoding="utf-8")
    half.replace(folder / FILES)


def _check_files(folder: pathlib.Path) -> None:
    """Refuses a checkpoint whose files are not as they were listed, before orbax meets them.

    A checkpoint without a list, of a process that was killed before it wrote one, is left to orbax.
    """
    if not (folder / FILES).exists():
        return
    listed, found = json.loads((folder / FILES).read_text(encoding="utf-8")), _describe_files(folder)
    for name in sorted(listed):
        if name not in found:
            raise ValueError(f"its file {name} is missing")
        if listed[name] != found[name]:
            raise ValueError(f"its file {name} has changed")


def _describe_files(folder: pathlib.Path) -> dict[str, list[int]]:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: [(size := path.stat().st_size), zlib.crc32(path.read_bytes()) if size <= SMALL else 0]
        for name, path in files.items()
        if name not in (FILES, f"{FILES}.tmp")
    }


def _shorten(error: BaseException) -> str:
    return f"{type(error).__name__}: {brief.cut(' '.join(str(error).split()), SHOWN)}"


def _list_shapes(tree: Any) -> dict[str, str]:
    """Returns the shapes of the leaves, by path: of a state, or of what orbax has kept of one."""
    # Orbax keeps a dataclass as a dict, a tuple as a list, and a typed key as its data: simple names are the same.
    tree = jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, Shaped))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]"
        for path, leaf in leaves
        if isinstance(leaf, Shaped) and leaf.shape is not None
    }


def _check_types(state: Any, like: Any, folder: Any) -> None:
    """Refuses a state of other types: orbax restores a typed key as plain numbers, if it was saved as such."""
    for (path, kept), now in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(like), strict=True):
        one, other = jnp.result_type(kept), jnp.result_type(now)
        if one != other:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"The checkpoint in {folder} is of another state: {name} is {one} there, and {other} now. Make it the "
                "same way, or give another directory."
            )


def _check_shapes(kept: Mapping[str, str], now: Mapping[str, str], folder: Any) -> None:
    """Refuses a checkpoint of other shapes."""
    # Orbax keeps the value of an nnx variable one level down.
    kept = {name if name in now else name.removesuffix("/value"): shape for name, shape in kept.items()}
    changed = [name for name in kept if name in now and kept[name] != now[name]]
    if changed:
        name = changed[0]
        raise ValueError(
            f"The checkpoint in {folder} is of another network: {name} is {kept[name]} there, and {now[name]} now "
            f"({len(changed)} arrays differ). Build the same network, or give another directory."
        )
    if set(kept) != set(now):
        missing, new = sorted(set(kept) - set(now)), sorted(set(now) - set(kept))
        guards = any(name.split("/")[0] in ("skipped", "loss_scale") for name in missing + new)
        same = "count_skipped and loss_scale in TrainState.create" if guards else "network, head and optimizer"
        raise ValueError(
            f"The checkpoint in {folder} is of another state. Only there: {missing[:2]}; only now: {new[:2]}. Build "
            f"the same {same}, or give another directory."
        )


def _check_run(kept: Mapping[str, str], now: Mapping[str, str], folder: Any) -> None:
    """Refuses a checkpoint of another head or optimizer, and names both."""
    for name, (one, other) in find_changes(kept, now).items():
        raise ValueError(
            f"{folder} holds the training of another {name}. There: {one}. Now: {other}. Give a new run a new "
            "directory. If you mean to go on with it, pass allow_changes=True."
        )


def as_folder(directory: Any) -> pathlib.Path | None:
    """Returns the path of a directory for checkpoints, which stays the same if the process changes its own."""
    if directory is None:
        return None
    if not isinstance(directory, (str, os.PathLike)) or not str(directory) or "\0" in str(directory):
        raise ValueError(f"directory must be the path of a folder, or None. Given {brief.tell(directory)}.")
    if "://" in str(directory):
        raise ValueError(f"directory must be a path on a file system that is mounted here. Given {str(directory)!r}.")
    return pathlib.Path(directory).expanduser().absolute()


@contextlib.contextmanager
def locked(directory: pathlib.Path | None) -> Iterator[None]:
    """Holds a directory for this process, and finds out that it can be written. The death of a process frees it.

    Of several processes that train together (`jax.process_count()`), the first one holds it for all.
    """
    if directory is None:
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ValueError(f"directory={str(directory)!r} cannot be written: {_shorten(error)}.") from error
    if jax.process_index() != 0:
        yield
        return
    try:
        import fcntl
    except ImportError:  # on Windows there is no such lock
        yield
        return
    try:
        file = (directory / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{directory / 'lock'} must be a file that can be written: {_shorten(error)}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNKNOWN:
                warnings.warn(
                    f"directory={str(directory)!r} is on a file system without locks: see to it yourself that no other "
                    "run uses it.",
                    CheckpointWarning,
                    stacklevel=4,
                )
                yield
                return
            file.seek(0)
            raise ValueError(
                f"directory={str(directory)!r} is in use by {_name_owner(file.read())}, or by one that it has started. "
                "Two runs would overwrite each other's checkpoints: wait for the other, stop it, or give another "
                "directory."
            ) from error
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid()}))
        file.flush()
        try:
            yield
        finally:
            # Closing it is not enough: a child of this process, such as a reader of data, may hold it open too.
            fcntl.flock(file, fcntl.LOCK_UN)


def _name_owner(text: str) -> str:
    """Returns the owner of a lock, in words."""
    try:
        owner = json.loads(text)
        return f"the process {owner['process']} on {owner['host']}"
    except (ValueError, KeyError, TypeError):  # it has not written its name yet
        return "another process"
