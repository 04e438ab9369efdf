"""Instructions and answers from documents, in the paper's four steps (arXiv 2411.02265).

1. `Instruct` asks a model for instructions that a document inspires.
2. `Evolve` has them made clearer, harder, or varied.
3. `Respond` has each answered, several times.
4. `Critique` has the answers graded, and `select` keeps what passes: quality, grades, agreement among answers, no
   near-duplicates.

The steps are the paper's; the prompts and thresholds here are this package's. A step is a function from a batch of
records, dicts, to records; `run_step` applies one to a JSONL file and goes on where it was interrupted.
"""

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tenfold.core.files import write_whole

from .generators import Generate

Record = dict[str, Any]
Step = Callable[[list[Record]], list[Record]]

INSTRUCT = (
    "Read the text and write one instruction for an assistant that someone could ask without having the text: {kind}. "
    "Reply with the instruction alone.\n\nText:\n{text}"
)
KINDS = (
    "a question of understanding that needs reasoning",
    "a problem with one short, checkable answer",
    "a practical task, in writing or in code",
)
EVOLVE = {
    "clarity": "Rewrite the instruction so that it is clear, complete and can be understood by itself. Keep its task.",
    "difficulty": "Rewrite the instruction into a harder one that needs one more step of reasoning. Keep it solvable.",
    "variety": "Write a new instruction of the same field as the instruction, about something else.",
}
RESPOND = "{instruction}\n\nIf there is one short final answer, end with a line: Answer: <it>"
CRITIQUE = (
    "Grade the response to the instruction: 4 correct, complete and helpful; 3 minor flaws; 2 serious flaws; 1 wrong "
    "or useless. Reply with the number alone.\n\nInstruction:\n{instruction}\n\nResponse:\n{response}"
)


@dataclass(frozen=True)
class Instruct:
    """Step 1: for every document `text`, an `instruction` of each kind."""

    generate: Generate
    kinds: tuple[str, ...] = KINDS
    longest: int = 4000  # characters of a document that are shown

    def __call__(self, records: list[Record]) -> list[Record]:
        """One record per document and kind."""
        pairs = [(record, kind) for record in records for kind in self.kinds]
        prompts = [INSTRUCT.format(kind=kind, text=record["text"][: self.longest]) for record, kind in pairs]
        return [
            {"source": record.get("id", _digest(record["text"])), "kind": kind, "instruction": answer}
            for (record, kind), answer in zip(pairs, self.generate(prompts), strict=True)
            if answer
        ]


def check_ways(ways: Iterable[str]) -> None:
    """Raise ValueError for a way of evolving instructions that there is not."""
    if unknown := [way for way in ways if way not in EVOLVE]:
        raise ValueError(f"ways: unknown {unknown[0]!r}; accepted: {', '.join(EVOLVE)}")


@dataclass(frozen=True)
class Evolve:
    """Step 2: the instruction in other ways, one after the other, e.g. clearer and then harder."""

    generate: Generate
    ways: tuple[str, ...] = ("clarity", "difficulty")

    def __post_init__(self):
        check_ways(self.ways)

    def __call__(self, records: list[Record]) -> list[Record]:
        """The same records, with the last instruction in place and those before it kept in `history`."""
        for way in self.ways:
            prompts = [f"{EVOLVE[way]} Reply with it alone.\n\nInstruction:\n{r['instruction']}" for r in records]
            records = [
                {**r, "instruction": new or r["instruction"], "history": [*r.get("history", ()), r["instruction"]]}
                for r, new in zip(records, self.generate(prompts), strict=True)
            ]
        return records


@dataclass(frozen=True)
class Respond:
    """Step 3: `responses`, `samples` of them, to be compared with each other.

    Args:
        generate: by whom; or a model for each kind of instruction, with `""` for all others.
        samples: answers to each instruction.
    """

    generate: Generate | dict[str, Generate]
    samples: int = 3

    def __call__(self, records: list[Record]) -> list[Record]:
        """The same records with responses."""
        models = self.generate if isinstance(self.generate, dict) else {"": self.generate}
        by_model: dict[str, list[int]] = defaultdict(list)
        for i, record in enumerate(records):
            kind = record.get("kind", "")
            if kind not in models and "" not in models:
                raise ValueError(
                    f'generate: has no model for instructions of kind {kind!r}, and none for all others, ""'
                )
            by_model[kind if kind in models else ""].append(i)
        responses: dict[int, list[str]] = {i: [] for i in range(len(records))}
        for name, chosen in by_model.items():
            for sample in range(self.samples):
                # A trailing space apiece: a model that is seeded by its prompts answers differently each time.
                prompts = [RESPOND.format(instruction=records[i]["instruction"]) + " " * sample for i in chosen]
                for i, answer in zip(chosen, models[name](prompts), strict=True):
                    responses[i].append(answer)
        return [{**record, "responses": responses[i]} for i, record in enumerate(records)]


@dataclass(frozen=True)
class Critique:
    """The first half of step 4: `grades` from 1 to 4 of the responses, null where the critic gave none."""

    generate: Generate

    def __call__(self, records: list[Record]) -> list[Record]:
        """The same records with grades."""
        prompts = [CRITIQUE.format(instruction=r["instruction"], response=a) for r in records for a in r["responses"]]
        grades = iter([_grade(text) for text in self.generate(prompts)] if prompts else [])
        return [{**r, "grades": [next(grades) for _ in r["responses"]]} for r in records]


