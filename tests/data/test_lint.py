"""Lint: every seeded defect is found at its line, and nothing in clean data."""

import copy

import pytest

from llmkit.core.errors import DataError, RecipeError
from llmkit.data.cleaning import Linting
from llmkit.data.lint import NAMES, Lint
from llmkit.data.node import Data, Jsonl
from llmkit.data.prepare import prepare
from llmkit.data.render import Renderer
from llmkit.stages.lint_table import lines, linted
from tests.data import clean
from tests.data.conftest import write

AT = 17
"""The line of the seeded defect."""


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", clean.SETS)
def test_nothing_is_reported_on_clean_sets(name, seed, lint):
    assert lint(clean.rows(name, 60, seed), valid=clean.rows(name, 20, seed + 100)) == {}


def answered(change):
    """Changes the last answer of a row."""

    def apply(row):
        if "messages" in row:
            row["messages"][-1]["content"] = change(row["messages"][-1]["content"])
        else:
            key = "completion" if "completion" in row else "text"
            row[key] = change(row[key])

    return apply


def asked(change):
    def apply(row):
        index = next(i for i, m in enumerate(row["messages"]) if m["role"] == "user")
        row["messages"][index]["content"] = change(row["messages"][index]["content"])

    return apply


def last(**more):
    return lambda row: row["messages"][-1].update(more)


def called(change):
    return lambda row: change(row["messages"][1]["tool_calls"][0]["function"])


def moved(order):
    def apply(row):
        row["messages"] = [row["messages"][i] for i in order]

    return apply


DEFECTS = {
    # what is trained
    "every weight 0": ("chat", last(weight=0), "nothing to learn"),
    "no answer": ("chat", lambda r: r["messages"].pop(), "nothing to learn"),
    "a negative weight": ("chat", last(weight=-1), "weights"),
    "weights that contradict": ("chat", last(weight=1, train=False), "weights"),
    "columns that are none of ours": ("chat", lambda r: (r.clear(), r.update(other="x")), "unusable"),
    # order and emptiness
    "an answer first": ("chat", moved([-1, -2]), "role order"),
    "two questions": ("chat", lambda r: r["messages"].insert(-1, r["messages"][-2]), "role order"),
    "a late system turn": ("chat", lambda r: r["messages"].insert(-1, clean.turn("system", "x")), "role order"),
    "a role that is none": ("chat", last(role="narrator"), "role order"),
    "a blank answer": ("chat", answered(lambda t: "  \n"), "empty"),
    "a null question": ("chat", asked(lambda t: None), "empty"),
    "an empty completion": ("completion", answered(lambda t: ""), "empty"),
    "blank text": ("text", answered(lambda t: " \n "), "empty"),
    # letters
    "latin-1": ("chat", answered(lambda t: t + " Déjà vu.".encode().decode("latin-1")), "mojibake"),
    "cp1252": ("completion", answered(lambda t: t + " It’s so.".encode().decode("cp1252")), "mojibake"),
    "mojibake in Russian": ("languages", answered(lambda t: t + "река".encode().decode("latin-1")), "mojibake"),
    "lost letters": ("text", answered(lambda t: t[:20] + "\ufffd" + t[20:]), "replacement character"),
    "half a letter": ("chat", answered(lambda t: t + "\ud83d"), "surrogates"),
    "a NUL": ("text", answered(lambda t: t[:9] + "\x00" + t[9:]), "control characters"),
    "a terminal's colours": ("chat", answered(lambda t: f"\x1b[31m{t}\x1b[0m."), "control characters"),
    "a byte order mark inside": ("completion", answered(lambda t: " \ufeff" + t), "control characters"),
    "entities": ("chat", answered(lambda t: f"Tom &amp; Ann. {t}"), "html entities"),
    "numbered entities": ("text", answered(lambda t: f"It&#39;s so. {t}"), "html entities"),
    "a Cyrillic o in a Latin word": ("chat", answered(lambda t: f"A gооd word. {t}"), "mixed scripts"),
    "a row in Russian": ("chat", lambda r: r.update(clean.languages(Only("ru"))), "other script"),
    # markup
    "an end of turn inside": ("chat", answered(lambda t: t + "<|im_end|>"), "special text"),
    "another template's turn": (
        "chat",
        answered(lambda t: f"{t}\n<|eot_id|><|start_header_id|>user."),
        "template text",
    ),
    "instruction signs": ("completion", answered(lambda t: f" [INST] {t}"), "template text"),
    "a next turn in the answer": ("completion", answered(lambda t: f"{t}\n\n### Human: {t}"), "template text"),
    "a thought left open": ("chat", answered(lambda t: f"<think>{t}"), "unclosed thought"),
    # answers
    "nan": ("chat", answered(lambda t: "nan"), "placeholder"),
    "none": ("completion", answered(lambda t: " None"), "placeholder"),
    "cut in mid-sentence": ("chat", answered(lambda t: t[: t.rindex(" ")]), "mid-sentence"),
    "a loop": ("chat", answered(lambda t: "the fox " * 200 + "."), "loop"),
    "the question again": ("chat", lambda r: last(content=r["messages"][-2]["content"] + " Yes.")(r), "echo"),
    "one answer twice": (
        "languages",
        lambda r: last(content=next(m["content"] for m in r["messages"] if m["role"] == "assistant") + "")(r),
        "repeated answer",
    ),
    "words run together": ("completion", lambda r: r.update(prompt="2 plus 2 is", completion="4."), "glued"),
    # tools
    "a tool that is not there": ("tools", called(lambda f: f.update(name="fly")), "tool calls"),
    "arguments that are no JSON": ("tools", called(lambda f: f.update(arguments="{what:")), "tool calls"),
    "a result of no call": ("tools", lambda r: r["messages"][1].update(tool_calls=None, content="Well."), "tool calls"),
    "a call without its result": (
        "tools",
        lambda r: r["messages"].__setitem__(2, clean.turn("user", "And?")),
        "tool calls",
    ),
    # lengths
    "very long": ("chat", answered(lambda t: clean.said(Only("en"), 50)), "odd length"),
    "very short": ("text", lambda r: r.update(text="Ok."), "odd length"),
}


