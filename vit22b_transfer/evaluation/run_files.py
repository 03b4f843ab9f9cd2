"""What evaluations left in a run's folder: which predictions, of which split."""

import os
from collections.abc import Sequence

from vit22b_transfer import UserError
from vit22b_transfer.data.records import quoted
from vit22b_transfer.evaluation import evaluate
from vit22b_transfer.host import json_files

_MAX_BYTES = 16 << 20


def entries(folder: str) -> dict[str, str]:
    """Entry of `metrics.json`, such as `TASK/SPLIT` -> its file of predictions.

    The file lies in the folder, whatever path it had when it was written. Entries whose
    file is gone are left out.

    Raises:
      UserError: if there is no `metrics.json`, or one that no evaluation wrote.
    """
    path = os.path.join(folder, evaluate.METRICS_FILE)
    if not os.path.isfile(path):
        raise UserError(
            f"{folder} has no {evaluate.METRICS_FILE}: first `vit22b eval {folder}`, "
            "or name a file of predictions."
        )
    found = {}
    for name, entry in json_files.read_object(path, limit=_MAX_BYTES).items():
        written = entry.get("predictions") if isinstance(entry, dict) else None
        if not isinstance(written, str):
            raise UserError(f"{path}: {quoted(name)} names no file of predictions.")
        file = os.path.join(folder, os.path.basename(written))
        if os.path.isfile(file):
            found[name] = file
    return found


def chosen(folders: Sequence[str], entry: str | None) -> tuple[str, list[str]]:
    """The entry that all folders have, and its file in each.

    entry: None: the only one that they share.

    Raises:
      UserError: if there is no such entry, or several.
    """
    every = [entries(folder) for folder in folders]
    shared = [name for name in every[0] if all(name in one for one in every)]
    where = " and ".join(folders)
    if entry is None and len(shared) != 1:
        raise UserError(
            f"{where} have {len(shared)} evaluations with predictions in common"
            + (f": choose one by --entry {' or '.join(shared)}." if shared else ".")
        )
    name = shared[0] if entry is None else entry
    if name not in shared:
        raise UserError(
            f"{where}: no evaluation {quoted(name)} with its predictions; there are "
            f"{', '.join(shared) or 'none'}."
        )
    return name, [one[name] for one in every]
