"""Derives conversations from the documentation in Python's own standard library.

    python experiments/finetune/questions.py

Writes two conversations for each documented function and class to runs/finetune/questions.jsonl. "What does
textwrap.dedent do?" is answered by the first sentence of the docstring, and "Which module defines textwrap.dedent?" by
the name of the module. A tenth of the questions of the second kind, whose answers can be compared letter by letter, are
held out, in runs/finetune/held_out.jsonl, for exact_match.py.
"""

import argparse
import json
import re
import zlib
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
    parser.add_argument("--output", type=Path, default=Path("runs/finetune"), help="folder of both files")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[str]] = {"questions.jsonl": [], "held_out.jsonl": []}
    for name, question, answer in question_answer_pairs():
        is_held_out = question.startswith("Which") and zlib.crc32(name.encode()) % 10 == 0
        line = json.dumps(conversation(question, answer)) + "\n"
        files["held_out.jsonl" if is_held_out else "questions.jsonl"].append(line)
    for file, lines in files.items():
        write_text(folder / file, "".join(lines))
        print(f"{len(lines):,} conversations in {folder / file}")


def question_answer_pairs() -> Iterator[tuple[str, str, str]]:
    """Yields a name, a question about it and the answer, in the order of the documentation; no question twice."""
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
        yield name, f"What is {name}?" if found["kind"] else f"What does {name} do?", sentence
        yield name, f"Which module defines {name}?", found["module"]


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