class Only(clean.random.Random):
    """Draws that choose one language."""

    def __new__(cls, language):
        return super().__new__(cls, 7)

    def __init__(self, language):
        super().__init__(7)
        self.language = language

    def choice(self, options):
        return self.language if options is clean.PLACES else super().choice(options)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_seeded_defect_is_found_at_its_line_and_nothing_else(defect, lint):
    name, change, expected = DEFECTS[defect]
    rows = clean.rows(name)
    before = copy.deepcopy(rows[AT - 1])
    change(rows[AT - 1])
    assert rows[AT - 1] != before
    found = lint(rows)
    assert set(found) - {"odd length"} == {expected} - {"odd length"} and expected in found
    finding = found[expected]
    assert finding.count == 1 and finding.rows == len(rows)
    assert [place.line for place in finding.places] == [AT]
    assert finding.fix and str(finding.places[0]).startswith(finding.places[0].file + f":{AT}")


def test_copies_are_found_and_the_first_stays(lint):
    rows = clean.rows("chat")
    rows[AT - 1], rows[30] = rows[2], rows[2]
    finding = lint(rows)["duplicate"]
    assert [place.line for place in finding.places] == [AT, 31] and "train.jsonl:3" in finding.places[0].detail


@pytest.mark.parametrize(("times", "level"), [(1, "warn"), (30, "info")])
def test_a_question_with_two_answers_is_a_contradiction_and_where_common_information(times, level, lint):
    rows = clean.rows("chat")
    for index in range(times):
        again = copy.deepcopy(rows[index])
        again["messages"][-1]["content"] = f"No, it is {index + 3} of them, and that is that."
        rows.append(again)
    found = lint(rows)
    assert set(found) == {"contradiction"} and found["contradiction"].level == level
    assert found["contradiction"].count == times and found["contradiction"].places[0].line == 41


