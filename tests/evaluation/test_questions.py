"""The seven benchmarks' question files, in their own form and in LLaVA's, become the same questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from himix_megatron.evaluation import questions as read
from himix_megatron.evaluation.runner import read_questions

SHORT = "\nAnswer the question using a single word or phrase."


def write(path: Path, content: Any) -> Path:
    """JSON, or a list as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(map(json.dumps, content)) + "\n" if path.suffix == ".jsonl" else json.dumps(content)
    path.write_text(lines)
    return path


def test_vqav2(tmp_path: Path) -> None:
    row = {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000}
    official = write(tmp_path / "questions.json", {"data_subtype": "val2014", "questions": [row]})
    people = [{"answer": "down", "answer_confidence": "yes", "answer_id": n} for n in range(10)]
    note = {"question_id": 262148000, "answers": people, "answer_type": "other", "question_type": "where is"}
    annotations = write(tmp_path / "annotations.json", {"annotations": [note]})
    (question,) = read.vqav2(official, annotations)
    assert question.images == ("COCO_val2014_000000262148.jpg",)
    assert question.prompt == "Where is he looking?" + SHORT
    assert (question.gold, question.groups) == (("down",) * 10, ("other",))

    llava = {"question_id": 262148000, "image": question.images[0], "text": question.prompt, "category": "default"}
    assert read.vqav2(write(tmp_path / "llava.jsonl", [llava]), annotations) == [question]
    assert read.vqav2(official, None)[0].gold == ()


def test_vqav2_test_dev_shows_images_of_test(tmp_path: Path) -> None:
    row = {"image_id": 1, "question": "?", "question_id": 10}
    path = write(tmp_path / "q.json", {"data_subtype": "test-dev2015", "questions": [row]})
    assert read.vqav2(path, None)[0].images == ("COCO_test2015_000000000001.jpg",)


def test_gqa(tmp_path: Path) -> None:
    row = {"question": "Is it red?", "imageId": "n1", "answer": "yes", "types": {"structural": "verify", "semantic": "attr"}}
    other = {"question": "What is it?", "imageId": "n2", "answer": "car", "types": {"structural": "query", "semantic": "cat"}}
    official = write(tmp_path / "testdev.json", {"201": row, "202": other})
    first, second = read.gqa(official, None)
    assert (first.id, first.images, first.gold) == ("201", ("n1.jpg",), ("yes",))
    assert first.groups == ("binary", "structural verify", "semantic attr")
    assert second.groups[0] == "open"
    rows = [{"question_id": q.id, "image": q.images[0], "text": q.prompt, "category": "default"} for q in (first, second)]
    assert read.gqa(write(tmp_path / "llava.jsonl", rows), official) == [first, second]


def test_textvqa_by_image_and_question_where_ids_are_images(tmp_path: Path) -> None:
    rows = [
        {"question_id": 34602 + n, "image_id": "003a", "question": text, "answers": ["nokia"] * 10}
        for n, text in enumerate(("What brand is it?", "what does it say?"))
    ]
    official = write(tmp_path / "TextVQA_0.5.1_val.json", {"data": rows})
    questions = read.textvqa(official, None)
    assert [q.id for q in questions] == [34602, 34603]
    assert questions[0].images == ("003a.jpg",)
    llava = [
        {"question_id": "003a", "image": "003a.jpg", "text": f"{row['question']}\nReference OCR token: NOKIA, 12{SHORT}"}
        for row in rows
    ]
    found = read.textvqa(write(tmp_path / "llava.jsonl", llava), official)
    assert [(q.id, q.text, q.gold) for q in found] == [(q.id, q.text, q.gold) for q in questions]
    assert "Reference OCR token: NOKIA" in found[0].prompt
    with pytest.raises(ValueError, match="--annotations must be given"):
        read.textvqa(tmp_path / "llava.jsonl", None)


def test_pope(tmp_path: Path) -> None:
    for split in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": n, "image": f"{n}.jpg", "text": f"Is there a {split} in the image?", "label": label}
            for n, label in enumerate(("yes", "no"), 1)
        ]
        # Their files are called .json and hold a JSON object a line.
        (tmp_path / "coco").mkdir(exist_ok=True)
        (tmp_path / "coco" / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, rows)) + "\n")
    questions = read.pope(tmp_path / "coco", None)
    assert [q.id for q in questions] == [f"{s}/{n}" for s in ("adversarial", "popular", "random") for n in (1, 2)]
    assert read.pope(tmp_path / "coco" / "coco_pope_random.json", None) == questions[4:]
    llava = [
        {"question_id": str(q.id).split("/")[1], "image": q.images[0], "text": q.prompt, "category": q.groups[0]}
        for q in questions
    ]
    assert read.pope(write(tmp_path / "llava.jsonl", llava), tmp_path / "coco") == questions


