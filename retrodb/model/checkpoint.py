"""Checkpoints: safetensors and JSON in a folder, of which ``checkpoint.json`` says what counts, and is replaced last.

Killed, interrupted or out of space at any moment, a checkpoint is the one before or the new one, never half of both.
Nothing in it is a pickle.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from retrodb.errors import DamagedError, InputError, MismatchError
from retrodb.formats import Committed
from retrodb.lock import LOCK_NAME
from retrodb.model.config import ModelConfig, parse_model
from retrodb.model.data import DataSettings
from retrodb.model.retro import Retro
from retrodb.storage import TEMPORARY_PREFIX, Storage

CHECKPOINT_NAME: Final = "checkpoint.json"
WEIGHTS: Final = "model.safetensors"
STATE: Final = "state.safetensors"
_STEP_FOLDER: Final = re.compile(r"step-\d{8}")
_FORMAT: Final = "retrodb-model"
_VERSION: Final = 1

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """What ``checkpoint.json`` says.

    Attributes:
        model: sizes.
        data: of the database it was trained on.
        settings: of the run, as the trainer recorded them.
        progress: step, tokens, position in the stream, .. of the run.
        files: the recorded files by name: relative path, bytes, sha256.
    """

    model: ModelConfig
    data: DataSettings
    settings: dict[str, Any]
    progress: dict[str, Any]
    files: dict[str, Committed] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return int(self.progress["step"])

    def as_json(self) -> dict[str, Any]:
        return {
            "format": {"name": _FORMAT, "version": _VERSION},
            "model": self.model.model_dump(mode="json"),
            "data": self.data.as_json(),
            "settings": self.settings,
            "progress": self.progress,
            "files": files_json(self.files),
        }


def read_checkpoint(storage: Storage) -> Checkpoint | None:
    """The checkpoint in a folder, or None where there is none.

    Raises:
        InputError: ``checkpoint.json`` is another program's.
        MismatchError: a later version wrote it.
        DamagedError: it is malformed.
    """
    where = storage.describe(CHECKPOINT_NAME)
    found = storage.read_json(CHECKPOINT_NAME)
    if found is None:
        return None
    mark = found.get("format") if isinstance(found, dict) else None
    if not isinstance(mark, dict) or mark.get("name") != _FORMAT:
        raise InputError(f"{where} is no checkpoint of retrodb train.")
    if mark.get("version") != _VERSION:
        raise MismatchError(f"{where} has version {mark.get('version')}; this retrodb reads version {_VERSION}.")
    try:
        made = Checkpoint(
            model=parse_model(found["model"]),
            data=DataSettings(**found["data"]),
            settings=dict(found["settings"]),
            progress={**found["progress"], "step": int(found["progress"]["step"])},
            files=parse_files(found["files"]),
        )
        if made.step < 0 or made.model.chunk_tokens != made.data.chunk_tokens:
            raise ValueError(
                f"step {made.step}, chunks of {made.model.chunk_tokens} and {made.data.chunk_tokens} tokens"
            )
        return made
    except (KeyError, TypeError, ValueError, AttributeError, InputError) as error:
        raise DamagedError(f"{where} is malformed: {error}.") from error


def check_free(storage: Storage, document: str = CHECKPOINT_NAME) -> None:
    """Refuse to begin a checkpoint among someone else's files; what a killed first save left is no one's.

    Another program's checkpoint has step folders as well, which the first save of this one would remove.

    Args:
        storage: the folder, which has no ``document``.
        document: what names the files of a checkpoint of this kind.

    Raises:
        InputError: it is a file, or a folder that holds other things.
    """
    if storage.is_a_file():
        raise InputError(f"{storage.url} is a file; name a folder for the checkpoint.")
    own = (LOCK_NAME, *_leftovers(storage))
    there = storage.list_files("") + storage.list_folders("")
    foreign = [name for name in there if name not in own and not _STEP_FOLDER.fullmatch(name)]
    if foreign:
        raise InputError(
            f"{storage.url} has no {document} and holds other things ({', '.join(foreign[:3])}): name another"
            " folder for the checkpoint."
        )


def open_checkpoint(url: str) -> tuple[Storage, Checkpoint]:
    """The checkpoint at ``url``. Raises InputError where there is none, and as `read_checkpoint` does."""
    storage = Storage(url)
    checkpoint = read_checkpoint(storage)
    if checkpoint is None:
        raise InputError(f"{storage.url} is no checkpoint: it has no {CHECKPOINT_NAME}. Make one with retrodb train.")
    return storage, checkpoint


def write_checkpoint(storage: Storage, checkpoint: Checkpoint, contents: dict[str, bytes]) -> Checkpoint:
    """Write the files of a step into a folder of their own, then ``checkpoint.json``, then remove the step before.

    Whatever killed saves left behind goes, too; the caller holds the lock.

    Args:
        storage: the checkpoint's folder.
        checkpoint: its ``files`` are taken from ``contents``.
        contents: the files' bytes by name.
    """
    files = write_step(storage, checkpoint.step, contents)
    written = replace(checkpoint, files=files)
    storage.commit_json(CHECKPOINT_NAME, written.as_json())
    forget_other_steps(storage, checkpoint.step)
    return written


def write_step(storage: Storage, step: int, contents: Mapping[str, bytes]) -> dict[str, Committed]:
    """Write the files of a step that no document names yet into a folder of their own; what is to be recorded."""
    folder = _step_folder(step)
    storage.delete_folder(folder)  # what a killed save left of it
    return {name: storage.commit_bytes(f"{folder}/{name}", data) for name, data in contents.items()}


def forget_other_steps(storage: Storage, step: int) -> None:
    """Once a document names a step: remove all others, and what killed saves left behind."""
    for name in storage.list_folders(""):
        if _STEP_FOLDER.fullmatch(name) and name != _step_folder(step):
            storage.delete_folder(name)
    storage.delete(*_leftovers(storage))


def _step_folder(step: int) -> str:
    return f"step-{step:08d}"


def files_json(files: Mapping[str, Committed]) -> dict[str, Any]:
    """What a document says of recorded files."""
    return {name: {"path": file.path, "bytes": file.bytes, "sha256": file.sha256} for name, file in files.items()}


def parse_files(found: Mapping[str, Any]) -> dict[str, Committed]:
    """Of `files_json`. Raises KeyError, TypeError, ValueError or AttributeError for what is malformed."""
    return {name: Committed(str(file["path"]), int(file["bytes"]), str(file["sha256"])) for name, file in found.items()}


def read_document(storage: Storage, name: str, mark: str, program: str) -> dict[str, Any] | None:
    """What another kind of checkpoint's document says; None where there is none.

    Args:
        storage: the checkpoint's folder.
        name: of the document.
        mark: its ``format``.
        program: what writes such ones, for a message.

    Raises:
        InputError: it is another program's.
    """
    found = storage.read_json(name)
    if found is not None and not (isinstance(found, dict) and found.get("format") == mark):
        raise InputError(f"{storage.describe(name)} is no checkpoint of {program}.")
    return found


@contextlib.contextmanager
def well_formed(storage: Storage, name: str) -> Iterator[None]:
    """Within it, what trips over a document's content raises DamagedError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"{storage.describe(name)} is malformed: {error!r}.") from error


