"""The question files of the paper's seven benchmarks, as they are published, as questions for the model.

Two forms are read of each: the benchmark's own, and the JSONL that LLaVA-1.5's evaluation uses (question_id, image, text and,
for some, category), whose `text` is asked as it stands. docs/evaluation.md says where each comes from.

Source of the instructions: LLaVA's docs/Evaluation.md ("single word or phrase"); for MMMU its own configuration for LLaVA-1.5.
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..runtime import typed_json
from ..runtime.untrusted_files import read_below, read_regular
from .scoring import mmmu
from .scoring.base import Question

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
YES_NO = "Please answer yes or no."
MAX_BYTES = 4 << 30  # the largest files have about 1 GB


# ---- what all files share ------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """A JSON file, or the list of a JSONL file's lines. Raises: ValueError naming the line that is neither."""
    text = read_regular(path, MAX_BYTES)
    if path.suffix != ".jsonl":
        # POPE calls its JSONL .json: what is no JSON as a whole is read by lines.
        with contextlib.suppress(ValueError):
            return typed_json.parse(text, str(path))
    lines = enumerate(text.splitlines(), 1)
    return [typed_json.parse(line, f"{path}:{number}") for number, line in lines if line.strip()]


def field(row: Any, name: str, path: Path) -> Any:
    """A row's field. Raises: ValueError naming the file, what is missing, and what is there."""
    if not isinstance(row, Mapping) or name not in row:
        there = ", ".join(map(str, list(row)[:8])) if isinstance(row, Mapping) else f"{str(row)[:60]!r}"
        raise ValueError(f"{path}: a question has no {name} ({there}): is it this benchmark's file?")
    return row[name]


def rows_of(content: Any, path: Path) -> list[Any]:
    """LLaVA's rows. Raises: ValueError where the file is something else."""
    if not isinstance(content, list) or not content:
        raise ValueError(
            f"{path} holds no questions: wanted the benchmark's own file, or LLaVA's JSONL (see docs/evaluation.md)"
        )
    return content


def published(text: str) -> str:
    """The question in a row's `text`, without what LLaVA adds around it."""
    lines = [line for line in text.split("\n") if line.strip() != SHORT.strip() and not line.startswith("Reference OCR token:")]
    return "\n".join(lines).strip()


def llava(row: Any, path: Path, **known: Any) -> Question:
    """A row of LLaVA's JSONL."""
    asked = str(field(row, "text", path))
    values = {"id": field(row, "question_id", path), "text": published(asked), "prompt": asked}
    return Question(**values | {"images": (str(field(row, "image", path)),)} | known)


def short(identifier: str | int, text: str, image: str, gold: tuple[str, ...] = (), groups: tuple[str, ...] = ()) -> Question:
    """A question of a benchmark's own file, asked for a short answer."""
    return Question(id=identifier, text=text, prompt=text + SHORT, images=(image,), gold=gold, groups=groups)


def needs(annotations: Path | None, what: str) -> Path:
    """Raises: ValueError where a file that is needed was not given."""
    if annotations is None:
        raise ValueError(f"--annotations must be given: {what}")
    return annotations


# ---- VQAv2, TextVQA, GQA -------------------------------------------------------------------------------------------


def vqav2(questions: Path, annotations: Path | None) -> list[Question]:
    """v2_OpenEnded_mscoco_..._questions.json; annotations: v2_mscoco_..._annotations.json (the test sets have none)."""
    content, found = read_json(questions), []
    if isinstance(content, dict):
        # test-dev's questions are about test2015's images.
        subset = str(field(content, "data_subtype", questions)).replace("test-dev", "test")
        for row in field(content, "questions", questions):
            text = field(row, "question", questions)
            image = f"COCO_{subset}_{int(field(row, 'image_id', questions)):012d}.jpg"
            found.append(short(field(row, "question_id", questions), text, image))
    else:
        found = [llava(row, questions) for row in rows_of(content, questions)]
    if annotations is None:
        return found
    rows = field(read_json(annotations), "annotations", annotations)
    people = {field(row, "question_id", annotations): row for row in rows}
    for number, question in enumerate(found):
        row = _known(people, question.id, annotations)
        gold = tuple(str(person["answer"]) for person in field(row, "answers", annotations))
        found[number] = replace(question, gold=gold, groups=(str(field(row, "answer_type", annotations)),))
    return found


