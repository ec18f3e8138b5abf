"""CSV files: their cells are the texts that they hold, and what would be read as something else is refused."""

import pytest

from trapo_train.data.dataset import DataConfig, load_problems
from trapo_train.data.sources import load_rows
from trapo_train.schema import UserError
from trapo_train.tasks import build_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def load(tmp_path):
    """Load files by a pattern, train.csv alone if there is one text."""

    def load(*texts, **options):
        for number, text in enumerate(texts):
            (tmp_path / f"{number}.csv").write_text(text, encoding="utf-8")
        columns, rows = load_rows(DataConfig(path=str(tmp_path / ("0.csv" if len(texts) == 1 else "*.csv")), **options))
        return columns, list(rows)

    return load


def test_cells_of_csv_stay_the_texts_that_they_are(load):
    solutions = ["007", "1.50", "1e3", "NA", "null", "true", "2024-01-05", " 7 ", "18446744073709551616"]
    columns, rows = load("prompt,solution,level\n" + "".join(f'"q, {n}\nof ""{n}""",{x},\n' for n, x in enumerate(solutions)))
    assert columns == ["prompt", "solution", "level"]
    assert rows == [{"prompt": f'q, {n}\nof "{n}"', "solution": x, "level": None} for n, x in enumerate(solutions)]


def test_whole_numbers_of_csv_do_not_become_floats_where_some_are_missing(load):
    assert [row["solution"] for row in load("prompt,solution\na,7\nb,\nc\n")[1]] == ["7", None, None]


def test_several_csv_files_a_split_of_them_and_one_that_changed(load):
    first, second = "solution,prompt\n1,a\n2,b\n", "solution,prompt\n03,c\n"
    assert [row["solution"] for row in load(first, second)[1]] == ["1", "2", "03"]
    assert [row["prompt"] for row in load(first, second, split="train[1:]")[1]] == ["b", "c"]
    assert [row["prompt"] for row in load(first, second, split="test", num_problems=1)[1]] == ["a"]
    assert [row["solution"] for row in load(first, second.replace("03", "003"))[1]] == ["1", "2", "003"]


def test_columns_of_several_csv_files_are_read_by_name_whatever_their_order(load):
    rows = [{"prompt": "a", "solution": "7"}, {"prompt": "b", "solution": "8"}]
    assert [row for row in load("prompt,solution\na,7\n", "solution,prompt\n8,b\n")[1]] == rows


def test_csv_files_of_other_columns_are_refused_in_whatever_folder_a_pattern_finds_them(tmp_path):
    (tmp_path / "more" / "yet").mkdir(parents=True)
    (tmp_path / "a.csv").write_text("prompt,solution,expert\na,1,ab\n")
    for file, header, trace in (("more/b.csv", "prompt,solution,expert", ",bc"), ("more/yet/c.csv", "prompt,solution", "")):
        (tmp_path / file).write_text(f"{header}\nb,2{trace}\n")
    with pytest.raises(UserError, match=r"^eval_data.a.path: CSV files .* same columns, got ") as raised:
        load_rows(DataConfig(path=str(tmp_path / "**" / "*.csv")), "eval_data.a")
    assert f"['prompt', 'solution'] in {tmp_path / 'more/yet/c.csv'}. Give all files the same columns." in str(raised.value)
    (tmp_path / "more" / "yet" / "c.csv").unlink()
    _, rows = load_rows(DataConfig(path=str(tmp_path / "**" / "*.csv")))
    assert [row["expert"] for row in rows] == ["ab", "bc"]
    _, rows = load_rows(DataConfig(path=f"{tmp_path}/**/b.csv"))  # none beside the others
    assert [row["prompt"] for row in rows] == ["b"]


def test_an_index_that_pandas_has_written_is_a_further_column_and_a_byte_order_mark_belongs_to_none(load):
    assert load("\ufeff,prompt,solution\n0,a,7\n")[1] == [{"Unnamed: 0": "0", "prompt": "a", "solution": "7"}]
    assert load("\ufeffprompt,solution\na,7\n")[1] == [{"prompt": "a", "solution": "7"}]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["prompt,solution\nHello, you,5\na,7\n"], "Length of header or names does not match length of data"),
        (["prompt,solution\na,7\nHello, you,5\n"], "Expected 2 fields in line 3, saw 3"),
        (["prompt,solution\n"], "not empty."),
        ([""], "not empty."),
    ],
)
def test_csv_that_would_be_read_as_something_else_is_refused(texts, words, load):
    with pytest.raises(UserError, match="^data: reading the dataset ") as raised:
        load(*texts)
    assert words in str(raised.value)


def test_problems_come_from_csv(tmp_path):
    (tmp_path / "train.csv").write_text("prompt,solution,expert\nab|,07,ab#b\nab|,7,\n")
    problems = load_problems(DataConfig(path=str(tmp_path / "train.csv")), build_tokenizer(), None)
    assert [(problem.solution, len(problem.experts)) for problem in problems] == [("07", 1), ("7", 0)]


@pytest.mark.parametrize("line", [b'{"prompt": "x", "solution": "y"', '{"prompt": "é"}'.encode("latin-1")], ids=["cut", "latin-1"])
def test_a_bad_line_is_located(tmp_path, line):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"prompt": "a", "solution": "b"}\r\n\r\n' + line + b"\n")  # line 2 is empty
    with pytest.raises(UserError, match=rf"^data: .*line 3 of {file} is no JSON in UTF-8 \(.*\)\. (Check|Save)"):
        load_problems(DataConfig(path=str(file)), build_tokenizer(), None)
