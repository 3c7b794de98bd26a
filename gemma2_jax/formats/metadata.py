"""A checkpoint's metadata for generation and other tools: all besides weights, sizes and tokenizer.model.

It comes from Hugging Face's files: stop ids, the chat template, names of special tokens. A run folder stores it in
`metadata.json`, so that it is available when the run is used or exported.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gemma2_jax.config import UserError
from gemma2_jax.data.chat_format import chat_template
from gemma2_jax.files import reason, write_text
from gemma2_jax.formats.json_file import read_object, shown

METADATA_FILE = "metadata.json"  # in a run folder

GENERATION_FILE = "generation_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_MODEL_FILE = "config.json"
_SPECIAL_FILE = "special_tokens_map.json"
_TEMPLATE_FILE = "chat_template.jinja"
_TEMPLATE_FOLDER = "additional_chat_templates"  # further templates, each named after its file

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Keys of config.json that ModelConfig lacks and other tools use.
_MODEL_KEYS = (*_IDS, "max_position_embeddings", "attention_dropout", "initializer_range")
# Keys of tokenizer_config.json that do not follow from tokenizer.model.
_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
_TOKENIZER_KEYS = (
    *_NAMES, "add_bos_token", "add_eos_token", "additional_special_tokens", "extra_special_tokens",
    "padding_side", "truncation_side", "model_max_length", "clean_up_tokenization_spaces",
)  # fmt: skip


@dataclass(frozen=True)
class Metadata:
    """A checkpoint's metadata; each attribute is empty or None if the checkpoint lacks it.

    Attributes:
        model: token ids and limits from config.json.
        generation: content of generation_config.json.
        tokenizer: names of special tokens, and settings for padding and truncation, from tokenizer_config.json.
        chat_template: Jinja template, or several by name.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | Mapping[str, str] | None = None

    @property
    def stop_ids(self) -> frozenset[int] | None:
        """The ids that end a text, as transformers finds them; None if the checkpoint names none."""
        for values in (self.generation, self.model):
            if values.get("eos_token_id") is not None:
                return frozenset(_listed(values["eos_token_id"]))
        return None

    def of_chats(self, end_of_turn: int) -> "Metadata":
        """Returns the metadata after training on conversations: `end_of_turn` is a stop id, the template Gemma 2's.

        The weights may come from a base model, whose own stop ids lack `end_of_turn` and would let it go on after its
        turn.
        """
        if self.stop_ids is None:  # then the tokenizer's turn token is one
            return replace(self, chat_template=chat_template())
        ids = self.generation or {key: self.model[key] for key in _IDS if key in self.model}
        generation = {**ids, "eos_token_id": sorted({*self.stop_ids, end_of_turn})}
        return replace(self, generation=generation, chat_template=chat_template())

    def token_ids(self, tokens: int) -> dict[str, Any]:
        """Returns the bos, eos and pad ids of config.json that are below `tokens`; others would have no embedding."""
        return _within(self.model, tokens)

    def generation_json(self, tokens: int) -> dict[str, Any]:
        """Returns generation_config.json's content without ids >= `tokens`, or config.json's ids if it is missing."""
        if not self.generation:
            return self.token_ids(tokens)
        others = {key: value for key, value in self.generation.items() if key not in _IDS}
        return {**_within(self.generation, tokens), **others}

    def save(self, folder: str | Path) -> None:
        """Writes METADATA_FILE, unless there is nothing to keep."""
        if self != Metadata():
            text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
            write_text(Path(folder) / METADATA_FILE, text + "\n")


def templates_json(template: str | Mapping[str, str]) -> str | list[dict[str, str]]:
    """Returns a chat template in the form of tokenizer_config.json and GGUF."""
    if isinstance(template, str):
        return template
    return [{"name": name, "template": text} for name, text in template.items()]


def load_metadata(run_folder: Path) -> Metadata:
    """Returns the metadata of a run folder. Raises UserError if its file is damaged."""
    path = run_folder / METADATA_FILE
    if not path.exists():
        return Metadata()
    data = read_object(path)
    for key in ("model", "generation", "tokenizer"):
        if not isinstance(data.get(key, {}), dict):
            raise UserError(f"{path} has {key} {shown(data[key])}; it must be an object of keys and values.")
        _check_ids(path, data.get(key, {}))
    return Metadata(
        data.get("model", {}),
        data.get("generation", {}),
        data.get("tokenizer", {}),
        _template(path, data.get("chat_template")),
    )


def read_metadata(folder: Path) -> Metadata:
    """Returns the metadata of a Hugging Face folder. Raises UserError if one of its files is not a JSON object."""
    model = _read(folder / _MODEL_FILE)
    generation = _read(folder / GENERATION_FILE)
    generation.pop("transformers_version", None)
    tokenizer = _read(folder / TOKENIZER_CONFIG_FILE)
    names = {**_read(folder / _SPECIAL_FILE), **tokenizer}
    return Metadata(
        {key: model[key] for key in _MODEL_KEYS if model.get(key) is not None},
        generation,
        _tokenizer_values(names),
        _template_files(folder) or _template(folder / TOKENIZER_CONFIG_FILE, tokenizer.get("chat_template")),
    )


def _read(path: Path) -> dict[str, Any]:
    data = read_object(path) if path.exists() else {}
    _check_ids(path, data)
    return data


def _check_ids(path: Path, data: Mapping[str, Any]) -> None:
    for key in _IDS:
        value = data.get(key)
        if value is not None and not all(type(number) is int for number in _listed(value)):
            raise UserError(f"{path} has {key} {shown(value)}; it must be a token id or a list of them.")


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def _within(values: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    found = {}
    for key in _IDS:
        value = values.get(key)
        kept = [number for number in _listed(value) if value is not None and 0 <= number < tokens]
        if kept:
            found[key] = kept if isinstance(value, list) else value
    return found


def _tokenizer_values(names: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: _text(names[key]) for key in _TOKENIZER_KEYS if names.get(key) is not None}
    extra = found.get("extra_special_tokens")
    if isinstance(extra, list):  # transformers 5's key for additional_special_tokens
        del found["extra_special_tokens"]
        found["additional_special_tokens"] = extra
    return found


def _text(value: Any) -> Any:
    """Returns a token's text; some files store it as `content` of an object with matching rules."""
    if isinstance(value, dict) and "content" in value:
        return value["content"]
    if isinstance(value, list):
        return [_text(item) for item in value]
    return value


def _template_files(folder: Path) -> str | dict[str, str] | None:
    files = {path.stem: path for path in sorted((folder / _TEMPLATE_FOLDER).glob("*.jinja"))}
    if (folder / _TEMPLATE_FILE).exists():
        files = {"default": folder / _TEMPLATE_FILE, **files}
    try:
        texts = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {reason(error)}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{folder / _TEMPLATE_FILE} is not a text file in UTF-8.") from None
    return texts.get("default") if len(texts) < 2 else texts


def _template(path: Path, value: Any) -> str | dict[str, str] | None:
    """Returns a template from its JSON value: a text, or several by name, as an object or a list."""
    if value is None or isinstance(value, str):
        return value
    named = value
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        named = {item.get("name"): item.get("template") for item in value}
    if isinstance(named, dict) and all(isinstance(text, str) for pair in named.items() for text in pair):
        return named
    raise UserError(f"{path} has chat_template {shown(value)}; it must be a string, or strings by name.")