def textvqa(questions: Path, annotations: Path | None) -> list[Question]:
    """TextVQA_0.5.1_val.json, answers included; or LLaVA's JSONL (with OCR tokens) and that file as annotations.

    LLaVA's question_id is the image: image and question together find the question's own id.
    """
    content, found = read_json(questions), []
    if isinstance(content, dict):
        for row in field(content, "data", questions):
            text, image = field(row, "question", questions), f"{field(row, 'image_id', questions)}.jpg"
            gold = tuple(map(str, row.get("answers", ())))
            found.append(short(field(row, "question_id", questions), text, image, gold))
        return found
    source = needs(annotations, "LLaVA's file names images, not questions; TextVQA_0.5.1_val.json has both")
    rows = field(read_json(source), "data", source)
    own = {(field(row, "image_id", source), field(row, "question", source).lower()): row for row in rows}
    for row in rows_of(content, questions):
        question = llava(row, questions)
        match = _known(own, (question.id, question.text.lower()), source)
        found.append(replace(question, id=match["question_id"], gold=tuple(map(str, match.get("answers", ())))))
    return found


def gqa(questions: Path, annotations: Path | None) -> list[Question]:
    """testdev_balanced_questions.json, answers included; or LLaVA's JSONL and that file as annotations."""
    content = read_json(questions)
    if isinstance(content, dict):
        return [_gqa(identifier, row, questions) for identifier, row in content.items()]
    rows = {} if annotations is None else read_json(annotations)
    found = []
    for row in rows_of(content, questions):
        question = llava(row, questions, id=str(field(row, "question_id", questions)))
        if annotations is not None:
            own = _gqa(str(question.id), _known(rows, question.id, annotations), annotations)
            question = replace(question, gold=own.gold, groups=own.groups)
        found.append(question)
    return found


def _gqa(identifier: str, row: Any, path: Path) -> Question:
    text, image = field(row, "question", path), f"{field(row, 'imageId', path)}.jpg"
    types = row.get("types") or {}
    kinds = [("open" if types["structural"] == "query" else "binary")] if "structural" in types else []
    groups = (*kinds, *(f"{name} {types[name]}" for name in ("structural", "semantic") if name in types))
    gold = (str(row["answer"]),) if "answer" in row else ()
    return short(identifier, text, image, gold, groups)


# ---- POPE, MME -----------------------------------------------------------------------------------------------------


def pope(questions: Path, annotations: Path | None) -> list[Question]:
    """A coco_pope_SPLIT.json, or the folder of the three; or LLaVA's JSONL and that folder as annotations."""
    if questions.is_dir():
        paths = sorted(questions.glob("coco_pope_*.json"))
        if not paths:
            raise ValueError(f"{questions} holds no coco_pope_SPLIT.json")
        return [question for path in paths for question in pope(path, None)]
    rows = rows_of(read_json(questions), questions)
    if isinstance(rows[0], Mapping) and "category" in rows[0]:
        source = needs(annotations, "LLaVA's file has no labels; the folder with coco_pope_SPLIT.json has")
        labels = {(own.groups, own.images, own.text): own.gold for own in pope(source, None)}
        found = []
        for row in rows:
            split = str(field(row, "category", questions))
            own = llava(row, questions, id=f"{split}/{field(row, 'question_id', questions)}", groups=(split,))
            found.append(replace(own, gold=_known(labels, ((split,), own.images, own.text), source)))
        return found
    name = re.fullmatch(r"coco_pope_(\w+)", questions.stem)
    split = name[1] if name else questions.stem
    found = []
    for row in rows:
        number, *texts = (field(row, name, questions) for name in ("question_id", "text", "image", "label"))
        text, image, label = map(str, texts)
        found.append(short(f"{split}/{number}", text, image, (label,), (split,)))
    return found


def mme(questions: Path, annotations: Path | None) -> list[Question]:
    """The folder MME_Benchmark_release_version; or LLaVA's JSONL and that folder as annotations."""
    if questions.is_dir():
        return list(_numbered(_mme_release(questions)))
    source = needs(annotations, "LLaVA's file has no answers; the folder MME_Benchmark_release_version has")
    own = {(q.groups[0], Path(q.images[0]).stem, _bare(q.text)): q for q in _mme_release(source)}
    found = []
    for row in rows_of(read_json(questions), questions):
        question = llava(row, questions)
        category = str(field(row, "category", questions))
        match = _known(own, (category, Path(question.images[0]).stem, _bare(question.text)), source)
        found.append(replace(question, text=match.text, gold=match.gold, groups=match.groups))
    return list(_numbered(found))


