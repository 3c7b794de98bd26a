"""Ollama's Modelfile: how to prompt the model in a GGUF file, and where its turns end.

Ollama does not take these from the file alone. It puts a text before the first turn (its `.System`) with a blank line
into the user's turn, since Gemma 2 has no system turn.
"""

from dataclasses import dataclass
from pathlib import Path

from gemma2_jax.config import UserError
from gemma2_jax.data.chat_format import chat_template, turn_parts
from gemma2_jax.data.tokenizer import END_OF_TURN, START_OF_TURN, Tokenizer
from gemma2_jax.files import reason
from gemma2_jax.formats.metadata import Metadata


@dataclass(frozen=True)
class Modelfile:
    """The Modelfile of a GGUF file: STEM.Modelfile beside it.

    Attributes:
        content: its text.
    """

    path: Path
    content: str

    @classmethod
    def of(cls, gguf_file: Path, tokenizer: Tokenizer, metadata: Metadata) -> "Modelfile | None":
        """Returns the Modelfile of a GGUF file; None if its tokenizer has no turn tokens.

        A model with a chat template of its own gets no TEMPLATE, since Ollama's language is another one.
        """
        if tokenizer.end_of_turn_id == tokenizer.eos_id:
            return None
        lines = [f"FROM ./{gguf_file.name}"]
        if metadata.chat_template in (None, chat_template()):
            lines.append(f'TEMPLATE """{_template()}"""')
        lines += [f"PARAMETER stop {token}" for token in (START_OF_TURN, END_OF_TURN)]
        return cls(gguf_file.with_name(f"{gguf_file.stem}.Modelfile"), "\n".join(lines) + "\n")

    def check(self) -> None:
        """Raises UserError if another file is in its place."""
        try:
            if self.path.read_bytes() == self.content.encode():
                return
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {reason(error, self.path)}.") from None
        raise UserError(
            f"{self.path} exists already with other content; choose another target, or delete it."
        )


def _template() -> str:
    """Gemma 2's turns in the template language of Go."""
    system = "{{ if .System }}{{ .System }}\n\n{{ end }}"
    user, model = turn_parts("user", f"{system}{{{{ .Prompt }}}}"), turn_parts("model", "{{ .Response }}")
    return "".join(user) + "".join(model)