def _leftovers(storage: Storage) -> list[str]:
    """Files that a killed writer had not finished."""
    return [name for name in storage.list_files("") if name.startswith(TEMPORARY_PREFIX)]


def read_file(storage: Storage, files: Mapping[str, Committed], name: str) -> bytes:
    """A recorded file's bytes.

    Raises:
        DamagedError: it is missing, or its bytes are not the recorded ones.
    """
    file = files.get(name)
    if file is None:
        raise DamagedError(f"the checkpoint {storage.url} records no {name}.")
    data = storage.read_if_there(file.path)
    if data is None or hashlib.sha256(data).hexdigest() != file.sha256:
        raise DamagedError(
            f"{storage.describe(file.path)} is missing, or not what was saved (sha256 {file.sha256[:16]})."
            " Restore it, or train again into another folder."
        )
    return data


def read_tensors(storage: Storage, files: Mapping[str, Committed], name: str) -> Tensors:
    """A recorded safetensors file. Raises DamagedError as `read_file` does, or where it is none."""
    try:
        return load(read_file(storage, files, name))
    except (SafetensorError, ValueError, KeyError) as error:
        raise DamagedError(f"{storage.describe(files[name].path)} is no safetensors: {error}.") from error


def tensor_bytes(tensors: Tensors) -> bytes:
    """Tensors as a safetensors file. Equal tensors give equal bytes."""
    return save({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})


def load_model(url: str) -> tuple[Retro, Checkpoint]:
    """The model of a checkpoint, ready to evaluate.

    Raises:
        InputError: there is none.
        DamagedError: a file is not what was saved, or does not hold the model's weights.
    """
    storage, checkpoint = open_checkpoint(url)
    weights = read_tensors(storage, checkpoint.files, WEIGHTS)
    where = storage.describe(checkpoint.files[WEIGHTS].path)
    with torch.device("meta"):  # sizes that are not those of the weights must not take the memory they ask for
        check_weights(Retro(checkpoint.model), weights, where)
    model = Retro(checkpoint.model)
    load_weights(model, weights, where)
    return model.eval(), checkpoint


def check_weights(module: torch.nn.Module, tensors: Tensors, where: str) -> None:
    """Raises DamagedError unless ``tensors`` are exactly a module's own, in name and shape."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise DamagedError(
            f"{where} does not hold this model's weights: {name} has the shape {found.get(name, 'missing')}, and should"
            f" have {expected.get(name, 'not be there')} ({len(wrong)} of {len(expected)} differ)."
        )


def load_weights(module: torch.nn.Module, tensors: Tensors, where: str) -> None:
    """Put ``tensors`` into a module. Raises DamagedError as `check_weights` does."""
    check_weights(module, tensors, where)
    module.load_state_dict(tensors)
