"""Models by their name on the Hugging Face hub."""

import re
from pathlib import Path

from gemma2_jax.config import UserError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer.model"]


def is_hub_name(text: str) -> bool:
    """Whether `text` could be the name of a model on the hub: OWNER/NAME."""
    return _NAME.fullmatch(text) is not None


def download(name: str) -> Path:
    """The folder of a model's files, fetched from the hub unless they are in its cache already.

    Raises:
        UserError: the extra `hub` is missing, the hub cannot be reached, or it does not give the model out.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError:
        raise UserError(
            f"{name} is no folder here; to fetch it from the Hugging Face hub, install the extra `hub` "
            "(pip install 'gemma2_jax[hub]')."
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_FILES))
    except GatedRepoError:
        raise UserError(
            f"{name} is given out by the Hugging Face hub only after its terms were accepted there and you have "
            "logged in (`hf auth login`)."
        ) from None
    except RepositoryNotFoundError:
        raise UserError(f"{name} is neither a folder here nor a model on the Hugging Face hub.") from None
    except (LocalEntryNotFoundError, OSError):
        raise UserError(
            f"{name} is no folder here, and the Hugging Face hub cannot be reached; "
            "give the path of a downloaded folder."
        ) from None
