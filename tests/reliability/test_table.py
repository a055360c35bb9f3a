"""The page in ``docs/`` lists exactly the faults that are tested."""

from multiprocessing.connection import Connection

from tests.reliability import defects, table
from tests.reliability.commands import CONTEXT


def collect(connection: Connection) -> None:
    """Send the rows of the page, as pytest collects them."""
    results, _ = table.matrix("--collect-only", "-qq")
    connection.send(table.rows(results))


def test_the_page_lists_exactly_the_matrix() -> None:
    """This page is compared with what pytest collects."""
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=collect, args=(there,))
    process.start()
    there.close()
    found = here.recv()
    process.join()
    written = [line for line in table.PAGE.read_text().splitlines() if "`test_" in line]
    expected = [(says, name.replace(".py::", ": "), count) for says, name, count in found]
    assert len(expected) == len(written) and all(says for says, _, _ in expected)
    for line, (says, name, count) in zip(written, expected, strict=True):
        assert line == f"| {says} | `{name}` | {count} | {count} |", "run python -m tests.reliability.table"


def test_the_page_lists_exactly_the_defects() -> None:
    """A defect that no longer fits the sources cannot be tried, so it may not stand in the list."""
    written = table.PAGE.read_text(encoding="utf-8").partition(table.DEFECTS)[2].splitlines()
    assert written[-len(defects.ALL) :] == [defects.row(each) for each in defects.ALL], (
        "run python -m tests.reliability.defects"
    )
    for each in defects.ALL:
        source = (table.ROOT / each.file).read_text(encoding="utf-8")
        assert each.broken(source) != source
        file, name = each.test.split("::")
        assert f"def {name}(" in (table.ROOT / file).read_text(encoding="utf-8"), each.test