@pytest.mark.parametrize("apart", [True, False], ids=["images apart", "images beside"])
def test_mme(tmp_path: Path, apart: bool) -> None:
    images, texts = ("artwork/images", "artwork/questions_answers_YN") if apart else ("artwork", "artwork")
    for folder in (images, texts):
        (tmp_path / "release" / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / "release" / images / "10002.jpg").write_bytes(b"")
    lines = "Does it show a church? Please answer yes or no.\tYes\nDoes it show a ship?  Please answer yes or no.\tNo\n"
    (tmp_path / "release" / texts / "10002.txt").write_text(lines)
    first, second = read.mme(tmp_path / "release", None)
    assert first.id == f"{images}/10002.jpg#0"
    assert first.prompt == "Does it show a church?" + SHORT
    assert (first.gold, second.gold) == (("Yes",), ("No",))
    assert second.text == "Does it show a ship?  Please answer yes or no."
    llava = [
        {"question_id": "artwork/10002.jpg", "image": q.images[0], "text": q.prompt, "category": "artwork"}
        for q in (first, second)
    ]
    assert read.mme(write(tmp_path / "llava.jsonl", llava), tmp_path / "release") == [first, second]


def test_mmmu(tmp_path: Path) -> None:
    rows = [
        {
            "id": "validation_Art_Theory_1",
            "question": "Who painted <image 1>?",
            "options": "['Klee', \"O'Keeffe\"]",  # the dataset holds lists as text
            "answer": "B",
            "question_type": "multiple-choice",
            "image_1": "a.png",
            "image_2": None,
        },
        {"id": "validation_Math_2", "question": "How much?", "options": [], "answer": "['24/7', '3.43']", "image_1": "b.png"},
    ]
    first, second = read.mmmu_rows(write(tmp_path / "rows.jsonl", rows), None)
    letter = "Answer with the option's letter from the given choices directly."
    assert first.prompt == f"Who painted <image 1>?\n(A) Klee\n(B) O'Keeffe\n\n{letter}"
    assert (first.gold, first.groups, first.images) == (("B",), ("Art and Design", "Art_Theory"), ("a.png",))
    assert second.prompt == "How much?" + SHORT
    assert second.gold == ("24/7", "3.43")
    answers = {"validation_Art_Theory_1": {"question_type": "multiple-choice", "ground_truth": "A"}}
    path = write(tmp_path / "answer_dict_val.json", answers)
    (again,) = read.mmmu_rows(write(tmp_path / "one.jsonl", rows[:1]), path)
    assert again.gold == ("A",)
    (hidden,) = read.mmmu_rows(write(tmp_path / "test.jsonl", [rows[0] | {"answer": "?"}]), None)
    assert hidden.gold == ()


def test_mmvet(tmp_path: Path) -> None:
    row = {"imagename": "v1_0.png", "question": "What is x in the equation?", "answer": "-1<AND>-5", "capability": ["ocr"]}
    (question,) = read.mmvet(write(tmp_path / "mm-vet.json", {"v1_0": row}), None)
    assert (question.id, question.images, question.gold) == ("v1_0", ("v1_0.png",), ())
    llava = {"question_id": 0, "image": "v1_0.png", "text": "What is x in the equation?"}
    assert read.mmvet(write(tmp_path / "llava.jsonl", [llava]), None) == [question]


MISTAKES = {
    "no such file": ("gqa", None, r"absent\.json: no such file or folder"),
    "no JSON": ("gqa", "{]", r"file\.json:1: no JSON"),
    "too deep": ("gqa", "[" * 90_000, r"file\.json:1: no JSON that can be read: too many lists"),
    "no table": ("gqa", {"1": {"question": "?", "imageId": 1, "types": 5}}, r"file\.json is not this benchmark's file"),
    "no numbers": ("vqav2", {"data_subtype": "v", "questions": [5]}, "a question has no question"),
    "an image without a number": (
        "vqav2",
        {"data_subtype": "v", "questions": [{"question": "?", "image_id": [], "question_id": 1}]},
        r"file\.json is not this benchmark's file: TypeError",
    ),
    "an endless number": (
        "vqav2",
        '{"data_subtype": "v", "questions": [{"question": "?", "image_id": 1e999, "question_id": 1}]}',
        r"file\.json is not this benchmark's file: OverflowError",
    ),
    "another benchmark's": ("gqa", {"data": [1]}, r"a question has no question .*is it this benchmark's file\?"),
    "nothing in it": ("vqav2", {"data_subtype": "val2014", "questions": []}, r"file\.json holds no questions"),
    "no rows": ("mmvet", [], r"file\.json holds no questions"),
    "a folder is wanted": ("mme", [], r"--annotations must be given: LLaVA's file has no answers"),
    "an id twice": (
        "mmmu",
        [{"id": "validation_Math_1", "question": "?", "answer": "1"}] * 2,
        r"has 2 questions with the id validation_Math_1",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_file_gets_one_clear_line(name: str, tmp_path: Path) -> None:
    kind, content, wanted = MISTAKES[name]
    path = tmp_path / ("absent.json" if content is None else "file.json")
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=wanted) as caught:
        read_questions(kind, path, None, None)
    assert "\n" not in str(caught.value)


def test_annotations_of_other_questions_are_refused(tmp_path: Path) -> None:
    row = {"image_id": 1, "question": "?", "question_id": 10}
    official = write(tmp_path / "q.json", {"data_subtype": "val2014", "questions": [row]})
    annotations = write(tmp_path / "a.json", {"annotations": [{"question_id": 11, "answers": [], "answer_type": "other"}]})
    with pytest.raises(ValueError, match="has nothing for 10, which a question names"):
        read.vqav2(official, annotations)