def _mme_release(folder: Path) -> Iterator[Question]:
    """A category is a folder of images and of texts with their names, together or in images/ and questions_answers_YN/."""
    for category in sorted(path for path in folder.iterdir() if path.is_dir()):
        apart = (category / "questions_answers_YN").is_dir()
        texts, images = (category / "questions_answers_YN", category / "images") if apart else (category, category)
        names = {path.stem: path for path in images.iterdir() if path.suffix != ".txt"}
        for path in sorted(texts.glob("*.txt")):
            image = _known(names, path.stem, images).relative_to(folder).as_posix()
            for line in dict.fromkeys(read_below(folder, path.relative_to(folder).as_posix()).decode().splitlines()):
                if not line.strip():
                    continue
                text, _, answer = line.strip().rpartition("\t")
                if answer.strip().lower() not in ("yes", "no"):
                    raise ValueError(f"{path} has a line that is not a question, a tab, and Yes or No: {line[:80]!r}")
                prompt = _bare(text) + SHORT
                yield Question(
                    id=image, text=text, prompt=prompt, images=(image,), gold=(answer.strip(),), groups=(category.name,)
                )


def _bare(text: str) -> str:
    """MME's question without its request for yes or no, in whose place LLaVA puts its own."""
    return text.replace(YES_NO, "").strip()


def _numbered(found: Iterable[Question]) -> Iterator[Question]:
    """Ids of an image's questions: the image, and which question."""
    seen: dict[str, int] = {}
    for question in found:
        name = question.images[0]
        seen[name] = seen.get(name, -1) + 1
        yield replace(question, id=f"{name}#{seen[name]}")


# ---- MMMU, MM-Vet --------------------------------------------------------------------------------------------------


def mmmu_rows(questions: Path, annotations: Path | None) -> list[Question]:
    """Rows of the dataset as JSON or JSONL: id, question, options, and image_1 to image_7 as file names (docs/evaluation.md).

    Answers: the row's `answer`, or annotations: answer_dict_val.json.
    """
    known = {} if annotations is None else read_json(annotations)
    found = []
    for row in rows_of(read_json(questions), questions):
        identifier, text = str(field(row, "id", questions)), str(field(row, "question", questions))
        options = tuple(map(str, _list(row.get("options", ()))))
        listed = "".join(f"({chr(ord('A') + number)}) {option}\n" for number, option in enumerate(options))
        images = tuple(str(row[f"image_{number}"]) for number in range(1, 8) if row.get(f"image_{number}"))
        answer = row.get("answer") if annotations is None else _known(known, identifier, annotations)["ground_truth"]
        gold = () if answer in (None, "", "?") else tuple(map(str, _list(answer)))  # the test set's answers are "?"
        subject = mmmu.subject_of(identifier)
        groups = (mmmu.DOMAIN_OF[subject], subject) if subject in mmmu.DOMAIN_OF else (subject,)
        prompt = f"{text}\n{listed}{LETTER}" if options else text + SHORT
        found.append(
            Question(id=identifier, text=text, prompt=prompt, images=images, gold=gold, groups=groups, options=options)
        )
    return found


def _list(value: Any) -> list[Any]:
    """A list, also one that the dataset holds as text ("['a', 'b']")."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [value]
    return list(value) if isinstance(value, list | tuple) else [value]


def mmvet(questions: Path, annotations: Path | None) -> list[Question]:
    """mm-vet.json; or LLaVA's JSONL, whose ids lack the v1_. The answers are for the judge: they are not read."""
    content = read_json(questions)
    if isinstance(content, dict):
        found = []
        for identifier, row in content.items():
            text, image = (str(field(row, name, questions)) for name in ("question", "imagename"))
            found.append(Question(id=identifier, text=text, prompt=text, images=(image,)))
        return found
    found = [llava(row, questions) for row in rows_of(content, questions)]
    return [replace(question, id=f"v1_{str(question.id).removeprefix('v1_')}") for question in found]


# ---- small parts ---------------------------------------------------------------------------------------------------


def _known(table: Mapping[Any, Any], key: Any, path: Path) -> Any:
    """Raises: ValueError where annotations do not know a question."""
    if key not in table:
        raise ValueError(f"{path} has nothing for {key}, which a question names: do questions and annotations belong together?")
    return table[key]
