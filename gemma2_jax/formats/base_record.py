"""base.json in a run folder, which identifies the base model that has the frozen weights, wherever that lies."""

import json
from dataclasses import dataclass
from pathlib import Path

from gemma2_jax.config import UserError, build, read_json, to_dict
from gemma2_jax.files import write_text

BASE_FILE = "base.json"


@dataclass(frozen=True)
class BaseRecord:
    """The base model of a run with frozen weights.

    Attributes:
        source: path of its checkpoint, or its name on the hub.
        identity: `source_identity` of its weights.
    """

    source: str
    identity: str

    def save(self, run_folder: Path) -> None:
        write_text(run_folder / BASE_FILE, json.dumps(to_dict(self)))


def read_base_record(run_folder: str | Path) -> BaseRecord:
    """Reads the record in a run folder. Raises UserError if it is missing or damaged."""
    path = Path(run_folder) / BASE_FILE
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} is truncated or damaged: it does not hold a JSON object.")
    return build(BaseRecord, found, str(path))


def check_same_base(run_folder: str | Path, now: BaseRecord) -> None:
    """Raises UserError if the run in a folder was trained on another base model than `now`."""
    if not (Path(run_folder) / BASE_FILE).exists():
        return
    begun = read_base_record(run_folder)
    if begun.identity != now.identity:
        raise UserError(
            f"{run_folder} was trained on {begun.source} with the weights {begun.identity[:12]} ({BASE_FILE}), but "
            f"initialise.source {now.source} has the weights {now.identity[:12]}; write the path of the former, choose "
            "another output, or delete that folder to train again."
        )
