"""Derives conversations from the documentation in Python's own standard library.

    python experiments/finetune/questions.py

Writes runs/finetune/questions.jsonl (or --output): a question and its answer for each documented function and class.
"What does textwrap.dedent do?" is answered by the first sentence of the docstring. "Which module defines
textwrap.dedent?" is answered by the module's name, so its answer can be compared letter by letter.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

from gemma2_jax.data.python_docs import PythonDocs
from gemma2_jax.files import write_text

# The first line of a document on a public class or function: "class module.Name(bases)", "module.name(arguments)".
PUBLIC = r"[a-zA-Z]\w*"
HEADING = re.compile(
    rf"(?=class|.*\()(?P<kind>class )?(?P<module>{PUBLIC}(?:\.{PUBLIC})*)\.(?P<name>{PUBLIC})(?:\(|$)"
)
LONGEST = 200  # characters of an answer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/finetune/questions.jsonl"))
    output = parser.parse_args().output
    pairs = list(question_answer_pairs())
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, "".join(json.dumps(conversation(*pair)) + "\n" for pair in pairs))
    print(f"{len(pairs):,} conversations in {output}")


def question_answer_pairs() -> Iterator[tuple[str, str]]:
    """Yields a question and its answer, in the order of the documentation; no question twice."""
    asked = set()
    for document, _ in PythonDocs():
        heading, _, rest = document.partition("\n\n")
        found = HEADING.match(heading)
        if found is None:
            continue
        name = f"{found['module']}.{found['name']}"
        sentence = first_sentence(rest)
        if sentence is None or name in asked:
            continue
        asked.add(name)
        yield f"What {'is' if found['kind'] else 'does'} {name}{'' if found['kind'] else ' do'}?", sentence
        yield f"Which module defines {name}?", found["module"]


def first_sentence(docstring: str) -> str | None:
    """Returns the first sentence of a docstring's first paragraph; None if it has none of a usual length."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    found = re.match(r"[A-Z].*?[^.]\.(?= |$)", paragraph)
    return found.group() if found and 15 <= len(found.group()) <= LONGEST else None


def conversation(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    """Returns a line of the file, in the format of OpenAI and Hugging Face."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


if __name__ == "__main__":
    main()