def run_step(name: str, step: Step, source: Iterable[Record], folder: Path, *, batch_size: int = 8) -> Path:
    """Apply `step` to `source`, batch by batch, into `<folder>/<name>.jsonl`; go on after what is there already.

    What counts as done is written after each batch; half a batch that an interruption left is cut off.

    Raises:
        ValueError: the progress does not belong to the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    output, progress = folder / f"{name}.jsonl", folder / f"{name}.progress.json"
    state = {"records": 0, "bytes": 0}
    if progress.is_file() and output.is_file():
        state = read_json(progress)
        if output.stat().st_size < state["bytes"]:
            raise ValueError(f"{output}: is shorter than its progress says; delete both to begin anew")
    with output.open("r+b" if output.is_file() else "w+b") as file:
        file.truncate(state["bytes"])
        file.seek(state["bytes"])
        rest = islice(source, state["records"], None)
        while batch := list(islice(rest, batch_size)):
            for record in step(batch):
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            state = {"records": state["records"] + len(batch), "bytes": file.tell()}
            with write_whole(progress) as temporary:
                temporary.write_text(json.dumps(state), encoding="utf-8")
    return output


def read_json(path: Path) -> Record:
    """What a run noted down in a file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: is damaged; delete {path.parent} to begin anew: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: is damaged; delete {path.parent} to begin anew")
    return record


def read_jsonl(path: Path, *needed: str) -> Iterator[Record]:
    """The records of a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not a JSON object in UTF-8 with text in each of the `needed` entries, by its number.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8: {error}") from error
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
            for name in needed:
                if not isinstance(record, dict) or not isinstance(record.get(name), str):
                    raise ValueError(f"{path}, line {number}: expected an object with text in {name!r}")
            yield record


@dataclass(frozen=True)
class Filters:
    """What a record must satisfy.

    Args:
        shortest: words of a response, at least; 1 suffices if it states its answer.
        longest: words of a response, at most.
        repetition: share of a response's word triples that repeat an earlier one, at most.
        agreement: share of the responses with the same final answer, at least, where most state one.
        grade: of the chosen response, at least; for records that were graded.
        similarity: Jaccard similarity of two instructions' word triples, from which they are one.
    """

    shortest: int = 5
    longest: int = 2000
    repetition: float = 0.3
    agreement: float = 0.5
    grade: int = 3
    similarity: float = 0.7

    def choose(self, record: Record) -> tuple[str | None, str]:
        """The response to keep, or None and why."""
        responses = record["responses"]
        grades = record.get("grades")
        answers = [final_answer(text) for text in responses]
        stated = [a for a in answers if a is not None]
        allowed = range(len(responses))
        if len(stated) > len(responses) / 2:
            answer, votes = Counter(stated).most_common(1)[0]
            if votes / len(responses) < self.agreement or (votes == 1 and len(responses) > 1):
                return None, "answers disagree"
            allowed = [i for i in allowed if answers[i] == answer]
        reasons = {i: self._flaw(record["instruction"], responses[i], answers[i]) for i in allowed}
        good = [i for i in allowed if not reasons[i]]
        if not good:
            return None, next(iter(reasons.values()), "no response")
        if grades is None:
            return responses[good[0]], ""
        best = max(good, key=lambda i: grades[i] or 0)
        if (grades[best] or 0) < self.grade:
            return None, "grade"
        return responses[best], ""

    def _flaw(self, instruction: str, response: str, answer: str | None) -> str:
        words = response.split()
        if len(words) < (1 if answer is not None else self.shortest):
            return "too short"
        if len(words) > self.longest:
            return "too long"
        triples = [*zip(words, words[1:], words[2:], strict=False)]
        if triples and 1 - len(set(triples)) / len(triples) > self.repetition:
            return "repeats itself"
        return "copies the instruction" if _normal(instruction) == _normal(response) else ""


def select(records: Iterable[Record], filters: Filters | None = None) -> tuple[list[Record], Counter]:
    """The second half of step 4: the records that pass, with one `response` each, and how many fell to what."""
    filters = filters or Filters()
    kept, reasons, seen = [], Counter(), NearDuplicates(filters.similarity)
    for record in records:
        response, reason = filters.choose(record)
        if response is not None and not seen.add(record["instruction"]):
            response, reason = None, "near-duplicate"
        if response is None:
            reasons[reason] += 1
        else:
            kept.append(
                {**{k: record[k] for k in ("source", "kind", "instruction") if k in record}, "response": response}
            )
    return kept, reasons


class NearDuplicates:
    """Texts that share most of their word triples, found by an index of triples; the comparison is exact."""

    def __init__(self, similarity: float = 0.7):
        self.similarity = similarity
        self._sizes: list[int] = []
        self._index: dict[tuple[str, ...], list[int]] = defaultdict(list)

    def add(self, text: str) -> bool:
        """Whether it is new; then it is remembered."""
        words = _normal(text).split()
        triples = {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
        shared = Counter(i for triple in triples for i in self._index.get(triple, ()))
        for i, common in shared.items():
            if common / (len(triples) + self._sizes[i] - common) >= self.similarity:
                return False
        for triple in triples:
            self._index[triple].append(len(self._sizes))
        self._sizes.append(len(triples))
        return True


def final_answer(text: str) -> str | None:
    r"""The short answer that a response states at its end, normalized: `\boxed{…}`, or a line `Answer: …`."""
    stated = re.findall(r"\\boxed\{([^{}]+)\}|(?im:^\W*(?:final )?answer\W*?:\s*(.+?)\s*$)", text)
    if not stated:
        return None
    answer = _normal(next(filter(None, stated[-1])).strip(" *`$."))
    try:
        return f"{float(answer.replace(',', '')):.10g}"
    except ValueError:
        return answer or None


def _grade(text: str) -> int | None:
    found = re.search(r"\b[1-4]\b", text)
    return int(found[0]) if found else None


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