def test_rows_that_validation_holds_too(lint):
    rows, valid = clean.rows("chat", 60), clean.rows("chat", 20, seed=9)
    valid[3] = rows[AT - 1]
    valid[5] = {"messages": [*rows[40]["messages"][:-1], clean.turn("assistant", "Another answer to it.")]}
    finding = lint(rows, valid)["overlap"]
    assert [(place.line, place.detail.split()[0]) for place in finding.places] == [(AT, "as"), (41, "asked")]
    assert finding.places[0].detail.endswith("valid.jsonl:4")


def test_near_copies_of_validation_are_found(lint):
    rows, valid = clean.rows("text", 60), clean.rows("text", 20, seed=9)
    valid[4] = {"text": rows[AT - 1]["text"].upper() + " End."}
    valid[6] = {"text": rows[30]["text"][: len(rows[30]["text"]) // 2] + valid[6]["text"]}  # half is not near
    found = lint(rows, valid)
    assert set(found) == {"near overlap"}
    assert [(p.line, p.detail[-13:]) for p in found["near overlap"].places] == [(AT, "valid.jsonl:5")]


@pytest.mark.parametrize(
    ("overflow", "name", "level"), [("truncate", "cut answer", "warn"), ("drop", "too long", "info")]
)
def test_answers_that_are_cut_and_rows_that_are_dropped(overflow, name, level, lint):
    rows = clean.rows("chat")
    rows[AT - 1]["messages"][-1]["content"] = clean.said(clean.random.Random(1), 40)
    finding = lint(rows, max_length=800, overflow=overflow)[name]
    assert [place.line for place in finding.places] == [AT] and finding.level == level


def test_a_broken_line_that_is_set_aside(lint):
    rows = clean.rows("chat")
    rows[AT - 1] = '{"messages": ['
    assert [p.line for p in lint(rows, on_bad_row="quarantine")["broken"].places] == [AT]


def test_a_thought_that_the_prompt_begins_is_closed_by_the_completion(lint):
    rows = clean.rows("completion", 30)
    rows[4] = {"prompt": rows[4]["prompt"] + " <think>\n", "completion": f"well</think>{rows[4]['completion']}"}
    assert lint(rows) == {}


def test_a_habit_is_information(lint):
    rows = clean.rows("chat")
    for row in rows[:20]:
        answered(lambda t: f"&lt;b&gt;{t}")(row)
    finding = lint(rows)["html entities"]
    assert finding.level == "info" and finding.count == 20 and len(finding.places) == 5


def test_what_is_allowed_is_left_out_and_error_stops_at_the_first(lint):
    rows = clean.rows("chat")
    DEFECTS["nan"][1](rows[AT - 1])
    DEFECTS["a terminal's colours"][1](rows[AT])
    assert set(lint(rows, lint={"allow": ["placeholder"]})) == {"control characters"}
    with pytest.raises(
        DataError, match=rf"train\.jsonl:{AT}: data\.train: lint finds placeholder 1; .*fix: .*data\.lint"
    ):
        lint(rows, lint={"level": "error", "allow": ["control characters"]})
    both = {"level": "error", "allow": ["control characters", "placeholder"]}
    assert lint(rows, lint=both) == {} and lint(clean.rows("chat"), lint="error") == {}


def test_off_looks_for_nothing_and_unknown_names_are_refused(tmp_path, tokenizer):
    data = Data(train=(write(tmp_path / "train.jsonl", clean.rows("chat")),), lint="off")
    assert (
        prepare(data.train, data, tokenizer).lint is None
        and linted(data, prepare(data.train, data, tokenizer), None) == {}
    )
    with pytest.raises(RecipeError, match="no finding is called duplicates; fix: use "):
        Linting(allow=("duplicates",))


def test_two_halves_merge_into_the_whole(tmp_path, tokenizers):
    rows = clean.rows("chat", 60)
    rows[40], rows[41], rows[50] = rows[3], {"messages": []}, rows[20]
    DEFECTS["nan"][1](rows[AT - 1])
    rows[45]["messages"][-1]["content"] += "\x00"

    def read(part, file):
        data = Data(train=(write(tmp_path / file, part),), valid=(Jsonl(path="v"),), max_length=4096, bad_share=1.0)
        return prepare(data.train, data, tokenizers()).lint

    whole, first, second = read(rows, "a.jsonl"), read(rows[:30], "a.jsonl"), read(rows[30:], "b.jsonl")
    empty = Lint(Renderer(tokenizers()), 4096, sketches=True)
    for part in (first, second):
        empty.merge(part)

    def facts(lint):
        return [(f.name, f.level, f.count, f.rows) for f in lint.findings()]

    assert facts(empty) == facts(whole) and len(facts(whole)) >= 4 and empty.shares() == whole.shares()
    (copies,) = [f for f in empty.findings() if f.name == "duplicate"]
    assert [(p.file[-7:], p.line) for p in copies.places] == [("b.jsonl", 11), ("b.jsonl", 21)]
    assert (empty.table().sketches == whole.table().sketches).all()


def test_the_table_is_text_with_counts_and_places(lint, tmp_path):
    rows = clean.rows("chat")
    DEFECTS["a NUL"][1]({"text": ""})
    for row in rows[: AT - 1]:
        answered(lambda t: t + "\x07")(row)
    found = lint(rows)
    (head, line) = lines({"data.train": tuple(found.values())})
    assert head == "data.train: lint: warnings 1, notes 0"
    assert line.split()[:4] == ["warn", "control", "characters", str(AT - 1)]
    assert "train.jsonl:1 ('\\x07')" in line and line.endswith(", ...")
    assert list(lines({"data.train": ()})) == ["data.train: lint finds nothing"]


ENGLISH = "This is the {} of it, and it was not for you to be with {}."
GERMAN = "Das ist nicht der {}, und die {} ist auf dem Tisch, zu dem ich ging."


def test_a_row_in_another_language_of_the_same_script(lint):
    draw = clean.random.Random(3)

    def row(text, language):
        said = [text.format(*draw.choices(clean.WORDS[language], k=2)) for _ in range(2)]
        return {"messages": [clean.turn("user", said[0]), clean.turn("assistant", said[1])]}

    rows = [row(ENGLISH, "en") for _ in range(60)]
    rows[AT - 1] = row(GERMAN, "de")
    finding = lint(rows)["other language"]
    assert [(p.line, p.detail) for p in finding.places] == [(AT, "German, and the others English")]
    assert finding.level == "info" and "other language" not in lint([row(GERMAN, "de") for _ in range(30)] + rows)


def test_numbers_are_kept_of_a_bounded_number_of_rows(lint, tmp_path, tokenizers, monkeypatch):
    monkeypatch.setattr("llmkit.data.lint.MOST", 30)
    rows = clean.rows("chat")
    rows[20], rows[35] = rows[3], rows[4]
    found = lint(rows, valid=clean.rows("chat", 20, seed=9))
    assert [place.line for place in found["duplicate"].places] == [21]


def test_every_finding_has_a_seeded_defect():
    seeded = {expected for *_, expected in DEFECTS.values()} | {
        "duplicate",
        "contradiction",
        "overlap",
        "near overlap",
        "other language",
    }
    seeded |= {"cut answer", "too long", "broken", "untrained end", "doubled bos", "generation prompt", "template"}
    seeded |= {"removed copy", "removed near copy", "removed contaminated"}  # tests/data/test_near.py
    assert set(NAMES) == seeded and len(DEFECTS) >= 30
