"""Downloads models by their name on the Hugging Face hub."""

import os
import re
from pathlib import Path
from typing import Any

from gemma2_jax.config import UserError
from gemma2_jax.files import in_the_way
from gemma2_jax.machine import is_installed

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "adapter_config.json",
]


def is_hub_name(text: str) -> bool:
    """Whether `text` could be the name of a model on the hub: OWNER/NAME, and not a GGUF file."""
    return _NAME.fullmatch(text) is not None and not text.endswith(".gguf")


def is_remote(path: str) -> bool:
    """Whether `path` does not exist on this machine and could be the name of a model on the hub."""
    return is_hub_name(path) and not os.path.exists(path) and in_the_way(path) is None


def check_hub_installed(path: str) -> None:
    """Raises UserError if `path` must be downloaded from the hub, but the hub's package is not installed."""
    if is_remote(path) and not is_installed("huggingface_hub"):
        raise UserError(
            f"{path} is not a local folder; to download it from the Hugging Face hub, install the extra `hub` "
            "(pip install 'gemma2_jax[hub]')."
        )


def download(name: str) -> Path:
    """Returns the folder of a model's files, downloaded from the hub unless they are in its cache.

    Raises:
        UserError: the extra `hub` is missing, the hub cannot be reached, or it refuses access to the model.
    """
    check_hub_installed(name)
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_FILES))
    except errors.GatedRepoError:
        raise UserError(
            f"{name} is gated; accept its terms on its page on the Hugging Face hub, and log in with "
            "`hf auth login`."
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(f"{name} is neither a local folder nor a model on the Hugging Face hub.") from None
    except (OSError, errors.HTTPError) as error:  # network errors are not OSErrors
        raise UserError(f"{name} is not a local folder, and {_reason(error, errors)}") from None


def _reason(error: Exception, errors: Any) -> str:
    """Returns why a download failed: the hub refused, the disk could not store it, or the hub was unreachable."""
    answer = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    if isinstance(answer, errors.HfHubHTTPError):
        return (
            f"the Hugging Face hub responded with HTTP status {answer.response.status_code}; try again later, or give "
            "the path of a downloaded folder."
        )
    if isinstance(answer, OSError) and answer.errno is not None and not isinstance(answer, ConnectionError):
        return f"the download from the Hugging Face hub cannot be stored: {answer.strerror}."
    return "the Hugging Face hub cannot be reached; give the path of a downloaded folder."
